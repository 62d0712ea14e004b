"""The command `ffr-verl`. Each command imports what it needs when it runs, so `--help` is quick and needs no torch."""

from __future__ import annotations

import enum
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ffr_verl import __version__
from ffr_verl.errors import FFRError

__all__ = ["app", "main"]

_MOST_REASONS = 5  # why rows have no answer

app = typer.Typer(
    name="ffr-verl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-grained fragment retrieval training on verl.\n\n"
    "The order of a project: prepare the data (inspect shows a row), embed it for the coherence reward, train stage 1 "
    "(verl.trainer.sft_trainer +recipe=ffr_sft), merge its checkpoint, score how hard the rows are, train stage 2 "
    "(verl.trainer.main_ppo +recipe=ffr_grpo), merge, infer, evaluate, report. `ffr-verl demo` does it all on a small "
    "scale.",
)
recipe_app = typer.Typer(no_args_is_help=True, help="The recipes for `+recipe=NAME`: list, show, copy to edit.")
app.add_typer(recipe_app, name="recipe")
console = Console()


class StoredDtype(str, enum.Enum):
    """Choices of `ffr-verl embed --dtype`."""

    float16 = "float16"
    float32 = "float32"


class SourceFormat(str, enum.Enum):
    """Choices of `ffr-verl prepare --format`."""

    mldr = "mldr"
    dialogue = "dialogue"


class WindowIds(str, enum.Enum):
    """Choices of `ffr-verl prepare --window-ids`."""

    whole = "global"
    published = "published"


class Language(str, enum.Enum):
    """Choices of `ffr-verl prepare --language`."""

    en = "en"
    zh = "zh"


class PredictionFormat(str, enum.Enum):
    """Choices of `--format` of predictions."""

    ffr = "ffr"
    verl = "verl"


class AnswerStyle(str, enum.Enum):
    """Choices of `--answer-style`."""

    plain = "plain"
    reasoning = "reasoning"


class Layout(str, enum.Enum):
    """Choices of `ffr-verl build --layout`."""

    blocks = "blocks"
    interleaved = "interleaved"
    mixed = "mixed"


class CoherenceChoice(str, enum.Enum):
    """Choices of `ffr-verl report --coherence-mode`."""

    continuous = "continuous"
    published = "published"
    gold_anchored = "gold_anchored"


