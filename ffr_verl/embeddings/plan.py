"""What of a data set is to be embedded: each different text and each different image once, and the keys they serve."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ffr_verl.data.parquet_files import check_columns, check_images, images_root, rows_of_files
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.embeddings.store import image_key, query_key, split_dialogue_id, utterance_key
from ffr_verl.errors import FFRError
from ffr_verl.files import disk_errors
from ffr_verl.images import resolve_image
from ffr_verl.settings import DataConfig

ItemKind = Literal["text", "image"]
_READERS = 8


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """Items without repeats, in order of first appearance, and the keys that share them."""

    texts: list[str] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)  # files of different content
    text_keys: dict[str, int | None] = field(default_factory=dict)  # position of the text; `None` of one without
    query_keys: dict[str, int | None] = field(default_factory=dict)
    image_keys: dict[str, int] = field(default_factory=dict)
    image_digests: list[str] = field(default_factory=list)  # SHA-256
    renamed_dialogues: list[str] = field(default_factory=list)  # an earlier split has their id

    def digest(self, **settings: Any) -> str:
        """Identifies the items together with `settings`; another data set, image or setting has another."""
        digest = hashlib.sha256(repr(sorted(settings.items())).encode())
        for text in self.texts:
            digest.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
        for image in self.image_digests:
            digest.update(image.encode())
        return digest.hexdigest()


def make_plan(
    files: Sequence[Path], *, images_root_folder: Path | None = None, on_row: Callable[[int], None] = lambda rows: None
) -> EmbeddingPlan:
    """Read the utterances, images and queries of `NAME.rl.parquet` files; `on_row` is told how many rows were read.

    Raises `FFRError` for files of another kind, images that cannot be read, a dialogue that cannot be parsed, one
    dialogue id that means two dialogues in a split, and one image path that means two pictures.
    """
    plan = EmbeddingPlan()
    text_at: dict[str, int] = {}
    image_at: dict[str, int] = {}
    path_digests: dict[Path, str] = {}
    origin: dict[tuple[str, str], str] = {}
    dialogues: dict[tuple[str, str], dict[int, int | None]] = {}
    rows = 0

    def position_of(text: str) -> int | None:
        text = text.strip()
        position = text_at.setdefault(text, len(text_at)) if text else None
        if position == len(plan.texts):
            plan.texts.append(text)
        return position

    for file in files:
        check_columns([str(file)], "rl", unlabelled=True)
        config = DataConfig(images_root=None if images_root_folder is None else str(images_root_folder))
        root = images_root([str(file)], config)
        check_images([str(file)], root, sample=False)
        names: dict[str, str] = {}
        for number, row in enumerate(rows_of_files([file], columns=("prompt", "extra_info"))):
            where = f"{file}: row {number}"
            dialogue_id, split = str(row["extra_info"]["dialogue_id"]), str(row["extra_info"].get("split") or "")
            try:
                dialogue = parse_dialogue(row["prompt"], dialogue_id)
            except (ValueError, KeyError, TypeError) as error:
                raise FFRError(
                    f"{where}: field prompt: {error}; make the file again with `ffr-verl prepare`"
                ) from None
            known = dialogues.setdefault((split, dialogue_id), {})
            plan.query_keys[query_key(dialogue.query)] = position_of(dialogue.query)
            for utterance in dialogue.utterances:
                position = position_of(utterance.text)
                if known.setdefault(utterance.id, position) != position:
                    raise FFRError(
                        f"{where}: utterance {utterance.id} of dialogue {dialogue_id} has another text than in "
                        f"{origin[split, dialogue_id]}; different dialogues of a split need different ids"
                    )
            origin.setdefault((split, dialogue_id), where)
            for name in row["extra_info"]["images"] or ():
                names.setdefault(name, where)
            rows += 1
            on_row(rows)
        paths = {name: _file_of(name, root, where) for name, where in names.items()}
        new = [path for path in dict.fromkeys(paths.values()) if path not in path_digests]
        with ThreadPoolExecutor(_READERS) as readers:
            path_digests.update(zip(new, readers.map(_file_digest, new), strict=True))
        for name, path in paths.items():
            digest = path_digests[path]
            position = image_at.setdefault(digest, len(image_at))
            if position == len(plan.images):
                plan.images.append(path)
                plan.image_digests.append(digest)
            if plan.image_keys.setdefault(image_key(name), position) != position:
                raise FFRError(
                    f"{names[name]}: image {name} is another picture than the one of this path in an earlier file; "
                    "paths must differ to share a store"
                )
    _name_texts(plan, dialogues)
    return plan


def _name_texts(plan: EmbeddingPlan, dialogues: Mapping[tuple[str, str], Mapping[int, int | None]]) -> None:
    """Give the texts their keys. Splits that number their dialogues alike would overwrite each other: a dialogue whose
    id an earlier split has used for another one is kept under `split_dialogue_id`."""
    for (split, dialogue_id), positions in dialogues.items():
        keys = {utterance_key(dialogue_id, identifier): position for identifier, position in positions.items()}
        if any(plan.text_keys.get(key, position) != position for key, position in keys.items()):
            name = split_dialogue_id(split, dialogue_id)
            keys = {utterance_key(name, identifier): position for identifier, position in positions.items()}
            plan.renamed_dialogues.append(name)
        plan.text_keys.update(keys)


def _file_of(name: str, root: Path, where: str) -> Path:
    try:
        return resolve_image(root, name)
    except ValueError as error:
        raise FFRError(f"{where}: image {name}: {error}") from None


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with disk_errors(path, "bring the images there, or give --images-root"), path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
