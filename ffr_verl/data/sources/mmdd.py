"""MMDD, the 45k multi-modal dialogues of Lee et al. (ACL 2021): text dialogues, one utterance replaced by a picture.

Fields as its README lists them: `dialog` (list of texts), `replaced_idx`, `img_idx`, `score`, `dialog_dataset`,
`dialog_file`, `img_dataset`, `img_file`. Speakers are not named; they take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffr_verl.data.sources.json_document import records_of_rows
from ffr_verl.data.sources.public_sets import wrong
from ffr_verl.data.sources.source import Notes, ReadSettings, Source

_SOURCE = frozenset({"dialog_dataset", "dialog_file", "img_dataset", "img_file"})
_ROW = _SOURCE | {"dialog", "replaced_idx", "img_idx", "score"}


def _dialogue(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> dict[str, Any]:
    texts, place, picture = row.get("dialog"), row.get("replaced_idx"), row.get("img_file")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise wrong("dialog", texts, "a list of texts")
    if type(place) is not int or not 0 <= place < len(texts):
        raise wrong("replaced_idx", place, f"0 to {len(texts) - 1}, the place of the picture")
    if not isinstance(picture, str) or not picture:
        raise wrong("img_file", picture, "the file of the picture")
    contents: list[Any] = list(texts)
    contents[place] = [{"image_url": settings.image_files.get(picture, picture), "caption": texts[place]}]
    notes.leave("texts that a picture replaces (--captions writes them)")
    notes.unread(row, _ROW, texts)
    turns = [{"speaker": f"user{at % 2 + 1}", "utterance": content} for at, content in enumerate(contents)]
    return {"dialogue_id": f"{row.get('dialog_dataset', 'mmdd')}_{number}", "dialogue": turns}


MMDD = Source(
    about="MMDD: text dialogues with one utterance replaced by a picture, img_file below --images-root",
    example='{"dialog": ["hi", "my dog", "cute"], "replaced_idx": 1, "img_idx": 4, "score": 0.7, "dialog_dataset": '
    '"persona", "dialog_file": "train.txt", "img_dataset": "coco", "img_file": "COCO_1.jpg"}',
    records=records_of_rows,
    dialogue=_dialogue,
    fits=lambda probe: {"dialog", "replaced_idx"} <= probe.keys,
    leaves="the replaced texts, but with --captions",
)
