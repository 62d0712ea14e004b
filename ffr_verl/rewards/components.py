"""Rewards of one's own beside ours: components of `compute_score` that a recipe names, see docs/rewards.md.

A component is a plain function `f(completion, solution, *, ...) -> float` of one completion and one gold answer, both
as text. It is given what it names among its parameters: `extra_info` of the row, the answers' `style`, the open
embedding `store`, and the settings that stand beside it in the recipe. It must be pure and must return a finite number
for any completion.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ffr_verl.doors import Door, blamed, entry_points, load_door, parse_door
from ffr_verl.embeddings.store import open_store
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle
from ffr_verl.rewards.reading import Completion, completion_text
from ffr_verl.rewards.table import MODE_KEYS, REWARDS
from ffr_verl.settings import plain, refuse_unknown_keys

ENTRY_POINTS = "ffr_verl.rewards"
_OFFERED = ("extra_info", "style", "store")
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_METRIC = re.compile("[A-Za-z][A-Za-z0-9_]*")
# What stands beside the components in what a reward returns, or has a meaning of its own where metrics are named.
_TAKEN = frozenset(
    {
        *("score", "reward", "acc", "malformed"),
        *("predicted_utterances", "predicted_images", "gold_utterances", "gold_images", "missing_embeddings"),
        *("confusion", "cut_off", "id_credits", "reward_error"),
    }
).union(REWARDS, *[reward.keys for reward in REWARDS.values()], *MODE_KEYS.values())
_NUMBERS = (int, float, np.integer, np.floating, np.bool_)
_PROMISE = "a component returns one finite number for any completion, see docs/rewards.md"


@dataclass(frozen=True, slots=True)
class Component:
    """A reward of one's own, loaded and checked."""

    name: str  # of its weight, its key in the result and its metrics
    door: str  # where it comes from, for messages
    function: Callable[..., Any]
    settings: Mapping[str, Any]
    takes: frozenset[str]  # of what is offered
    _tried: list[bool] = field(default_factory=list, repr=False, compare=False)

    @property
    def needs_dialogue(self) -> bool:
        return "extra_info" in self.takes

    def value(
        self, completion: Completion, solution: str, extra_info: Any, *, style: AnswerStyle, embeddings: str | None
    ) -> float:
        """What it says of an answer. The first time in a process the row's gold answer and an empty one are tried too.

        Raises:
            FFRError: when it raises, or returns no finite number, or another one for the same answer; the message
                names it and the row.
        """
        if not self._tried:
            self.attempt(solution, extra_info, style=style, embeddings=embeddings)
            self._tried.append(True)
        given = self._given(extra_info, style, embeddings)
        return self._call(completion_text(completion), solution, extra_info, given)

    def attempt(self, solution: str, extra_info: Any, *, style: AnswerStyle, embeddings: str | None) -> None:
        """Try it on the gold answer of a row and on an empty one; raises as `value`."""
        given, before = self._given(extra_info, style, embeddings), repr(extra_info)
        for text in (solution, ""):
            found = [self._call(text, solution, extra_info, given) for _ in range(2)]
            if found[0] != found[1]:
                raise self._error(
                    extra_info,
                    f"returned {found[0]!r}, then {found[1]!r} for the same answer; it must be pure: seed what it "
                    "draws, keep what it asks for",
                )
        if repr(extra_info) != before:
            raise self._error(extra_info, "changed extra_info, which other rewards read; it must be pure")

    def _given(self, extra_info: Any, style: AnswerStyle, embeddings: str | None) -> dict[str, Any]:
        given: dict[str, Any] = {**self.settings}
        if "extra_info" in self.takes:
            given["extra_info"] = extra_info
        if "style" in self.takes:
            given["style"] = style
        if "store" in self.takes:
            given["store"] = open_store(str(embeddings))
        return given

    def _call(self, completion: str, solution: str, extra_info: Any, given: Mapping[str, Any]) -> float:
        try:
            found = self.function(completion, solution, **given)
            value = found if type(found) is float else float(found) if isinstance(found, _NUMBERS) else math.nan
        except FFRError as error:
            raise self._error(extra_info, str(error)) from error
        except (Exception, SystemExit) as error:  # a function of others may raise anything
            raise self._error(extra_info, f"raised {blamed(error)}; {_PROMISE}") from error
        if math.isfinite(value):
            return value
        shown = f"{found!r:.60}" if isinstance(found, _NUMBERS) else f"a {type(found).__name__}"
        if isinstance(found, Mapping):
            shown += f" with the keys {', '.join(map(str, found))}"
        raise self._error(extra_info, f"returned {shown}; {_PROMISE}")

    def _error(self, extra_info: Any, text: str) -> FFRError:
        row = extra_info.get("dialogue_id") if isinstance(extra_info, Mapping) else None
        of = f"dialogue {row}: " if row is not None else ""
        return FFRError(f"reward {self.name} ({self.door}): {of}{text}")


