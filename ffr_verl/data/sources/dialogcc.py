"""DialogCC (passing2961/dialogcc): dialogues of five corpora with pictures of CC3M.

Fields as programs that read it use them: `dialogue_id`, `dialogue` (`speaker`, `utterance`, `shared_image`: a list of
`image_url` and `caption`), `split`. All pictures aligned to an utterance are taken for shared in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffr_verl.data.sources.json_document import records_of_rows
from ffr_verl.data.sources.public_sets import list_of, text_of
from ffr_verl.data.sources.source import Notes, ReadSettings, Source

_ROW = frozenset({"dialogue", "dialogue_id", "split"})
_TURN = frozenset({"speaker", "utterance", "shared_image"})
_IMAGE = frozenset({"image_url", "caption"})


def _dialogue(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> dict[str, Any]:
    turns, said = [], []
    for place, turn in list_of(row, "dialogue"):
        words = text_of(turn, "utterance", place)
        content: list[Any] = [words] if words else []
        for where, image in list_of(turn, "shared_image", place) if turn.get("shared_image") else ():
            said += [text_of(image, name, where) for name in _IMAGE]
            content.append(notes.picture((image.get("image_url"),), image.get("caption"), settings))
            notes.unread(image, _IMAGE, said)
        said.append(words)
        notes.unread(turn, _TURN, said)
        turns.append({"speaker": text_of(turn, "speaker", place), "utterance": content or ""})
    notes.unread(row, _ROW, said)
    return {"dialogue_id": row.get("dialogue_id"), "dialogue": turns}


DIALOGCC = Source(
    about="DialogCC: dialogues with pictures named by their addresses",
    example='{"dialogue_id": "bst:806", "dialogue": [{"speaker": "A", "utterance": "my dog", "shared_image": '
    '[{"image_url": "https://…/1.jpg", "caption": "a dog"}]}], "split": "train"}',
    records=records_of_rows,
    dialogue=_dialogue,
    fits=lambda probe: {"dialogue", "shared_image"} <= probe.keys,
    leaves="pictures without a file in --image-map",
)
