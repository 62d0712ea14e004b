"""`ffr-verl embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli.console import VectorDtype, bar, figures, refuse_options, warn, wrote
from ffr_verl.cli.options import Force


def embed(
    context: typer.Context,
    data: Annotated[
        list[Path],
        typer.Argument(help="NAME.rl.parquet of `ffr-verl prepare`; give training and validation together."),
    ],
    model: Annotated[str, typer.Option(help="A sentence-transformers model: name on the hub, or folder.")],
    output: Annotated[Path, typer.Option(help="Folder of the store to make.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the best there is by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items that the model gets at a time.")] = 64,
    dtype: Annotated[VectorDtype, typer.Option(help="Type of the stored vectors.")] = "float16",
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
    force: Force = False,
    restart: Annotated[bool, typer.Option(help="Forget what an interrupted run left.")] = False,
) -> None:
    """Embed utterances, images and queries for rewards.

    Each different text and each different picture is embedded once. A multimodal model embeds all; a text-only one
    embeds utterances and queries, and says so. A run that was interrupted is resumed when it is started again.

    Use the store with reward.custom_reward_function.reward_kwargs.embeddings=OUTPUT.

    Example: ffr-verl embed data/train.rl.parquet data/val.rl.parquet --model BAAI/bge-m3 --output data/embeddings
    """
    from rich.progress import MofNCompleteColumn, TimeElapsedColumn

    from ffr_verl.embeddings.embed import embed as embed_files
    from ffr_verl.embeddings.encoders import EncoderSettings

    if ray is None:
        refuse_options(context, ("ray_workers", "ray_gpus"), "goes with --ray ADDRESS")
    with bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
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
            dtype=dtype,
            images_root=images_root,
            ray_address=ray,
            ray_workers=ray_workers,
            ray_gpus_per_worker=ray_gpus,
            force=force,
            restart=restart,
            say=warn,
            on_rows=lambda rows: progress.update(reading, completed=rows, total=rows),
            on_items=lambda done, total: progress.update(encoding, completed=done, total=total, visible=True),
        )
    figures(
        f"{output}: {summary.manifest.model}",
        {
            "utterances": summary.utterances,
            "  without text": summary.without_text,
            "queries": summary.queries,
            "different texts": summary.texts,
            "image paths": summary.image_paths,
            "  different images embedded": summary.images,
            "dimension": summary.manifest.dimension,
            "taken over from an interrupted run": summary.resumed_items,
            "seconds": f"{summary.seconds:.1f}",
        },
    )
    wrote(output)
