"""One picture, however its file is made: what the model sees, and its size, are the same wherever it is looked at."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffr_verl.data.checks.image_checks import check_image
from ffr_verl.data.checks.problems import ProblemKind
from ffr_verl.evaluation.report.pictures import make_thumbnail
from ffr_verl.images import image_tokens, model_picture, open_picture, read_image_facts, resized
from ffr_verl.inference.endpoint import data_uri
from ffr_verl.model_families import FAMILIES

RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (156, 156, 156)
BOUND = 602_112


def upright() -> Image.Image:
    """90 x 60, its left third red, the rest blue."""
    image = Image.new("RGB", (90, 60), BLUE)
    image.paste(RED, (0, 0, 30, 60))
    return image


def lying() -> tuple[Image.Image, Image.Exif]:
    """The same, as a camera held sideways keeps it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return upright().transpose(Image.Transpose.ROTATE_90), exif


def with_clear_left(mode: str) -> Image.Image:
    """The left third transparent, with black below."""
    image = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
    image.paste((*BLUE, 255), (30, 0, 90, 60))
    return image.convert(mode)


def save(make: Callable[[], Image.Image], **options: object) -> Callable[[Path], None]:
    return lambda path: make().save(path, **options)


def save_lying(path: Path) -> None:
    image, exif = lying()
    image.save(path, exif=exif, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


def save_palette(path: Path) -> None:
    image = upright().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    image.save(path, transparency=image.getpixel((5, 5)))


def save_frames(path: Path) -> None:
    further = {"lossless": True} if path.suffix == ".webp" else {}
    upright().save(path, save_all=True, append_images=[Image.new("RGB", (90, 60), "green")], **further)


def save_16_bits(path: Path, *, transparency: int | None = None) -> None:
    values = np.full((60, 90), 40_000, np.uint16)
    values[:, :30] = 65_535
    Image.fromarray(values).save(path, **({} if transparency is None else {"transparency": transparency}))


# How the file is made; the model sees which colours left and right.
KINDS: dict[str, tuple[Callable[[Path], None], tuple[int, int, int], tuple[int, int, int]]] = {
    "plain.png": (save(upright), RED, BLUE),
    "plain.bmp": (save(upright), RED, BLUE),
    "turned.jpg": (save_lying, RED, BLUE),
    "turned.png": (save_lying, RED, BLUE),
    "turned.webp": (save_lying, RED, BLUE),
    "turned.tiff": (save_lying, RED, BLUE),
    "clear.png": (save(lambda: with_clear_left("RGBA")), WHITE, BLUE),
    "clear.webp": (save(lambda: with_clear_left("RGBA"), lossless=True), WHITE, BLUE),
    "clear_grey.png": (save(lambda: with_clear_left("LA")), WHITE, (29, 29, 29)),
    "clear_palette.png": (save_palette, WHITE, BLUE),
    "clear_palette.gif": (save_palette, WHITE, BLUE),
    "clear_colour.png": (save(upright, transparency=RED), WHITE, BLUE),
    "one_bit.png": (save(lambda: with_clear_left("RGBA").getchannel("A").convert("1")), (0, 0, 0), WHITE),
    "deep.png": (save_16_bits, WHITE, GREY),
    "deep_clear.png": (lambda path: save_16_bits(path, transparency=40_000), WHITE, WHITE),
    "inks.jpg": (save(lambda: upright().convert("CMYK"), quality=95, subsampling=0), RED, BLUE),
    "frames.png": (save_frames, RED, BLUE),
    "frames.gif": (save_frames, RED, BLUE),
    "frames.webp": (save_frames, RED, BLUE),
}


def assert_shows(image: Image.Image, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """In RGB, without a hint of orientation or transparency that a program could overlook; JPEG is not exact."""
    assert image.mode in ("RGB", "L", "P", "1")
    assert not image.has_transparency_data
    assert not image.getexif()
    pixels = np.asarray(image.convert("RGB"), np.int16)
    width = pixels.shape[1]
    assert np.abs(pixels[:, : width // 4] - left).max() <= 8
    assert np.abs(pixels[:, width // 2 :] - right).max() <= 8


@pytest.mark.parametrize("name", KINDS)
def test_the_picture_is_the_same_in_every_place(tmp_path: Path, name: str) -> None:
    make, left, right = KINDS[name]
    path = tmp_path / name
    make(path)
    for source in (path, path.read_bytes()):
        assert_shows(open_picture(source), left, right)
        facts = read_image_facts(source)
        assert (facts.width, facts.height) == open_picture(source).size == (90, 60)
        for_model = model_picture(source, max_pixels=BOUND)
        assert_shows(for_model, left, right)
        for bound in (BOUND, 4_000):
            sent = base64.b64decode(data_uri(source, max_pixels=bound).partition(";base64,")[2])
            with Image.open(io.BytesIO(sent)) as image:
                assert_shows(image, left, right)
                assert image.size == ((90, 60) if bound == BOUND else resized(90, 60, max_pixels=bound))
                assert not getattr(image, "is_animated", False)
    thumbnail = make_thumbnail(tmp_path, name, size=240)
    assert (thumbnail.width, thumbnail.height) == (90, 60)
    verdict = check_image(tmp_path, name, decode=False, max_pixels=BOUND)
    assert verdict.tokens == (for_model.width // 28) * (for_model.height // 28)
    odd = name.startswith(("deep", "inks", "frames"))
    assert [kind for kind, _ in verdict.problems] == [ProblemKind.IMAGE_ODD] * odd


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.jpg", "a.bmp", "a.tiff", "a.jp2", "frames.png"])
def test_a_file_that_is_cut_off_is_found_by_the_check(tmp_path: Path, name: str) -> None:
    noise = Image.effect_noise((90, 70), 60).convert("RGB")
    noise.save(tmp_path / name, **({"save_all": True, "append_images": [noise]} if "frames" in name else {}))
    content = (tmp_path / name).read_bytes()
    # Half of it, and in the end what a GIF may have anywhere in its data: the byte that ends one.
    (tmp_path / name).write_bytes(content[: len(content) // 2] + b";" * 8 * name.endswith("gif"))
    verdict = check_image(tmp_path, name, decode=False, max_pixels=BOUND)
    assert [kind for kind, _ in verdict.problems] == [ProblemKind.IMAGE_BROKEN]
    assert verdict.tokens is None


@pytest.mark.parametrize("size", [(40, 7_600), (7_600, 40), (41, 7_000), (3, 601), (14, 2_820)])
def test_a_strip_that_the_processor_refuses_is_refused_by_the_check(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(tmp_path / "a.png")
    verdict = check_image(tmp_path, "a.png", decode=False, max_pixels=BOUND)
    ((kind, message),) = verdict.problems
    assert kind is ProblemKind.IMAGE_SIZE
    assert "one side more than 200 times the other" in message
    assert verdict.tokens is None


def test_the_size_is_that_of_the_models_family() -> None:
    """Qwen3-VL has patches of 16 pixels, and enlarges what has fewer than 65,536."""
    assert image_tokens(64, 64, max_pixels=BOUND) == 4
    assert image_tokens(64, 64, max_pixels=BOUND, family=FAMILIES["qwen3_vl"]) == 64
    assert resized(1000, 500, max_pixels=BOUND, family=FAMILIES["qwen3_vl"]) == (992, 512)
    assert resized(64, 64, max_pixels=1, family=FAMILIES["qwen3_vl"]) == (256, 256), "its processor would enlarge it"
