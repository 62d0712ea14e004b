"""PhotoChat (google-research/multimodalchat): dialogues of two people in which one photo is shared.

Fields as its README lists them: `dialogue` (`message`, `share_photo`, `user_id`), `dialogue_id`, `photo_description`,
`photo_url`, `photo_id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffr_verl.data.sources.json_document import records_of_rows
from ffr_verl.data.sources.public_sets import list_of, text_of
from ffr_verl.data.sources.source import Notes, ReadSettings, Source

_ROW = frozenset({"dialogue", "dialogue_id", "photo_description", "photo_url", "photo_id"})
_TURN = frozenset({"message", "share_photo", "user_id"})


def _dialogue(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> dict[str, Any]:
    description = row.get("photo_description")
    turns, said = [], [text_of(row, name) for name in ("photo_description", "photo_url")]
    for place, turn in list_of(row, "dialogue"):
        words = text_of(turn, "message", place)
        content: list[Any] = [words] if words else []
        if turn.get("share_photo"):
            content.append(notes.picture((row.get("photo_id"), row.get("photo_url")), description, settings))
        said.append(words)
        notes.unread(turn, _TURN, said)
        user = turn.get("user_id")
        turns.append({"speaker": f"user{user + 1 if type(user) is int else user}", "utterance": content or ""})
    notes.unread(row, _ROW, said)
    return {"dialogue_id": row.get("dialogue_id"), "dialogue": turns}


PHOTOCHAT = Source(
    about="PhotoChat: dialogues with one shared photo, named by its address or id",
    example='{"dialogue_id": 7, "dialogue": [{"message": "look", "share_photo": false, "user_id": 0}, {"message": "", '
    '"share_photo": true, "user_id": 0}], "photo_description": "a dog", "photo_url": "https://…/1.jpg", "photo_id": '
    '"train/19e4"}',
    records=records_of_rows,
    dialogue=_dialogue,
    fits=lambda probe: {"dialogue", "share_photo"} <= probe.keys,
    leaves="photos without a file in --image-map",
)
