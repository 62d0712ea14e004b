"""From a path or bytes to the picture that a model sees, and its size in pixels and tokens.

Preparation, the datasets, inference, endpoints, embedding and the report all take their pictures from here. Paths lie
below a given root, and nothing is fetched.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ffr_verl.model_families import QWEN2_VL, ModelFamily

# Pillow warns above this number; a picture that large takes hundreds of megabytes in every worker that decodes it.
MOST_PIXELS = 89_478_485
# Pillow can read more, some of it by starting other programs (EPS). MPO is a JPEG with a preview beside it.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
# How names of picture files end, as a pattern: those of the formats, and HEIC, which is one and cannot be opened.
PICTURE_ENDINGS = r"\.(?:jpe?g|png|gif|webp|bmp|ppm|tiff?|jp2|avif|heic)"
# What other programs show as open_picture does, if there is nothing else to it.
_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_PLAIN_MODES = ("RGB", "L", "P", "1")
_SURE_MODES = (*_PLAIN_MODES, "RGBA", "LA")  # a whole file of these can be shown as it is; others are tried
_LOSSLESS = ("PNG", "GIF", "BMP", "PPM", "TIFF")
_JPEG_QUALITY = 95
# Nothing in the data of a picture looks like these; a GIF ends with ";", which may stand anywhere.
_ENDINGS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_TAIL = 64
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image file says of the picture in it.

    Attributes:
        width: in pixels, as it is seen: upright.
        height: in pixels.
        format: such as `PNG`.
        mode: Pillow's, such as `RGB` or `CMYK`.
        is_animated: whether it has several frames, of which the model sees the first.
    """

    width: int
    height: int
    format: str
    mode: str
    is_animated: bool

    @property
    def has_plain_colours(self) -> bool:
        """Whether its colours need no conversion, as those of CMYK or of 16 bits do."""
        return self.mode in _SURE_MODES


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


def image_source(image: str | Mapping[str, Any], root: Path) -> Path | bytes:
    """Where the picture of a row's image is: in a file below `root`, or in the row (`prepare --embed-images`).

    Args:
        image: a path as it stands in a row, or `{"path": …, "bytes": …}`.
        root: a resolved folder.

    Raises:
        ValueError: as `resolve_image`.
    """
    if isinstance(image, str):
        return resolve_image(root, image)
    return image["bytes"] if image.get("bytes") is not None else resolve_image(root, str(image.get("path")))


