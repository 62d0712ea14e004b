"""From parquet files to an embedding store: `ffr-verl embed`.

The items are cut into chunks. A finished chunk is a file in `.NAME.partial` beside the output, so a run that was
killed is resumed where it stopped; the store itself appears whole, at the end.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffr_verl.embeddings.encoders import EncoderSettings, SentenceEncoder
from ffr_verl.embeddings.plan import EmbeddingPlan, ItemKind, make_plan
from ffr_verl.embeddings.store import StoreManifest, VectorDtype, check_place, write_arrays
from ffr_verl.errors import FFRError
from ffr_verl.files import disk_errors, lock_folder

_CHUNK_ITEMS: dict[ItemKind, int] = {"text": 1024, "image": 256}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive items of one kind; `items` are texts or paths."""

    name: str
    kind: ItemKind
    items: list[str]


@dataclass(frozen=True, slots=True)
class EmbedSummary:
    """What `embed` did."""

    manifest: StoreManifest
    utterances: int  # keys
    without_text: int  # of the utterances
    queries: int  # different ones
    texts: int  # different ones of utterances and queries
    image_paths: int  # keys
    images: int  # different ones among them; 0 when the model takes text only
    resumed_items: int  # that an earlier, interrupted run had embedded
    seconds: float  # wall time


def encode_chunk(encoder: SentenceEncoder, chunk: Chunk) -> np.ndarray:
    """Vectors of a chunk's items, shape `(items, dimension)`."""
    if chunk.kind == "text":
        return encoder.encode_texts(chunk.items)
    return encoder.encode_images([Path(item) for item in chunk.items])


def embed(
    files: Sequence[Path],
    output: Path,
    settings: EncoderSettings,
    *,
    dtype: VectorDtype = "float16",
    images_root: Path | None = None,
    ray_address: str | None = None,
    ray_workers: int | None = None,
    ray_gpus_per_worker: float = 0.0,
    force: bool = False,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_items: Callable[[int, int], None] = lambda done, total: None,
) -> EmbedSummary:
    """Embed the utterances, images and queries of RL parquet files and write the store.

    Options as of `ffr-verl embed`; `say` is told what a user should know before the work starts, `on_rows` how many
    rows were read, `on_items` how many items were encoded, and of how many.

    Raises `FFRError` for what `check_place`, `check_address`, `make_plan`, `SentenceEncoder` and `write_arrays`
    refuse, and a partial run of other data or settings.
    """
    started = time.monotonic()
    check_place(output, overwrite=force)
    if ray_address is not None:
        _check_ray(ray_address)
    plan = make_plan(files, images_root_folder=images_root, on_row=on_rows)
    encoder = SentenceEncoder(settings)
    takes_images = encoder.takes_images
    if plan.images and not takes_images:
        say(
            f"{settings.model} takes text only: the {len(plan.images)} images get no vector, coherence will follow "
            "the utterances alone (a multimodal model embeds both)"
        )
    if plan.renamed_dialogues:
        say(
            f"{len(plan.renamed_dialogues)} dialogues have an id that means another dialogue in an earlier split: "
            f"they are kept as SPLIT/ID, such as {plan.renamed_dialogues[0]}, where the reward finds them"
        )
    chunks = _chunks(plan, takes_images)
    if not chunks:
        raise FFRError("there is nothing to embed: no utterance has text")
    total = sum(len(chunk.items) for chunk in chunks)
    digest = plan.digest(
        model=settings.model, revision=encoder.revision, normalize=settings.normalize, images=takes_images
    )
    partial = output.parent / f".{output.name}.partial"
    with disk_errors(partial):
        lock = lock_folder(partial)
    missing = _missing(partial, digest, chunks, restart=restart, say=say)
    finished = resumed = total - sum(len(chunk.items) for chunk in missing)
    if resumed:
        say(f"resumed: {resumed} of {total} items are there from an interrupted run")
    on_items(finished, total)
    encoded: Iterable[tuple[Chunk, np.ndarray]] = ((chunk, encode_chunk(encoder, chunk)) for chunk in missing)
    if ray_address is not None and missing:
        from ffr_verl.embeddings.ray_encoding import encode_on_ray

        encoded = encode_on_ray(ray_address, settings, missing, workers=ray_workers, gpus=ray_gpus_per_worker)
    for chunk, vectors in encoded:
        _save(partial / chunk.name, vectors)
        finished += len(chunk.items)
        on_items(finished, total)
    manifest = write_arrays(
        output,
        rows=(np.load(partial / chunk.name) for chunk in chunks),
        index=_index(plan, takes_images),
        dimension=np.load(partial / chunks[0].name).shape[1],
        model=settings.model,
        revision=encoder.revision,
        dtype=dtype,
        normalized=settings.normalize,
        overwrite=force,
    )
    shutil.rmtree(partial)
    lock.close()
    return EmbedSummary(
        manifest=manifest,
        utterances=len(plan.text_keys),
        texts=len(plan.texts),
        without_text=sum(position is None for position in plan.text_keys.values()),
        queries=len(plan.query_keys),
        image_paths=len(plan.image_keys),
        images=len(plan.images) if takes_images else 0,
        resumed_items=resumed,
        seconds=time.monotonic() - started,
    )


