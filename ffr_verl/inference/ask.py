"""`ffr-verl ask`: what a model finds in a chat, for a person to read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffr_verl.data.chat import Chat, asked
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue
from ffr_verl.errors import FFRError, printable
from ffr_verl.fragments import AnswerStyle, Fragment, parse_either, parse_fragment
from ffr_verl.inference.endpoint import EndpointSettings, ask_endpoint, unanswered
from ffr_verl.inference.generate import GeneratorSettings, generate_answers
from ffr_verl.inference.journal import Answers
from ffr_verl.inference.merge_windows import united_prediction
from ffr_verl.inference.rows import GivenRows
from ffr_verl.predictions import prediction_row


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a query of a dialogue."""

    dialogue: Dialogue  # with the query
    images: tuple[str, ...]  # path of each, as in the chat
    fragment: Fragment  # what of the answer is in the dialogue
    outside: Fragment  # what is not
    malformed: tuple[str, ...]  # answers, a window each, that are not in the format, as written
    error: str | None  # why there is no answer, or none to some windows
    is_answered: bool  # at least for a window

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (any(self.fragment_ids) or any(self.outside_ids) or self.malformed or self.error)

    @property
    def fragment_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of utterances and of images."""
        return self.fragment.utterance_ids, self.fragment.image_ids

    @property
    def outside_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of utterances and of images that the model was not shown."""
        return self.outside.utterance_ids, self.outside.image_ids

    def turns(self) -> Iterator[tuple[Utterance, list[int]]]:
        """The utterances that are in the fragment, or have an image in it; and the fragment's images of each."""
        for utterance in self.dialogue.utterances:
            images = [image for image in utterance.image_ids if image in self.fragment.image_ids]
            if images or utterance.id in self.fragment.utterance_ids:
                yield utterance, images

    def problems(self) -> list[str]:
        """What is wrong with the answer, a line each, the raw text of a malformed one among them."""
        told = [f"no answer: {self.error}"] if self.error else []
        told += [f"the answer is not in the format; as written: {text or '(nothing)'}" for text in self.malformed]
        named = zip(("utterances", "images"), self.outside_ids, strict=True)
        outside = [f"{name} {', '.join(map(str, ids))}" for name, ids in named if ids]
        return told + ([f"ids that the model was not shown: {'; '.join(outside)}"] if outside else [])

    def lines(self) -> Iterator[str]:
        """The fragment as a chat: ids, speakers, texts, names of pictures."""
        identifier, turns = printable(self.dialogue.dialogue_id), len(self.dialogue.utterances)
        named = zip(("turn", "picture"), self.fragment_ids, strict=True)
        found = [f"{len(ids)} {name}{'s' * (len(ids) != 1)}" for name, ids in named]
        yield f"{identifier}, of {turns} turns: {', '.join(found)}"
        before = -1
        for utterance, images in self.turns():
            if before >= 0 and utterance.id != before + 1:
                yield "      …"
            before = utterance.id
            first, *more = [printable(line) for line in utterance.text.splitlines()] or [""]
            mark = "" if utterance.id in self.fragment.utterance_ids else " (its picture only)"
            yield f"{utterance.id:5} {printable(utterance.speaker)}: {first}{mark}".rstrip()
            yield from [f"      {line}" for line in more]
            yield from [f"      [image {image}: {printable(self.images[image])}]" for image in images]
        yield from [f"  {printable(problem)}" for problem in self.problems()]

    def to_dict(self) -> dict[str, Any]:
        """For a machine."""
        turns = [
            {
                "id": utterance.id,
                "speaker": utterance.speaker,
                "text": utterance.text,
                "images": [{"id": image, "path": self.images[image]} for image in images],
            }
            for utterance, images in self.turns()
        ]
        utterances, images = map(list, self.fragment_ids)
        outside_utterances, outside_images = map(list, self.outside_ids)
        return {
            "query": self.dialogue.query,
            "dialogue_id": self.dialogue.dialogue_id,
            "utterances": utterances,
            "images": images,
            "turns": turns,
            "outside": {"utterances": outside_utterances, "images": outside_images},
            "malformed": list(self.malformed),
            "error": self.error,
        }


