"""The parquet files of `ffr-verl prepare`, read: kind of file, images root, rows, and whether the images can be read.

Needs neither torch nor verl, so the check runs before anything heavy starts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import UNSET, Meta, UnsetType

from ffr_verl.errors import FFRError, counted, one_line
from ffr_verl.files import refuse_special
from ffr_verl.images import read_image_facts, resized, resolve_image
from ffr_verl.model_families import FAMILIES, QWEN2_VL, UNKNOWN, ModelFamily
from ffr_verl.predictions import wrong_field
from ffr_verl.settings import DataConfig

logger = logging.getLogger(__name__)

Kind = Literal["rl", "sft"]
IMAGES_ROOT_KEY = b"ffr_verl.images_root"
PAIR_KEY = b"ffr_verl.pair"  # count and CRC-32 of the rows, which both files of one call of prepare share
MODEL_FAMILY_KEY = b"ffr_verl.model_family"
_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "rl": ("prompt", "images", "reward_model", "extra_info", "data_source"),
    "sft": ("messages", "images"),
}
_FIELDS = {
    "reward_model": ("ground_truth",),
    "extra_info": ("dialogue_id", "query", "utterance_ids", "image_utterances", "images"),
}
_OF_FAMILY = ("name", "patch_size", "merge_size")
_TRAINING_OPTION = "data.ffr.images_root=FOLDER"
_SAMPLED_ROWS = 16
_SAMPLED_GROUPS = 4  # a row group may have 64 MiB
_READERS = 8
_ABSENT = "`ffr-verl prepare` writes NAME.rl.parquet and NAME.sft.parquet"
_TAIL = 8  # bytes behind the footer: its length, and the format's name
_SEAL, _SEAL_SIZE = b"ffr-seal", 12


class _Message(msgspec.Struct, gc=False):
    role: str
    content: str | list[Any]


_Name = Annotated[str, Meta(min_length=1)]
_Messages = Annotated[list[_Message], Meta(min_length=1)]


class _Image(msgspec.Struct, gc=False):
    path: _Name
    content: bytes | None = msgspec.field(default=None, name="bytes")


class _Reward(msgspec.Struct, gc=False):
    ground_truth: str | UnsetType | None = UNSET


class _Info(msgspec.Struct, gc=False):
    dialogue_id: str | int | UnsetType = UNSET
    query: str | UnsetType | None = UNSET
    utterance_ids: list[int] | UnsetType = UNSET
    image_ids: list[int] | UnsetType | None = UNSET
    image_utterances: list[int] | UnsetType = UNSET
    images: list[str] | UnsetType | None = UNSET
    split: str | UnsetType | None = UNSET
    window: dict[str, Any] | UnsetType | None = UNSET


class _Row(msgspec.Struct, gc=False):
    """What rows hold where they hold it: a reader may ask for some columns, a file may have more."""

    prompt: _Messages | UnsetType = UNSET
    messages: _Messages | UnsetType = UNSET
    images: list[_Name | _Image] | UnsetType | None = UNSET
    reward_model: _Reward | UnsetType = UNSET
    extra_info: _Info | UnsetType = UNSET
    dialogue_id: str | int | UnsetType = UNSET


def as_list(files: Any) -> list[str]:
    """One path or a list of them, as verl's `data.train_files` takes both."""
    return [str(files)] if isinstance(files, (str, Path)) else [str(file) for file in files]


@contextlib.contextmanager
def open_parquet(
    file: str | Path, *, mend: str = "make it again with `ffr-verl prepare`", absent: str = _ABSENT
) -> Iterator[pq.ParquetFile]:
    """An open parquet file, whose pages are compared with their checksums when they are read, and its footer now; an
    `FFRError` when it is missing, no parquet file, or damaged where the block reads it."""
    refuse_special(file)
    found = "not a parquet file"
    try:
        with pa.OSFile(os.fsencode(file)) as source:  # a name that is no UTF-8 is fine here only
            _check_seal(source)
            parquet = pq.ParquetFile(source, page_checksum_verification=True)
            found = "cannot be read, it is damaged or holds other values"
            yield parquet
    except FileNotFoundError:
        raise FFRError(f"{file}: no such file; {absent}") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError, IndexError) as error:
        raise FFRError(f"{file}: {found} ({one_line(str(error))}); {mend}") from None


