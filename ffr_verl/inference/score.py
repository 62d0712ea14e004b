"""`ffr-verl score`: how hard each training row is for a model, by its own answers; and a chart of it.

A run that was killed is resumed where it stopped, see `ffr_verl.inference.journal`; the difficulty file appears whole
at the end.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ffr_verl.data.parquet_files import check_columns, check_images, rows_of_files
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.evaluation.breakdowns import DISPERSION
from ffr_verl.files import check_output, whole_or_nothing
from ffr_verl.fragments import AnswerStyle, Fragment, parse_gold, parse_leniently
from ffr_verl.inference.generate import Answer, GeneratorSettings, generate_answers
from ffr_verl.inference.journal import AnswerJournal, journal_folder
from ffr_verl.inference.rows import IMAGES_ROOT_OPTION, AskedRows
from ffr_verl.predictions import PredictionFormat, UnusableLines, read_predictions, row_key, row_key_without_id
from ffr_verl.samplers.difficulty import LEVELS, difficulty_f1
from ffr_verl.samplers.difficulty_file import difficulty_table, row_keys, write_difficulty

# Told apart by lightness too, for print and for eyes that mix up red and green.
_COLOURS = {"easy": "#9ecae1", "middle": "#6baed6", "confusing": "#2171b5", "hard": "#08306b"}
_MOST_POINTS = 20_000


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What `score` did."""

    table: pa.Table  # a line for each row, see `difficulty_table`
    seconds: float

    def levels(self) -> list[tuple[str, int, float, float]]:
        """Of each level: its name, rows, mean f1 and mean dispersion of the rows with a gold fragment."""
        names = np.array(self.table.column("level").to_pylist())
        f1, spread = (self.table.column(name).to_numpy() for name in ("f1", "dispersion"))
        return [
            (level, int(chosen.sum()), _mean(f1[chosen]), _mean(spread[chosen & (spread > 0)]))
            for level in LEVELS
            for chosen in [names == level]
        ]

    def f1_by_dispersion(self) -> list[tuple[str, int, float]]:
        """Mean f1 of rows by the dispersion of their gold: range, rows, f1."""
        f1, spread = (self.table.column(name).to_numpy() for name in ("f1", "dispersion"))
        part = np.searchsorted([most for _, most in DISPERSION], spread)
        found = [(name, f1[part == number]) for number, (name, _) in enumerate(DISPERSION)]
        return [(name, len(values), _mean(values)) for name, values in found if len(values)]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def score(
    files: Sequence[Path],
    output: Path,
    *,
    settings: GeneratorSettings | None = None,
    predictions: Path | None = None,
    row_format: PredictionFormat = "ffr",
    style: AnswerStyle = "plain",
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreSummary:
    """Score the rows of RL files and write the difficulty file.

    Args:
        files: `NAME.rl.parquet` of `ffr-verl prepare`, in the order in which they are trained.
        output: the difficulty file; replaced with `force` only.
        settings: of the model that answers.
        predictions: answers of another tool instead, in a `row_format`, see `answers_of_predictions`.
        style: of the answers.
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
    inputs = [*files, *([] if predictions is None else [predictions])]
    check_output(output, force=force, example="difficulty.parquet", inputs=inputs)
    names = [str(file) for file in files]
    check_columns(names, "rl")

    def write(found: Iterable[Mapping[str, Any]], source: str) -> pa.Table:
        table = difficulty_table(rows_of_files(files), found, model=source, style=style)
        write_difficulty(table, output)
        return table

    if predictions is not None:
        if not len(row_keys(files)):
            raise FFRError(f"{', '.join(names)}: no rows")
        table = write(answers_of_predictions(predictions, files, row_format=row_format, say=say), str(predictions))
        without = int(np.isnan(table.column("mean_logprob").to_numpy()).sum())
        if without:
            say(
                f"{without} of {table.num_rows} answers have no log-probabilities: their entropy is 10, as published: "
                "above that of the others, so that among them only f1 tells; `ffr-verl infer --logprobs` writes them"
            )
        return ScoreSummary(table, time.monotonic() - started)
    assert settings is not None
    rows = AskedRows(files)
    count, digest = rows.survey(max_images=settings.max_images)
    check_images(names, settings.images_root, sample=False, option=IMAGES_ROOT_OPTION)
    work = {**settings.work(), "rows": digest} | ({} if style == "plain" else {"style": style})
    with AnswerJournal(journal_folder(output), work, rows=count, restart=restart) as journal:
        if journal.answered:
            say(f"resumed: {journal.answered} of {count} rows have their answer from an interrupted run")
        generate_answers(rows, journal, settings, record=functools.partial(_record, style=style), on_rows=on_rows)
        table = write((record for record in journal.records() if record is not None), settings.model)
        journal.remove()
    return ScoreSummary(table, time.monotonic() - started)


def _record(answer: Answer, row: Mapping[str, Any], *, style: AnswerStyle) -> dict[str, Any]:
    if answer.error is not None:
        info = row["extra_info"]
        raise FFRError(f"row {info['index']} ({info['dialogue_id']}) has no answer: {answer.error}")
    record = answer.to_record()
    if answer.samples:
        gold = parse_gold(row["reward_model"]["ground_truth"]) or Fragment((), ())
        right = [difficulty_f1(parse_leniently(sample, style=style), gold) == 1.0 for sample in answer.samples]
        record["pass_rate"] = sum(right) / len(right)
    return record


def answers_of_predictions(
    path: Path,
    files: Sequence[Path],
    *,
    row_format: PredictionFormat = "ffr",
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """The answers of a file of predictions to the rows of RL files, in the order of the rows.

    Predictions may stand in any order, and there may be more than are asked for; those with an `error` are no answers.
    They are told by dialogue, query and gold answer, and where there are several of one, the first is for the first
    row of the data that is such, and so on.

    Raises:
        FFRError: when a row of `files` has no answer, or a prediction cannot be read.
    """
    found: dict[int, deque[dict[str, Any]]] = {}
    refused: list[str] = []
    lacks_ids = False
    for one in read_predictions(path, row_format=row_format, unusable=UnusableLines(path, mend="")):
        if one.error:
            refused.append(f"line {one.line}: {one.error}")
            continue
        try:
            dialogue = parse_dialogue(one.messages, one.dialogue_id)
        except ValueError as error:
            raise FFRError(f"{path}: line {one.line}: {error}") from None
        lacks_ids |= not one.dialogue_id
        if one.dialogue_id:
            key = row_key(one.dialogue_id, dialogue.query, one.labels)
        else:
            key = row_key_without_id(dialogue, one.labels)
        found.setdefault(key, deque()).append({"response": one.response, "logprobs": list(one.logprobs)})
    keys = [[key] for key in row_keys(files).tolist()]
    if lacks_ids:
        for number, row in enumerate(rows_of_files(files, columns=("prompt", "reward_model"))):
            dialogue = parse_dialogue(row["prompt"], "")
            keys[number].append(row_key_without_id(dialogue, row["reward_model"]["ground_truth"]))
    of_row = [next((key for key in some if key in found), None) for some in keys]
    without = [number for number, key in enumerate(of_row) if key is None]
    if without:
        why = f"; {len(refused)} predictions say that they are no answer ({refused[0]})" if refused else ""
        raise FFRError(
            f"{path}: no answer to {len(without)} of {len(keys)} rows (row {without[0]} ...), by dialogue_id, query "
            f"and labels{why}"
        )
    chosen = [key for key in of_row if key is not None]
    more = sum([max(0, len(found[key]) - times) for key, times in Counter(chosen).items()])
    if more:
        are = "1 answer is" if more == 1 else f"{more} answers are"
        say(f"{are} to rows that have one already (same dialogue, query and gold answer): the first of each counts")
    for key in chosen:
        answers = found[key]
        yield answers.popleft() if len(answers) > 1 else answers[0]


def draw_difficulty(table: pa.Table, path: Path) -> None:
    """Write a chart of a table of `difficulty_table` as PNG; the file appears whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = np.array(table.column("level").to_pylist())
    f1, dispersion = table.column("f1").to_numpy(), table.column("dispersion").to_numpy()
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2)
    counts = [int((levels == level).sum()) for level in LEVELS]
    drawn = bars.bar(LEVELS, counts, color=[_COLOURS[level] for level in LEVELS])
    bars.bar_label(drawn, [f"{count:,}\n{count / max(1, len(levels)):.0%}" for count in counts])
    bars.margins(y=0.18)
    bars.set_title("rows by level")
    source = np.random.default_rng(0)
    chosen = np.flatnonzero(dispersion > 0)
    if len(chosen) > _MOST_POINTS:
        chosen = source.choice(chosen, _MOST_POINTS, replace=False)
    # A little noise keeps the many equal values from hiding each other.
    moved = source.uniform(-0.015, 0.015, (2, len(chosen)))
    for level in LEVELS:
        mine = levels[chosen] == level
        points.scatter(
            dispersion[chosen][mine] + moved[0][mine],
            f1[chosen][mine] + moved[1][mine],
            s=8,
            alpha=0.5,
            linewidths=0,
            color=_COLOURS[level],
            label=level,
        )
    points.set_title("f1 against dispersion (rows with a fragment)")
    points.set_xlabel("dispersion: span of the gold utterances over their number")
    points.set_ylabel("f1 of the greedy answer")
    points.set_ylim(-0.05, 1.05)
    points.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axes in (bars, points):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing([path]) as (temporary,):
        figure.savefig(temporary, format="png")
