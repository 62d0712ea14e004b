"""Answers that verl wrote down while it trained, in their groups, and what our replay buffer knew of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.report.rows import ReportRows
from ffr_verl.evaluation.report.training import json_objects, short_names
from ffr_verl.predictions import Prediction, read_verl_dump

_STEP = re.compile(r"[0-9]+")


class RolloutsRead(NamedTuple):
    """What was read: names of the steps in the page, and what the reader should know."""

    steps: list[str]  # newest first
    notices: list[tuple[str, list[str]]]


class _Dump(NamedTuple):
    folder: Path
    step: int
    path: Path


def read_rollouts(places: Sequence[Path], rows: ReportRows, *, most: int) -> RolloutsRead:
    """Add the groups of all `STEP.jsonl` of verl below the places to the rows, newest steps first.

    Of more than about `most` answers some steps are left out, evenly, but never the first and the last, and each of
    those shown has the same share. What our replay buffer wrote of an answer (`sampler_kwargs.dump_dir`) is found by
    its `uid`.
    """
    theirs: list[_Dump] = []
    ours: dict[int, list[Path]] = {}
    for path in dict.fromkeys(path for place in places for path in sorted(place.rglob("*.jsonl"))):
        if _STEP.fullmatch(path.stem) and path.is_file():
            fields = next(json_objects(path), {})
            if {"input", "output"} <= fields.keys():
                theirs.append(_Dump(path.parent, int(path.stem), path))
            elif {"uid", "dialogue_id"} <= fields.keys():
                ours.setdefault(int(path.stem), []).append(path)
    folders = list(dict.fromkeys(dump.folder for dump in theirs))
    name_of = dict(zip(folders, short_names(folders), strict=True))
    theirs.sort(key=lambda dump: (-dump.step, name_of[dump.folder]))
    skipped: list[str] = []
    kept = _some_steps(theirs, most)
    shown, steps, is_cut = 0, [], False
    for dump in kept:
        step = f"{name_of[dump.folder]} {dump.step}"
        told = {str(one.get("uid")): one for path in ours.get(dump.step, ()) for one in json_objects(path)}
        of_step = 0
        for number, group in enumerate(_groups(dump.path, told, skipped), start=1):
            if of_step >= max(1, most // len(kept)):
                is_cut = True
                break
            of_step += len(group)
            rows.add_group(re.sub(r"[^\w.-]+", "-", f"{step}-{number}"), step, group)
        steps.append(step)
        shown += of_step
    notices: list[tuple[str, list[str]]] = []
    if len(kept) < len(theirs):
        left_out = [f"{name_of[dump.folder]} {dump.step}" for dump in theirs if dump not in kept]
        notices.append((f"Steps whose answers are not shown (--most-rows): {len(left_out):,}.", [", ".join(left_out)]))
    if is_cut:
        notices.append((f"Answers in the page: {shown:,}; steps have more than --most-rows allows.", []))
    if skipped:
        notices.append((f"Lines of dumps that could not be read: {len(skipped):,}.", skipped[:50]))
    if ours and not theirs:
        text = "Only the replay buffer's dump was found; answers come from trainer.rollout_data_dir."
        notices.append((text, []))
    return RolloutsRead(steps, notices)


def _some_steps(dumps: list[_Dump], most: int) -> list[_Dump]:
    if not dumps:
        return []
    with max((dump.path for dump in dumps), key=lambda path: path.stat().st_size).open("rb") as lines:
        fit = max(2, most // max(1, sum(1 for _ in lines)))
    if fit >= len(dumps):
        return dumps
    return [dumps[round(at * (len(dumps) - 1) / (fit - 1))] for at in range(fit)]


def _groups(path: Path, told: Mapping[str, Mapping[str, Any]], skipped: list[str]) -> Iterator[list[Prediction]]:
    """The answers to each prompt; of an answer in several outputs the last one."""
    groups: dict[Any, dict[Any, Prediction]] = {}
    try:
        for one in read_verl_dump(
            path, lenient=True, on_skipped=lambda line, why: skipped.append(f"{path.name}: line {line}: {why}")
        ):
            uid = str(one.extra.get("uid", ""))
            group, _, session = uid.rpartition("_")[0].rpartition("_")
            known = told.get(uid)
            if known is not None:
                extra = {**{name: value for name, value in known.items() if name != "reward"}, **one.extra}
                images = tuple([str(name) for name in known.get("images") or ()])
                one = dataclasses.replace(
                    one, dialogue_id=str(known.get("dialogue_id", "")), images=images, extra=extra
                )
            groups.setdefault(group or (one.prompt, one.labels), {})[session or one.line] = one
    except FFRError as error:
        skipped.append(str(error))
    yield from (list(group.values()) for group in groups.values())
