"""`ffr-verl prepare`: MLDR rows, checked, as parquet for both training stages."""

from __future__ import annotations

import contextlib
import errno
import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from ffr_verl.data.images import check_image, resolve_image
from ffr_verl.data.mldr import read_rows
from ffr_verl.dialogues import IMAGE, Dialogue, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, malformed_reason, parse_fragment

__all__ = ["IMAGES_ROOT_KEY", "PrepareSummary", "prepare"]

IMAGES_ROOT_KEY = b"ffr_verl.images_root"
_FORMAT_VERSION = {b"ffr_verl.format_version": b"1"}
_ROW_GROUP = 512
_SHOWN_PROBLEMS = 20

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_RL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", _MESSAGES),
        ("images", pa.list_(pa.string())),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("split", pa.string()),
                    ("dialogue_id", pa.string()),
                    ("query", pa.string()),
                    ("utterance_ids", pa.list_(pa.int64())),
                    ("image_utterances", pa.list_(pa.int64())),
                    ("images", pa.list_(pa.string())),
                ]
            ),
        ),
    ]
)
_SFT_SCHEMA = pa.schema([("messages", _MESSAGES), ("images", pa.list_(pa.string())), ("dialogue_id", pa.string())])


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What was written: counts, means over rows, seconds, and the two files."""

    rows: int
    dialogues: int
    mean_turns: float
    mean_images: float
    empty_gold_share: float
    mean_fragment_size: float
    seconds: float
    rl_path: Path
    sft_path: Path


@dataclass(frozen=True, slots=True)
class _Row:
    messages: list[dict[str, str]]
    images: list[str]
    dialogue: Dialogue
    gold: Fragment
    solution: str


class _BadRow(ValueError):
    """A problem of one row: the field, and what is wrong with it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"field {field!r}: {message}")


