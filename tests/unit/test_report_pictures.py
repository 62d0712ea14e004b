"""Thumbnails of the report: small, once each, and never of a file outside the images root."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from ffr_verl.evaluation.report.pictures import Thumbnail, make_pictures, make_thumbnail

pytestmark = pytest.mark.filterwarnings("ignore:Image size .* exceeds limit")  # a picture too large on purpose


def decoded(thumbnail: Thumbnail) -> Image.Image:
    kind, _, content = thumbnail.src.partition(";base64,")
    assert kind == "data:image/webp"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.size == (thumbnail.width, thumbnail.height)
    return image.convert("RGB")


def test_a_picture_is_shrunk_and_never_enlarged(tmp_path: Path) -> None:
    for name, size, expected in (("a.png", (1000, 500), (100, 50)), ("b.png", (20, 10), (20, 10))):
        Image.new("RGB", size, "red").save(tmp_path / name)
        assert decoded(make_thumbnail(tmp_path, name, size=100)).size == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_a_picture(mode: str, tmp_path: Path) -> None:
    ending = "tiff" if mode == "CMYK" else "png"
    Image.new(mode, (50, 40)).save(tmp_path / f"a.{ending}")
    assert decoded(make_thumbnail(tmp_path, f"a.{ending}", size=100)).size == (50, 40)


def test_transparency_becomes_white_and_a_turned_photo_stands_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (10, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert min(decoded(make_thumbnail(tmp_path, "clear.png", size=100)).getpixel((5, 5))) > 245  # type: ignore[type-var, arg-type]
    turned = Image.new("RGB", (400, 200), "green")
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decoded(make_thumbnail(tmp_path, "turned.jpg", size=100)).size == (50, 100)


def test_equal_pictures_are_kept_once(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10), "red").save(tmp_path / "a.png")
    Image.new("RGB", (10, 10), "red").save(tmp_path / "copy.png")
    Image.new("RGB", (10, 10), "blue").save(tmp_path / "b.png")
    done: list[tuple[int, int]] = []
    pictures = make_pictures(
        ["a.png", "copy.png", "b.png", "a.png", "./a.png"], tmp_path, on_done=lambda *of: done.append(of)
    )
    assert len(pictures.thumbnails) == 2
    assert pictures.of_name == {"a.png": 0, "copy.png": 0, "b.png": 1, "./a.png": 0}
    assert done[-1] == (4, 4)


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    names = ["../secret.png", "images/../../secret.png", str(tmp_path / "secret.png"), "link.png", "folder/secret.png"]
    pictures = make_pictures(names, root)
    assert not pictures.thumbnails
    assert pictures.of_name == dict.fromkeys(names, "leaves the images root"), "and the page does not name the root"


def test_what_is_no_picture_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (50, 50), "red").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    Image.new("1", (9_500, 9_500)).save(tmp_path / "huge.png")
    expected = {
        "none.png": "no such file",
        "empty.png": "is empty",
        "text.png": "cannot be decoded",
        "folder.png": "is a folder",
        "pipe.png": "is no regular file",
        "cut.jpg": "cannot be decoded",
        "huge.png": "too large",
        "http://example.org/a.png": "is an address; nothing is fetched",
        "data:image/png;base64,AAAA": "is an address; nothing is fetched",
        "a\0b.png": "holds a NUL character",
        "x" * 5_000: "cannot be read (file name too long)",
        "": "is a folder",
    }
    pictures = make_pictures(list(expected), tmp_path)
    for name, message in expected.items():
        assert str(pictures.of_name[name]).startswith(message), name
    assert sum(pictures.problems.values()) == len(expected)
