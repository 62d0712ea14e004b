"""`ffr-verl score`: how hard each training row is for a model, by its own answers.

Rows are answered in chunks. A finished chunk is a file in `.NAME.answers` beside the output, so a run that was killed
goes on where it stopped; the difficulty file itself appears whole, at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ffr_verl.data.config import DataConfig
from ffr_verl.data.json_rows import read_rows
from ffr_verl.data.parquet_files import check_columns, check_images, images_root
from ffr_verl.data.parquet_writer import whole_or_nothing
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import parse_leniently
from ffr_verl.inference.generate import Answer, Generator, GeneratorSettings
from ffr_verl.model_folders import folder_revision
from ffr_verl.samplers.difficulty import LEVELS, difficulty_f1
from ffr_verl.samplers.difficulty_file import (
    difficulty_table,
    row_key,
    row_keys,
    rows_of_files,
    write_difficulty,
)

__all__ = ["ScoreSummary", "answers_of_predictions", "score"]

_CHUNK_ROWS = 64


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What `score` did.

    Attributes:
        table: a line for each row, see `difficulty_table`.
        resumed_rows: answered by an earlier, interrupted run.
        seconds: wall time.
    """

    table: pa.Table
    resumed_rows: int
    seconds: float

    def levels(self) -> list[tuple[str, int, float, float]]:
        """Of each level: its name, rows, mean f1 and mean dispersion of the rows with a gold fragment."""
        names = np.array(self.table.column("level").to_pylist())
        f1, spread = (self.table.column(name).to_numpy() for name in ("f1", "dispersion"))
        lines: list[tuple[str, int, float, float]] = []
        for level in LEVELS:
            chosen = names == level
            dense = chosen & (spread > 0)
            lines.append(
                (
                    level,
                    int(chosen.sum()),
                    float(f1[chosen].mean()) if chosen.any() else float("nan"),
                    float(spread[dense].mean()) if dense.any() else float("nan"),
                )
            )
        return lines

    def f1_by_dispersion(self) -> list[tuple[str, int, float]]:
        """Mean f1 of rows by the dispersion of their gold: range, rows, f1."""
        f1, spread = (self.table.column(name).to_numpy() for name in ("f1", "dispersion"))
        lines: list[tuple[str, int, float]] = []
        for name, least, most in (
            ("empty gold", -1.0, 0.0),
            ("1 (dense)", 0.0, 1.0),
            ("1 to 1.5", 1.0, 1.5),
            ("1.5 to 2", 1.5, 2.0),
            ("2 to 3", 2.0, 3.0),
            ("above 3", 3.0, np.inf),
        ):
            chosen = (spread > least) & (spread <= most)
            if chosen.any():
                lines.append((name, int(chosen.sum()), float(f1[chosen].mean())))
        return lines


