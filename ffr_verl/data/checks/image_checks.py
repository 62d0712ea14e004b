"""The checks of one image that a row names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ffr_verl.data.checks.problems import ProblemKind
from ffr_verl.images import image_tokens, read_image_facts, resolve_image
from ffr_verl.model_families import QWEN2_VL, ModelFamily


class ImageVerdict(NamedTuple):
    """What is known of an image."""

    tokens: int | None  # that the model spends on it; `None` when it cannot be used
    problems: tuple[tuple[ProblemKind, str], ...] = ()  # kind and message of each


def check_image(
    root: Path, name: str, *, decode: bool, max_pixels: int, family: ModelFamily = QWEN2_VL
) -> ImageVerdict:
    """Find out whether an image below a resolved folder can be used; `decode` it, or read its header and end."""
    kind = ProblemKind.IMAGE_PATH
    try:
        path = resolve_image(root, name)
        kind = ProblemKind.IMAGE_BROKEN
        facts = read_image_facts(path, decode=decode)
    except ValueError as error:
        message = str(error)
        if message.startswith(("no such file", "cannot be read")):
            kind = ProblemKind.IMAGE_MISSING
        elif message.startswith("too large"):
            kind = ProblemKind.IMAGE_SIZE
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
