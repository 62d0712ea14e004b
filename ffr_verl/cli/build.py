"""`ffr-verl build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import Layout, clean_up_when_terminated, console, wrote


def build(
    source: Annotated[Path, typer.Argument(help="Short dialogues; a chat's are those between two gaps.")],
    output: Annotated[Path, typer.Argument(help="JSONL of raw dialogues to write, for prepare --format dialogue.")],
    dialogues: Annotated[int, typer.Option(min=1, help="How many long dialogues to make.")],
    topics: Annotated[int, typer.Option(min=1, help="Short dialogues in a long one.")] = 3,
    layout: Annotated[
        Layout, typer.Option(help="blocks: one after another; interleaved: taking turns; mixed: either, by chance.")
    ] = "mixed",
    dispersion: Annotated[
        float | None,
        typer.Option(help="Wanted span of a fragment over its size in interleaved dialogues, from 1 (dense)."),
    ] = None,
    negatives: Annotated[float, typer.Option(help="Share of dialogues asked for what is not there, 0 to 1.")] = 0.15,
    queries: Annotated[int, typer.Option(min=1, help="Queries of a dialogue, each for another topic.")] = 1,
    query_field: Annotated[
        list[str] | None, typer.Option(help="Field of a short dialogue with its query or queries; may be repeated.")
    ] = None,
    keep_speakers: Annotated[
        bool, typer.Option("--keep-speakers", help="Keep the speakers' names; user1 and user2 by turns otherwise.")
    ] = False,
    source_format: shared.SourceFormat = "auto",
    gap_hours: shared.GapHours = 8.0,
    image_map: shared.ImageMap = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="No queries, of short dialogues that have none.")
    ] = False,
    prefix: Annotated[str, typer.Option(help="Start of each dialogue_id.")] = "built",
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
    force: shared.Force = False,
) -> None:
    """Compose long dialogues of several topics from short ones.

    Queries ask for their parts. A short dialogue is a raw dialogue with a query_text (docs/data.md) and, where
    dialogues share one, a topic.

    Example: ffr-verl build short.jsonl long.jsonl --dialogues 10000 --dispersion 1.6
    """
    from ffr_verl.data.compose import ComposeSettings
    from ffr_verl.data.compose import build as build_dialogues

    clean_up_when_terminated()
    settings = ComposeSettings(topics, layout, dispersion, negatives, queries, keep_speakers, unlabelled)
    with console.status("composing"):
        count, mean = build_dialogues(
            source,
            output,
            dialogues=dialogues,
            settings=settings,
            query_fields=query_field or ("query_text",),
            prefix=prefix,
            seed=seed,
            source_format=source_format,
            gap_hours=gap_hours,
            image_map=image_map,
            force=force,
        )
    told = "without queries" if unlabelled else f"{count} queries, mean dispersion {mean:.2f}"
    wrote(f"{output}: {dialogues} dialogues, {told}")
