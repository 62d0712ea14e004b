"""MMDialog (victorsungo/MMDialog): `conversations.json`, whose pictures are files called `MEDIA_KEY.jpg`.

Fields as programs that read it use them: `conversation` (a list of `turn`: a list of `{"__TEXT__": …}` and
`{"__MEDIA__": key}`), and for retrieval `negative_candidate_media_keys`, `negative_candidate_texts`. Speakers are not
named; they take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffr_verl.data.sources.json_document import records_of_rows
from ffr_verl.data.sources.public_sets import list_of, text_of, wrong
from ffr_verl.data.sources.source import Notes, ReadSettings, Source

_CANDIDATES = ("negative_candidate_media_keys", "negative_candidate_texts")
_IDS = ("dialogue_id", "conversation_id", "id")
_ROW = frozenset({"conversation", *_CANDIDATES, *_IDS})


def _dialogue(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> dict[str, Any]:
    turns, said = [], []
    for position, (place, turn) in enumerate(list_of(row, "conversation")):
        content: list[Any] = []
        for where, piece in list_of(turn, "turn", place):
            if "__MEDIA__" in piece:
                key = piece["__MEDIA__"]
                if not isinstance(key, (str, int)) or key == "":
                    raise wrong(f"{where}.__MEDIA__", key, "the key of a picture")
                content.append({"image_url": settings.image_files.get(str(key), f"{key}.jpg")})
                said.append(str(key))
            if "__TEXT__" in piece:
                content.append(text_of(piece, "__TEXT__", where))
                said.append(content[-1])
            notes.unread(piece, frozenset({"__TEXT__", "__MEDIA__"}), said)
        notes.unread(turn, frozenset({"turn"}), said)
        turns.append({"speaker": f"user{position % 2 + 1}", "utterance": content})
    for name in _CANDIDATES:
        notes.leave("candidates of the retrieval task", row.get(name))
    notes.unread(row, _ROW, said)
    named = next((row[name] for name in _IDS if row.get(name) is not None), f"mmdialog_{number}")
    return {"dialogue_id": named, "dialogue": turns}


MMDIALOG = Source(
    about="MMDialog: conversations.json; pictures are MEDIA_KEY.jpg below --images-root",
    example='{"conversation": [{"turn": [{"__TEXT__": "good morning"}, {"__MEDIA__": "3f2a"}]}]}',
    records=records_of_rows,
    dialogue=_dialogue,
    fits=lambda probe: {"conversation", "turn"} <= probe.keys and not {"__TEXT__", "__MEDIA__"}.isdisjoint(probe.keys),
    leaves="negative candidates",
)
