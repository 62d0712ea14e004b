"""What differs between model families, found from a name or a model's files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ffr_verl.dialogues import control_token
from ffr_verl.errors import FFRError
from ffr_verl.model_families import CONTROL_TOKENS, FAMILIES, QWEN2_VL, family_named, family_of_model
from ffr_verl.recipes import recipe_names, recipe_path


def model(folder: Path, config: object, processor: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_known_model_type_gives_its_entry_and_the_models_own_files_count_first(tmp_path: Path) -> None:
    folder = model(tmp_path, {"model_type": "qwen3_vl"})
    assert family_of_model(folder) == family_of_model(folder / "config.json") == FAMILIES["qwen3_vl"]
    model(
        tmp_path, {"model_type": "qwen3_vl"}, {"patch_size": 20, "size": {"shortest_edge": 99, "longest_edge": 10**6}}
    )
    family = family_of_model(folder)
    assert (family.factor, family.min_pixels, family.max_pixels) == (40, 99, 10**6)
    assert family_of_model(None) is QWEN2_VL
    assert family_of_model(None, name="qwen3_vl") is FAMILIES["qwen3_vl"]


def test_settings_of_other_kinds_of_processors_are_left_alone(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_vl", "vision_config": [1]}
    assert family_of_model(model(tmp_path, config, {"size": 224})) == FAMILIES["qwen3_vl"]


def test_an_unknown_family_is_said_with_what_may_be_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"model_type": "seen_nowhere", "vision_config": {"patch_size": 32, "spatial_merge_size": 1}}
    with caplog.at_level(logging.WARNING):
        family = family_of_model(model(tmp_path, config))
    assert family.factor == 32, "what its files tell is taken from them"
    (message,) = caplog.messages
    assert "model_type (seen_nowhere) is none of qwen2_vl" in message
    assert "Sizes of images, numbers of prompt tokens" in message
    assert "--model-family" in message
    assert family.name == "seen_nowhere", "it is not called one of those that are known"
    caplog.clear()
    assert family_of_model(tmp_path, name="qwen2_5_vl").name == "qwen2_5_vl"
    assert not caplog.messages, "the user has said what it is like"
    with pytest.raises(FFRError, match=r"--model-family: found 'qwen9'; expected one of qwen2_vl, "):
        family_named("qwen9")


@pytest.mark.parametrize("token", sorted(CONTROL_TOKENS))
def test_no_text_may_hold_a_token_that_a_template_acts_on(token: str) -> None:
    assert control_token(f"look {token} there") == token


def test_recipes_leave_the_vision_tower_alone_by_its_name() -> None:
    text = "".join([recipe_path(name).read_text(encoding="utf-8") for name in recipe_names()])
    excluded = [line for line in text.splitlines() if line.strip().startswith("exclude_modules:")]
    assert excluded
    assert all(f'".*{family.vision_tower}.*"' in line for line in excluded for family in FAMILIES.values())
