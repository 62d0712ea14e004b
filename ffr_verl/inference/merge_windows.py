"""From the answers to the windows of a long dialogue to an answer to the dialogue.

Utterance ids are united as they are. An image id is read as a place among the images that the window shows, which has
a place among those of the whole dialogue; so it does not matter whether images count from 0 in every window
(`published`) or go on (`global`). Ids are sorted, each is there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.data.parquet_files import rows_of_files
from ffr_verl.data.windows import Window, WindowIds, whole_fragment, window_id
from ffr_verl.dialogues import Dialogue, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment, format_fragment, parse_either, parse_fragment
from ffr_verl.predictions import (
    ANSWERED,
    Prediction,
    UnusableLines,
    prediction_of,
    prediction_row,
    read_predictions,
)


@dataclass(frozen=True, slots=True)
class WindowAnswer:
    """The part of a prediction that is needed to unite it with others."""

    dialogue_id: str  # `ID_split_k`, or that of a dialogue that was not cut
    query: str
    response: str
    utterance_ids: tuple[int, ...]  # that the window shows
    image_ids: tuple[int, ...]  # that the window shows, as it calls them
    digest: str  # of what is spoken in it
    logprobs: tuple[float, ...]  # of the answer's tokens, where the prediction has any
    error: str | None  # why there is no answer

    @classmethod
    def of(cls, prediction: Prediction) -> WindowAnswer:
        """Read a prediction; a `ValueError` when there is no dialogue in its messages."""
        dialogue = parse_dialogue(prediction.messages, prediction.dialogue_id)
        return cls(
            prediction.dialogue_id,
            dialogue.query,
            prediction.response,
            tuple([utterance.id for utterance in dialogue.utterances]),
            dialogue.image_ids,
            dialogue.digest,
            prediction.logprobs,
            prediction.error,
        )


def merged_prediction(
    row: Mapping[str, Any], answers: Sequence[WindowAnswer], *, style: AnswerStyle = "plain"
) -> dict[str, Any]:
    """The answers to a dialogue's windows united.

    Answers are read as evaluation reads them: a malformed one counts as empty, or as what can be read of it. An image
    id that the window does not show stands for no image and is left out.

    Args:
        row: of the whole dialogue, of an RL file.
        answers: to its windows, in any order; or to the dialogue itself, which is kept as it is.
        style: of the answers, and of the united one.

    Returns:
        A `prediction_row`; of united answers without log-probabilities, but with `windows` (how many),
        `malformed_windows` (those with an answer that is not in the format) and, when windows have no answer, `error`.
        The response is empty when no window has an answer in the format, and nothing could be read of them.

    Raises:
        ValueError: when the answers are not to windows of this dialogue, a window has two or none, or turns are in
            none of them.
    """
    identifier = str(row["extra_info"]["dialogue_id"])
    if len(answers) == 1 and answers[0].dialogue_id == identifier:
        [one] = answers
        record = {"response": one.response, "logprobs": one.logprobs, **({"error": one.error} if one.error else {})}
        return prediction_row(row, record, logprobs=bool(one.logprobs))
    dialogue = parse_dialogue(row["prompt"], identifier)
    parts = [_part(dialogue, answer, style) for answer in answers]
    numbers = sorted([window.number for window, _ in parts])
    for place, number in enumerate(numbers, start=numbers[0]):  # other tools may count from 1
        if number != place:
            what = f"two answers to window {number}" if number < place else f"no answer to window {place}"
            raise ValueError(f"{what} ({identifier}_split_{min(number, place)})")
    seen = {utterance for window, _ in parts for utterance in range(*window.utterances)}
    lost = [utterance.id for utterance in dialogue.utterances if utterance.id not in seen]
    if lost:
        raise ValueError(f"no answer to a window with utterance {lost[0]} ({len(lost)} utterances are in none)")
    united = whole_fragment(parts)
    unread = [answer for answer in answers if parse_fragment(answer.response, style=style) is None]
    nothing = len(unread) == len(answers) and united == Fragment((), ())
    malformed = sum(answer.error is None for answer in unread)
    record = {"response": "" if nothing else format_fragment(united, style=style), "logprobs": []}
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        record["error"] = f"{len(errors)} of {len(answers)} windows have no answer: {errors[0]}"
    merged = prediction_row(row, record, logprobs=False)
    return {**merged, "windows": len(answers), "malformed_windows": malformed}


def united_prediction(
    row: Mapping[str, Any], made: Sequence[Mapping[str, Any]], *, style: AnswerStyle = "plain"
) -> dict[str, Any]:
    """`merged_prediction` of the rows (`prediction_row`) that answer a dialogue's windows, or the dialogue itself."""
    answers = [WindowAnswer.of(prediction_of(number, part, needed=ANSWERED)) for number, part in enumerate(made)]
    return merged_prediction(row, answers, style=style)