def ask(
    chat: Chat,
    queries: Sequence[str],
    settings: GeneratorSettings | EndpointSettings,
    *,
    window: WindowSettings | None = None,
    style: AnswerStyle = "plain",
    say: Callable[[str], None] = lambda text: None,
    on_found: Callable[[Found], None] = lambda found: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """Ask each dialogue of a chat each query.

    Args:
        chat: its images root is that of `settings`.
        queries: each is asked once.
        settings: of the model, or the server, that answers; `style` is that of its answers.
        window: cut dialogues that are longer, and unite the windows' answers.
        say: told what the user should know, before the model is loaded.
        on_found: told each answer, query by query, as soon as it and those before it are there.
        on_rows: told how many prompts of how many have their answer.

    Raises:
        FFRError: for a chat, a query, a model or a server that cannot be used, or when there is no answer at all.
    """
    queries = list(dict.fromkeys([query.strip() for query in queries]))
    if not queries:
        raise FFRError('no query; give one, such as "the garden", or --queries FILE with one a line')
    dialogues = list(chat.dialogues(lambda what, count: say(f"in no prompt: {what}: {count:,}")))
    rows: list[dict[str, Any]] = []
    for query in queries:
        try:
            rows += [asked(dialogue, query, index=number) for number, dialogue in enumerate(dialogues)]
        except ValueError as error:
            raise FFRError(f"the query {printable(repr(query))} {error}; write it otherwise") from None
    given = GivenRows([chat.path], window=window, rows=rows)
    count, _ = given.survey(max_images=settings.max_images)
    parts = [given.parts(row) for row in rows]
    ends = list(itertools.accumulate(map(len, parts)))
    answers, found = Answers(count), list[Found]()

    def tell() -> None:
        while len(found) < len(rows):
            row, of_row, end = rows[len(found)], parts[len(found)], ends[len(found)]
            if not all(number in answers for number in range(end - len(of_row), end)):
                return
            records = itertools.islice(answers.records(), end - len(of_row), end)
            made = [prediction_row(one, record, logprobs=False) for one, record in zip(of_row, records, strict=True)]
            found.append(_found(row, made, style))
            on_found(found[-1])

    def progress(done: int, total: int) -> None:
        on_rows(done, total)
        tell()

    say(f"prompts: {count:,}, for each query of each dialogue or its windows; asking {settings.model}")
    if isinstance(settings, EndpointSettings):
        failure = ask_endpoint(given, answers, settings, allow_errors=True, on_rows=progress)
        answers.append([(number, unanswered(failure)) for number in range(count) if number not in answers])
        tell()
    else:
        generate_answers(given, answers, settings, first=len(parts[0]), on_rows=progress)
    if not any(one.is_answered for one in found):
        raise FFRError(f"there is no answer: {found[0].error}")
    return found


def _found(row: Mapping[str, Any], made: Sequence[Mapping[str, Any]], style: AnswerStyle) -> Found:
    """Of a row, and the predictions for its windows, or itself."""
    merged = united_prediction(row, made, style=style)
    dialogue = parse_dialogue(row["prompt"], row["extra_info"]["dialogue_id"])
    turns = {utterance.id for utterance in dialogue.utterances}
    named = parse_either(merged["response"], style=style)
    wrong: tuple[list[int], list[int]] = ([one for one in named.utterance_ids if one not in turns], [])
    malformed = []
    for part in made:
        shown = parse_dialogue(part["messages"], "").image_ids
        wrong[1].extend([one for one in parse_either(part["response"], style=style).image_ids if one not in shown])
        if "error" not in part and parse_fragment(part["response"], style=style) is None:
            malformed.append(part["response"])
    images = [one for one in named.image_ids if one in dialogue.image_ids]
    fragment = Fragment(
        *[tuple(sorted(set(ids))) for ids in ([one for one in named.utterance_ids if one in turns], images)]
    )
    outside = Fragment(tuple(sorted(set(wrong[0]))), tuple(sorted({*wrong[1]} - {*fragment.image_ids})))
    paths = tuple(row["extra_info"]["images"])
    is_answered = any("error" not in part for part in made)
    return Found(dialogue, paths, fragment, outside, tuple(malformed), merged.get("error"), is_answered)
