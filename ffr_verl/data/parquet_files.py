"""What `ffr-verl prepare` wrote, read back: kind of file, images root, and whether the images can be read.

Needs neither torch nor verl, so the check runs before anything heavy starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ffr_verl.data.config import DataConfig
from ffr_verl.data.parquet_writer import IMAGES_ROOT_KEY
from ffr_verl.errors import FFRError
from ffr_verl.images import read_image_facts, resized, resolve_image
from ffr_verl.model_families import QWEN2_VL, ModelFamily

__all__ = ["Kind", "as_list", "check_columns", "check_images", "dialogues_of_rows", "images_root", "read_schema"]

Kind = Literal["rl", "sft"]
_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "rl": ("prompt", "images", "reward_model", "extra_info", "data_source"),
    "sft": ("messages", "images"),
}
_TRAINING_OPTION = "data.ffr.images_root=FOLDER"
_SAMPLED_ROWS = 16
_SAMPLED_GROUPS = 4
_READERS = 8


def as_list(files: Any) -> list[str]:
    """One path or a list of them, as verl's `data.train_files` takes both.

    Example:
        >>> as_list("train.rl.parquet")
        ['train.rl.parquet']
    """
    return [str(files)] if isinstance(files, (str, Path)) else [str(file) for file in files]


def read_schema(file: str) -> pa.Schema:
    """The schema of a parquet file.

    Raises:
        FFRError: when the file is missing or no parquet file.
    """
    try:
        return pq.read_schema(file)
    except FileNotFoundError:
        raise FFRError(
            f"{file}: no such file; `ffr-verl prepare` writes NAME.rl.parquet and NAME.sft.parquet"
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise FFRError(f"{file}: not a parquet file ({error}); make it again with `ffr-verl prepare`") from None


def check_columns(files: Sequence[str], kind: Kind) -> None:
    """Refuse files that lack a column of their kind.

    Raises:
        FFRError: names the file, the columns and the kind that is needed.
    """
    other: Kind = "sft" if kind == "rl" else "rl"
    for file in files:
        missing = [column for column in _COLUMNS[kind] if column not in read_schema(file).names]
        if missing:
            raise FFRError(
                f"{file}: no column {', '.join(missing)}; this stage needs NAME.{kind}.parquet of `ffr-verl prepare`, "
                f"not NAME.{other}.parquet"
            )


def images_root(files: Sequence[str], config: DataConfig, *, option: str = _TRAINING_OPTION) -> Path:
    """The folder that image paths are relative to: `config.images_root`, or the one recorded in the files.

    Args:
        files: parquet files of `ffr-verl prepare`.
        config: of the data.
        option: how the user gives the folder, for the message.

    Raises:
        FFRError: when it is not configured and the files record none, or several.
    """
    if config.images_root is not None:
        return Path(config.images_root).expanduser().resolve()
    roots = {(read_schema(file).metadata or {}).get(IMAGES_ROOT_KEY, b"").decode() for file in files}
    if len(roots) != 1 or "" in roots:
        found = "no images root is recorded" if "" in roots else f"different images roots: {', '.join(sorted(roots))}"
        raise FFRError(f"{', '.join(files)}: {found}; give {option}, or make the files with `ffr-verl prepare`")
    return Path(roots.pop())


def _first_rows_of_images(file: str, *, sample: bool) -> dict[str, int]:
    """Each image path of the file (or of some rows spread over it) and the first row that has it."""
    column = pq.read_table(file, columns=["images"]).column("images")
    count = len(column)
    step = max(1, count // _SAMPLED_ROWS) if sample else 1
    first: dict[str, int] = {}
    for row in range(0, count, step):
        for name in column[row].as_py() or ():
            first.setdefault(name, row)
    return first


def _held_images(file: str) -> Iterator[tuple[int, str, bytes]]:
    """Row, path and bytes of the images of some rows spread over a file that holds its images."""
    parquet = pq.ParquetFile(file)
    groups = parquet.num_row_groups
    first = [0, *itertools.accumulate(parquet.metadata.row_group(group).num_rows for group in range(groups))]
    # A row group may have 64 MiB, so few are read, and several rows of each.
    for group in range(0, groups, max(1, groups // _SAMPLED_GROUPS)):
        column = parquet.read_row_group(group, columns=["images"]).column("images")
        for row in range(0, len(column), max(1, len(column) // (_SAMPLED_ROWS // _SAMPLED_GROUPS))):
            for image in column[row].as_py() or ():
                yield first[group] + row, image["path"], image["bytes"] or b""


def dialogues_of_rows(file: str) -> list[dict[str, Any]]:
    """`extra_info` of some rows spread over an RL file."""
    table = pq.read_table(file, columns=["extra_info"]).column("extra_info")
    return [table[row].as_py() for row in range(0, len(table), max(1, len(table) // _SAMPLED_ROWS))]


def check_images(
    files: Sequence[str],
    root: Path,
    *,
    sample: bool,
    option: str = _TRAINING_OPTION,
    max_pixels: int | None = None,
    family: ModelFamily = QWEN2_VL,
) -> int:
    """Open each image that the files name; with `sample`, decode those of about 16 rows of each file, which finds
    damage in the middle too.

    verl drops a row with an unreadable image without a word, or fails in the middle of training. Images that a file
    holds itself were checked when it was written: only a sample of them is looked at.

    Args:
        files: parquet files of `ffr-verl prepare`.
        root: that image paths are relative to.
        sample: see above.
        option: how the user gives the root, for the message.
        max_pixels: bound to which a model shrinks them, which not every shape allows, see `resized`; `None` where no
            model of `family` sees them.
        family: of the model.

    Returns:
        How many different images were opened.

    Raises:
        FFRError: when some cannot be read: how many, and file, row and cause of the first.
    """

    def problem_of(image: str | bytes) -> str | None:
        try:
            facts = read_image_facts(image if isinstance(image, bytes) else resolve_image(root, image), decode=sample)
            if max_pixels is not None:
                resized(facts.width, facts.height, max_pixels=max_pixels, family=family)
        except ValueError as error:
            return str(error)
        return None

    opened = 0
    for file in files:
        found: list[tuple[int, str, str | None]]
        if pa.types.is_struct(read_schema(file).field("images").type.value_type):
            found = [(row, name, problem_of(held)) for row, name, held in _held_images(file)]
            place, mend = "in the file", "make the file again with `ffr-verl prepare --embed-images --decode`"
        else:
            rows = _first_rows_of_images(file, sample=sample)
            with ThreadPoolExecutor(_READERS) as readers:
                found = list(zip(rows.values(), rows, readers.map(problem_of, rows), strict=True))
            place, mend = f"images root {root}", f"bring the images there, or give {option}"
        opened += len(found)
        bad = [(row, name, problem) for row, name, problem in found if problem]
        if bad:
            row, name, problem = bad[0]
            more = f", and {len(bad) - 1} more images cannot be read" if len(bad) > 1 else ""
            raise FFRError(f"{file}: row {row}: image {name}: {problem} ({place}){more}; {mend}")
    return opened