def resolved(components: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping `components` of `reward_kwargs` with absolute paths of files, for processes in other folders."""
    found: dict[str, Any] = {}
    for name, given in components.items():
        door = given.get("function") if isinstance(given, Mapping) else given
        if isinstance(door, str):
            absolute = str(parse_door(door, where=f"reward_kwargs.components.{name}"))
            given = {**given, "function": absolute} if isinstance(given, Mapping) else absolute
        found[str(name)] = given
    return found


def components_of(given: Any, weights: Iterable[str], *, embeddings: str | None, where: str) -> tuple[Component, ...]:
    """The components that `reward_kwargs` name beside ours.

    Args:
        given: `components`: for each name a door, or a mapping of `function`, the door, and settings of the function.
        weights: names of `weights`: one that is neither in `given` nor ours may be an entry point.
        embeddings: of `reward_kwargs`.
        where: of `reward_kwargs`, for messages.

    Raises:
        FFRError: for a weight of nothing, a door that cannot be opened, a function of another signature, a name that
            is taken or no name of a metric, and a component that needs the embedding store where there is none.
    """
    if not isinstance(given, Mapping):
        raise FFRError(
            f"{where}.components: found {given!r}, expected a mapping such as {{brevity: pkg://mine:brevity}}"
        )
    named = {str(name): one for name, one in given.items()}
    if undeclared := [name for name in weights if name not in named and name not in REWARDS]:
        points = entry_points(ENTRY_POINTS)
        try:
            refuse_unknown_keys(undeclared, allowed=[*REWARDS, *named, *points], where=f"{where}.weights")
        except FFRError as error:
            raise FFRError(f"{error}; a reward of your own stands in {where}.components, too") from None
        named |= dict.fromkeys(undeclared)
    found, problems = [], []
    for name, one in named.items():
        place = f"{where}.components.{name}"
        try:
            if name in _TAKEN or name.startswith("micro_"):
                raise FFRError(f"{place}: there is a metric of this name already; choose another")
            if not _METRIC.fullmatch(name):
                raise FFRError(f"{place}: found {name!r}, expected letters, digits and _: it names the metrics too")
            found.append(component(name, one, has_store=embeddings is not None, where=place))
        except FFRError as error:
            problems.append(str(error))
    if problems:  # all of them at once
        raise FFRError("\n".join(problems))
    return tuple(found)


def component(name: str, given: Any, *, has_store: bool, where: str) -> Component:
    """Load a component.

    Args:
        name: of it; also of its entry point where `given` names no function.
        given: a door, a function, or a mapping of either as `function` and settings; `None` for the entry point.
        has_store: whether there is an embedding store to give it.
        where: it stands, for messages.

    Raises:
        FFRError: when it cannot be loaded, takes other arguments, or needs a store that is not there.
    """
    settings = dict(plain(given, where)) if isinstance(given, Mapping) else {"function": given}
    chosen = settings.pop("function", None)
    if chosen is None and settings and name not in entry_points(ENTRY_POINTS):
        refuse_unknown_keys(settings, allowed=["function"], where=where)
    chosen = name if chosen is None else chosen
    if callable(chosen):
        function, door = chosen, name_of(chosen)
    elif isinstance(chosen, str):
        function, door = _loaded(parse_door(chosen, where=where), where), chosen
    else:
        raise FFRError(
            f"{where}: found {chosen!r}, expected pkg://module:name, path/to/file.py:name or an entry point"
        )
    return Component(name, door, function, settings, _checked(function, settings, has_store, where, door))


def name_of(function: Any) -> str:
    """What a function, or another callable, is called."""
    return str(getattr(function, "__name__", type(function).__name__))


def _loaded(door: Door, where: str) -> Callable[..., Any]:
    found = load_door(door, where=where, group=ENTRY_POINTS)
    if not callable(found):
        raise FFRError(f"{where}: {door} is of type {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]


def _checked(
    function: Callable[..., Any], settings: Mapping[str, Any], has_store: bool, where: str, door: str
) -> frozenset[str]:
    """What the function takes of what is offered."""
    expected = "expected f(completion, solution, *, ...) -> float, see docs/rewards.md"
    if inspect.iscoroutinefunction(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else "an async function"
        raise FFRError(f"{where}: {door} is {kind}, {expected}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise FFRError(f"{where}: {door} has no signature that can be read, {expected}") from None
    parameters = list(signature.parameters.values())
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(one.kind is one.VAR_POSITIONAL for one in parameters):
        raise FFRError(f"{where}: {door} takes {signature}, {expected}")
    by_name = [one for one in parameters if one not in positional[:2] and one.kind in _BY_NAME]
    names = [one.name for one in by_name]
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        refuse_unknown_keys(settings, allowed=names, where=where)
    takes = frozenset([one for one in _OFFERED if one != "store" or has_store]).intersection(names) - settings.keys()
    for one in by_name:
        if one.name == "store" and one.default is one.empty and not has_store and one.name not in settings:
            raise FFRError(
                f"{where}: {door} needs an embedding store: give {where.partition('.components.')[0]}.embeddings, the "
                "folder that `ffr-verl embed` made"
            )
        if one.default is one.empty and one.name not in settings and one.name not in takes:
            raise FFRError(
                f"{where}: {door} needs {one.name}, which is not one of {', '.join(_OFFERED)} nor a setting; give it: "
                f"{{function: {door}, {one.name}: ...}}"
            )
    try:
        signature.bind("", "", **dict.fromkeys([*settings, *takes]))
    except TypeError as error:
        raise FFRError(f"{where}: {door} takes {signature}: {error}; {expected}") from None
    return takes
