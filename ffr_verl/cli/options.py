"""Options that several commands have, each described once; and settings made of options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ffr_verl.cli.console import (
    SOURCE_FORMATS,
    AnswerStyle,
    PredictionFormat,
    WindowIds,
    refuse_options,
    show_formats,
)
from ffr_verl.errors import FFRError

if TYPE_CHECKING:
    from ffr_verl.inference.endpoint import EndpointSettings
    from ffr_verl.inference.generate import GeneratorSettings

Settings = TypeVar("Settings")

_OF_SERVER = (
    "model_family",
    "api_key_env",
    "header_env",
    "concurrency",
    "timeout",
    "retries",
    "body",
    "allow_errors",
)
_OF_ENGINE = ("lora", "max_model_len", "tensor_parallel_size", "gpu_memory_utilization", "trust_remote_code")

# Of a file of dialogues.
SourceFormat = Annotated[
    str, typer.Option("--format", metavar="NAME", callback=show_formats, is_eager=True, help=SOURCE_FORMATS)
]
GapHours = Annotated[
    float, typer.Option(min=0, help="Cut an exported chat where nobody wrote for so long; 0 leaves it whole.")
]
ImageMap = Annotated[
    Path | None,
    typer.Option(help="JSON {address: file}, or lines of address, tab, file: pictures that rows name otherwise."),
]
ChatImagesRoot = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; by default that of the source.")
]


def _recipes(incomplete: str) -> list[str]:
    from ffr_verl.recipes import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _overrides(incomplete: str) -> list[str]:
    return [f"+recipe={name}" for name in _recipes("") if f"+recipe={name}".startswith(incomplete)]


# Of recipes and runs.
RecipeName = Annotated[
    str, typer.Argument(help="Name of a recipe, as in `ffr-verl recipe list`.", autocompletion=_recipes)
]
Overrides = Annotated[
    list[str],
    typer.Argument(
        help="What follows `python -m verl.trainer...`: +recipe=NAME, KEY=VALUE ...", autocompletion=_overrides
    ),
]

# Of dialogues that are cut.
Stride = Annotated[
    int | None, typer.Option(min=1, help="Turns from one window's start to the next; half a window by default.")
]
GivenWindowIds = Annotated[
    WindowIds, typer.Option(help="global: ids of the whole dialogue; published: images count from 0 in each window.")
]

# Of a model that answers.
RecordedImagesRoot = Annotated[
    Path | None, typer.Option(help="Folder of the images; by default the one recorded in the files.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
MaxModelLen = Annotated[int, typer.Option(min=2, help="Most tokens of prompt and answer.")]
MaxImages = Annotated[int, typer.Option(min=0, help="Most images of a prompt.")]
TensorParallelSize = Annotated[int, typer.Option(min=1, help="GPUs that share the model.")]
GpuMemoryUtilization = Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of a GPU's memory.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
]
Model = Annotated[
    str | None,
    typer.Option(help="A Hugging Face folder, or hub name; with --endpoint a name that the server knows."),
]
Lora = Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter for the model.")]
WrittenStyle = Annotated[
    AnswerStyle,
    typer.Option(help="Form of answers that are read: plain, or reasoning for <think>…</think><answer>…</answer>."),
]
Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ask this OpenAI-compatible server, such as http://localhost:8000/v1."),
]
ApiKeyEnv = Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with the server's key.")]
HeaderEnv = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HEADER=NAME",
        help="A further header with the value of an environment variable, such as "
        "OpenAI-Organization=OPENAI_ORG_ID; may be repeated.",
    ),
]
ServedFamily = Annotated[str, typer.Option(help="Family of the server's model: how large images are shrunk.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Most requests to the server in flight.")]
Timeout = Annotated[float, typer.Option(min=1.0, help="Seconds that a whole request may take.")]
Retries = Annotated[
    int,
    typer.Option(min=0, help="Retries of a request that failed for the moment: 429, 5xx, timeout, lost connection."),
]
Body = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="Object with further fields of each request; null takes a field out."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]  # no command does without it
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")]

# Of predictions that are evaluated.
RowFormat = Annotated[
    PredictionFormat,
    typer.Option("--format", help="ffr: as ffr-verl infer writes; verl: a file of trainer.validation_data_dir."),
]
RewardedStyle = Annotated[
    AnswerStyle | None,
    typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>; as the rewards by default."),
]
RewardKwargs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Recipe, .hydra/config.yaml or YAML with the run's settings of rewards. Relative paths in it start at "
        "the current folder, as in the run.",
    ),
]
Compare = Annotated[
    Path | None, typer.Option(help="Predictions of another model for the same rows: show the difference.")
]


def settings_of(kind: type[Settings], options: Mapping[str, Any], **others: Any) -> Settings:
    """Settings of a dataclass: the options that are named like its fields, and others."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in options.items() if name in names} | others)


def answering_settings(
    context: typer.Context, options: Mapping[str, Any], images_root: Callable[[], Path]
) -> GeneratorSettings | EndpointSettings:
    """Settings of what answers, a model or a server, of the options named above; an `FFRError` for options of the
    other one."""
    from ffr_verl.inference.generate import GeneratorSettings

    model, url = options["model"], options["endpoint"]
    if url is None and model is None:
        raise FFRError("give --model: a model folder or hub name, or with --endpoint a name that the server knows")
    if url is None:
        refuse_options(context, _OF_SERVER, "goes with --endpoint URL")
        return settings_of(GeneratorSettings, options, images_root=images_root(), seed=options.get("seed") or 0)
    refuse_options(context, _OF_ENGINE, "is the server's business; it does not go with --endpoint")
    return server_settings(options, images_root())


def server_settings(options: Mapping[str, Any], images_root: Path) -> EndpointSettings:
    """Settings of a server, of the options named above; where it has one model, `--model` may be left out."""
    from ffr_verl.inference.endpoint import EndpointSettings, read_body, read_headers, served_model

    settings = settings_of(
        EndpointSettings,
        options,
        url=options["endpoint"],
        model=options["model"] or "",
        images_root=images_root,
        header_env=read_headers(options.get("header_env") or ()),
        body=read_body(options["body"]),
    )
    return settings if settings.model else dataclasses.replace(settings, model=served_model(settings))


def images_root_of_chat(chat: Path, given: Path | None) -> Path:
    """The resolved folder that a chat's image paths are relative to: the given one, or the chat's own."""
    root = (given or (chat if chat.is_dir() else chat.parent)).expanduser().resolve()
    if not root.is_dir():
        raise FFRError(f"--images-root: {given}: no such folder" if given else f"{chat}: no such file or folder")
    return root