def _chunks(plan: EmbeddingPlan, takes_images: bool) -> list[Chunk]:
    items: dict[ItemKind, list[str]] = {"text": plan.texts}
    if takes_images:
        items["image"] = [str(path) for path in plan.images]
    return [
        Chunk(f"{kind}-{start:09}.npy", kind, values[start : start + _CHUNK_ITEMS[kind]])
        for kind, values in items.items()
        for start in range(0, len(values), _CHUNK_ITEMS[kind])
    ]


def _check_ray(address: str) -> None:
    try:
        from ffr_verl.embeddings.ray_encoding import check_address
    except ImportError as error:
        raise FFRError(f"--ray {address}: Ray Data is not installed ({error}): pip install 'ray[data]'") from None
    check_address(address)


def _missing(
    partial: Path, digest: str, chunks: Sequence[Chunk], *, restart: bool, say: Callable[[str], None]
) -> list[Chunk]:
    """The chunks that an interrupted run of the same work has not left whole."""
    record = partial / "work.json"
    with disk_errors(partial):
        if restart:
            for file in (*partial.glob("*.npy"), record):
                file.unlink(missing_ok=True)
        left = {file.name for file in partial.glob("*.npy")}
        try:
            recorded = json.loads(record.read_text(encoding="utf-8"))["digest"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            recorded = None
        if left and recorded != digest:
            raise FFRError(
                f"{partial}: an interrupted run of other data, another model or other settings; finish that one, or "
                "forget it with --restart"
            )
        if not left:
            record.write_text(json.dumps({"digest": digest}), encoding="utf-8")
    missing = []
    for chunk in chunks:
        if chunk.name not in left or not _is_whole(partial / chunk.name, len(chunk.items)):
            if chunk.name in left:
                say(f"{partial / chunk.name}: is damaged, its {len(chunk.items)} items are embedded again")
            missing.append(chunk)
    return missing


def _is_whole(file: Path, rows: int) -> bool:
    data = file.read_bytes()
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        return False
    return len(np.load(file, mmap_mode="r")) == rows


def _save(file: Path, vectors: np.ndarray) -> None:
    """Write a chunk, with a checksum behind it, where `np.load` does not look."""
    content = io.BytesIO()
    np.save(content, vectors)
    data, temporary = content.getvalue(), file.with_suffix(".tmp")
    with disk_errors(file, "run the same command again when that is mended"):
        temporary.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
        os.replace(temporary, file)


def _index(plan: EmbeddingPlan, takes_images: bool) -> Iterator[tuple[str, int]]:
    """Each key with its row; texts come first."""
    for key, position in [*plan.text_keys.items(), *plan.query_keys.items()]:
        yield key, -1 if position is None else position
    for key, image in plan.image_keys.items():
        yield key, len(plan.texts) + image if takes_images else -1
