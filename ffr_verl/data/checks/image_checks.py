"""The checks of one image that a row names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ffr_verl.data.checks.problems import ProblemKind
from ffr_verl.images import image_tokens, read_image_facts, resolve_image
from ffr_verl.model_families import QWEN2_VL, ModelFamily

__all__ = ["ImageVerdict", "check_image"]

_KINDS = (
    ("no such file", ProblemKind.IMAGE_MISSING),
    ("cannot be read", ProblemKind.IMAGE_MISSING),
    ("too large", ProblemKind.IMAGE_SIZE),
)


class ImageVerdict(NamedTuple):
    """What is known of an image.

    Attributes:
        tokens: that the model spends on it; `None` when it cannot be used.
        problems: kind and message of each.
    """

    tokens: int | None
    problems: tuple[tuple[ProblemKind, str], ...] = ()


def check_image(
    root: Path, name: str, *, decode: bool, max_pixels: int, family: ModelFamily = QWEN2_VL
) -> ImageVerdict:
    """Find out whether an image can be used.

    Args:
        root: resolved folder that it must be below.
        name: its path as it stands in the row.
        decode: decode it, instead of reading its header and end.
        max_pixels: bound to which it is shrunk, see `resized`.
        family: of the model.

    Example:
        >>> check_image(Path("/data"), "../cat.png", decode=False, max_pixels=602_112).problems[0][1]
        '../cat.png: leaves the images root /data'
    """
    try:
        path = resolve_image(root, name)
    except ValueError as error:
        return ImageVerdict(None, ((ProblemKind.IMAGE_PATH, f"{name}: {error}"),))
    try:
        facts = read_image_facts(path, decode=decode)
    except ValueError as error:
        message = str(error)
        kind = next((kind for start, kind in _KINDS if message.startswith(start)), ProblemKind.IMAGE_BROKEN)
        return ImageVerdict(None, ((kind, f"{name}: {message}"),))
    problems = []
    if facts.is_animated:
        problems.append((ProblemKind.IMAGE_ODD, f"{name}: animated; the model sees the first frame only"))
    if not facts.has_plain_colours:
        problems.append((ProblemKind.IMAGE_ODD, f"{name}: colours of mode {facts.mode}; they may come out wrong"))
    tokens: int | None = None
    try:
        tokens = image_tokens(facts.width, facts.height, max_pixels=max_pixels, family=family)
    except ValueError as error:
        problems.append((ProblemKind.IMAGE_SIZE, f"{name}: {error}"))
    return ImageVerdict(tokens, tuple(problems))
