"""`ffr-verl infer`: a model's answers to the rows of RL files, as predictions; long dialogues in windows.

A run that was killed goes on where it stopped, see `ffr_verl.inference.journal`; the output appears whole, at the end.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ffr_verl.data.json_rows import read_rows
from ffr_verl.data.parquet_files import check_columns, check_images
from ffr_verl.data.parquet_writer import whole_or_nothing
from ffr_verl.data.windows import WindowSettings
from ffr_verl.errors import FFRError
from ffr_verl.inference.endpoint import EndpointSettings, ask_endpoint
from ffr_verl.inference.generate import GeneratorSettings, generate_answers
from ffr_verl.inference.journal import AnswerJournal, check_output, journal_folder
from ffr_verl.inference.merge_windows import WindowAnswer, merge_windows, merged_prediction
from ffr_verl.inference.predictions import prediction_row, write_prediction
from ffr_verl.inference.rows import AskedRows

__all__ = ["InferSummary", "infer", "merge_predictions", "windows_path"]


@dataclass(frozen=True, slots=True)
class InferSummary:
    """What `infer` did.

    Attributes:
        rows: predictions in the output.
        asked: rows that were asked, windows counted one by one; 0 when predictions were merged only.
        resumed: of them answered by an earlier, interrupted run.
        cut_off: answers that ended at the most tokens of an answer.
        errors: why rows have no answer, and how many; most frequent first.
        windows: the file with the windows' answers, where there are windows.
        seconds: wall time.
    """

    rows: int
    asked: int
    resumed: int
    cut_off: int
    errors: tuple[tuple[str, int], ...]
    windows: Path | None
    seconds: float


def windows_path(output: Path) -> Path:
    """Where the windows' answers stand beside the merged ones.

    Example:
        >>> windows_path(Path("out/pred.jsonl")).as_posix()
        'out/pred.windows.jsonl'
    """
    return output.with_name(f"{output.stem}.windows{output.suffix}")


def infer(
    files: Sequence[Path],
    output: Path,
    settings: GeneratorSettings | EndpointSettings,
    *,
    window: WindowSettings | None = None,
    whole: Sequence[Path] = (),
    limit: int | None = None,
    allow_errors: bool = False,
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> InferSummary:
    """Answer the rows of RL files and write the predictions.

    Args:
        files: `NAME.rl.parquet` of `ffr-verl prepare`.
        output: JSONL, see `prediction_row`.
        settings: of the model, or the server, that answers.
        window: cut dialogues that are longer, answer the windows and unite the answers; the windows' answers stand at
            `windows_path`.
        whole: RL files of the whole dialogues when `files` holds windows already; their answers are united likewise.
        limit: the first so many rows of `files` only.
        allow_errors: write the output although a server gave no answer to some rows for the moment.
        force: replace `output`.
        restart: forget what an interrupted run left.
        say: told what the user should know.
        on_rows: told how many rows of how many have their answer; first when the model is ready.

    Raises:
        FFRError: for files, a model or a server that cannot be used, an output that exists, or an interrupted run of
            other rows, another model or other settings.
    """
    started = time.monotonic()
    has_windows = bool(whole) or window is not None
    for path in (output, windows_path(output)) if has_windows else (output,):
        check_output(path, force=force, example="pred.jsonl", inputs=(*files, *whole))
    asked = AskedRows(files, limit, window)
    check_columns([str(file) for file in (*files, *whole)], "rl")
    count, digest = asked.survey(max_images=settings.max_images)
    if whole:
        _check_merge(asked, whole)
    check_images([str(file) for file in files], settings.images_root, sample=False)
    work = {**settings.work(), "rows": digest}
    with AnswerJournal(journal_folder(output), work, rows=count, restart=restart) as journal:
        resumed = journal.answered
        if resumed:
            say(f"going on: {resumed} of {count} rows have their answer from an interrupted run")
        if isinstance(settings, EndpointSettings):
            failure = ask_endpoint(asked, journal, settings, allow_errors=allow_errors, on_rows=on_rows)
            left = count - journal.answered
            if left and not allow_errors:
                raise FFRError(
                    f"--endpoint {settings.url}: {left} of {count} rows have no answer ({failure}); the others are "
                    "kept: run the same command again to ask for these, or write what there is with --allow-errors"
                )
        else:
            generate_answers(asked, journal, settings, on_rows=on_rows)
        errors, cut_off = _faults(journal)
        if sum(errors.values()) == count:
            raise FFRError(
                f"no row has an answer, such as: {next(iter(errors))}; change what is wrong, and begin anew with "
                "--restart"
            )
        rows = _write(asked, journal, output, whole, logprobs=settings.logprobs)
        journal.remove()
    return InferSummary(
        rows=rows,
        asked=count,
        resumed=resumed,
        cut_off=cut_off,
        errors=tuple(errors.most_common()),
        windows=windows_path(output) if has_windows else None,
        seconds=time.monotonic() - started,
    )


def merge_predictions(predictions: Path, whole: Sequence[Path], output: Path, *, force: bool = False) -> InferSummary:
    """Unite the answers to windows, by any tool, into answers to the whole dialogues.

    Args:
        predictions: of rows `ID_split_k`, see `merge_windows`.
        whole: RL files of the whole dialogues.
        output: JSONL, a row for each row of `whole`.
        force: replace `output`.

    Raises:
        FFRError: see `merge_windows`; for an output that exists.
    """
    started = time.monotonic()
    check_output(output, force=force, example="pred.jsonl", inputs=(predictions, *whole))
    check_columns([str(file) for file in whole], "rl")
    rows = 0
    with _written([output]) as (file,):
        for row in merge_windows(read_rows(predictions), whole, name=str(predictions)):
            write_prediction(file, row)
            rows += 1
    return InferSummary(rows, 0, 0, 0, (), None, time.monotonic() - started)


def _check_merge(asked: AskedRows, whole: Sequence[Path]) -> None:
    """Unite the gold answers first: what cannot be merged is found before a model is asked."""
    rows = asked.whole(columns=("prompt", "reward_model", "extra_info"))
    gold = (prediction_row(row, {"response": row["reward_model"]["ground_truth"]}, logprobs=False) for row in rows)
    for _ in merge_windows(enumerate(gold), whole, name=", ".join(map(str, asked.files))):
        pass


def _faults(journal: AnswerJournal) -> tuple[Counter[str], int]:
    errors: Counter[str] = Counter()
    cut_off = 0
    for record in journal.records():
        if record is None or "error" in record:
            errors["no answer after all retries" if record is None else record["error"]] += 1
        else:
            cut_off += record.get("is_cut_off", False)
    return errors, cut_off


def _write(asked: AskedRows, journal: AnswerJournal, output: Path, whole: Sequence[Path], *, logprobs: bool) -> int:
    """Write the predictions, those of windows beside; how many the output has."""
    has_windows = bool(whole) or asked.window is not None
    with _written([output, *([windows_path(output)] if has_windows else [])]) as (file, *windows):
        rows = 0
        for row in _predictions(asked, journal, windows, whole, logprobs=logprobs):
            write_prediction(file, row)
            rows += 1
        return rows


def _predictions(
    asked: AskedRows, journal: AnswerJournal, windows: Sequence[IO[str]], whole: Sequence[Path], *, logprobs: bool
) -> Iterator[dict[str, Any]]:
    """The rows of the output; those of windows are written to a file of their own."""
    records = journal.records()
    if not windows:
        for row, record in zip(asked, records, strict=True):
            yield prediction_row(row, record, logprobs=logprobs)
        return
    (file,) = windows
    if whole:
        for row, record in zip(asked, records, strict=True):
            write_prediction(file, prediction_row(row, record, logprobs=logprobs))
        file.flush()
        yield from merge_windows(read_rows(Path(file.name)), whole, name=file.name)
        return
    for row in asked.whole():
        answers = []
        for part in asked.parts(row):
            prediction = prediction_row(part, next(records), logprobs=logprobs)
            write_prediction(file, prediction)
            answers.append(WindowAnswer.of(prediction))
        yield merged_prediction(row, answers)


@contextlib.contextmanager
def _written(paths: Sequence[Path]) -> Iterator[list[IO[str]]]:
    """Files that appear whole, together, when the block ends well."""
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(paths) as temporary, contextlib.ExitStack() as stack:
            files: list[IO[str]] = [stack.enter_context(path.open("w", encoding="utf-8")) for path in temporary]
            yield files
            stack.close()
    except OSError as error:
        raise FFRError(
            f"{error.filename or paths[-1]}: {error.strerror or error}; run the same command again when that is mended"
        ) from None