def _expect(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise _BadRow(field, message)


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = row.get("messages")
    _expect(
        isinstance(messages, list) and bool(messages),
        "messages",
        "missing or no list; expected system, user, assistant",
    )
    assert isinstance(messages, list)
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        _expect(
            is_message and isinstance(message.get("content"), str),
            f"messages[{number}]",
            "expected an object with the texts role and content",
        )
    roles = [message["role"] for message in messages]
    expected = (["system", "user", "assistant"], ["user", "assistant"])
    _expect(
        roles in expected,
        "messages",
        f"found the roles {', '.join(roles)}; expected system (optional), user, assistant",
    )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _image_names(row: Mapping[str, Any]) -> list[str]:
    images = row.get("images")
    _expect(isinstance(images, list), "images", "missing or no list; give [] where a dialogue has none")
    assert isinstance(images, list)
    names: list[str] = []
    for number, image in enumerate(images):
        name = image.get("path") if isinstance(image, dict) else image
        if not isinstance(name, str) or not name:
            raise _BadRow(f"images[{number}]", f'found {image!r}; expected a path or {{"path": …}}')
        names.append(name)
    return names


def _check_ids(dialogue: Dialogue, images: list[str], user_text: str) -> None:
    found = [utterance.id for utterance in dialogue.utterances]
    _expect(
        found == list(range(len(found))),
        "messages",
        f"utterance ids are {found}; expected 0 to {len(found) - 1} in order",
    )
    _expect(
        dialogue.image_ids == tuple(range(len(dialogue.image_ids))),
        "messages",
        f"image ids are {list(dialogue.image_ids)}; expected to count from 0 in order",
    )
    placeholders = user_text.count(IMAGE)
    _expect(
        placeholders == len(images) == len(dialogue.image_ids),
        "images",
        f"{len(images)} paths, {placeholders} {IMAGE} and {len(dialogue.image_ids)} image ids; the three "
        f"must be equal",
    )


def _gold(row: Mapping[str, Any], dialogue: Dialogue, answer: str) -> tuple[Fragment, str]:
    solution = row.get("solution")
    _expect(isinstance(solution, str), "solution", "missing or no text; expected the gold answer")
    assert isinstance(solution, str)
    gold = parse_fragment(solution)
    if gold is None:
        reason = malformed_reason(solution)
        raise _BadRow("solution", f"malformed ({reason.value if reason else ''}): {solution[:80]!r}")
    _expect(answer == solution, "messages", "the assistant's message is not the solution")
    for field, ids, count in (
        ("utterance", gold.utterance_ids, len(dialogue.utterances)),
        ("image", gold.image_ids, len(dialogue.image_ids)),
    ):
        outside = [identifier for identifier in ids if identifier >= count]
        _expect(not outside, "solution", f"{field} ids {outside} are outside the dialogue, which has {count}")
        _expect(len(set(ids)) == len(ids), "solution", f"{field} ids repeat: {list(ids)}")
    return gold, solution


def _check_row(row: Mapping[str, Any], check_path: Any) -> _Row:
    dialogue_id = row.get("dialogue_id")
    _expect(isinstance(dialogue_id, (str, int)) and dialogue_id != "", "dialogue_id", "missing; expected a text")
    messages, images = _messages(row), _image_names(row)
    try:
        dialogue = parse_dialogue(messages, str(dialogue_id))
    except ValueError as error:
        raise _BadRow("messages", str(error)) from None
    _check_ids(dialogue, images, next(message["content"] for message in messages if message["role"] == "user"))
    gold, solution = _gold(row, dialogue, messages[-1]["content"])
    for number, name in enumerate(images):
        problem = check_path(name)
        _expect(problem is None, f"images[{number}]", f"{name}: {problem}")
    return _Row(messages, images, dialogue, gold, solution)


@contextlib.contextmanager
def _atomic_writers(paths: Mapping[Path, pa.Schema]) -> Iterator[list[pq.ParquetWriter]]:
    """Parquet writers to temporary names, moved into place together when the block ends well, removed otherwise."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in paths}
    with contextlib.ExitStack() as stack:
        for temporary in partial.values():
            stack.callback(temporary.unlink, missing_ok=True)
        writers = [pq.ParquetWriter(partial[path], schema, compression="zstd") for path, schema in paths.items()]
        with contextlib.ExitStack() as closing:
            for writer in writers:
                closing.callback(writer.close)
            yield writers
        for path, temporary in partial.items():
            temporary.replace(path)


def prepare(
    source: Path,
    *,
    images_root: Path,
    output: Path,
    split: str,
    data_source: str = "ffr/mldr",
    progress: bool = False,
) -> PrepareSummary:
    """Check every row of `source` and write `{split}.rl.parquet` and `{split}.sft.parquet` into `output`.

    Args:
        source: MLDR rows, a JSON list or JSONL.
        images_root: folder that the rows' image paths are relative to; recorded in the files.
        output: folder for the files; made when missing.
        split: name of the split.
        data_source: value of verl's field of that name.
        progress: show a progress bar.

    Returns:
        Counts, means and the two paths.

    Raises:
        FFRError: for anything wrong with the input, the first problems listed with row and field, or a full disk.
            Nothing is written then; files of an earlier call stay as they were.
    """
    started = time.monotonic()
    if not split or Path(split).name != split:
        raise FFRError(f"--split: found {split!r}; give a plain name such as train")
    root = images_root.expanduser().resolve()
    if not root.is_dir():
        raise FFRError(f"--images-root: {images_root}: no such folder")

    @functools.cache
    def check_path(name: str) -> str | None:
        try:
            check_image(resolve_image(root, name))
        except ValueError as error:
            return str(error)
        return None

    metadata = {IMAGES_ROOT_KEY: str(root).encode(), **_FORMAT_VERSION}
    rl_path, sft_path = output / f"{split}.rl.parquet", output / f"{split}.sft.parquet"
    schemas = {rl_path: _RL_SCHEMA.with_metadata(metadata), sft_path: _SFT_SCHEMA.with_metadata(metadata)}
    problems: list[str] = []
    problem_count = rows = turns = images = empty = fragment_sizes = 0
    dialogues: set[str] = set()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _atomic_writers(schemas) as (rl_writer, sft_writer):
            rl_rows: list[dict[str, Any]] = []
            sft_rows: list[dict[str, Any]] = []
            stream = track(read_rows(source), description=f"preparing {split}", disable=not progress)
            for number, row in stream:
                try:
                    checked = _check_row(row, check_path)
                except _BadRow as problem:
                    problem_count += 1
                    if len(problems) < _SHOWN_PROBLEMS:
                        problems.append(f"row {number}: {problem}")
                    continue
                rl_rows.append(_rl_row(checked, index=number, split=split, data_source=data_source))
                sft_rows.append(_sft_row(checked))
                rows += 1
                turns += len(checked.dialogue.utterances)
                images += len(checked.images)
                empty += checked.gold == Fragment((), ())
                fragment_sizes += len(checked.gold.utterance_ids)
                dialogues.add(checked.dialogue.dialogue_id)
                if len(rl_rows) == _ROW_GROUP and not problem_count:
                    _flush(rl_writer, rl_rows)
                    _flush(sft_writer, sft_rows)
            if problem_count:
                more = f"\n... and {problem_count - len(problems)} more" if problem_count > len(problems) else ""
                listed = "\n".join(problems)
                raise FFRError(f"{source}: {problem_count} rows are refused, nothing was written:\n{listed}{more}")
            if not rows:
                raise FFRError(f"{source}: no rows in it; expected a JSON list or JSONL of MLDR rows")
            _flush(rl_writer, rl_rows)
            _flush(sft_writer, sft_rows)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FFRError(f"{output}: the disk is full; free some space, or give another --output") from None
        raise FFRError(f"{output}: {error.strerror or error}") from None
    filled = rows - empty
    return PrepareSummary(
        rows=rows,
        dialogues=len(dialogues),
        mean_turns=turns / rows,
        mean_images=images / rows,
        empty_gold_share=empty / rows,
        mean_fragment_size=fragment_sizes / filled if filled else 0.0,
        seconds=time.monotonic() - started,
        rl_path=rl_path,
        sft_path=sft_path,
    )


def _flush(writer: pq.ParquetWriter, rows: list[dict[str, Any]]) -> None:
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
        rows.clear()


def _rl_row(row: _Row, *, index: int, split: str, data_source: str) -> dict[str, Any]:
    dialogue = row.dialogue
    return {
        "data_source": data_source,
        "prompt": row.messages[:-1],
        "images": row.images,
        "ability": "ffr",
        "reward_model": {"style": "rule", "ground_truth": row.solution},
        "extra_info": {
            "index": index,
            "split": split,
            "dialogue_id": dialogue.dialogue_id,
            "query": dialogue.query,
            "utterance_ids": [utterance.id for utterance in dialogue.utterances],
            "image_utterances": list(dialogue.image_utterances),
            "images": row.images,
        },
    }


def _sft_row(row: _Row) -> dict[str, Any]:
    return {"messages": row.messages, "images": row.images, "dialogue_id": row.dialogue.dialogue_id}