def main() -> None:
    """Run the command; what a user can mend is one message on stderr and exit status 2."""
    try:
        app()
    except FFRError as error:
        sys.stderr.write(f"ffr-verl: error: {error}\n")
        raise SystemExit(2) from None
    except SystemExit as error:  # so Typer ends on Ctrl-C
        if error.code == 130:
            sys.stderr.write("ffr-verl: interrupted\n")
        raise


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _clean_up_when_terminated() -> None:
    """Let SIGTERM end the command as Ctrl-C does, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, _end)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"ffr-verl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="A JSON list or JSONL of rows, gzipped or not.")],
    images_root: Annotated[Path, typer.Option(help="Folder that the rows' image paths are relative to.")],
    output: Annotated[Path, typer.Option(help="Folder for the parquet files; made when missing.")],
    split: Annotated[str, typer.Option(help="Name of the split: writes NAME.rl.parquet and NAME.sft.parquet.")],
    source_format: Annotated[
        SourceFormat,
        typer.Option("--format", help="mldr: rows with prompts; dialogue: raw dialogues with queries and gold turns."),
    ] = SourceFormat.mldr,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Write the good rows; the others go to NAME.rejected.jsonl.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report there, also when rows are refused.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A parquet file of another split, whose dialogues must not occur; may be repeated."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image, instead of reading its header and end.")
    ] = False,
    embed_images: Annotated[
        bool, typer.Option("--embed-images", help="Store the images in the files: for clusters without a shared disk.")
    ] = False,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a row; rollout.limit_images of a run.")] = 8,
    max_pixels: Annotated[
        int, typer.Option(min=3136, help="Bound to which the model shrinks an image; data.ffr.max_pixels of a run.")
    ] = 602_112,
    tokenizer: Annotated[
        str | None, typer.Option(help="The model's folder, tokenizer.json or hub name, to count prompt tokens.")
    ] = None,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a prompt; data.max_prompt_length of a run. Needs --tokenizer.")
    ] = 14_512,
    window: Annotated[int | None, typer.Option(min=1, help="Cut dialogues that have more turns into windows.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Turns from one window's start to the next; half a window by default.")
    ] = None,
    window_ids: Annotated[
        WindowIds | None,
        typer.Option(
            help="global: ids of the whole dialogue; published: images count from 0 in each window. With --window."
        ),
    ] = None,
    language: Annotated[
        Language | None, typer.Option(help="Of the instructions around raw dialogues; each dialogue's own by default.")
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help="YAML with the instructions around raw dialogues: user ({query}, {dialogue}), system."),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Write the captions of raw dialogues into the prompt.")
    ] = False,
) -> None:
    """Check rows and write them as parquet for both training stages.

    Every row is checked (fields, ids, images, gold answer, repetitions). With any error nothing is written, and a
    table of the problems by kind says which rows, what was found and how to mend it. docs/data.md lists the checks.

    Example: ffr-verl prepare train.json --images-root . --output data --split train

    Example: ffr-verl prepare wechat.jsonl --format dialogue --window 40 --window-ids global --images-root photos
    --output data --split test
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ffr_verl.data.prepare import prepare as prepare_rows
    from ffr_verl.data.statistics import table_rows
    from ffr_verl.data.windows import WindowSettings

    _clean_up_when_terminated()
    if window is None and (stride is not None or window_ids is not None):
        raise FFRError("--stride and --window-ids go with --window TURNS")
    if window is not None and window_ids is None:
        raise FFRError("--window needs --window-ids: global (ids of the whole dialogue) or published (docs/data.md)")
    windows = None
    if window is not None and window_ids is not None:
        windows = WindowSettings(window, stride or max(1, window // 2), window_ids.value)
    size = source.stat().st_size if source.is_file() else None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"preparing {split}", total=size)
        summary = prepare_rows(
            source,
            images_root=images_root,
            output=output,
            split=split,
            source_format=source_format.value,
            skip_invalid=skip_invalid,
            decode=decode,
            embed_images=embed_images,
            max_images=max_images,
            max_pixels=max_pixels,
            tokenizer=tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            against=against or (),
            window=windows,
            language=None if language is None else language.value,
            template=template,
            captions=captions,
            report=report,
            on_position=lambda position: progress.update(task, completed=position),
        )
    for errors, title in ((True, "left out"), (False, "warnings")):
        if problems := summary.problems.table(errors=errors):
            console.print(f"{title}:\n{problems}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    table = Table(title=f"{split}: {summary.seconds:.1f} s")
    for name in ("", "mean", "p95"):
        table.add_column(name, justify="right" if name else "left")
    for line in table_rows(summary.statistics):
        table.add_row(*line)
    if summary.rejected:
        table.add_row("rows left out", f"{summary.rejected:,}", "")
    console.print(table)
    for path in (summary.rl_path, summary.sft_path, summary.rejected_path, report):
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A parquet file of `ffr-verl prepare`, MLDR rows or raw dialogues.")],
    row: Annotated[int, typer.Option(min=0, help="Number of the row, from 0.")] = 0,
    images_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; by default the one recorded in a parquet file.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The model's folder, tokenizer.json or hub name, to count prompt tokens.")
    ] = None,
) -> None:
    """Show a row: turns, images with their sizes, the query, the gold fragment marked.

    Example: ffr-verl inspect data/train.rl.parquet --row 7
    """
    from ffr_verl.data.inspection import render_row

    console.print(render_row(file, row, root=images_root, tokenizer=tokenizer))


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="Short dialogues (raw dialogues), JSON list or JSONL.")],
    output: Annotated[Path, typer.Argument(help="JSONL of raw dialogues to write, for prepare --format dialogue.")],
    dialogues: Annotated[int, typer.Option(min=1, help="How many long dialogues to make.")],
    topics: Annotated[int, typer.Option(min=1, help="Short dialogues in a long one.")] = 3,
    layout: Annotated[
        Layout, typer.Option(help="blocks: one after another; interleaved: taking turns; mixed: either, by chance.")
    ] = Layout.mixed,
    dispersion: Annotated[
        float | None,
        typer.Option(help="Wanted span of a fragment over its size in interleaved dialogues, from 1 (dense)."),
    ] = None,
    negatives: Annotated[float, typer.Option(help="Share of queries that ask for what is not there, 0 to 1.")] = 0.15,
    queries: Annotated[int, typer.Option(min=1, help="Queries of a dialogue, each for another topic.")] = 1,
    query_field: Annotated[
        list[str] | None, typer.Option(help="Field of a short dialogue with its query or queries; may be repeated.")
    ] = None,
    keep_speakers: Annotated[
        bool, typer.Option("--keep-speakers", help="Keep the speakers' names; user1 and user2 by turns otherwise.")
    ] = False,
    prefix: Annotated[str, typer.Option(help="Start of each dialogue_id.")] = "built",
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
) -> None:
    """Compose long dialogues of several topics from short ones, with queries for their parts.

    A short dialogue is a raw dialogue with a query_text (docs/data.md) and, where dialogues share one, a topic.

    Example: ffr-verl build short.jsonl long.jsonl --dialogues 10000 --dispersion 1.6
    """
    from ffr_verl.data.compose import ComposeSettings
    from ffr_verl.data.compose import build as build_dialogues

    _clean_up_when_terminated()
    settings = ComposeSettings(topics, layout.value, dispersion, negatives, queries, keep_speakers)
    with console.status("composing"):
        count, mean = build_dialogues(
            source,
            output,
            dialogues=dialogues,
            settings=settings,
            query_fields=query_field or ("query_text",),
            prefix=prefix,
            seed=seed,
        )
    console.print(
        f"wrote {output}: {dialogues} dialogues, {count} queries, mean dispersion {mean:.2f}", soft_wrap=True
    )


