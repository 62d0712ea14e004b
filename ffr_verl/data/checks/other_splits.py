"""The dialogues of other splits (`--against`), by what is said and shown in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from ffr_verl.data.compact_map import CompactMap
from ffr_verl.data.windows import window_id
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue
from ffr_verl.errors import FFRError

__all__ = ["OtherSplits", "dialogue_fingerprint", "digest"]


def digest(text: str) -> int:
    """A signed number of 64 bits that identifies a text."""
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def dialogue_fingerprint(dialogue: Dialogue, images: Sequence[str]) -> int:
    """Identifies what is said and shown in a dialogue, whatever its id; a signed number of 64 bits."""
    said = [f"{utterance.speaker}\0{utterance.text}" for utterance in dialogue.utterances]
    return digest("\0".join([*said, "\0", *images]))


class OtherSplits:
    """Tells in which parquet file of `ffr-verl prepare` a dialogue is.

    Args:
        files: RL or SFT files. Windows are known by themselves and as the whole dialogue that they were cut from.

    Raises:
        FFRError: when one is no file of `ffr-verl prepare`.

    Example:
        >>> OtherSplits().file_of(7) is None
        True
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files = tuple(files)
        self._numbers = CompactMap()
        for number, file in enumerate(self._files):
            for fingerprint in _fingerprints(file):
                self._numbers.setdefault(fingerprint, number)

    def file_of(self, fingerprint: int) -> str | None:
        """The first file that has a dialogue, see `dialogue_fingerprint`; `None` when none has it."""
        number = self._numbers.get(fingerprint)
        return None if number is None else str(self._files[number])


def _rows(file: Path) -> Iterator[tuple[Dialogue, list[str]]]:
    """Dialogue and image paths of each row."""
    try:
        parquet = pq.ParquetFile(file)
    except FileNotFoundError:
        raise FFRError(f"--against {file}: no such file") from None
    except (OSError, ValueError) as error:
        raise FFRError(f"--against {file}: not a parquet file ({error})") from None
    names = parquet.schema_arrow.names
    column = next((name for name in ("prompt", "messages") if name in names), None)
    owner = next((name for name in ("extra_info", "dialogue_id") if name in names), None)
    if column is None or owner is None or "images" not in names:
        raise FFRError(f"--against {file}: no columns prompt and images; give a NAME.rl.parquet of `ffr-verl prepare`")
    path = "images.list.element.path" if "images.list.element.path" in _leaves(parquet) else "images"
    identifier = "extra_info.dialogue_id" if owner == "extra_info" else owner
    for batch in parquet.iter_batches(batch_size=512, columns=[column, path, identifier]):
        for row in batch.to_pylist():
            images = [image["path"] if isinstance(image, dict) else image for image in row["images"] or ()]
            name = row[owner]["dialogue_id"] if owner == "extra_info" else row[owner]
            try:
                yield parse_dialogue(row[column], str(name)), images
            except (ValueError, KeyError, TypeError) as error:
                raise FFRError(f"--against {file}: {error}; give a NAME.rl.parquet of `ffr-verl prepare`") from None


def _leaves(parquet: pq.ParquetFile) -> set[str]:
    """Names of the columns as they lie in the file."""
    return {parquet.schema.column(number).path for number in range(len(parquet.schema))}


def _fingerprints(file: Path) -> Iterator[int]:
    """Of each row's dialogue, and of each dialogue whose windows follow each other in the file."""
    windows: list[tuple[Dialogue, list[str]]] = []
    previous: tuple[str, int] | None = None
    for dialogue, images in _rows(file):
        yield dialogue_fingerprint(dialogue, images)
        found = window_id(dialogue.dialogue_id)
        if windows and (found is None or previous is None or found != (previous[0], previous[1] + 1)):
            yield dialogue_fingerprint(*_united(windows))
            windows.clear()
        if found is not None:
            windows.append((dialogue, images))
        previous = found
    if windows:
        yield dialogue_fingerprint(*_united(windows))


def _united(windows: Sequence[tuple[Dialogue, Sequence[str]]]) -> tuple[Dialogue, list[str]]:
    """The dialogue that windows were cut from, and its image paths; utterance ids are those of the whole dialogue."""
    whole: dict[int, tuple[Utterance, list[str]]] = {}
    for dialogue, images in windows:
        at = 0
        for utterance in dialogue.utterances:
            end = at + len(utterance.image_ids)
            whole[utterance.id] = utterance, list(images[at:end])
            at = end
    parts = [part for _, part in sorted(whole.items())]
    utterances = tuple([utterance for utterance, _ in parts])
    return Dialogue("", utterances, ""), [image for _, images in parts for image in images]
