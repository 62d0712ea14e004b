"""`ffr-verl infer`: a model's answers to the rows of RL files, as predictions; long dialogues in windows.

A run that was killed is resumed where it stopped, see `ffr_verl.inference.journal`; the output appears whole at the
end.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ffr_verl.data.parquet_files import check_columns, check_images
from ffr_verl.data.windows import WindowSettings
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output, whole_or_nothing
from ffr_verl.fragments import AnswerStyle
from ffr_verl.inference.endpoint import EndpointSettings, ask_endpoint, unanswered
from ffr_verl.inference.generate import GeneratorSettings, generate_answers
from ffr_verl.inference.journal import AnswerJournal, journal_folder
from ffr_verl.inference.merge_windows import merge_windows, read_windows, united_prediction
from ffr_verl.inference.rows import IMAGES_ROOT_OPTION, AskedRows
from ffr_verl.predictions import ANSWERED, prediction_of, prediction_row, write_prediction

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class InferSummary:
    """What `infer` did."""

    rows: int  # predictions in the output
    asked: int = 0  # rows that were asked, windows counted one by one; 0 when predictions were merged only
    resumed: int = 0  # of them answered by an earlier, interrupted run
    cut_off: int = 0  # answers that ended at the most tokens of an answer
    errors: tuple[tuple[str, int], ...] = ()  # why rows have no answer, and how many; most frequent first
    malformed_windows: int = 0  # windows whose answer is not in the format; it counts as what can be read of it
    windows: Path | None = None  # the file with the windows' answers, where there are windows
    seconds: float = 0.0


def windows_path(output: Path) -> Path:
    """Where the windows' answers stand beside the merged ones: `pred.windows.jsonl` beside `pred.jsonl`."""
    return output.with_name(f"{output.stem}.windows{output.suffix}")


