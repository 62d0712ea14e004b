"""Small copies of the dialogues' images, as addresses that hold the picture itself; each picture once."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ffr_verl.images import open_picture, resolve_image

_QUALITY = 70


class Thumbnail(NamedTuple):
    """A small picture: `data:image/webp;base64,…`, and its size in pixels."""

    src: str
    width: int
    height: int


class Pictures(NamedTuple):
    """Thumbnails of named images."""

    thumbnails: list[Thumbnail]  # the different pictures
    of_name: dict[str, int | str]  # for each name its position in `thumbnails`, or what is wrong with it

    @property
    def problems(self) -> Counter[str]:
        """How many names have which problem."""
        return Counter(found for found in self.of_name.values() if isinstance(found, str))


def make_thumbnail(root: Path, name: str, *, size: int) -> Thumbnail:
    """A small copy, its longer side at most `size` pixels, of an image as the model sees it.

    Raises:
        ValueError: when the name leaves `root`, a resolved folder, or the file is missing, broken or too large.
    """
    small = open_picture(resolve_image(root, name), side=size)
    small.thumbnail((size, size), reducing_gap=2.0)
    packed = io.BytesIO()
    small.save(packed, "WEBP", quality=_QUALITY, method=2)  # half the time of 4, a twentieth larger
    return Thumbnail("data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode("ascii"), *small.size)


def make_pictures(
    names: Sequence[str],
    root: Path,
    *,
    size: int = 240,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Pictures:
    """Thumbnails of the images of these names below `root`; equal pictures under several names are kept once.

    `on_done` is told how many names of how many are done.
    """
    root = Path(os.path.realpath(root))

    def attempt(name: str) -> Thumbnail | str:
        try:
            return make_thumbnail(root, name, size=size)
        except ValueError as error:
            return str(error).removesuffix(f" {root}")  # the page may be shown to others

    different = list(dict.fromkeys(names))
    thumbnails: list[Thumbnail] = []
    at: dict[bytes, int] = {}
    of_name: dict[str, int | str] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow lets other threads run while it works
        for done, (name, made) in enumerate(zip(different, pool.map(attempt, different), strict=True), start=1):
            if isinstance(made, Thumbnail):
                digest = hashlib.sha256(made.src.encode("ascii")).digest()
                if digest not in at:
                    at[digest] = len(thumbnails)
                    thumbnails.append(made)
                of_name[name] = at[digest]
            else:
                of_name[name] = made
            on_done(done, len(different))
    return Pictures(thumbnails, of_name)