def score(
    files: Sequence[Path],
    output: Path,
    *,
    settings: GeneratorSettings | None = None,
    predictions: Path | None = None,
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreSummary:
    """Score the rows of RL files and write the difficulty file.

    Args:
        files: `NAME.rl.parquet` of `ffr-verl prepare`, in the order in which they are trained.
        output: the difficulty file.
        settings: of the model that answers.
        predictions: answers of another tool instead, see `answers_of_predictions`.
        force: replace `output`.
        restart: forget what an interrupted run left.
        say: told what the user should know.
        on_rows: told how many rows of how many have their answer.

    Raises:
        FFRError: for files, predictions or a model that cannot be used, an output that exists, or an interrupted run
            of other rows, another model or other settings.
    """
    started = time.monotonic()
    if (settings is None) == (predictions is None):
        raise FFRError("give --model DIR, or --predictions FILE")
    if output.is_dir():
        raise FFRError(
            f"--output {output}: a folder; give the name of a file, such as {output / 'difficulty.parquet'}"
        )
    if output.exists() and not force:
        raise FFRError(f"{output}: is there already; choose another --output, or replace it with --force")
    names = [str(file) for file in files]
    check_columns(names, "rl")
    keys = row_keys(files)
    if not len(keys):
        raise FFRError(f"{', '.join(names)}: no rows")
    resumed = 0
    partial = output.parent / f".{output.name}.answers"
    if predictions is not None:
        found: Iterable[Mapping[str, Any]] = answers_of_predictions(predictions, files)
        source = str(predictions)
    else:
        assert settings is not None
        check_images(names, settings.images_root, sample=False)
        found, resumed = _generated(files, keys, partial, settings, restart=restart, say=say, on_rows=on_rows)
        source = settings.model
    table = difficulty_table(rows_of_files(files), found, model=source)
    write_difficulty(table, output)
    shutil.rmtree(partial, ignore_errors=True)
    return ScoreSummary(table, resumed, time.monotonic() - started)


def images_root_of(files: Sequence[Path], given: Path | None) -> Path:
    """The folder of the images: the given one, or the one recorded in the files."""
    return images_root([str(file) for file in files], DataConfig(images_root=None if given is None else str(given)))


def _generated(
    files: Sequence[Path],
    keys: np.ndarray,
    partial: Path,
    settings: GeneratorSettings,
    *,
    restart: bool,
    say: Callable[[str], None],
    on_rows: Callable[[int, int], None],
) -> tuple[list[Mapping[str, Any]], int]:
    """An answer to each row; and how many an earlier run had."""
    folder = Path(settings.model).expanduser()
    revision = folder_revision(folder) if folder.is_dir() else settings.model
    values = {**asdict(settings), "images_root": "", "revision": revision, "rows": keys.tobytes().hex()}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    _open_partial(partial, digest, restart=restart)
    count = len(keys)
    chunks = [partial / f"{start:09}.jsonl" for start in range(0, count, _CHUNK_ROWS)]
    answered = sum(min(_CHUNK_ROWS, count - int(chunk.stem)) for chunk in chunks if chunk.exists())
    resumed = answered
    if resumed:
        say(f"going on: {resumed} of {count} rows have their answer from an interrupted run")
    on_rows(answered, count)
    if resumed < count:
        generator = Generator(settings)
        rows = rows_of_files(files)
        for chunk in chunks:
            batch = list(itertools.islice(rows, _CHUNK_ROWS))
            if chunk.exists():
                continue
            _save(chunk, [_record(answer, row) for answer, row in zip(generator.answers(batch), batch, strict=True)])
            answered += len(batch)
            on_rows(answered, count)
    return [json.loads(line) for chunk in chunks for line in chunk.read_text(encoding="utf-8").splitlines()], resumed


def _open_partial(partial: Path, digest: str, *, restart: bool) -> None:
    record = partial / "work.json"
    if partial.exists() and restart:
        shutil.rmtree(partial)
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8")).get("digest") != digest:
            raise FFRError(
                f"{partial}: an interrupted run of other rows, another model or other settings; finish that one, or "
                "forget it with --restart"
            )
        return
    partial.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"digest": digest}), encoding="utf-8")


def _record(answer: Answer, row: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"response": answer.response, "logprobs": list(answer.logprobs)}
    if answer.samples:
        gold = parse_leniently(row["reward_model"]["ground_truth"])
        right = [difficulty_f1(parse_leniently(sample), gold) == 1.0 for sample in answer.samples]
        record["pass_rate"] = sum(right) / len(right)
    return record


def _save(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    try:
        with whole_or_nothing([file]) as (temporary,):
            temporary.write_text("".join([json.dumps(record) + "\n" for record in records]), encoding="utf-8")
    except OSError as error:
        raise FFRError(f"{file}: {error.strerror or error}; run the same command again when that is mended") from None


def answers_of_predictions(path: Path, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The answers of a file of predictions to the rows of RL files, in the order of the rows.

    Args:
        path: JSONL of `response`, `labels` (the gold answer), `dialogue_id`, `messages` and, where there are
            log-probabilities, `logprobs: {"content": [{"logprob": …}, …]}`; as ms-swift and the published tools write
            it. Its rows may stand in any order, and there may be more than are asked for.
        files: the RL files.

    Raises:
        FFRError: when a row of `files` has no answer, or a prediction cannot be read.
    """
    found: dict[int, dict[str, Any]] = {}
    for number, row in read_rows(path):
        where = f"{path}: row {number}"
        missing = [name for name in ("response", "labels", "dialogue_id", "messages") if name not in row]
        if missing or not isinstance(row["response"], str) or not isinstance(row["labels"], str):
            raise FFRError(
                f"{where}: no {', '.join(missing) or 'text in response and labels'}; see docs/curriculum.md"
            )
        try:
            query = parse_dialogue(row["messages"], "").query
            content = (row.get("logprobs") or {}).get("content") or ()
            logprobs = [float(token["logprob"]) for token in content]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FFRError(f"{where}: {error}") from None
        found[row_key(str(row["dialogue_id"]), query, row["labels"])] = {
            "response": row["response"],
            "logprobs": logprobs,
        }
    keys = row_keys(files).tolist()
    without = [number for number, key in enumerate(keys) if key not in found]
    if without:
        raise FFRError(
            f"{path}: no answer to {len(without)} of {len(keys)} rows (row {without[0]} ...), by dialogue_id, query "
            "and labels"
        )
    for key in keys:
        yield found[key]
