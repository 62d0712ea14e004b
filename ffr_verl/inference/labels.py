"""What `ffr-verl label` asks a language model of a dialogue, and what of its answers is a label."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.data.templates import Language, detect_language
from ffr_verl.dialogues import IMAGE, Dialogue, with_query
from ffr_verl.errors import FFRError, one_line
from ffr_verl.files import read_yaml
from ffr_verl.fragments import Fragment
from ffr_verl.settings import refuse_unknown_keys

_PLACE = re.compile(r"\{(dialogue|queries|negatives|reason)\}")
_KEYS = ("system", "user", "again")
_LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class LabelPrompts:
    """What is asked, by language: `system`, `user`, and `again` after an answer that was refused."""

    texts: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, path: Path | None = None) -> LabelPrompts:
        """Those of a YAML file, or of `label_prompts.yaml` of this package, which says what is in it.

        Raises:
            FFRError: for a file that cannot be read, other keys, or a text without its places.
        """
        mend = "give a YAML file like ffr_verl/inference/label_prompts.yaml"
        where = f"--prompts {path}"
        values = read_yaml(path or Path(__file__).with_name("label_prompts.yaml"), mend=mend, option="--prompts")
        if not isinstance(values, dict) or not values:
            raise FFRError(f"{where}: no language in it; {mend}")
        refuse_unknown_keys(values, allowed=_LANGUAGES, where=where)
        for language, texts in values.items():
            if not isinstance(texts, dict) or not all(isinstance(texts.get(key), str) for key in _KEYS):
                raise FFRError(f"{where}: {language}: expected the texts {', '.join(_KEYS)}; {mend}")
            refuse_unknown_keys(texts, allowed=_KEYS, where=f"{where}: {language}")
            for key, place in (("user", "{dialogue}"), ("again", "{reason}")):
                if texts[key].count(place) != 1:
                    raise FFRError(f"{where}: {language}: {key}: expected {place} in it, once")
            if any(IMAGE in text for text in texts.values()):
                raise FFRError(f"{where}: {language}: holds {IMAGE}, which stands for a picture; leave it out")
        return cls(values)

    def of(self, dialogue: Dialogue, values: Mapping[str, object]) -> dict[str, str]:
        """The texts in the dialogue's language, or in the one that there is, with values in their places."""
        language = detect_language(" ".join([utterance.text for utterance in dialogue.utterances]))
        texts = self.texts.get(language) or next(iter(self.texts.values()))

        def value_of(place: re.Match[str]) -> str:
            return str(values.get(place[1], place[0]))

        return {key: _PLACE.sub(value_of, text).strip() for key, text in texts.items()}


@dataclass(frozen=True, slots=True)
class Labelled:
    """A query and its gold; an empty fragment for one that nothing answers."""

    query: str
    fragment: Fragment
    topic: str | None = None


def read_labels(text: str, dialogue: Dialogue, *, negatives: int = 0) -> list[Labelled]:
    """The queries of an answer: JSON in the form that `label_prompts.yaml` asks for, maybe with words around it.

    Raises:
        ValueError: for an answer that is not in the form, names ids that the dialogue does not have, an id twice or an
            image outside its utterances, has a query twice, without text or without a fragment, or fewer than
            `negatives` queries that nothing answers; with the reason, as the model is told it.

    Example:
        >>> dialogue = Dialogue("d", (), "")
        >>> read_labels('{"queries": [{"query": "a cat", "utterances": [3]}], "negatives": []}', dialogue)
        Traceback (most recent call last):
        ...
        ValueError: queries[0]: utterances [3] are not in the conversation
    """
    try:
        found, _ = json.JSONDecoder().raw_decode(text[max(0, text.find("{")) :])
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    asked, nothing = found.get("queries"), found.get("negatives", [])
    if not isinstance(asked, list) or not isinstance(nothing, list) or not asked:
        raise ValueError("expected a list queries with at least one query, and a list negatives")
    if len(nothing) < negatives:
        raise ValueError(f"{len(nothing)} negatives, expected {negatives}")
    images_of = {utterance.id: utterance.image_ids for utterance in dialogue.utterances}
    labels: list[Labelled] = []
    for number, item in enumerate(asked):
        where = f"queries[{number}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected an object with query, utterances and images")
        utterances = _known_ids(item.get("utterances"), images_of, f"{where}: utterances")
        images = _known_ids(item.get("images") or [], dialogue.image_ids, f"{where}: images")
        if not utterances:
            raise ValueError(f"{where}: utterances is empty; a query that nothing answers belongs to negatives")
        lone = [image for image in images if not any(image in images_of[one] for one in utterances)]
        if lone:
            raise ValueError(f"{where}: images {lone} are in none of its utterances")
        topic = one_line(item["topic"]) if isinstance(item.get("topic"), str) else None
        fragment = Fragment(tuple(sorted(utterances)), tuple(sorted(images)))
        labels.append(Labelled(_query(item.get("query"), where), fragment, topic))
    labels += [Labelled(_query(text, f"negatives[{at}]"), Fragment((), ())) for at, text in enumerate(nothing)]
    for query, count in Counter(one.query.casefold() for one in labels).items():
        if count > 1:
            raise ValueError(f"the query {query!r} is there twice")
    return labels


def _known_ids(value: Any, known: Container[int], where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise ValueError(f"{where}: expected a list of ids")
    if outside := [one for one in value if one not in known]:
        raise ValueError(f"{where} {outside} are not in the conversation")
    if len(set(value)) < len(value):
        raise ValueError(f"{where} name an id twice")
    return value


def _query(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text for the query")
    try:
        with_query([], value)
    except ValueError as error:
        raise ValueError(f"{where}: the query {error}") from None
    return " ".join(value.split())
