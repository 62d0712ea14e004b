"""Answers in the usual writing, read quickly; the parsers of `ffr_verl.fragments` read all others."""

from __future__ import annotations

import functools
import re

from ffr_verl.fragments import TAGS

__all__ = ["plain_masks"]

# As `format_fragment` writes ids; sets of them are whole numbers with one bit an id, which Python compares quickly.
_BITS = {str(identifier): 1 << identifier for identifier in range(1024)}
_bit = _BITS.__getitem__
_match_plain = re.compile(
    r"{}\[([0-9, ]{{0,1024}})\]{};{}\[([0-9, ]{{0,1024}})\]{}".format(*[re.escape(tag) for tag in TAGS])
).fullmatch


@functools.lru_cache(maxsize=4096)  # lists repeat from row to row, those of images above all
def _mask(text: str) -> int:
    """The ids of a list; a `KeyError` where they are written in another way."""
    if not text:
        return 0
    bits = list(map(_bit, text.split(", ")))
    mask = sum(bits)
    if mask.bit_count() < len(bits):  # two equal bits were added
        raise KeyError(text)
    return mask


def plain_masks(text: str) -> tuple[int, int] | None:
    """The utterance and image ids of an answer that is written as `format_fragment` writes it, repeats nothing and has
    no id above 1023; `None` for any other text, of which nothing is said. The strict and the lenient reading of such
    an answer are the same.

    Returns:
        Numbers whose bit `i` tells whether id `i` is in the answer.

    Example:
        >>> masks = plain_masks("<|utt_ids_start|>[0, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>")
        >>> [bin(mask) for mask in masks]
        ['0b101', '0b0']
    """
    match = _match_plain(text)
    if match is None:
        return None
    utterances, images = match.groups()
    try:
        return _mask(utterances), _mask(images)
    except KeyError:
        return None