def read_image_facts(source: Path | bytes, *, decode: bool = False) -> ImageFacts:
    """What an image is, and that `open_picture` can open it.

    The header is read, and whether the file ends as its format should. Where that does not tell enough (another
    ending, a format without one, rare colours) the picture is decoded.

    Args:
        source: a file, or its content.
        decode: decode it in any case, which also finds damage in the middle.

    Raises:
        ValueError: as `open_picture`.

    Example:
        >>> picture = io.BytesIO()
        >>> Image.new("RGB", (4, 3)).save(picture, "PNG")
        >>> read_image_facts(picture.getvalue()).width
        4
    """
    with _opened(source) as (image, file):
        width, height = image.size
        kind = image.format or ""
        if _orientation(image) >= 5:
            width, height = height, width
        facts = ImageFacts(width, height, kind, image.mode, _is_animated(image))
        is_sure = facts.has_plain_colours and _is_whole(file, kind)
    if decode or not is_sure:
        open_picture(source, side=max(width, height) // 8)
    return facts


def open_picture(source: Path | bytes, *, side: int | None = None) -> Image.Image:
    """The picture in a file, as every model sees it: its first frame, upright, in RGB, what is transparent on white.

    That is what an OpenAI-compatible server of vLLM makes of a file, but for grey of 16 bits, of which the upper 8 are
    taken here (Pillow's conversion shows all but the darkest as white).

    Args:
        source: a file, or its content.
        side: a JPEG may be read at a fraction of its size, no smaller than so many pixels a side, which is quick.

    Raises:
        ValueError: when it is missing, empty, broken, of a format that is not read, or has more than
            `MOST_PIXELS`; the message says which.
    """
    with _opened(source) as (image, _):
        if side is not None:
            image.draft("RGB", (side, side))
        image.load()
        with contextlib.suppress(Exception):  # of a broken EXIF block nothing can be told
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            values = np.asarray(image)
            grey = (values.clip(0, 65_535) >> 8).astype(np.uint8)
            if (clear := image.info.get("transparency")) is not None:
                grey[values == clear] = 255
            return Image.fromarray(grey).convert("RGB")
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            ground = Image.new("RGB", layer.size, "white")
            ground.paste(layer, mask=layer.getchannel("A"))
            return ground
        return image.convert("RGB")


def model_picture(source: Path | bytes, *, max_pixels: int, family: ModelFamily = QWEN2_VL) -> Image.Image:
    """The picture at the size at which a model sees it, see `open_picture` and `resized`, whose errors it raises."""
    picture = open_picture(source)
    return picture.resize(resized(*picture.size, max_pixels=max_pixels, family=family), Image.Resampling.BICUBIC)


def packed_picture(
    source: Path | bytes, *, max_pixels: int, family: ModelFamily = QWEN2_VL
) -> tuple[str, bytes | None]:
    """The picture as a file for another program, which may know nothing of orientation, transparency and frames.

    Args:
        source: a file, or its content.
        max_pixels: a picture with more is shrunk to the size at which a model sees it.
        family: of that model.

    Returns:
        Its media type and content; `None` for the content where the file can be given as it is.

    Raises:
        ValueError: as `open_picture`.
    """
    with _opened(source) as (image, _):
        kind, is_large = image.format or "", image.width * image.height > max_pixels
        is_plain = image.mode in _PLAIN_MODES and not image.has_transparency_data and not _is_animated(image)
        if kind in _MEDIA_TYPES and is_plain and _orientation(image) == 1 and not is_large:
            return _MEDIA_TYPES[kind], None
    picture = model_picture(source, max_pixels=max_pixels, family=family) if is_large else open_picture(source)
    packed = io.BytesIO()
    if kind in _LOSSLESS:
        picture.save(packed, "PNG")
        return "image/png", packed.getvalue()
    picture.save(packed, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return "image/jpeg", packed.getvalue()


def resized(width: int, height: int, *, max_pixels: int, family: ModelFamily = QWEN2_VL) -> tuple[int, int]:
    """The size at which a model sees an image: sides that are multiples of its `factor`, between its least pixels and
    `max_pixels` (or its most, if that is less), the ratio kept as well as it goes. Its processor changes nothing more.

    Raises:
        ValueError: when one side is more than `family.max_ratio` times the other, before or after, which the model's
            processor refuses, or would vanish.

    Source: the resizing rule of Qwen2-VL.

    Example:
        >>> resized(1000, 500, max_pixels=602_112)
        (1008, 504)
        >>> resized(4000, 3000, max_pixels=602_112)
        (896, 672)
        >>> resized(40, 7600, max_pixels=602_112)
        Traceback (most recent call last):
            ...
        ValueError: is 40 x 7600, for the model 28 x 7588: one side more than 200 times the other
    """
    factor, most_ratio = family.factor, family.max_ratio
    if max(width, height) > most_ratio * min(width, height):
        raise ValueError(f"is {width} x {height}: one side more than {most_ratio} times the other")
    least = family.min_pixels
    most = max(min(max_pixels, family.max_pixels), least)
    new_width, new_height = (max(factor, round(side / factor) * factor) for side in (width, height))
    if new_width * new_height > most:
        scale = math.sqrt(width * height / most)
        new_width, new_height = (math.floor(side / scale / factor) * factor for side in (width, height))
    elif new_width * new_height < least:
        scale = math.sqrt(least / (width * height))
        new_width, new_height = (math.ceil(side * scale / factor) * factor for side in (width, height))
    if not new_width or not new_height:
        raise ValueError(f"is {width} x {height}: a side vanishes within {most:,} pixels")
    if max(new_width, new_height) > most_ratio * min(new_width, new_height):
        raise ValueError(
            f"is {width} x {height}, for the model {new_width} x {new_height}: one side more than {most_ratio} times "
            "the other"
        )
    return new_width, new_height


def image_tokens(width: int, height: int, *, max_pixels: int, family: ModelFamily = QWEN2_VL) -> int:
    """Tokens that a model spends on an image, see `resized`.

    Example:
        >>> image_tokens(1000, 500, max_pixels=602_112)
        648
    """
    new_width, new_height = resized(width, height, max_pixels=max_pixels, family=family)
    return (new_width // family.factor) * (new_height // family.factor)


def _open_file(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("is a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise ValueError("is no regular file")
        return open(source, "rb")  # half the time of Path.open
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({(error.strerror or type(error).__name__).lower()})") from None


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image, its header read, and its file; what goes wrong inside is a ValueError that says what it was."""
    with _open_file(source) as file:
        try:
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height}")
                yield image, file
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"too large: {error}; at most {MOST_PIXELS:,} pixels") from None
        except Exception as error:  # noqa: BLE001  # Pillow's plugins raise whatever they like on broken files
            if not file.seek(0, os.SEEK_END):
                raise ValueError("is empty") from None
            is_other = isinstance(error, UnidentifiedImageError)
            reason = f"none of {', '.join(_formats())}" if is_other else type(error).__name__
            raise ValueError(f"cannot be decoded ({reason})") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow can read."""
    Image.init()
    return tuple([name for name in _FORMATS if name in Image.OPEN])


def _is_animated(image: Image.Image) -> bool:
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def _orientation(image: Image.Image) -> int:
    """1 where a file says nothing. Of a PNG, Pillow would decode the whole to look for a block behind the picture; a
    TIFF it turns by itself."""
    blocks = {"PNG": ("exif",), "TIFF": ()}.get(image.format or "", ("exif", "xmp"))
    if not any(block in image.info for block in blocks):
        return 1
    with contextlib.suppress(Exception):
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _is_whole(file: BinaryIO, kind: str) -> bool:
    """Whether the file ends as its format does; `False` is a suspicion only."""
    size = file.seek(0, os.SEEK_END)
    if kind == "WEBP":
        file.seek(4)
        return size >= int.from_bytes(file.read(4), "little") + 8
    file.seek(max(0, size - _TAIL))
    return kind in _ENDINGS and _ENDINGS[kind] in file.read()