def infer(
    files: Sequence[Path],
    output: Path,
    settings: GeneratorSettings | EndpointSettings,
    *,
    window: WindowSettings | None = None,
    whole: Sequence[Path] = (),
    style: AnswerStyle = "plain",
    limit: int | None = None,
    allow_errors: bool = False,
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> InferSummary:
    """Answer the rows of RL files and write the predictions.

    Args:
        files: `NAME.rl.parquet` of `ffr-verl prepare`, of which the first `limit` rows are asked.
        output: JSONL, see `prediction_row`; replaced with `force` only.
        settings: of the model, or the server, that answers; `style` is that of its answers.
        window: cut dialogues that are longer, and unite the windows' answers, which stand at `windows_path`.
        whole: RL files of the whole dialogues when `files` holds windows already; their answers are united likewise.
        allow_errors: write the output although a server gave no answer to some rows for the moment.
        restart: forget what an interrupted run left.
        say: told what the user should know.
        on_rows: told how many rows of how many have their answer; first when the model is ready.

    Raises:
        FFRError: for files, a model or a server that cannot be used, an output that exists, or an interrupted run of
            other rows, another model or other settings.
    """
    started = time.monotonic()
    windows = windows_path(output) if whole or window is not None else None
    for path in (output, windows):
        if path is not None:
            check_output(path, force=force, example="pred.jsonl", inputs=(*files, *whole))
    asked = AskedRows(files, limit, window)
    check_columns([str(file) for file in (*files, *whole)], "rl", unlabelled=True)
    count, digest = asked.survey(max_images=settings.max_images)
    if whole:
        _check_merge(asked, whole)
    check_images([str(file) for file in files], settings.images_root, sample=False, option=IMAGES_ROOT_OPTION)
    work = {**settings.work(), "rows": digest}
    with AnswerJournal(journal_folder(output), work, rows=count, restart=restart) as journal:
        resumed, failure = journal.answered, None
        if resumed:
            say(f"resumed: {resumed} of {count} rows have their answer from an interrupted run")
        if isinstance(settings, EndpointSettings):
            failure = ask_endpoint(asked, journal, settings, allow_errors=allow_errors, say=say, on_rows=on_rows)
            if journal.answered < count and not allow_errors:
                raise FFRError(
                    f"--endpoint {settings.url}: {count - journal.answered} of {count} rows have no answer ({failure})"
                    "; the others are kept: run the same command again to ask for these, or write what there is with "
                    "--allow-errors"
                )
        else:
            generate_answers(asked, journal, settings, on_rows=on_rows)
        none = unanswered(failure)
        reasons: list[str] = []
        cut_off = silent = without_logprobs = 0
        for record in journal.records(none):
            if "error" in record:
                reasons.append(record["error"])
                silent += record.get("is_cut_off", False)  # before it said anything
            else:
                cut_off += record.get("is_cut_off", False)
                without_logprobs += bool(record["response"]) and not record["logprobs"]
        errors = count_reasons(reasons)
        if len(reasons) == count and not silent:
            raise FFRError(
                f"no row has an answer, such as: {errors[0][0]}; change what is wrong, and start again with --restart"
            )
        if settings.logprobs and without_logprobs:
            say(f"{without_logprobs} answers came without log-probabilities, although they were asked for")
        with _written([output, *([] if windows is None else [windows])]) as (file, *beside):
            made = _predictions(asked, journal.records(none), beside, whole, logprobs=settings.logprobs, style=style)
            rows, malformed = _write(file, made)
        journal.remove()
    return InferSummary(rows, count, resumed, cut_off, errors, malformed, windows, time.monotonic() - started)


def merge_predictions(
    predictions: Path, whole: Sequence[Path], output: Path, *, style: AnswerStyle = "plain", force: bool = False
) -> InferSummary:
    """Unite the answers to windows, by any tool, into answers to the whole dialogues, see `merge_windows`.

    The output is JSONL, a row for each row of `whole`; replaced with `force` only, else an `FFRError`.
    """
    started = time.monotonic()
    check_output(output, force=force, example="pred.jsonl", inputs=(predictions, *whole))
    check_columns([str(file) for file in whole], "rl", unlabelled=True)
    reasons: list[str] = []
    answers = read_windows(predictions)
    with _written([output]) as (file,):
        made = merge_windows(answers, whole, name=str(predictions), style=style, refuse_second_answers=True)
        rows, malformed = _write(file, made, reasons)
    seconds = time.monotonic() - started
    return InferSummary(rows, errors=count_reasons(reasons), malformed_windows=malformed, seconds=seconds)


def _check_merge(asked: AskedRows, whole: Sequence[Path]) -> None:
    """Unite the gold answers first: what cannot be merged is found before a model is asked."""
    rows = asked.whole(columns=("prompt", "reward_model", "extra_info"))
    made = (
        prediction_row(row, {"response": row["reward_model"]["ground_truth"] or ""}, logprobs=False) for row in rows
    )
    gold = (prediction_of(number, row, needed=ANSWERED) for number, row in enumerate(made))
    for _ in merge_windows(gold, whole, name=", ".join(map(str, asked.files))):
        pass


def count_reasons(reasons: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """How often each reason is there; those that differ in numbers only are one, told by the first of them."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason in reasons:
        kind = _NUMBER.sub("#", reason)
        first.setdefault(kind, reason)
        counts[kind] += 1
    return tuple([(first[kind], count) for kind, count in counts.most_common()])


def _write(file: IO[str], rows: Iterable[Mapping[str, Any]], reasons: list[str] | None = None) -> tuple[int, int]:
    """Write predictions; how many there are, and how many windows in them are malformed."""
    count = malformed = 0
    for row in rows:
        write_prediction(file, row)
        count += 1
        malformed += row.get("malformed_windows", 0)
        if reasons is not None and row.get("error"):
            reasons.append(row["error"])
    return count, malformed


def _predictions(
    asked: AskedRows,
    records: Iterator[dict[str, Any]],
    windows: Sequence[IO[str]],
    whole: Sequence[Path],
    *,
    logprobs: bool,
    style: AnswerStyle,
) -> Iterator[dict[str, Any]]:
    """The rows of the output; those of windows are written to a file of their own."""
    if whole or not windows:
        rows = (prediction_row(row, record, logprobs=logprobs) for row, record in zip(asked, records, strict=True))
        if not windows:
            yield from rows
            return
        _write(windows[0], rows)
        windows[0].flush()
        yield from merge_windows(read_windows(Path(windows[0].name)), whole, name=windows[0].name, style=style)
        return
    for row in asked.whole():
        made = [prediction_row(part, next(records), logprobs=logprobs) for part in asked.parts(row)]
        _write(windows[0], made)
        yield united_prediction(row, made, style=style)


@contextlib.contextmanager
def _written(paths: Sequence[Path]) -> Iterator[list[IO[str]]]:
    """Files that appear whole, together, when the block ends well."""
    with whole_or_nothing(paths, place=paths[-1]) as temporary, contextlib.ExitStack() as stack:
        files: list[IO[str]] = [stack.enter_context(path.open("w", encoding="utf-8")) for path in temporary]
        yield files
        stack.close()
