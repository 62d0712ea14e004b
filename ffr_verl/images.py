"""A row's images: always below a given root, never fetched; what they are, and how many tokens they become."""

from __future__ import annotations

import functools
import math
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

__all__ = [
    "MOST_PIXELS",
    "ImageFacts",
    "facts_of_image",
    "image_tokens",
    "read_image_facts",
    "resized",
    "resolve_image",
]

# A patch of Qwen2-VL is 14 pixels wide, and 2 x 2 patches become one token.
_FACTOR = 28
_LEAST_PIXELS = 4 * _FACTOR**2
_MOST_RATIO = 200
# Pillow warns above this number; a picture that large takes hundreds of megabytes in every worker that decodes it.
MOST_PIXELS = 89_478_485
# Pillow can read more, some of it by starting other programs (EPS). MPO is a JPEG with a preview beside it.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
_TAIL = 64


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image file says of itself.

    Attributes:
        width: in pixels.
        height: in pixels.
        format: such as `PNG`.
        mode: Pillow's, such as `RGB` or `CMYK`.
        is_animated: whether it has several frames, of which the model would see the first.
    """

    width: int
    height: int
    format: str
    mode: str
    is_animated: bool


def resolve_image(root: Path, name: str) -> Path:
    """The file of an image that a row names.

    Args:
        root: a resolved folder.
        name: the path as it stands in the row, relative to `root` or absolute.

    Raises:
        ValueError: for an address (`http://…`, `data:…`), or a path that leaves `root` by `..` or a symbolic link. The
            links of a hub cache's snapshot to the blobs of its own repository may leave it.

    Example:
        >>> resolve_image(Path("/data"), "images/../../etc/passwd")
        Traceback (most recent call last):
            ...
        ValueError: leaves the images root /data
    """
    if "://" in name or name.startswith("data:"):
        raise ValueError("is an address; nothing is fetched, give a file below the images root")
    if "\0" in name:
        raise ValueError("holds a NUL character; no file can be called that")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root) and not _is_own_blob(root, root / name, path):
        raise ValueError(f"leaves the images root {root}")
    return path


def _is_own_blob(root: Path, link: Path, path: Path) -> bool:
    """Whether a link below a hub cache's `REPOSITORY/snapshots/REVISION` leads to a file in `REPOSITORY/blobs`."""
    snapshot = next((folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"), None)
    is_below = Path(os.path.realpath(link.parent)).is_relative_to(root)
    return snapshot is not None and is_below and path.parent == snapshot.parent.parent / "blobs"


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow can read."""
    Image.init()
    return tuple([name for name in _FORMATS if name in Image.OPEN])


def _is_whole(file: BinaryIO, kind: str) -> bool:
    """Whether the file ends as its format does; `False` is a suspicion only."""
    if kind == "WEBP":
        file.seek(4)
        announced = int.from_bytes(file.read(4), "little") + 8
        return file.seek(0, os.SEEK_END) >= announced
    ending = _ENDINGS.get(kind)
    if ending is None:
        return False
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    return ending in file.read()


def _decode(image: Image.Image) -> None:
    if image.format == "JPEG":  # at an eighth of the size, which reads everything and is quick
        image.draft(image.mode, (image.width // 8, image.height // 8))
    image.load()


def read_image_facts(path: Path, *, decode: bool = False) -> ImageFacts:
    """Open an image file and say what it is.

    Its header is read, and whether it ends as its format should; one that does not, or is of a format whose end tells
    nothing, is decoded.

    Args:
        path: the file.
        decode: decode it in any case, which also finds damage in the middle.

    Raises:
        ValueError: when it is missing, empty, broken, of a format that is not read, or has more than
            `MOST_PIXELS`; the message says which.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("is a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise ValueError("is no regular file")
        with path.open("rb") as file:
            return facts_of_image(file, decode=decode)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({(error.strerror or type(error).__name__).lower()})") from None


def facts_of_image(file: BinaryIO, *, decode: bool = False) -> ImageFacts:
    """The same of an open file, or of bytes out of a parquet file in an `io.BytesIO`.

    Example:
        >>> import io
        >>> picture = io.BytesIO()
        >>> Image.new("RGB", (4, 3)).save(picture, "PNG")
        >>> facts_of_image(picture)
        ImageFacts(width=4, height=3, format='PNG', mode='RGB', is_animated=False)
    """
    try:
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise Image.DecompressionBombError(f"{width} x {height}")
                kind = image.format or ""
                is_animated = kind != "MPO" and bool(getattr(image, "is_animated", False))
                facts = ImageFacts(width, height, kind, image.mode, is_animated)
                if decode or not _is_whole(file, kind):
                    file.seek(0)
                    with Image.open(file, formats=_formats()) as again:
                        _decode(again)
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}; at most {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # noqa: BLE001  # Pillow's plugins raise whatever they like on broken files
        if not file.seek(0, os.SEEK_END):
            raise ValueError("is empty") from None
        is_other = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(_formats())}" if is_other else type(error).__name__
        raise ValueError(f"cannot be decoded ({reason})") from None
    return facts


def resized(width: int, height: int, *, max_pixels: int, min_pixels: int | None = None) -> tuple[int, int]:
    """The size at which Qwen2-VL sees an image: multiples of 28, within the bounds, the ratio kept as well as it goes.

    Raises:
        ValueError: when one side is more than 200 times the other, which Qwen2-VL refuses, or would vanish.

    Source: the resizing rule of Qwen2-VL.

    Example:
        >>> resized(1000, 500, max_pixels=602_112)
        (1008, 504)
        >>> resized(4000, 3000, max_pixels=602_112)
        (896, 672)
    """
    if max(width, height) > _MOST_RATIO * min(width, height):
        raise ValueError(f"is {width} x {height}: one side more than {_MOST_RATIO} times the other")
    least = _LEAST_PIXELS if min_pixels is None else min_pixels
    new_width, new_height = (max(_FACTOR, round(side / _FACTOR) * _FACTOR) for side in (width, height))
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        new_width, new_height = (math.floor(side / scale / _FACTOR) * _FACTOR for side in (width, height))
    elif new_width * new_height < least:
        scale = math.sqrt(least / (width * height))
        new_width, new_height = (math.ceil(side * scale / _FACTOR) * _FACTOR for side in (width, height))
    if not new_width or not new_height:
        raise ValueError(f"is {width} x {height}: a side vanishes within {max_pixels:,} pixels")
    return new_width, new_height


def image_tokens(width: int, height: int, *, max_pixels: int, min_pixels: int | None = None) -> int:
    """Tokens that Qwen2-VL spends on an image, see `resized`.

    Example:
        >>> image_tokens(1000, 500, max_pixels=602_112)
        648
    """
    new_width, new_height = resized(width, height, max_pixels=max_pixels, min_pixels=min_pixels)
    return (new_width // _FACTOR) * (new_height // _FACTOR)
