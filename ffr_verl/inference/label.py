"""`ffr-verl label`: queries and gold fragments for dialogues that have none, written by a language model on a server
and checked against the dialogue; rows of the MLDR format, which `ffr-verl prepare` reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffr_verl.data.chat import Chat
from ffr_verl.data.checks.checked_row import CheckedRow
from ffr_verl.dialogues import IMAGE, with_query
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output, whole_or_nothing
from ffr_verl.fragments import format_fragment
from ffr_verl.inference.endpoint import EndpointSettings, ask_endpoint
from ffr_verl.inference.infer import count_reasons
from ffr_verl.inference.journal import AnswerJournal, journal_folder
from ffr_verl.inference.labels import Labelled, LabelPrompts, read_labels


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """What is asked of a dialogue; `ffr-verl label --help` describes the options of these names."""

    prompts: Path | None = None  # see `LabelPrompts`
    queries: int = 3
    negatives: int = 1  # further queries, which nothing answers
    tries: int = 3  # times that a dialogue is asked, while its answers are refused
    text_only: bool = False  # captions are sent in place of pictures


@dataclass(frozen=True, slots=True)
class LabelSummary:
    """What `label` did."""

    dialogues: int
    accepted: tuple[int, ...]  # dialogues whose first, second, … answer was accepted
    left_out: tuple[tuple[str, int], ...]  # why dialogues are left out, and how many; most frequent first
    queries: int  # rows with a fragment
    negatives: int  # rows without
    resumed: int  # answers of an earlier, interrupted run
    seconds: float


def label(
    chat: Chat,
    output: Path,
    server: EndpointSettings,
    settings: LabelSettings | None = None,
    *,
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> LabelSummary:
    """Have queries with gold fragments written for each dialogue of a chat, and write a row for each query.

    A dialogue whose answer `read_labels` refuses is asked again, and told the reason. One that has no accepted answer
    after all tries, or that the server refuses, is left out. A run that was interrupted is resumed.

    Args:
        chat: dialogues; queries and golds that they have are not read. Its images root is that of `server`.
        output: JSONL; replaced with `force` only.
        server: of the language model.
        settings: of what is asked.
        restart: forget what an interrupted run left.
        say: told what the user should know.
        on_rows: told how many of how many dialogues have their answer, in each round of asking.

    Raises:
        FFRError: for dialogues, prompts or a server that cannot be used, an output that exists, an interrupted run of
            other work, or when nothing is accepted.
    """
    started, settings = time.monotonic(), settings or LabelSettings()
    check_output(output, force=force, example="labelled.jsonl", inputs=[chat.path, settings.prompts])
    run = _Run(chat, settings, LabelPrompts.read(settings.prompts))
    work = {**server.work(), "rows": run.survey(server.max_images, say)}
    waiting: dict[int, list[dict[str, str]]] = {number: [] for number in range(run.count)}
    labels: dict[int, list[Labelled]] = {}
    reasons: dict[int, str] = {}
    accepted: list[int] = []
    resumed, folder = 0, journal_folder(output)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, folder)
        for number in range(settings.tries):
            if not waiting:
                break
            asked = {**work, "asked": hashlib.sha256(json.dumps(waiting).encode()).hexdigest()}
            journal = AnswerJournal(folder / str(number), asked, rows=len(waiting), restart=restart)
            stack.enter_context(journal)
            resumed += journal.answered
            failure = ask_endpoint(run.requests(waiting), journal, server, on_rows=on_rows)
            if journal.answered < journal.rows:
                raise FFRError(
                    f"--endpoint {server.url}: {journal.rows - journal.answered} of {journal.rows} dialogues have no "
                    f"answer ({failure}); the others are kept: run the same command again to ask for these"
                )
            done = len(labels)
            waiting = run.take(journal.records(), waiting, labels, reasons)
            accepted.append(len(labels) - done)
        left_out = count_reasons([reason for at, reason in reasons.items() if at not in labels])
        if not labels:
            raise FFRError(
                f"{chat.path}: no answer of {server.model} was accepted, such as: {left_out[0][0]}; change --prompts, "
                "the model or other options, and start again with --restart"
            )
        with whole_or_nothing([output]) as (temporary,), temporary.open("w", encoding="utf-8") as file:
            for at, dialogue in enumerate(chat.dialogues()):
                file.writelines(
                    [json.dumps(_row(dialogue, one), ensure_ascii=False) + "\n" for one in labels.get(at, ())]
                )
        shutil.rmtree(folder, ignore_errors=True)
    made = [bool(one.fragment.utterance_ids) for of_dialogue in labels.values() for one in of_dialogue]
    seconds = time.monotonic() - started
    return LabelSummary(run.count, tuple(accepted), left_out, sum(made), len(made) - sum(made), resumed, seconds)


def _remove_empty(folder: Path) -> None:
    """Of a run that ended before its first answer nothing is left."""
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Run:
    """What is asked, and of which dialogues."""

    def __init__(self, chat: Chat, settings: LabelSettings, prompts: LabelPrompts) -> None:
        self._shown = chat
        if settings.text_only:
            self._shown = replace(chat, settings=replace(chat.settings, captions=True))
        self._settings, self._prompts = settings, prompts
        self.count = 0

    def survey(self, max_images: int, say: Callable[[str], None]) -> str:
        """Count the dialogues; a digest of what is asked of them."""
        digest = hashlib.sha256(json.dumps(self._settings.negatives).encode())
        for dialogue in self._shown.dialogues(lambda what, number: say(f"in no prompt: {what}: {number:,}")):
            row = self._request(dialogue)
            if len(row["images"]) > max_images:
                raise FFRError(
                    f"{self._shown.path}: {dialogue.dialogue.dialogue_id}: {len(row['images'])} images, at most "
                    f"{max_images}; raise --max-images, or give --text-only for captions in their place"
                )
            digest.update(json.dumps(row).encode())
            self.count += 1
        return digest.hexdigest()

    def requests(self, waiting: dict[int, list[dict[str, str]]]) -> Iterator[dict[str, Any]]:
        """A row, as of an RL file, for each dialogue that waits, with what was said of earlier answers at its end."""
        for number, dialogue in enumerate(self._shown.dialogues()):
            if number in waiting:
                row = self._request(dialogue)
                yield {**row, "prompt": [*row["prompt"], *waiting[number]]}

    def _request(self, dialogue: CheckedRow) -> dict[str, Any]:
        text_only = self._settings.text_only
        text = dialogue.dialogue.to_text(captions=text_only)
        numbers = {"queries": self._settings.queries, "negatives": self._settings.negatives}
        values = {**numbers, "dialogue": text.replace(IMAGE, "") if text_only else text}
        texts = self._prompts.of(dialogue.dialogue, values)
        prompt = [{"role": role, "content": texts[role]} for role in ("system", "user")]
        return {"prompt": prompt, "images": [] if text_only else dialogue.images}

    def take(
        self,
        records: Iterator[dict[str, Any]],
        waiting: dict[int, list[dict[str, str]]],
        labels: dict[int, list[Labelled]],
        reasons: dict[int, str],
    ) -> dict[int, list[dict[str, str]]]:
        """Sort the answers into labels and reasons; which dialogues are to be asked again, and what is said then."""
        again: dict[int, list[dict[str, str]]] = {}
        for number, dialogue in enumerate(self._shown.dialogues()):
            if number not in waiting:
                continue
            record = next(records)
            if "error" in record:
                reasons[number] = record["error"]
                continue
            try:
                labels[number] = read_labels(record["response"], dialogue.dialogue, negatives=self._settings.negatives)
            except ValueError as error:
                cut_off = " (cut off at --max-new-tokens)" if record.get("is_cut_off") else ""
                reasons[number] = f"{error}{cut_off}"
                told = self._prompts.of(dialogue.dialogue, {"reason": error})["again"]
                said = {"role": "assistant", "content": record["response"].replace(IMAGE, "")}
                again[number] = [*waiting[number], said, {"role": "user", "content": told.replace(IMAGE, "")}]
        return again


def _row(dialogue: CheckedRow, label: Labelled) -> dict[str, Any]:
    """A row of the MLDR format."""
    solution = format_fragment(label.fragment)
    messages = [*with_query(dialogue.messages, label.query), {"role": "assistant", "content": solution}]
    named = {"dialogue_id": dialogue.dialogue.dialogue_id, "images": dialogue.images}
    topic = {"topic": label.topic} if label.topic else {}
    return {**named, **topic, "messages": messages, "solution": solution}
