"""The messages around a raw dialogue: a system message, and a user message that holds the query and the dialogue."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ffr_verl.dialogues import Dialogue, reserved_token
from ffr_verl.errors import FFRError
from ffr_verl.files import read_yaml
from ffr_verl.fragments import TAGS
from ffr_verl.settings import refuse_unknown_keys

Language = Literal["en", "zh"]

_PLACE = re.compile(r"\{(query|dialogue)\}")
_ANSWER = f"{TAGS[0]}[{{ids}}]{TAGS[1]};{TAGS[2]}[{{ids}}]{TAGS[3]}"
# Ideographs; punctuation is left out, as a Chinese chat may hold more of it than of anything else.
_IDEOGRAPHS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
_LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Instructions for a raw dialogue."""

    user: str  # with `{query}` (which becomes the query in its tags) and, at its end, `{dialogue}`, once each
    system: str | None = None  # the system message, if any

    @classmethod
    def read(cls, path: Path) -> PromptTemplate:
        """Read a YAML file with the keys `user` and, if wanted, `system`; an `FFRError` when it cannot be read, has
        other keys, or the places are not there."""
        values = read_yaml(path, mend="give a YAML file with the keys system and user")
        if not isinstance(values, dict) or not isinstance(values.get("user"), str):
            raise FFRError(f"{path}: no text under the key user; expected user: ... {{query}} ... {{dialogue}}")
        refuse_unknown_keys(values, allowed=["user", "system"], where=str(path))
        system = values.get("system")
        if system is not None and not isinstance(system, str):
            raise FFRError(f"{path}: system: found {system!r}, expected a text")
        template = cls(values["user"].rstrip(), None if system is None else system.strip())
        places = _PLACE.findall(template.user)
        if sorted(places) != ["dialogue", "query"] or not template.user.endswith("{dialogue}"):
            raise FFRError(f"{path}: user: expected {{query}} and {{dialogue}} once each, {{dialogue}} at the end")
        for name, text in (("user", template.user), ("system", template.system or "")):
            found = reserved_token(text)
            if found is not None and found not in TAGS:
                raise FFRError(f"{path}: {name}: holds {found}, which has a meaning in the prompt; leave it out")
        return template

    def messages(self, dialogue: Dialogue, *, captions: bool = False) -> list[dict[str, str]]:
        """The system message, if any, and the user's."""
        values = {"query": dialogue.tagged_query, "dialogue": dialogue.to_text(captions=captions)}
        user = _PLACE.sub(lambda place: values[place.group(1)], self.user)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": user}]


TEMPLATES: dict[Language, PromptTemplate] = {
    "en": PromptTemplate(
        system="You find the part of a conversation that a request asks for.",
        user="The request: {query}\n"
        "Below is a conversation in which each message has an id and each image has one of its own. Name every "
        "message and every image that belongs to the part the request asks for. Write nothing but the "
        "answer, in this form: "
        f"{_ANSWER.format(ids='ids')}. Separate ids by commas; leave a list empty when nothing belongs there.\n"
        "The conversation:\n{dialogue}",
    ),
    "zh": PromptTemplate(
        system="你负责从对话中找出与请求相符的片段。",
        user="请求：{query}\n"
        "下面的对话中，每条消息和每张图片都有各自的编号。请找出属于所请求片段的全部消息和全部图片，"
        f"只按以下格式给出答案：{_ANSWER.format(ids='编号')}。编号之间用逗号隔开；没有相符的内容时，列表留空。\n"
        "对话：\n{dialogue}",
    ),
}


def detect_language(text: str) -> Language:
    """`zh` when at least a fifth of the letters are ideographs, else `en`."""
    ideographs = sum(map(len, _IDEOGRAPHS.findall(text)))
    return "zh" if ideographs and ideographs >= 0.2 * sum(map(len, _LETTERS.findall(text))) else "en"
