"""The command as its users read it: each option is explained, exists where texts name it, and has the library's
default."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from typer.testing import CliRunner

from ffr_verl import settings
from ffr_verl.cli import app, ask, build, console, embed, evaluate, infer, label, prepare, report, score
from ffr_verl.data.compose import ComposeSettings
from ffr_verl.data.prepare import prepare as prepare_rows
from ffr_verl.data.sources import SOURCES
from ffr_verl.data.sources.source import ReadSettings
from ffr_verl.embeddings.encoders import EncoderSettings
from ffr_verl.evaluation import BootstrapSettings
from ffr_verl.evaluation.report.build import ReportSettings
from ffr_verl.inference.endpoint import EndpointSettings
from ffr_verl.inference.generate import GeneratorSettings
from ffr_verl.inference.label import LabelSettings
from ffr_verl.recipes import read_recipe, recipe_names, recipe_path

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
    for part, of_part in getattr(command, "commands", {}).items():
        yield from commands(of_part, f"{name} {part}".strip())


COMMANDS = dict(commands(typer.main.get_command(app)))


def options_of(command: Any) -> set[str]:
    return {"--help", *[name for one in command.params for name in (*one.opts, *one.secondary_opts)]}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_and_each_of_its_options(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"], terminal_width=1000)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert " ".join(COMMANDS[name].help.split("\n\n")[0].split()) in shown
    for parameter in COMMANDS[name].params:
        assert parameter.param_type_name == "argument" or parameter.opts[0] in shown, parameter.name
        assert parameter.help, parameter.name
        assert " ".join(parameter.help.split()) in shown, parameter.name


@pytest.mark.parametrize("name", ["", "recipe", *COMMANDS])
def test_help_fits_into_80_columns_and_keeps_brackets(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"], terminal_width=80).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in shown.partition("Commands:")[2], "the first sentence of a command fits beside its name"


def test_recipe_names_are_completed() -> None:
    """As a shell asks for them."""

    def completed(*words: str) -> list[str]:
        environment = {"_FFR_VERL_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["ffr-verl", *words])}
        asked = {**environment, "COMP_CWORD": str(len(words))}
        return CliRunner().invoke(app, [], prog_name="ffr-verl", env=asked).stdout.split()

    families = [name for name in recipe_names() if name.startswith("ffr_sft_q")]
    assert completed("recipe", "show", "ffr_sft_q") == families
    assert "+recipe=ffr_grpo" in completed("check", "+recipe=ffr_g")


def test_options_that_texts_name_are_there() -> None:
    """In README, docs and the examples of the help: behind the name of a command, and by themselves in code."""
    of_others = (
        "--multirun --generation-config --arms --seeds --rows --remove_unused_columns"
        " --no-deps --enable-lora --lora-modules --enforce-eager"
        " --template --model_type --torch_dtype --attn_impl --use_vllm --reward_funcs --reward --data"
    )
    text = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS).replace("\\\n", " ")
    examples = "\n".join(command.help.replace("\n", " ").replace("Example:", "\n") for command in COMMANDS.values())
    named = re.findall(r"ffr-verl ((?:recipe )?[a-z]+)\b([^`|#\n]*)", f"{text}\n{examples}")
    found = [(name, option) for name, rest in named for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)]
    assert len(found) > 100
    assert not [(name, option) for name, option in found if option not in options_of(COMMANDS[name])]
    alone = re.findall(r"(?<!\S)--[a-z][a-z_-]*", " ".join(re.findall(r"`(--[^`]*)`", text)))
    assert set(alone) - {*of_others.split()} <= set().union(*map(options_of, COMMANDS.values()))


@pytest.mark.parametrize(
    ("command", "library", "names"),
    [
        (prepare.prepare, prepare_rows, "source_format gap_hours max_images max_pixels max_prompt_tokens"),
        (build.build, ComposeSettings, "topics layout negatives queries"),
        (embed.embed, EncoderSettings, "batch_size normalize"),
        (infer.infer, EndpointSettings, "temperature top_p max_images model_family concurrency timeout retries"),
        (infer.infer, GeneratorSettings, "max_new_tokens max_model_len tensor_parallel_size gpu_memory_utilization"),
        (score.score, GeneratorSettings, "max_new_tokens max_model_len max_images gpu_memory_utilization samples"),
        (ask.ask, GeneratorSettings, "max_new_tokens max_model_len max_images gpu_memory_utilization"),
        (ask.ask, EndpointSettings, "model_family concurrency timeout retries"),
        (ask.ask, ReadSettings, "gap_hours"),
        (label.label, LabelSettings, "queries negatives tries text_only"),
        (label.label, ReadSettings, "gap_hours"),
        (build.build, ReadSettings, "gap_hours"),
        (report.report, ReportSettings, "most_rows thumbnail_size"),
        (evaluate.evaluate, BootstrapSettings, "seed"),
    ],
)
def test_defaults_are_those_of_the_library(command: Callable[..., Any], library: Any, names: str) -> None:
    ours, theirs = (
        {name: one.default for name, one in inspect.signature(function).parameters.items()}
        for function in (command, library)
    )
    assert {name: ours[name] for name in names.split()} == {name: theirs[name] for name in names.split()}


def test_published_bounds_are_those_of_the_recipes() -> None:
    grpo, sft = (read_recipe(recipe_path(name)) for name in ("ffr_grpo", "ffr_sft"))
    assert grpo["data"]["max_prompt_length"] == settings.DEFAULT_MAX_PROMPT_TOKENS
    assert grpo["data"]["max_response_length"] == settings.DEFAULT_MAX_NEW_TOKENS
    assert grpo["actor_rollout_ref"]["rollout"]["limit_images"] == settings.DEFAULT_MAX_IMAGES
    assert sft["data"]["max_length"] == settings.DEFAULT_MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("VectorDtype", "embeddings.store"),
        ("WindowIds", "data.windows"),
        ("Language", "data.templates"),
        ("PredictionFormat", "predictions"),
        ("AnswerStyle", "fragments"),
        ("Layout", "data.compose"),
        ("CoherenceMode", "rewards.settings"),
    ],
)
def test_choices_are_those_of_the_library(name: str, module: str) -> None:
    """They stand in `cli.console` too, since `--help` does not load what holds them."""
    theirs = getattr(importlib.import_module(f"ffr_verl.{module}"), name)
    assert set(get_args(getattr(console, name))) == set(get_args(theirs))


def test_the_help_names_every_source_format() -> None:
    assert [name for name in SOURCES if name not in console.SOURCE_FORMATS.replace(",", " ").split()] == []
