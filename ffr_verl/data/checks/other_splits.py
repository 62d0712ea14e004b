"""What is said and shown in a dialogue, whatever its id: to find repetitions, and the dialogues of other splits
(`--against`)."""

from __future__ import annotations

import functools
import itertools
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ffr_verl.data.parquet_files import holds_images, read_schema, recorded_root, rows_of_files
from ffr_verl.data.windows import window_id
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue
from ffr_verl.errors import FFRError

_SPEAKER, _TEXT = operator.attrgetter("speaker"), operator.attrgetter("text")
_folder = functools.lru_cache(maxsize=4096)(os.path.realpath)


def image_file(root: Path, name: str, *, follow: bool = True) -> str:
    """The file that a path names, however it is spelled; with `follow=False` it may itself be a link."""
    folder, _, last = os.path.join(root, name).rpartition("/")
    if "\0" in name or last in ("", ".", ".."):
        return name
    path = f"{_folder(folder)}/{last}"
    return os.path.realpath(path) if follow and os.path.islink(path) else path


def dialogue_fingerprint(dialogue: Dialogue, files: Sequence[str]) -> int:
    """Identifies who says what and shows which files (see `image_file`) in a dialogue, within this process; a number
    of 64 bits."""
    return hash("\0".join([*map(_SPEAKER, dialogue.utterances), *map(_TEXT, dialogue.utterances), "\0", *files]))


def _moved_fingerprint(dialogue: Dialogue, files: Sequence[str], root: Path) -> int:
    """The same where the folder of the images has moved: with their places below it."""
    return dialogue_fingerprint(dialogue, [os.path.relpath(file, root) for file in files])


class OtherSplits:
    """Tells in which RL or SFT file of `ffr-verl prepare` a dialogue is; windows are known by themselves and as the
    whole dialogue that they were cut from. Raises an `FFRError` for another file."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files: dict[int, Path] = {}
        for file in files:
            try:
                root = recorded_root(file) or Path()
                for dialogue, images in _dialogues(file):
                    places = [image_file(root, name) for name in images]
                    self._files.setdefault(dialogue_fingerprint(dialogue, places), file)
                    self._files.setdefault(_moved_fingerprint(dialogue, places, root), file)
            except FFRError as error:
                raise FFRError(f"--against {error}") from None

    def file_of(self, dialogue: Dialogue, files: Sequence[str], root: Path) -> Path | None:
        """The first file that has a dialogue, whose images have these files below `root`; `None` when none has it."""
        if not self._files:
            return None
        found = self._files.get(dialogue_fingerprint(dialogue, files))
        return found or self._files.get(_moved_fingerprint(dialogue, files, root))


def _rows(file: Path) -> Iterator[tuple[Dialogue, list[str]]]:
    """Dialogue and image paths of each row of an RL or SFT file."""
    names = read_schema(file).names
    prompt, owner = ("prompt", "extra_info") if "prompt" in names else ("messages", "dialogue_id")
    try:
        if not {prompt, owner, "images"} <= {*names}:
            raise ValueError("no columns prompt and images")
        images = "images.list.element.path" if holds_images(file) else "images"
        identifier = "extra_info.dialogue_id" if owner == "extra_info" else owner
        for row in rows_of_files([file], columns=(prompt, images, identifier)):
            name = row[owner]["dialogue_id"] if owner == "extra_info" else row[owner]
            paths = [image["path"] if isinstance(image, dict) else image for image in row["images"] or ()]
            yield parse_dialogue(row[prompt], str(name)), paths
    except FFRError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise FFRError(f"{file}: {error}; give a NAME.rl.parquet of `ffr-verl prepare`") from None


def _dialogues(file: Path) -> Iterator[tuple[Dialogue, list[str]]]:
    """Of each row, and the dialogues whose windows follow each other in the file."""
    windows: list[tuple[Dialogue, list[str]]] = []
    previous: tuple[str, int] | None = None
    for row in itertools.chain(_rows(file), [None]):
        found = None if row is None else window_id(row[0].dialogue_id)
        if windows and (found is None or previous is None or found != (previous[0], previous[1] + 1)):
            yield _united(windows)
            windows.clear()
        if row is not None:
            yield row
            windows += [row] if found is not None else []
        previous = found


def _united(windows: Sequence[tuple[Dialogue, Sequence[str]]]) -> tuple[Dialogue, list[str]]:
    """The dialogue that windows were cut from, and its image paths; utterance ids are those of the whole dialogue."""
    whole: dict[int, tuple[Utterance, list[str]]] = {}
    for dialogue, images in windows:
        left = iter(images)
        for utterance in dialogue.utterances:
            whole[utterance.id] = utterance, list(itertools.islice(left, len(utterance.image_ids)))
    parts = [part for _, part in sorted(whole.items())]
    paths = [image for _, held in parts for image in held]
    return Dialogue("", tuple([utterance for utterance, _ in parts]), ""), paths
