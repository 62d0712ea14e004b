"""Pictures: formats that start programs, roots that strangers chose, files that change while they are read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import fake_server
from PIL import Image

from ffr_verl.data import prepare as module
from ffr_verl.data.parquet_files import check_images, images_root
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError
from ffr_verl.images import image_source, open_picture
from ffr_verl.settings import DataConfig

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/ffr-owned) (w) file closefile showpage\n%%EOF\n"


def png(size: int = 32) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(content, "PNG")
    return content.getvalue()


def with_content(small: Path, file: Path, content: bytes | None, place: int = 3) -> Path:
    """`held.rl.parquet` with another content of one image."""
    table = pq.read_table(small / "held.rl.parquet")
    rows = table.column("images").to_pylist()
    row = [number for number, images in enumerate(rows) if images][place]
    rows[row][0]["bytes"] = content
    column = table.schema.get_field_index("images")
    pq.write_table(
        table.set_column(column, table.schema.field(column), pa.array(rows, table.schema.field(column).type)), file
    )
    return file


@pytest.mark.parametrize("content", [EPS, b"", None, png()[:-40], b"\x00" * 100, b"GIF89a" + b"\xff" * 50])
def test_any_image_that_a_file_holds_is_looked_at(small: Path, tmp_path: Path, content: bytes | None) -> None:
    """Whatever row it is in; and the opener that training uses refuses it, too."""
    for place in range(5):
        file = with_content(small, tmp_path / "held.rl.parquet", content, place)
        with pytest.raises(FFRError, match=r"held\.rl\.parquet: row \d+: image .*\(in the file\)"):
            check_images([str(file)], tmp_path, sample=False)
    with pytest.raises(ValueError, match=r"cannot be decoded|is empty"):
        open_picture(image_source({"path": "x.png", "bytes": content or b""}, tmp_path))


def test_nothing_else_opens_pictures() -> None:
    """One opener, with its formats and bounds, for the whole package."""
    package = Path(module.__file__).parents[1]
    users = [file for file in package.rglob("*.py") if "Image.open(" in file.read_text()]
    assert [file.name for file in users] == ["images.py"]


def test_a_root_that_a_stranger_chose_is_not_used(
    small: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to upload a picture nor to show it; it is when the user names it."""
    private, data = tmp_path / "private", tmp_path / "downloads" / "x" / "t.rl.parquet"
    private.mkdir()
    data.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(private / "me.png")
    table = pq.read_table(small / "t.rl.parquet")
    rows = [row for row in table.to_pylist() if row["images"]][:2]
    for row in rows:
        row["images"] = row["extra_info"]["images"] = ["me.png"] * len(row["images"])
    for root in ("/", str(private), str(tmp_path), f"{data.parent}/../../private"):
        metadata = {**table.schema.metadata, b"ffr_verl.images_root": root.encode()}
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema).replace_schema_metadata(metadata), data)
        with pytest.raises(FFRError, match=r"outside the folder of the file .* is meant: data\.ffr\.images_root=/"):
            images_root([str(data)], DataConfig())
        with fake_server() as server:
            options = ("--data", data, "--output", tmp_path / "p.jsonl", "--model", "m", "--endpoint", server.url)
            assert command("infer", *options) == 2
            assert not server.bodies
            assert command("infer", *options, "--images-root", private) == 0
            assert len(server.bodies) == 2
        page = ("report", tmp_path / "p.jsonl", "--output", tmp_path / "r.html", "--force")
        assert command(*page, "--data", data) == 2
        assert command("inspect", data) == 0
        (tmp_path / "p.jsonl").unlink()
    monkeypatch.setenv("HOME", str(data.parent))
    metadata = {**table.schema.metadata, b"ffr_verl.images_root": str(data.parent.parent).encode()}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema).replace_schema_metadata(metadata), data)
    with pytest.raises(FFRError, match="outside the folder of the file"):
        images_root([str(data)], DataConfig())


def test_what_is_stored_is_what_was_checked(demo_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file lies there when its content is stored."""
    resolve = module.resolve_image

    def changed(root: Path, name: str) -> Path:
        place = tmp_path / "changed"
        place.write_bytes(EPS)
        resolve(root, name)
        return place

    monkeypatch.setattr(module, "resolve_image", changed)
    with pytest.raises(FFRError, match="changed while it was read: cannot be decoded"):
        prepare(demo_set / "heldout.json", images_root=demo_set, output=tmp_path / "o", split="t", embed_images=True)
    assert not (tmp_path / "o").exists()


def test_a_folder_elsewhere_is_said_when_the_files_are_made(demo_set: Path, tmp_path: Path) -> None:
    far = tmp_path / "a" / "b"
    arguments = ["prepare", demo_set / "heldout.json", "--images-root", demo_set, "--output", far, "--split", "t"]
    environment: dict[str, Any] = {**os.environ, "COLUMNS": "300"}
    run = subprocess.run(
        [sys.executable, "-m", "ffr_verl", *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert f"name their folder in training: data.ffr.images_root={demo_set}" in run.stdout
