"""`ffr-verl ask --html`: the dialogues of some answers as one page, with the fragments lit."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffr_verl.evaluation.report.page import render_fragments
from ffr_verl.evaluation.report.pictures import Pictures, make_pictures
from ffr_verl.inference.ask import Found


def fragments_page(found: Sequence[Found], images_root: Path, *, title: str) -> str:
    """The page of the answers, grouped by query in their order; the dialogues in which nothing was found are counted.

    `images_root` is the resolved folder of the pictures; those of the dialogues shown are in the page, made small.
    """
    shown = [one for one in found if not one.is_empty]
    pictures = make_pictures([name for one in shown for name in one.images], images_root)
    by_query: dict[str, list[Found]] = {}
    for one in found:
        by_query.setdefault(one.dialogue.query, []).append(one)
    queries = [
        (query, [_answer(shown.index(one), one, pictures) for one in answers if not one.is_empty],
         sum(one.is_empty for one in answers))
        for query, answers in by_query.items()
    ]  # fmt: skip
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return render_fragments(title=title, made=made, queries=queries)


def _answer(number: int, found: Found, pictures: Pictures) -> dict[str, Any]:
    speakers = list(dict.fromkeys([utterance.speaker for utterance in found.dialogue.utterances]))
    turns = []
    for utterance in found.dialogue.utterances:
        images = [_image(image, found, pictures) for image in utterance.image_ids]
        hit = utterance.id in found.fragment.utterance_ids
        lit, right = hit or any(image["hit"] for image in images), speakers.index(utterance.speaker) == 1
        told = {"id": utterance.id, "speaker": utterance.speaker, "text": utterance.text, "images": images}
        turns.append({**told, "hit": hit, "lit": lit, "right": right})
    name = found.dialogue.dialogue_id
    return {"number": number, "dialogue_id": name, "problems": found.problems(), "turns": turns}


def _image(identifier: int, found: Found, pictures: Pictures) -> dict[str, Any]:
    name = found.images[identifier]
    told = {"id": identifier, "name": name, "hit": identifier in found.fragment.image_ids, "problem": None}
    at = pictures.of_name[name]
    return {**told, "problem": at} if isinstance(at, str) else {**told, **pictures.thumbnails[at]._asdict()}
