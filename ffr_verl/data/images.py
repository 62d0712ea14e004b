"""Where a row's image lies: always below a given root, never fetched."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

__all__ = ["check_image", "resolve_image"]


def resolve_image(root: Path, name: str) -> Path:
    """The file of an image that a row names.

    Args:
        root: a resolved folder.
        name: the path as it stands in the row, relative to `root` or absolute.

    Raises:
        ValueError: for an address (`http://…`, `data:…`), or a path that leaves `root` by `..` or a symbolic link.

    Example:
        >>> resolve_image(Path("/data"), "images/../../etc/passwd")
        Traceback (most recent call last):
            ...
        ValueError: leaves the images root /data
    """
    if "://" in name or name.startswith("data:"):
        raise ValueError("is an address; nothing is fetched, give a file below the images root")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root):
        raise ValueError(f"leaves the images root {root}")
    return path


def check_image(path: Path) -> None:
    """Read an image file to its end: checksums of a PNG, a JPEG decoded at an eighth of its size, which is quick.

    Raises:
        ValueError: when it is missing or cannot be decoded; the message says which.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                image.draft(image.mode, (image.width // 8, image.height // 8))
                image.load()
            else:
                image.verify()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot be decoded ({type(error).__name__})") from None