def read_windows(path: Path) -> Iterator[Prediction]:
    """The predictions of a file of windows; their gold answers are not needed."""
    unusable = UnusableLines(path, mend="; docs/inference.md says what a row has")
    return read_predictions(path, unusable=unusable, needed=("response", "messages", "dialogue_id"))


def merge_windows(
    predictions: Iterable[Prediction],
    files: Sequence[Path],
    *,
    name: str,
    style: AnswerStyle = "plain",
    refuse_second_answers: bool = False,
) -> Iterator[dict[str, Any]]:
    """An answer to each row of RL files of whole dialogues, out of predictions of rows `ID_split_k`, called `name`.

    They may be in any order; rows of dialogues that were not cut are among them as they are. Of a row that is there
    twice with different answers the first one counts, or is refused.

    Raises:
        FFRError: when a prediction cannot be read, or a row of the files has no answers or not to all of its windows.
    """
    windows: dict[tuple[str, str], list[WindowAnswer]] = {}
    uncut: dict[tuple[str, str], WindowAnswer] = {}
    for prediction in predictions:
        where = f"{name}: line {prediction.line}"
        try:
            answer = WindowAnswer.of(prediction)
        except ValueError as error:
            raise FFRError(f"{where}: {error}; docs/inference.md says what a row has") from None
        first = uncut.setdefault((answer.dialogue_id, answer.query), answer)
        if first is not answer:  # a row that the data have twice
            if first.response != answer.response and refuse_second_answers:
                raise FFRError(
                    f"{where}: another answer to {answer.query!r} of {answer.dialogue_id}, which has one already; "
                    "leave one of them out"
                )
            continue
        split = window_id(answer.dialogue_id)
        if split is not None:
            windows.setdefault((split[0], answer.query), []).append(answer)
    for number, row in enumerate(rows_of_files(files, columns=("prompt", "reward_model", "extra_info"))):
        key = (str(row["extra_info"]["dialogue_id"]), row["extra_info"]["query"])
        answers = [uncut[key]] if key in uncut else windows.get(key, [])
        try:
            if not answers:
                raise ValueError("no answer to it or its windows")
            yield merged_prediction(row, answers, style=style)
        except ValueError as error:
            raise FFRError(
                f"{name}: to row {number} of {', '.join(map(str, files))} ({key[0]}, {key[1]!r}): {error}"
            ) from None


def _part(whole: Dialogue, answer: WindowAnswer, style: AnswerStyle) -> tuple[Window, Fragment]:
    """The window of an answer, and what it answers in the window's ids."""
    split = window_id(answer.dialogue_id)
    if split is None:
        raise ValueError(f"{answer.dialogue_id} is no window ID_split_K")
    first, end = answer.utterance_ids[0], answer.utterance_ids[-1] + 1
    shown = Dialogue(split[0], whole.utterances[first:end], whole.query)
    if answer.utterance_ids != tuple([one.id for one in shown.utterances]) or answer.digest != shown.digest:
        raise ValueError(f"{answer.dialogue_id} is not a window of it; the data were prepared otherwise")
    before = sum(utterance < first for utterance in whole.image_utterances)
    count = len(shown.image_ids)
    if answer.image_ids == tuple(range(before, before + count)):
        ids: WindowIds = "global"
    elif answer.image_ids == tuple(range(count)):
        ids = "published"
    else:
        raise ValueError(f"{answer.dialogue_id} has the image ids {list(answer.image_ids)}, not {count} in order")
    fragment = parse_either(answer.response, style=style)
    images = tuple([identifier for identifier in fragment.image_ids if identifier in answer.image_ids])
    window = Window(split[0], split[1], (first, end), (before, before + count), ids)
    return window, Fragment(fragment.utterance_ids, images)
