"""LoCoMo (snap-research/locomo): very long conversations in sessions, with questions and the turns of their answers.

Fields as its README lists them: `sample_id`, `conversation` (`speaker_a`, `speaker_b`, `session_N`: a list of turns,
`session_N_date_time`; a turn has `speaker`, `dia_id`, `text` and, with a picture, `img_url`, `blip_caption`, `query`),
`qa` (`question`, `answer`, `evidence`: a list of `dia_id`, `category`), and generated summaries. A question becomes a
query, its evidence the gold turns; category 5 asks for what was not said, its gold is empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ffr_verl.data.sources.json_document import rows_or_object
from ffr_verl.data.sources.public_sets import list_of, text_of, wrong
from ffr_verl.data.sources.source import Notes, ReadSettings, Source

_SESSION = re.compile(r"session_(\d+)")
_TURN_ID = re.compile(r"D(\d+):(\d+)")
_ABOUT = ("observation", "session_summary", "event_summary", "observations", "session-summaries", "event-summaries")
_ROW = frozenset({"sample_id", "conversation", "qa", *_ABOUT})
_TURN = frozenset({"speaker", "dia_id", "text", "img_url", "blip_caption", "query", "re-download"})
_QA = frozenset({"question", "answer", "adversarial_answer", "evidence", "category"})
_ADVERSARIAL = 5


def _dialogue(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> dict[str, Any]:
    talk = row.get("conversation")
    if not isinstance(talk, Mapping):
        raise wrong("conversation", talk, "an object with session_1, session_2, ...")
    sessions = sorted([(int(found[1]), name) for name in talk if (found := _SESSION.fullmatch(name))])
    turns: list[dict[str, Any]] = []
    ids: dict[str, int] = {}
    said: list[str] = []
    for _, name in sessions:
        notes.leave("times of sessions", f"{name}_date_time" in talk)
        for place, turn in list_of(talk, name, "conversation") if talk[name] else ():
            words, caption = text_of(turn, "text", place), text_of(turn, "blip_caption", place)
            urls = turn.get("img_url") or []
            urls = urls if isinstance(urls, list) else [urls]
            content = [words, *[notes.picture((url,), caption, settings) for url in urls]]
            notes.leave("search words of pictures", "query" in turn)
            said += [words, caption]
            notes.unread(turn, _TURN, said)
            ids[text_of(turn, "dia_id", place)] = len(turns)
            turns.append({"speaker": text_of(turn, "speaker", place), "utterance": content})
    if not turns:
        raise wrong("conversation", None, "a session with turns")
    queries = []
    for place, item in list_of(row, "qa") if row.get("qa") else ():
        named = [f"D{int(a)}:{int(b)}" for a, b in _TURN_ID.findall(str(item.get("evidence")))]
        is_absent = item.get("category") == _ADVERSARIAL
        if not is_absent and (not named or any(one not in ids for one in named)):
            notes.leave("questions whose evidence names no turns of the conversation")
            continue
        gold = [] if is_absent else sorted({ids[one] for one in named})
        question = text_of(item, "question", place)
        queries.append({"query_text": question, "gt_turns": gold})
        notes.leave("answers of questions", "answer" in item or "adversarial_answer" in item)
        notes.unread(item, _QA, [question])
    for name in _ABOUT:
        notes.leave("summaries and observations", name in row)
    notes.unread(row, _ROW, said)
    dialogue_id = row.get("sample_id", f"locomo_{number}")
    return {"dialogue_id": dialogue_id, "dialogue": turns, "queries": queries}


LOCOMO = Source(
    about="LoCoMo: long conversations in sessions; its questions become queries, their evidence gold turns",
    example='{"sample_id": "conv-1", "conversation": {"speaker_a": "Ann", "speaker_b": "Ben", "session_1_date_time": '
    '"1:56 pm on 8 May, 2023", "session_1": [{"speaker": "Ann", "dia_id": "D1:1", "text": "my dog", "img_url": '
    '["https://…/1.jpg"], "blip_caption": "a dog", "query": "dog"}]}, "qa": [{"question": "What pet has Ann?", '
    '"answer": "a dog", "evidence": ["D1:1"], "category": 4}]}',
    records=rows_or_object,
    dialogue=_dialogue,
    fits=lambda probe: {"conversation", "dia_id"} <= probe.keys,
    leaves="pictures without a file in --image-map, times of sessions, answers, summaries",
    has_gold=True,
)
