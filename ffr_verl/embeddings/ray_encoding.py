"""Encoding on a Ray cluster, through Ray Data: one encoder a worker, chunks go to whichever is free."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from ffr_verl.embeddings.embed import Chunk, encode_chunk
from ffr_verl.embeddings.encoders import EncoderSettings, SentenceEncoder
from ffr_verl.errors import FFRError, first_line
from ffr_verl.ray_clusters import check_cluster


class _Worker:
    """An encoder in a Ray actor; each call gets one chunk."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._encoder = SentenceEncoder(EncoderSettings(**settings))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(str(batch["name"][0]), batch["kind"][0], [str(item) for item in batch["items"][0]])
        return {"name": [chunk.name], "vectors": [encode_chunk(self._encoder, chunk)]}


def encode_on_ray(
    address: str, settings: EncoderSettings, chunks: Sequence[Chunk], *, workers: int | None, gpus: float
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Encode chunks on a cluster and yield them as they finish, in any order.

    The model's folder and the images must exist on every node. There are as many `workers` as encoders, each with so
    many `gpus`; `None` for one a GPU, or one for each two CPUs where `gpus` is 0. Raises `FFRError` when the cluster
    cannot be reached.
    """
    started_here = not ray.is_initialized()
    if started_here:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise FFRError(f"--ray {address}: {first_line(error)}") from None
    folder = Path(settings.model).expanduser()
    if folder.is_dir():  # a worker has another working directory
        settings = replace(settings, model=str(folder.resolve()))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        resources = ray.cluster_resources()
        if workers is None:
            free = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 1) // 2
            workers = max(1, int(free))
        by_name = {chunk.name: chunk for chunk in chunks}
        rows = [{"name": chunk.name, "kind": chunk.kind, "items": chunk.items} for chunk in chunks]
        encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(asdict(settings),),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            num_gpus=gpus,
            num_cpus=None if gpus else 1,
        )
        for row in encoded.iter_rows():
            yield by_name[row["name"]], np.asarray(row["vectors"], dtype=np.float32)
    finally:
        if started_here:
            ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address that cannot serve, before any work."""
    if address.startswith("ray://"):
        raise FFRError(
            f"--ray {address}: Ray Data does not run through a Ray client; start the command on a node of the "
            "cluster, with --ray auto"
        )
    check_cluster(address, where=f"--ray {address}")
