"""Image files: below the root, readable to their end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.parquet_files import as_list, check_columns, check_images, images_root
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError
from ffr_verl.images import read_image_facts, resolve_image
from ffr_verl.settings import DataConfig


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGB"), ("a.jpg", "RGB"), ("a.gif", "P"), ("a.webp", "RGBA")])
def test_whole_files_pass_and_cut_ones_do_not(tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / name
    Image.effect_noise((90, 70), 60).convert(mode).save(path)
    read_image_facts(path)
    if name.endswith((".png", ".jpg")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_image_facts(path)


def test_a_bomb_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (200, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large"):
        read_image_facts(tmp_path / "a.png")


def test_an_absolute_path_below_the_root_is_fine(tmp_path: Path) -> None:
    assert resolve_image(tmp_path, str(tmp_path / "a" / "b.png")) == tmp_path / "a" / "b.png"
    assert resolve_image(tmp_path, "a/../b.png") == tmp_path / "b.png"


@pytest.mark.parametrize("name", ["https://a/b.png", "file:///etc/passwd", "data:image/png;base64,AA"])
def test_addresses_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is an address"):
        resolve_image(tmp_path, name)


def test_damage_in_the_middle_is_found_in_a_sample(tmp_path: Path) -> None:
    """What training would stumble over later; the preflight check looks at every header, this one decodes some."""

    def made(name: str, *, embed: bool) -> str:
        options = {"images_root": tmp_path, "output": tmp_path, "split": name, "embed_images": embed}
        return str(prepare(tmp_path / "rows.json", max_images=64, **options).sft_path)  # type: ignore[arg-type]

    rows = list(demo_rows(tmp_path / "images", rows=3, seed=0, image_share=1.0))
    for path in (tmp_path / "images").iterdir():
        Image.effect_noise((96, 96), 60).save(path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = {"good": made("good", embed=False), "packed": made("packed", embed=True)}
    for file in files.values():
        assert check_images([file], tmp_path, sample=True) > 3
    for path in (tmp_path / "images").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))
    assert check_images([files["good"]], tmp_path, sample=False) > 3, "header and end are whole"
    with pytest.raises(
        FFRError, match=r"good\.sft\.parquet: row 0: image images/.*: cannot be decoded .*bring the images"
    ):
        check_images([files["good"]], tmp_path, sample=True)
    assert check_images([files["packed"]], tmp_path, sample=True) > 3, "it holds its images"
    with pytest.raises(FFRError, match=r"row 0: image images/.*: cannot be decoded .*\(in the file\).* --decode`"):
        check_images([made("broken", embed=True)], tmp_path, sample=True)


def test_kind_of_file_is_checked(parquet: Path) -> None:
    rl, sft = str(parquet / "train.rl.parquet"), str(parquet / "train.sft.parquet")
    check_columns([rl], "rl")
    check_columns([sft], "sft")
    with pytest.raises(FFRError, match=r"train\.sft\.parquet: no column prompt.*needs NAME\.rl\.parquet"):
        check_columns([rl, sft], "rl")
    with pytest.raises(FFRError, match=r"train\.rl\.parquet: no column messages"):
        check_columns([rl], "sft")
    with pytest.raises(FFRError, match="not a parquet file"):
        check_columns([__file__], "rl")
    with pytest.raises(FFRError, match=r"absent\.parquet: no such file"):
        check_columns(["absent.parquet"], "rl")


def test_root_comes_from_the_file_or_the_config(parquet: Path, tmp_path: Path) -> None:
    files = as_list(str(parquet / "train.rl.parquet"))
    assert images_root(files, DataConfig()) == parquet.parent
    assert images_root(files, DataConfig(images_root=str(tmp_path))) == tmp_path


def test_every_image_is_opened_and_the_first_bad_one_is_named(parquet: Path, tmp_path: Path) -> None:
    files = [str(parquet / "train.rl.parquet")]
    assert check_images(files, parquet.parent, sample=False) > check_images(files, parquet.parent, sample=True) > 0
    with pytest.raises(FFRError, match=r"row \d+: image images_train/.*: no such file .* more images cannot be read"):
        check_images(files, tmp_path, sample=False)
