"""Imports point one way, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import ffr_verl

ROOT = Path(ffr_verl.__file__).parent
# Each layer may import from itself and from those above it in this list.
LAYERS = (
    (
        "errors",
        "doors",
        "settings",
        "files",
        "json_text",
        "fragments",
        "dialogues",
        "images",
        "metrics",
        "model_families",
        "ray_clusters",
        "predictions",
        "recipes",
        "conf",
    ),
    ("rewards", "samplers", "data", "embeddings"),
    ("inference", "evaluation"),
    ("integrations",),
    ("plugin", "demo", "cli"),
)
# Where copied recipes and programs look for what has moved, see each of them.
DOORS = {"preflight", "data.datasets", "data.trl", "qwen2_vl", "rewards.manager", "samplers"}


def modules() -> dict[str, ast.Module]:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}


MODULES = modules()


def imported(tree: ast.Module, *, at_once: bool) -> set[str]:
    """Modules of the package that a module imports; `at_once`: when it is loaded, not in a function or for types."""
    found = set()
    nodes = [*tree.body] if at_once else [*ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ffr_verl."):
            place = node.module.removeprefix("ffr_verl.")
            for alias in node.names:
                inner = f"{place}.{alias.name}"
                found.add(inner if inner in MODULES else place)
    return found


def layer_of(name: str) -> int | None:
    return next((number for number, names in enumerate(LAYERS) if name.split(".")[0] in names), None)


def test_every_module_has_a_layer() -> None:
    doors = {name for name in MODULES if name in DOORS or name.startswith("qwen2_vl")}
    assert not {name for name in MODULES if layer_of(name) is None} - doors - {"__init__", "__main__"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - DOORS))
def test_imports_point_one_way(name: str) -> None:
    own = layer_of(name)
    if own is not None:
        assert not {other for other in imported(MODULES[name], at_once=False) if (layer_of(other) or 0) > own}


def test_there_is_no_circle() -> None:
    graph = {name: imported(tree, at_once=True) - {name} for name, tree in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", ["ffr_verl.data.trl"])
def test_what_has_moved_is_found_where_it_was(name: str) -> None:
    module = __import__(name, fromlist=["_"])
    assert all(getattr(module, public) for public in module.__all__)