def _check_seal(file: pa.NativeFile) -> None:
    """Compare the footer with the checksum in front of it, where `seal_parquet` has put one."""
    if (size := file.size()) < _TAIL:
        return
    file.seek(size - _TAIL)
    start = size - _TAIL - int.from_bytes(file.read(4), "little")
    if start >= _SEAL_SIZE:
        file.seek(start - _SEAL_SIZE)
        seal = file.read(_SEAL_SIZE)
        if seal.startswith(_SEAL) and seal != _seal(file.read()):
            raise pa.ArrowInvalid("the checksum of its footer differs")
    file.seek(0)


def _seal(footer: bytes) -> bytes:
    return _SEAL + zlib.crc32(footer).to_bytes(4, "little")


def seal_parquet(path: Path) -> None:
    """Put a checksum of the footer in front of it, where readers of parquet do not look: the format has checksums of
    pages only."""
    with path.open("r+b") as file:
        file.seek(-_TAIL, os.SEEK_END)
        start = file.seek(-_TAIL - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        footer = file.read()
        file.seek(start)
        file.write(_seal(footer) + footer)


def batches_of(
    file: str | Path, *, columns: Sequence[str] | None = None, batch_size: int = 256
) -> Iterator[pa.RecordBatch]:
    """All rows of a file in batches, of all columns or of some (a name such as `extra_info.dialogue_id` is a part of a
    column); errors as those of `open_parquet`."""
    with open_parquet(file) as parquet:
        rows = 0
        for batch in parquet.iter_batches(batch_size=batch_size, columns=columns and list(columns)):
            rows += len(batch)
            yield batch
        if rows != parquet.metadata.num_rows:  # Arrow says nothing of a page that it takes for one of another kind
            raise pa.ArrowInvalid(f"damaged: {rows} rows of {parquet.metadata.num_rows}")


def check_pages(files: Sequence[str | Path]) -> None:
    """Read files whole, so that readers which do not look at the checksums of pages (datasets, as verl and TRL use it)
    do not train on damaged rows; an `FFRError` names the file."""
    for file in files:
        for _ in batches_of(file):
            pass


def count_rows(file: str | Path) -> int:
    """Rows of a parquet file; errors as those of `open_parquet`."""
    with open_parquet(file) as parquet:
        return int(parquet.metadata.num_rows)


def read_schema(file: str | Path) -> pa.Schema:
    """The schema of a parquet file; errors as those of `open_parquet`."""
    with open_parquet(file) as parquet:
        return parquet.schema_arrow


def holds_images(file: str | Path) -> bool:
    """Whether a file holds its images, and not their paths only."""
    kind = read_schema(file).field("images").type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    if inner is not None and pa.types.is_struct(inner) and {"path", "bytes"} <= {one.name for one in inner}:
        return True
    if inner is None or not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
        raise FFRError(
            f"{file}: column images: found {kind}, expected lists of paths, or of objects with path and bytes; make "
            "the file again with `ffr-verl prepare`"
        )
    return False


def rows_of_files(files: Sequence[str | Path], *, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of files, one after another; all of their columns, or those of some names that a file has, see
    `batches_of`."""
    for file in files:
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches_of(file, columns=columns))
        for number, row in enumerate(rows):
            yield _checked(row, file, number)


def _checked(row: dict[str, Any], file: str | Path, number: int) -> dict[str, Any]:
    """The row, whose values are of the kinds that all of its readers expect."""
    try:
        msgspec.convert(row, _Row, builtin_types=(bytes,))
    except msgspec.ValidationError as wrong:
        raise FFRError(
            f"{file}: row {number}: {wrong_field(wrong)}; make the file again with `ffr-verl prepare`"
        ) from None
    return row


def _groups(parquet: pq.ParquetFile) -> Iterator[tuple[int, int, int]]:
    """Of each row group its number, the number of its first row and how many rows it has."""
    first = 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        yield group, first, count
        first += count


def row_of_file(file: str | Path, number: int) -> dict[str, Any]:
    """A row, for which no more is read than its row group; an `FFRError` when there is none of the number."""
    with open_parquet(file) as parquet:
        for group, first, count in _groups(parquet):
            if number < first + count:
                row = parquet.read_row_group(group).slice(number - first, 1).to_pylist()[0]
                return _checked(row, file, number)
        rows = parquet.metadata.num_rows
    raise FFRError(f"{file}: has {counted(rows, 'row')}, there is no row {number} (the first is 0)")


def _column(file: str | Path, name: str, *, sample: bool) -> Iterator[tuple[int, Any]]:
    """Number and value of each row, or of about 16 rows spread over the file."""
    with open_parquet(file) as parquet:
        groups = parquet.num_row_groups
        for group, first, count in _groups(parquet):
            step = max(1, count * min(groups, _SAMPLED_GROUPS) // _SAMPLED_ROWS) if sample else 1
            if not sample or group % max(1, groups // _SAMPLED_GROUPS) == 0:
                values = parquet.read_row_group(group, columns=[name]).column(name)
                for row in range(0, count, step):
                    yield first + row, values[row].as_py()


def sampled_rows(file: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Columns of some rows spread over a file, about 16."""
    found = [_column(file, name, sample=True) for name in columns]
    return [dict(zip(columns, [value for _, value in cells], strict=True)) for cells in zip(*found, strict=True)]


def check_columns(files: Sequence[str], kind: Kind, *, unlabelled: bool = False) -> None:
    """Refuse files that lack a column of their kind, or have another thing there, by an `FFRError` that names file,
    columns and kind; and, unless they may be `unlabelled`, RL files with a row that has no gold answer."""
    other: Kind = "sft" if kind == "rl" else "rl"
    for file in files:
        schema = read_schema(file)
        missing = [column for column in _COLUMNS[kind] if column not in schema.names]
        if missing:
            raise FFRError(
                f"{file}: no column {', '.join(missing)}; this stage needs NAME.{kind}.parquet of `ffr-verl prepare`, "
                f"not NAME.{other}.parquet"
            )
        for column, names in _FIELDS.items() if kind == "rl" else ():
            found = schema.field(column).type
            if not pa.types.is_struct(found) or not {*names} <= {one.name for one in found}:
                raise FFRError(
                    f"{file}: column {column}: found {found}, expected objects with {', '.join(names)}; make the file "
                    "again with `ffr-verl prepare`"
                )
        holds_images(file)  # which says when it is neither
        if kind == "rl" and not unlabelled:
            _check_labelled(file)


def _check_labelled(file: str | Path) -> None:
    first = 0
    for batch in batches_of(file, batch_size=8192, columns=["reward_model.ground_truth"]):
        golds = batch.column("reward_model").field("ground_truth")
        if golds.null_count:
            number = first + golds.is_null().index(True).as_py()
            raise FFRError(
                f"{file}: row {number} has no gold answer: rows of `ffr-verl prepare --unlabelled` are for "
                "`ffr-verl infer` only; give a file of rows with gold answers"
            )
        first += len(golds)


def recorded_root(file: str | Path) -> Path | None:
    """The images root that a file records; `None` when it records none."""
    root = (read_schema(file).metadata or {}).get(IMAGES_ROOT_KEY)
    return Path(os.fsdecode(root)) if root else None


def check_pair(files: Sequence[str | Path]) -> None:
    """Refuse a `NAME.rl.parquet` beside a `NAME.sft.parquet` of another call of `ffr-verl prepare`, as one that was
    killed between the two leaves them, by an `FFRError`."""
    for file in map(Path, files):
        stem, _, kind = file.name.removesuffix(".parquet").rpartition(".")
        other = file.with_name(f"{stem}.{'sft' if kind == 'rl' else 'rl'}.parquet")
        if kind not in _COLUMNS or not other.is_file():
            continue
        pair = []
        for one in (file, other):
            with open_parquet(one) as parquet:
                pair.append((parquet.metadata.metadata or {}).get(PAIR_KEY))
        if None not in pair and pair[0] != pair[1]:
            raise FFRError(
                f"{file}: holds other rows than {other.name} beside it, which is of another call of `ffr-verl "
                "prepare`, one of them interrupted perhaps; prepare the split again, or keep the two apart"
            )


def family_record(family: ModelFamily) -> bytes:
    """What a file records of the model's family that its images and prompts were checked for."""
    return json.dumps({name: getattr(family, name) for name in _OF_FAMILY}).encode()


def recorded_family(file: str | Path) -> ModelFamily | None:
    """The family that a file's images and prompts were checked for; `None` when it records none that is known."""
    written = (read_schema(file).metadata or {}).get(MODEL_FAMILY_KEY) or b"{}"
    try:
        record = json.loads(written)
        return replace(FAMILIES[record["name"]], **{name: record[name] for name in _OF_FAMILY})
    except (ValueError, KeyError, TypeError):  # of another tool
        return None


def check_model_family(files: Sequence[str], family: ModelFamily) -> None:
    """Warn of files whose images were checked for a family that makes other tokens of them."""
    for file in files:
        recorded = recorded_family(file)
        if recorded is not None and recorded.factor != family.factor and family.name != UNKNOWN:
            logger.warning(
                "%s: prepared for %s, where a token is %d x %d pixels; the model is %s, with %d x %d: what `ffr-verl "
                "prepare` said of image sizes and prompt lengths does not hold for it. Prepare it again with "
                "--tokenizer MODEL, or --model-family %s",
                file,
                recorded.name,
                *(recorded.factor, recorded.factor),
                family.name,
                *(family.factor, family.factor),
                family.name,
            )


def images_root(files: Sequence[str], config: DataConfig, *, option: str = _TRAINING_OPTION) -> Path:
    """The folder that image paths are relative to: `config.images_root`, or the one recorded in the files; where these
    record none, several, or one that is not theirs (see `is_own_root`) and hold no images, an `FFRError` that names
    `option`."""
    if config.images_root is not None:
        return Path(config.images_root).expanduser().resolve()
    roots = {recorded_root(file) for file in files}
    root = roots.pop() if len(roots) == 1 else None
    if root is None:
        different = ", ".join(sorted(map(str, roots)))
        found = f"different images roots: {different}" if roots - {None} else "no images root is recorded"
        raise FFRError(f"{', '.join(files)}: {found}; give {option}, or make the files with `ffr-verl prepare`")
    for file in files:
        if not is_own_root(file, root) and not holds_images(file):
            raise FFRError(
                f"{file}: the images root that it records, {root}, is outside the folder of the file and the one "
                f"around it; whoever wrote the file chose it, so give it yourself if it is meant: "
                f"{option.replace('FOLDER', str(root)) if 'FOLDER' in option else f'{option}{root}'}"
            )
    return root


def is_own_root(file: str | Path, root: Path) -> bool:
    """Whether a recorded images root may be used unasked: it is in the folder of the file, or in the one around that
    (`data/train.rl.parquet` with the pictures in `images/`), but for a folder that holds the user's home."""
    folder = Path(os.path.realpath(file)).parent
    is_wide = Path(os.path.realpath(os.path.expanduser("~"))).is_relative_to(folder.parent)
    return Path(os.path.realpath(root)).is_relative_to(folder if is_wide else folder.parent)


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
    damage in the middle too. How many different images were opened.

    verl drops a row with an unreadable image without a word, or fails in the middle of training. With `max_pixels`,
    the bound to which a model of `family` shrinks them, their shape must allow that, see `resized`.

    Raises:
        FFRError: when some cannot be read: how many, file, row and cause of the first, and the `option` that gives the
            root.
    """

    def problem_of(image: str | bytes) -> str | None:
        try:
            source = image if isinstance(image, bytes) else resolve_image(root, image)
            facts = read_image_facts(source, decode=sample)
            if max_pixels is not None:
                resized(facts.width, facts.height, max_pixels=max_pixels, family=family)
        except ValueError as error:
            return str(error)
        return None

    opened = 0
    for file in files:
        is_held, bad, images = holds_images(file), list[tuple[int, str, str]](), _images_of(file, sample=sample)
        while some := list(itertools.islice(images, 256)):
            with ThreadPoolExecutor(_READERS) as readers:
                told = readers.map(problem_of, [source for _, _, source in some])
                bad += [(row, name, problem) for (row, name, _), problem in zip(some, told, strict=True) if problem]
            opened += len(some)
        if bad:
            row, name, problem = bad[0]
            more = f", and {len(bad) - 1} more images cannot be read" if len(bad) > 1 else ""
            place, mend = f"images root {root}", f"bring the images there, or give {option}"
            if is_held:
                place, mend = "in the file", "make the file again with `ffr-verl prepare --embed-images --decode`"
            raise FFRError(f"{file}: row {row}: image {name}: {problem} ({place}){more}; {mend}")
    return opened


def _images_of(file: str | Path, *, sample: bool) -> Iterator[tuple[int, str, str | bytes]]:
    """Row, name and path or content of each different image that a file names or holds, or of those of some rows."""
    seen = set[Any]()
    for row, found in _column(file, "images", sample=sample):
        for image in _checked({"images": found}, file, row)["images"] or ():
            name, source = (image, image) if isinstance(image, str) else (image["path"], image["bytes"] or b"")
            if (key := (name, hash(source))) not in seen:
                seen.add(key)
                yield row, name, source
