"""`ffr-verl label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import clean_up_when_terminated, console, figures, warn, wrote
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output

_MOST_REASONS = 5  # why dialogues are left out


def label(
    dialogues: Annotated[Path, typer.Argument(help="A file of dialogues or an exported chat, as `prepare` reads it.")],
    output: Annotated[Path, typer.Option(help="JSONL of MLDR rows to write, for `prepare`.")],
    endpoint: shared.Endpoint = None,
    model: Annotated[str | None, typer.Option(help="Name that the server knows; where it has one, that one.")] = None,
    api_key_env: shared.ApiKeyEnv = None,
    header_env: shared.HeaderEnv = None,
    source_format: shared.SourceFormat = "auto",
    queries: Annotated[int, typer.Option(min=1, help="Most queries with a fragment to ask for of a dialogue.")] = 3,
    negatives: Annotated[int, typer.Option(min=0, help="Queries that nothing answers, of each dialogue.")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with prompts of your own (docs/data.md).")
    ] = None,
    tries: Annotated[int, typer.Option(min=1, help="Times that a dialogue is asked while answers are refused.")] = 3,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Send captions in place of pictures, to a model that sees none.")
    ] = False,
    images_root: shared.ChatImagesRoot = None,
    image_map: shared.ImageMap = None,
    gap_hours: shared.GapHours = 8.0,
    max_new_tokens: shared.MaxNewTokens = 2048,
    max_images: shared.MaxImages = 16,
    model_family: shared.ServedFamily = "qwen2_vl",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy answers.")] = 0.0,
    concurrency: shared.Concurrency = 8,
    timeout: shared.Timeout = 300.0,
    retries: shared.Retries = 6,
    body: shared.Body = None,
    force: shared.Force = False,
    restart: shared.Restart = False,
) -> None:
    """Make a data set of dialogues with a language model on a server.

    The model writes queries, gold fragments and negatives. Every answer is checked against its dialogue and asked for
    again when it is wrong. Nothing is contacted but the server. A run that was interrupted is resumed when it is
    started again.

    Example: ffr-verl label result.json --endpoint http://localhost:8000/v1 --output labelled.jsonl
    """
    options = dict(locals(), logprobs=False)
    from ffr_verl.data.chat import Chat
    from ffr_verl.data.sources.rows import RowSettings
    from ffr_verl.data.sources.source import ReadSettings, read_image_map
    from ffr_verl.inference.label import LabelSettings
    from ffr_verl.inference.label import label as label_dialogues
    from ffr_verl.inference.progress import RowProgress

    clean_up_when_terminated()
    if endpoint is None:
        raise FFRError("give --endpoint URL: an OpenAI-compatible server with a language model")
    root = shared.images_root_of_chat(dialogues, images_root)
    check_output(output, force=force, example="labelled.jsonl", inputs=[dialogues, prompts, image_map])
    read = ReadSettings({} if image_map is None else read_image_map(image_map), gap_hours)
    server = shared.server_settings(options, root)
    with RowProgress("labelling", console) as progress:
        summary = label_dialogues(
            Chat(dialogues, root, source_format, RowSettings(read), model_family),
            output,
            server,
            shared.settings_of(LabelSettings, options),
            force=force,
            restart=restart,
            say=warn,
            on_rows=progress.update,
        )
    done = sum(summary.accepted)
    figures(
        f"{summary.dialogues:,} dialogues, {summary.seconds:.0f} s",
        {
            **{f"accepted at try {number}": count for number, count in enumerate(summary.accepted, start=1)},
            "left out": summary.dialogues - done,
            "share accepted": f"{done / summary.dialogues:.1%}",
            "answers of an interrupted run": summary.resumed,
            "queries with a fragment": summary.queries,
            "queries without": summary.negatives,
        },
    )
    for reason, count in summary.left_out[:_MOST_REASONS]:
        warn(f"{count:,} left out: {reason}")
    wrote(output)