@app.command()
def embed(
    data: Annotated[
        list[Path],
        typer.Argument(help="NAME.rl.parquet of `ffr-verl prepare`; give training and validation together."),
    ],
    model: Annotated[str, typer.Option(help="A sentence-transformers model: name on the hub, or folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the store to make.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the best there is by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items that the model gets at a time.")] = 64,
    dtype: Annotated[StoredDtype, typer.Option(help="Of the stored vectors.")] = StoredDtype.float16,
    normalize: Annotated[bool, typer.Option(help="Scale vectors to length 1.")] = True,
    images_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; by default the one recorded in the files.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Encode on this Ray cluster: auto, HOST:PORT, or local to start one here."
        ),
    ] = None,
    ray_workers: Annotated[int | None, typer.Option(min=1, help="Encoders in the cluster.")] = None,
    ray_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs for each encoder in the cluster.")] = 0.0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model's repository brings.")] = False,
    force: Annotated[bool, typer.Option(help="Replace a store that is there.")] = False,
    restart: Annotated[bool, typer.Option(help="Forget what an interrupted run left.")] = False,
) -> None:
    """Embed utterances and images for the coherence reward.

    Each different text and each different picture is embedded once. A multimodal model embeds both; a text-only one
    embeds the utterances, and says so. A run that was interrupted goes on when it is started again.

    Use the store with reward.custom_reward_function.reward_kwargs.embeddings=OUTPUT.

    Example: ffr-verl embed data/train.rl.parquet data/val.rl.parquet --model BAAI/bge-m3 --output data/embeddings
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ffr_verl.embeddings.embed import embed as embed_files
    from ffr_verl.embeddings.encoders import EncoderSettings

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        reading = progress.add_task("reading rows", total=None)
        encoding = progress.add_task("embedding", total=None, visible=False)
        summary = embed_files(
            data,
            output,
            EncoderSettings(
                model=model,
                revision=revision,
                device=device,
                batch_size=batch_size,
                normalize=normalize,
                trust_remote_code=trust_remote_code,
            ),
            dtype=dtype.value,
            images_root=images_root,
            ray_address=ray,
            ray_workers=ray_workers,
            ray_gpus_per_worker=ray_gpus,
            force=force,
            restart=restart,
            say=lambda text: console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
            on_rows=lambda rows: progress.update(reading, completed=rows, total=rows),
            on_items=lambda done, total: progress.update(encoding, completed=done, total=total, visible=True),
        )
    table = Table(title=escape(f"{output}: {summary.manifest.model}"))
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("utterances", f"{summary.utterances:,}")
    table.add_row("  different texts", f"{summary.texts:,}")
    table.add_row("  without text", f"{summary.without_text:,}")
    table.add_row("image paths", f"{summary.image_paths:,}")
    table.add_row("  different images embedded", f"{summary.images:,}")
    table.add_row("dimension", f"{summary.manifest.dimension:,}")
    table.add_row("taken over from an interrupted run", f"{summary.resumed_items:,}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    console.print(table)
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def score(
    data: Annotated[
        list[Path],
        typer.Option(help="NAME.rl.parquet of `ffr-verl prepare`; may be repeated, in the order of training."),
    ],
    output: Annotated[Path, typer.Option(help="The difficulty file to write.")],
    model: Annotated[str | None, typer.Option(help="The SFT model: a Hugging Face folder, or hub name.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="JSONL of answers by any tool instead of a model (docs/curriculum.md).")
    ] = None,
    answer_style: Annotated[
        AnswerStyle, typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>.")
    ] = AnswerStyle.plain,
    samples: Annotated[
        int, typer.Option(min=0, help="Answers drawn at temperature 1 beside the greedy one, for a pass rate.")
    ] = 0,
    images_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; by default the one recorded in the files.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    max_model_len: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and answer.")] = 15_536,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a prompt.")] = 8,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of a GPU's memory.")] = 0.9,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
    ] = False,
    chart: Annotated[
        Path | None, typer.Option(help="PNG to draw; beside the difficulty file, with its name, by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a difficulty file that is there.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")] = False,
) -> None:
    """Score how hard each training row is, by the SFT model's own greedy answer.

    Writes f1, entropy, mean log-probability, dispersion and the level (easy, middle, confusing, hard) of each row. A
    run that was interrupted goes on when it is started again.

    Use the file with data.ffr.curriculum.difficulty=OUTPUT.

    Example: ffr-verl score --model models/sft --data data/train.rl.parquet --output data/difficulty.parquet
    """
    from ffr_verl.inference.difficulty_chart import draw_difficulty
    from ffr_verl.inference.generate import GeneratorSettings
    from ffr_verl.inference.progress import RowProgress
    from ffr_verl.inference.rows import images_root_of
    from ffr_verl.inference.score import score as score_rows

    _clean_up_when_terminated()
    if predictions is not None and samples:
        raise FFRError("--samples draws answers of --model; it does not go with --predictions")
    settings = None
    if model is not None:
        settings = GeneratorSettings(
            model=model,
            images_root=images_root_of(data, images_root),
            max_new_tokens=max_new_tokens,
            max_model_len=max_model_len,
            max_images=max_images,
            samples=samples,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
        )
    with RowProgress("scoring", console) as progress:
        summary = score_rows(
            data,
            output,
            settings=settings,
            predictions=predictions,
            style=answer_style.value,
            force=force,
            restart=restart,
            say=lambda text: console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
            on_rows=progress.update,
        )
    rows = summary.table.num_rows
    table = Table(title=f"{rows:,} rows, {summary.seconds:.0f} s")
    for name in ("level", "rows", "", "f1", "dispersion"):
        table.add_column(name, justify="left" if name in ("level", "") else "right")
    for level, count, f1, spread in summary.levels():
        table.add_row(level, f"{count:,}", "#" * round(30 * count / rows), f"{f1:.3f}", f"{spread:.2f}")
    console.print(table)
    by_dispersion = Table(title="f1 against dispersion of the gold fragment")
    for name in ("dispersion", "rows", "f1", ""):
        by_dispersion.add_column(name, justify="left" if name in ("dispersion", "") else "right")
    for name, count, f1 in summary.f1_by_dispersion():
        by_dispersion.add_row(name, f"{count:,}", f"{f1:.3f}", "#" * round(30 * f1))
    console.print(by_dispersion)
    picture = chart or output.with_suffix(".png")
    draw_difficulty(summary.table, picture)
    for path in (output, picture):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def infer(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="JSONL of predictions to write.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="NAME.rl.parquet of `ffr-verl prepare`; may be repeated.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A Hugging Face folder, or hub name; with --endpoint a name that the server knows."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask this OpenAI-compatible server, such as http://localhost:8000/v1."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the server's key.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy answers.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the probability that tokens are drawn from.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of drawn answers; 0 by default, a server's own otherwise.")] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Write the log-probabilities of the answers' tokens.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a prompt.")] = 8,
    images_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; by default the one recorded in the files.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Cut dialogues that have more turns, answer the windows, unite the answers."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Turns from one window's start to the next; half a window by default.")
    ] = None,
    window_ids: Annotated[
        WindowIds,
        typer.Option(help="global: ids of the whole dialogue; published: images count from 0 in each window."),
    ] = WindowIds.whole,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            help="NAME.rl.parquet of the whole dialogues, when --data or --predictions hold windows of them; may be "
            "repeated."
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Answers to windows by any tool, to be united with --merge; no model is asked."),
    ] = None,
    answer_style: Annotated[
        AnswerStyle,
        typer.Option(help="Of windows' answers: plain, or reasoning for <think>…</think><answer>…</answer>."),
    ] = AnswerStyle.plain,
    lora: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter for the model.")] = None,
    max_model_len: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and answer.")] = 15_536,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of a GPU's memory.")] = 0.9,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests to the server in flight.")] = 8,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a request may take.")] = 300.0,
    retries: Annotated[
        int, typer.Option(min=0, help="Of a request that fails for the moment: 429, 5xx, timeouts, lost connections.")
    ] = 6,
    body: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Object with further fields of each request; null takes a field out."),
    ] = None,
    allow_errors: Annotated[
        bool,
        typer.Option("--allow-errors", help="Write the output although the server gave no answer to some rows."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace predictions that are there.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")] = False,
) -> None:
    """Answer the rows of a data set with a model, greedily, and write the predictions.

    The model runs here in vLLM, or is asked over the network with --endpoint; nothing else is contacted. A run that
    was interrupted goes on when it is started again. docs/inference.md describes the rows, windows and servers.

    Example: ffr-verl infer --model models/grpo --data data/test.rl.parquet --output pred.jsonl --logprobs

    Example: ffr-verl infer --model models/grpo --data data/wechat.rl.parquet --window 40 --output pred.jsonl

    Example: ffr-verl infer --endpoint https://api.openai.com/v1 --api-key-env OPENAI_API_KEY --model gpt-4o
    --data data/test.rl.parquet --output gpt-4o.jsonl

    Example: ffr-verl infer --data windows.rl.parquet --merge whole.rl.parquet --model models/grpo --output pred.jsonl
    """
    from ffr_verl.data.windows import WindowSettings
    from ffr_verl.inference.endpoint import EndpointSettings, read_body
    from ffr_verl.inference.generate import GeneratorSettings
    from ffr_verl.inference.infer import infer as infer_rows
    from ffr_verl.inference.infer import merge_predictions
    from ffr_verl.inference.progress import RowProgress
    from ffr_verl.inference.rows import images_root_of

    _clean_up_when_terminated()
    of_server = ("api_key_env", "concurrency", "timeout", "retries", "body", "allow_errors")
    of_engine = ("lora", "max_model_len", "tensor_parallel_size", "gpu_memory_utilization", "trust_remote_code")
    if window is None:
        _refuse_options(context, ("stride", "window_ids"), "goes with --window TURNS")
    if merge:
        _refuse_options(context, ("window", "limit"), "does not go with --merge, which needs all windows as they are")
    if predictions is not None:
        _refuse_options(context, ("data", "model", "endpoint"), "does not go with --predictions, which only merges")
        if not merge:
            raise FFRError("--predictions: give the file of the whole dialogues too, with --merge NAME.rl.parquet")
        summary = merge_predictions(predictions, merge, output, style=answer_style.value, force=force)
    else:
        if not data:
            raise FFRError("give --data NAME.rl.parquet of `ffr-verl prepare`")
        if model is None:
            raise FFRError("give --model: a model folder or hub name, or with --endpoint a name that the server knows")
        common: dict[str, Any] = {
            "model": model,
            "images_root": images_root_of(data, images_root),
            "max_new_tokens": max_new_tokens,
            "max_images": max_images,
            "temperature": temperature,
            "top_p": top_p,
            "logprobs": logprobs,
        }
        settings: GeneratorSettings | EndpointSettings
        if endpoint is not None:
            _refuse_options(context, of_engine, "is the server's business; it does not go with --endpoint")
            settings = EndpointSettings(
                **common,
                url=endpoint,
                api_key_env=api_key_env,
                seed=seed,
                concurrency=concurrency,
                timeout=timeout,
                retries=retries,
                body=read_body(body),
            )
        else:
            _refuse_options(context, of_server, "goes with --endpoint URL")
            settings = GeneratorSettings(
                **common,
                seed=seed or 0,
                lora=lora,
                max_model_len=max_model_len,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                trust_remote_code=trust_remote_code,
            )
        with RowProgress("answering", console) as progress:
            summary = infer_rows(
                data,
                output,
                settings,
                window=None
                if window is None
                else WindowSettings(window, stride or max(1, window // 2), window_ids.value),
                whole=merge or (),
                style=answer_style.value,
                limit=limit,
                allow_errors=allow_errors,
                force=force,
                restart=restart,
                say=lambda text: console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
                on_rows=progress.update,
            )
    title = f"{summary.rows:,} prediction{'s' * (summary.rows != 1)}, {summary.seconds:.0f} s"
    table = Table(title=title, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    lines = [
        ("rows asked", summary.asked),
        ("  by an interrupted run", summary.resumed),
        ("  cut off at --max-new-tokens", summary.cut_off),
    ]
    lines = lines if summary.asked else []  # --predictions: nothing was asked
    lines.append(("  without an answer", sum(count for _, count in summary.errors)))
    if merge or window is not None:
        lines.append(("windows whose answer is not in the format", summary.malformed_windows))
    for name, value in lines:
        table.add_row(name, f"{value:,}")
    console.print(table)
    for reason, count in summary.errors[:_MOST_REASONS]:
        console.print(
            f"{count:,} without an answer: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )
    if len(summary.errors) > _MOST_REASONS:
        console.print(f"and {len(summary.errors) - _MOST_REASONS:,} more reasons", style="yellow", highlight=False)
    for path in (summary.windows, output):
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _refuse_options(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that the user gave and that would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise FFRError(f"--{name.replace('_', '-')} {reason}")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="JSONL of predictions, gzipped or not.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number there, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the metrics there, break-downs too.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Predictions of another model for the same rows: show the difference.")
    ] = None,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Leave out lines that cannot be used, and count them.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    row_format: Annotated[
        PredictionFormat,
        typer.Option("--format", help="ffr: as ffr-verl infer writes; verl: a file of trainer.validation_data_dir."),
    ] = PredictionFormat.ffr,
    answer_style: Annotated[
        AnswerStyle, typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>.")
    ] = AnswerStyle.plain,
) -> None:
    """Say how good predictions are: precision, recall, F1 and MCC, faults of the answers, where they fail.

    Micro averages are the published ones; docs/evaluation.md defines every number. With --compare the difference is
    shown too, on the rows that both files have (dialogue_id, query and gold answer are the same).

    Example: ffr-verl evaluate pred.jsonl --compare baseline.jsonl --json result.json
    """
    from ffr_verl.evaluation.command import evaluate_command

    evaluate_command(
        predictions,
        compare=compare,
        json_file=json_file,
        csv_file=csv_file,
        lenient=lenient,
        resamples=bootstrap,
        seed=seed,
        row_format=row_format.value,
        style=answer_style.value,
        console=console,
    )


@app.command()
def report(
    predictions: Annotated[Path, typer.Argument(help="JSONL of predictions, gzipped or not.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    images_root: Annotated[
        Path | None,
        typer.Option(help="Folder that the rows' image paths are relative to; by default that of the predictions."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="NAME.rl.parquet of `ffr-verl prepare`, for the images root recorded there.")
    ] = None,
    embeddings: Annotated[Path | None, typer.Option(help="An embedding store, for the coherence reward.")] = None,
    coherence_mode: Annotated[
        CoherenceChoice, typer.Option(help="See docs/rewards.md. With --embeddings.")
    ] = CoherenceChoice.continuous,
    answer_style: Annotated[
        AnswerStyle, typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>.")
    ] = AnswerStyle.plain,
    row_format: Annotated[
        PredictionFormat,
        typer.Option("--format", help="ffr: as ffr-verl infer writes; verl: a file of trainer.validation_data_dir."),
    ] = PredictionFormat.ffr,
    compare: Annotated[
        Path | None, typer.Option(help="Predictions of another model for the same rows: show the difference.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="Folder with a verl run's metrics (JSONL or event files), for its curves.")
    ] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out lines that cannot be used.")] = False,
    most_rows: Annotated[
        int, typer.Option(min=1, help="Most rows in the file; of more those of least F1 are shown.")
    ] = 5_000,
    thumbnail_size: Annotated[
        int, typer.Option(min=16, max=1024, help="Most pixels of a picture's longer side.")
    ] = 240,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Fragment retrieval report",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write predictions as one HTML file to look at: metrics, charts and every dialogue with its fragments.

    The file holds small copies of the images and needs neither the network nor another file.

    Example: ffr-verl report pred.jsonl --output report.html --images-root data
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ffr_verl.evaluation.report import ReportSettings, write_report

    settings = ReportSettings(
        images_root=images_root,
        data=data,
        embeddings=embeddings,
        coherence_mode=coherence_mode.value,
        answer_style=answer_style.value,
        row_format=row_format.value,
        compare=compare,
        training=training,
        lenient=lenient,
        most_rows=most_rows,
        thumbnail_size=thumbnail_size,
        title=title,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        summary = write_report(
            predictions,
            output,
            settings,
            force=force,
            say=lambda text: console.print(text, style="yellow", highlight=False, soft_wrap=True, markup=False),
            on_progress=lambda phase, done, total: progress.update(
                task, description=phase, completed=done, total=total
            ),
        )
    if summary.skipped:
        console.print(f"{summary.skipped:,} lines left out", style="yellow", highlight=False)
    if summary.shown < summary.rows:
        console.print(
            f"{summary.shown:,} of {summary.rows:,} rows are shown, those of least F1 (--most-rows)", style="yellow"
        )
    for problem, count in summary.missing.most_common():
        console.print(f"{count:,} images not shown: {problem}", style="yellow", highlight=False, markup=False)
    console.print(
        f"wrote {output}: {summary.shown:,} rows, {summary.pictures:,} pictures, {summary.size / 1e6:.1f} MB, "
        f"{summary.seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def merge(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="default_local_dir of a run (newest step), a global_step_N in it, or its actor folder."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to make: config, weights, tokenizer, processor.")],
    best: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Of a GRPO run: the checkpoint whose validation was best by this metric, such as micro_joint_f1, "
            "instead of the newest.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the output folder when it exists.")] = False,
) -> None:
    """Make a plain Hugging Face folder of a verl checkpoint, LoRA folded in.

    Works for both stages, with LoRA and full fine-tuning. The result starts stage 2, and vLLM and transformers load
    it.

    Example: ffr-verl merge checkpoints/ffr/sft --output models/sft
    """
    from ffr_verl.checkpoints import best_checkpoint
    from ffr_verl.merge import merge_checkpoint

    if best is not None:
        step, value, checkpoint = best_checkpoint(checkpoint, best)
        console.print(f"step {step} is the best: {best} {value:.4f}", highlight=False, markup=False, soft_wrap=True)
    with console.status("merging"):
        merged = merge_checkpoint(checkpoint, output, force=force)
    console.print(f"wrote {merged}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    quick: Annotated[bool, typer.Option(help="Less of everything, in about half of the time.")] = False,
    restart: Annotated[bool, typer.Option(help="Forget what an earlier call made.")] = False,
    stack: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(
            help="Train with the *_cpu recipes or with the GPU ones; default: what the installed vLLM is for."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none of them.")] = False,
) -> None:
    """Run both training stages on a small drawn data set with a tiny Qwen2-VL, on the CPU or on one GPU.

    Prints and runs the commands that a user would type: prepare, SFT, merge, score, GRPO, infer, evaluate, report. A
    second call goes on where the first one ended. `make demo` installs what it needs.
    """
    from ffr_verl.demo.pipeline import DemoSettings, print_commands, run_demo
    from ffr_verl.demo.stacks import installed_stack

    chosen = stack or installed_stack()
    settings = DemoSettings.quick(chosen) if quick else DemoSettings(stack=chosen)
    if dry_run:
        print_commands(output, settings, console)
    else:
        run_demo(output, settings, restart=restart, console=console)


@app.command()
def doctor(
    data: Annotated[
        list[Path] | None, typer.Option(help="A parquet file of `ffr-verl prepare` to check; may be repeated.")
    ] = None,
) -> None:
    """Prove that this environment can train: versions, plugin, recipes through both trainers, platform, vLLM, memory,
    disk.

    Exits with status 1 when a check fails; each failed line says how to mend it.
    """
    from ffr_verl.doctor import run_checks

    checks = run_checks(data or [])
    table = Table(title="ffr-verl doctor")
    for column in ("", "check", "found"):
        table.add_column(column)
    for check in checks:
        found = check.found if check.ok else f"{check.found}\n[bold]mend:[/bold] {check.mend}"
        table.add_row("[green]ok[/green]" if check.ok else "[red]FAIL[/red]", check.name, found)
    console.print(table)
    failed = sum(not check.ok for check in checks)
    if failed:
        console.print(f"{failed} of {len(checks)} checks failed")
        raise typer.Exit(1)


@recipe_app.command("list")
def recipe_list() -> None:
    """Names of the recipes, and what each is for."""
    from ffr_verl.recipes import recipe_names, recipe_path

    for name in recipe_names():
        purpose = next(
            line.lstrip("# ").rstrip()
            for line in recipe_path(name).read_text(encoding="utf-8").splitlines()
            if line.startswith("# ") and "@package" not in line
        )
        typer.echo(f"{name:16} {purpose}")


@recipe_app.command("show")
def recipe_show(name: Annotated[str, typer.Argument(help="Name of a recipe, as in `ffr-verl recipe list`.")]) -> None:
    """Print a recipe's YAML."""
    from ffr_verl.recipes import recipe_path

    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@recipe_app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="Name of a recipe, as in `ffr-verl recipe list`.")],
    folder: Annotated[Path, typer.Argument(help="Folder that gets recipe/NEW_NAME.yaml.")],
    new_name: Annotated[str | None, typer.Option("--name", help="Name of the copy; my_NAME by default.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe for editing; run the copy with `--config-dir FOLDER +recipe=NEW_NAME`.

    The copy has a name of its own because Hydra looks into --config-dir after the installed recipes.
    """
    from ffr_verl.recipes import copy_recipe, trainer_of

    path = copy_recipe(name, folder, new_name=new_name, force=force)
    typer.echo(f"wrote {path}")
    typer.echo(
        f"edit it, then: python -m verl.trainer.{trainer_of(name)} --config-dir {folder} +recipe={path.stem} ..."
    )
