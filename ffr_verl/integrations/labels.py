"""Rows for trainers that hand a reward one text of each row, its label: EasyR1 and OpenRLHF."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffr_verl.data.parquet_files import as_list, check_columns, check_images, holds_images, rows_of_files
from ffr_verl.data.parquet_files import images_root as root_of_images
from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output, whole_or_nothing
from ffr_verl.images import resolve_image
from ffr_verl.settings import DataConfig


def label(solution: str, extra_info: Mapping[str, Any]) -> str:
    """The gold answer and what is known of the dialogue, as one text.

    Example:
        >>> read_label(label("<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>", {"index": 3}))
        ('<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>', {'index': 3})
    """
    return json.dumps({"solution": solution, "extra_info": extra_info}, ensure_ascii=False)


def read_label(text: Any) -> tuple[str, dict[str, Any] | None]:
    """Gold answer and `extra_info` of a label. A gold answer alone is a label too: `extra_info` is then `None`."""
    if not isinstance(text, str) or not text.startswith("{"):
        return text, None  # the rewards refuse a gold that is no text
    try:
        found = json.loads(text)
        return found["solution"], found["extra_info"]
    except (ValueError, KeyError) as error:
        raise FFRError(
            f"label: found {text!r:.80}, expected JSON of solution and extra_info ({error!r}); write the rows with "
            "ffr_verl.integrations.labels.write_labelled_rows"
        ) from None


def write_labelled_rows(
    files: str | Path | Sequence[str | Path], output: str | Path, *, images_root: str | Path | None = None
) -> int:
    """Write the rows of RL files as JSONL, for EasyR1 (`prompt`) and for OpenRLHF (`messages`).

    Args:
        files: `NAME.rl.parquet` of `ffr-verl prepare`.
        output: the file, replaced where there is one; columns `prompt` (all contents as one text), `messages`
            (contents cut at every image), `images` (absolute paths) and `label`.
        images_root: where the images lie, by default as recorded in the files.

    Returns:
        How many rows.

    Raises:
        FFRError: for files that are missing, of another kind, or hold their images, and images that cannot be read.
    """
    paths, count = as_list(files), 0
    check_output(Path(output), force=True, example="rows.jsonl", inputs=map(Path, paths), option="output=")
    check_columns(paths, "rl")
    for path in paths:
        if holds_images(path):
            raise FFRError(f"{path}: holds its images, and JSON takes paths; prepare it without --embed-images")
    config = DataConfig(images_root=None if images_root is None else str(images_root))
    root = root_of_images(paths, config, option="images_root=")
    check_images(paths, root, sample=True, option="images_root=")
    with whole_or_nothing([Path(output)]) as [temporary], temporary.open("w", encoding="utf-8") as file:
        for row in rows_of_files(paths):
            images = [str(resolve_image(root, image)) for image in row["images"] or ()]
            line = {
                "prompt": "\n".join([message["content"] for message in row["prompt"]]),
                "messages": with_image_parts(row["prompt"]),
                "images": images,
                "label": label(row["reward_model"]["ground_truth"], row["extra_info"]),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count
