"""The embedding store: one memory-mapped matrix, a key index, a manifest.

A store is a folder:

    manifest.json   encoder, shape, dtype, counts, hashes of the other files; a checksum of itself
    vectors.bin     (vectors, dimension) of float16 or float32, row-major, little-endian
    keys.bin        the keys, UTF-8, sorted by their bytes, one after another
    offsets.bin     int64: where each key starts in keys.bin, and its end
    rows.bin        int64: for each key its row in vectors.bin, or -1 for a key that is known to have no vector

The manifest's checksum is looked at whenever a store is opened, the index's when it is read, that of the vectors with
`EmbeddingStore.open(verify=True)`, as the check before a run does: a hash of each vector at its first use would cost
the reward 3 us a vector.

The vectors are mapped, so that opening is instant whatever the size and the reward workers of a machine share one copy
of them; the keys are read at the first look-up, about 150 bytes each. Several keys may name one row: equal texts are
stored once.
The folder is the only contract with whatever filled it; the encoder may live in another environment.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.files import whole_folder

VectorDtype = Literal["float16", "float32"]

FORMAT = "ffr-verl embedding store"
FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_VECTORS, _KEYS, _OFFSETS, _ROWS = "vectors.bin", "keys.bin", "offsets.bin", "rows.bin"
_INDEX_FILES = (_KEYS, _OFFSETS, _ROWS)
_INDEX = np.dtype("<i8")
_NO_VECTOR = -1
_KINDS = (("text", b"utt:"), ("image", b"img:"), ("query", b"qry:"))
_REMEDY = "make it again with `ffr-verl embed`"
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**48)]


def utterance_key(dialogue_id: str, utterance_id: int | str) -> str:
    """Key of an utterance's vector.

    Example:
        >>> utterance_key("d1", 7)
        'utt:d1:7'
    """
    return f"utt:{dialogue_id}:{utterance_id}"


def split_dialogue_id(split: str, dialogue_id: str) -> str:
    """The name under which a store keeps a dialogue whose id means another dialogue in an earlier split."""
    return f"{split}/{dialogue_id}"


def image_key(path: str) -> str:
    """Key of an image's vector: its path as it stands in the row.

    Example:
        >>> image_key("images/cat.jpg")
        'img:images/cat.jpg'
    """
    return f"img:{path}"


def query_key(query: str) -> str:
    """Key of a query's vector: the query itself, without white space around it.

    Example:
        >>> query_key("where is the cat? ")
        'qry:where is the cat?'
    """
    return f"qry:{query.strip()}"


@dataclass(frozen=True, slots=True)
class StoreManifest:
    """What a store says of itself."""

    model: str  # name or path of the encoder
    revision: str | None  # of the encoder, where known
    dimension: _Count
    dtype: VectorDtype
    normalized: bool  # whether every vector has length 1
    modalities: tuple[str, ...]  # what has vectors: `text`, `image`, `query`
    vectors: _Count  # rows of the matrix
    keys: _Count  # that name a row, or are known to have none
    content_hash: str  # SHA-256 of the four arrays
    index_hash: str | None = None  # SHA-256 of keys, offsets and rows; files of before 0.1.0 do not say
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of manifest.json, with a checksum of the other fields."""
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps({**values, "checksum": _checksum(values)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> StoreManifest:
        """Read `path/manifest.json`; `FFRError` when it is missing, no manifest of this version, or was edited."""
        file, mend = path / _MANIFEST, "give the --output of `ffr-verl embed`"
        if not path.is_dir():
            what = "a file, but an embedding store is a folder" if path.exists() else "no such folder"
            raise FFRError(f"{path}: {what}; {mend}")
        if not file.exists():
            raise FFRError(f"{path}: no embedding store: manifest.json is missing; {mend}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FFRError(f"{file}: cannot be read ({error}); {_REMEDY}") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise FFRError(f"{file}: not the manifest of an embedding store; {mend}")
        version, checksum = values.get("format_version"), values.pop("checksum", None)
        if version != FORMAT_VERSION:
            raise FFRError(f"{file}: format version {version!r}, this ffr-verl reads {FORMAT_VERSION}; {_REMEDY}")
        if checksum != _checksum({"format": FORMAT, **values}):
            raise FFRError(f"{file}: was edited (its checksum differs), so it may not describe the vectors; {_REMEDY}")
        try:
            cls(**values)  # the same fields
            return msgspec.convert(values, cls)
        except (TypeError, msgspec.ValidationError) as error:
            raise FFRError(f"{file}: has other fields than this ffr-verl's ({error}); {_REMEDY}") from None


def _checksum(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _hash_of_files(path: Path, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        with (path / name).open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


class EmbeddingStore:
    """An open store; read-only, safe to use from threads, and cheap to send to another process (it is opened there).

    `vectors` is the whole matrix, shape `(vectors, dimension)`, memory-mapped and read-only.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "store"
        >>> write_store(folder, [("utt:d:0", np.array([1.0, 0.0])), ("utt:d:1", np.array([0.0, 1.0]))], model="toy")
        >>> store = EmbeddingStore.open(folder)
        >>> len(store), store.manifest.dimension, "utt:d:7" in store
        (2, 2, False)
        >>> store.get("utt:d:1")
        array([0., 1.], dtype=float32)
    """

    def __init__(self, path: Path, manifest: StoreManifest, vectors: np.ndarray, maps: Mapping[str, Any]) -> None:
        """Use `EmbeddingStore.open`."""
        self.path, self.manifest, self.vectors, self._maps = path, manifest, vectors, maps
        self.scorer: Any = None  # of `ffr_verl.rewards`: what it has computed lasts as long as the store is open

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> EmbeddingStore:
        """Open a store; little but the manifest is read. The keys are read, and compared with what is recorded, at
        the first look-up. With `verify` everything is read and compared now (SHA-256, about 1 s a GB).

        Raises `FFRError` when it is missing, unfinished, edited, truncated, of another version, or (with `verify`)
        changed.
        """
        folder = Path(path).expanduser()
        manifest = StoreManifest.read(folder)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        sizes = {
            _VECTORS: manifest.vectors * manifest.dimension * dtype.itemsize,
            _OFFSETS: (manifest.keys + 1) * _INDEX.itemsize,
            _ROWS: manifest.keys * _INDEX.itemsize,
        }
        maps = {name: _map(folder / name, size) for name, size in sizes.items()}
        offsets = np.frombuffer(maps[_OFFSETS], dtype=_INDEX)
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            raise FFRError(f"{folder / _OFFSETS}: places of keys that do not follow each other; {_REMEDY}")
        maps[_KEYS] = _map(folder / _KEYS, int(offsets[-1]))
        vectors = np.frombuffer(maps[_VECTORS], dtype=dtype).reshape(manifest.vectors, manifest.dimension)
        if verify and _hash_of_files(folder, (_VECTORS, *_INDEX_FILES)) != manifest.content_hash:
            raise FFRError(f"{folder}: its content hash differs from the manifest's, files were changed; {_REMEDY}")
        store = cls(folder, manifest, vectors, maps)
        if verify:
            _ = store._row_of  # which says what is wrong with it
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingStore.open, (str(self.path.resolve()),)

    def __len__(self) -> int:
        return self.manifest.keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        """The index; an `FFRError` when it is not what was written, or names rows that are not there."""
        recorded = self.manifest.index_hash
        if recorded is not None and _hash_of_files(self.path, _INDEX_FILES) != recorded:
            files = ", ".join(_INDEX_FILES)
            raise FFRError(f"{self.path}: {files}: were changed, their hash differs from the manifest's; {_REMEDY}")
        text, offsets = self._maps[_KEYS], np.frombuffer(self._maps[_OFFSETS], dtype=_INDEX).tolist()
        rows = np.frombuffer(self._maps[_ROWS], dtype=_INDEX)
        wrong = np.flatnonzero((rows < _NO_VECTOR) | (rows >= self.manifest.vectors))
        if len(wrong):
            found = f"key {wrong[0]} names row {rows[wrong[0]]} of {self.manifest.vectors}"
            raise FFRError(f"{self.path / _ROWS}: {found}; {_REMEDY}")
        try:
            keys = [_shown(text[start:end]) for start, end in itertools.pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise FFRError(f"{self.path / _KEYS}: {error}; {_REMEDY}") from None
        found_rows = dict(zip(keys, rows.tolist(), strict=True))
        if len(found_rows) != len(keys):
            raise FFRError(f"{self.path / _KEYS}: a key stands there twice; {_REMEDY}")
        return found_rows

    def row_of(self, key: str) -> int | None:
        """The row of `key` in `vectors`; -1 when it is known to have no vector, `None` when the store lacks it."""
        return self._row_of.get(key)

    def __contains__(self, key: object) -> bool:
        """Whether `key` has a vector."""
        return isinstance(key, str) and self.get(key) is not None

    def get(self, key: str) -> np.ndarray | None:
        """The vector of `key` as stored, shape `(dimension,)`, read-only and not copied; `None` when it has none."""
        row = self._row_of.get(key, _NO_VECTOR)
        return None if row == _NO_VECTOR else self.vectors[row]

    def __getitem__(self, key: str) -> np.ndarray:
        """The vector of `key`; `KeyError` when the store has none."""
        vector = self.get(key)
        if vector is None:
            raise KeyError(f"{key}: no vector in {self.path}")
        return vector


_OPEN: dict[tuple[int, ...], EmbeddingStore] = {}
_MOST_OPEN = 8
_LOCK = threading.Lock()


def open_store(path: str | os.PathLike[str]) -> EmbeddingStore:
    """The process's one opened store of the folder that is at `path` now; one made again there is opened again."""
    name = os.path.expanduser(path)
    try:
        found = os.stat(f"{name}/{_MANIFEST}")
    except OSError:
        return EmbeddingStore.open(name)  # says what is wrong
    identity = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
    with _LOCK:
        store = _OPEN.get(identity)
        if store is None:
            while len(_OPEN) >= _MOST_OPEN:
                del _OPEN[next(iter(_OPEN))]
            store = _OPEN[identity] = EmbeddingStore.open(os.path.realpath(name))
    return store


def _map(file: Path, size: int) -> Any:
    """The file's bytes, mapped."""
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise FFRError(f"{file}: is missing; {_REMEDY}") from None
    if found != size:
        what = "truncated" if found < size else "too long"
        raise FFRError(f"{file}: {what}: {found} bytes, the manifest says {size}; {_REMEDY}")
    if size == 0:
        return b""
    with file.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def check_place(path: Path, *, overwrite: bool) -> None:
    """Raise `FFRError` when something is there and not to be replaced, or is no embedding store."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FFRError(f"{path}: is a file, but an embedding store is a folder; choose another name")
    if not overwrite:
        raise FFRError(
            f"{path}: is there already; choose another --output, or replace it with --force (overwrite=True)"
        )
    if any(path.iterdir()) and not (path / _MANIFEST).is_file():
        raise FFRError(f"{path}: holds something that is no embedding store; choose another folder")


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _shown(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")


def write_arrays(
    path: str | os.PathLike[str],
    *,
    rows: Iterable[np.ndarray],
    index: Iterable[tuple[str, int]],
    dimension: int,
    model: str,
    revision: str | None = None,
    dtype: VectorDtype = "float32",
    normalized: bool = False,
    overwrite: bool = False,
) -> StoreManifest:
    """Write a store whose keys share rows; otherwise as `write_store`.

    `rows` are blocks of shape `(any, dimension)` in the order of the matrix, `index` each key with its row, -1 for a
    key that is known to have no vector; it is read behind the rows. That rows are `normalized` is recorded, not done.

    Raises `FFRError` for a block of another dimension, a key given twice, a row that does not exist, numbers that are
    not finite in `dtype`, a folder that is there, or a full disk. Nothing is left then.
    """
    folder = Path(path).expanduser()
    if dtype not in get_args(VectorDtype):
        raise FFRError(f"dtype {dtype!r}, expected one of {', '.join(get_args(VectorDtype))}")
    stored = np.dtype(dtype).newbyteorder("<")
    check_place(folder, overwrite=overwrite)
    with whole_folder(folder) as temporary:
        count = 0
        with (temporary / _VECTORS).open("wb") as file:
            for block in rows:
                with np.errstate(over="ignore"):  # what becomes infinite is refused below
                    converted = np.ascontiguousarray(block, dtype=stored)
                if converted.ndim != 2 or converted.shape[1] != dimension:
                    raise FFRError(
                        f"{folder}: found vectors of shape {converted.shape} from row {count} on, expected "
                        f"(any, {dimension}); give vectors of one encoder"
                    )
                finite = np.isfinite(converted).all(axis=1)
                if not finite.all():
                    bad = count + int(np.argmin(finite))
                    raise FFRError(f"{folder}: vector {bad} holds a number that is not finite in {dtype}")
                file.write(converted.tobytes())
                count += len(converted)
        pairs = sorted([(_bytes(key), row) for key, row in index])
        for number, (key, row) in enumerate(pairs):
            if number and key == pairs[number - 1][0]:
                raise FFRError(f"{folder}: key {_shown(key)} is given twice")
            if not _NO_VECTOR <= row < count:
                raise FFRError(f"{folder}: key {_shown(key)} names row {row} of {count}")
        (temporary / _KEYS).write_bytes(b"".join([key for key, _row in pairs]))
        (temporary / _OFFSETS).write_bytes(np.cumsum([0, *[len(key) for key, _row in pairs]], dtype=_INDEX).tobytes())
        (temporary / _ROWS).write_bytes(np.array([row for _key, row in pairs], dtype=_INDEX).tobytes())
        kinds = {key[:4] for key, row in pairs if row != _NO_VECTOR}
        manifest = StoreManifest(
            model=model,
            revision=revision,
            dimension=dimension,
            dtype=dtype,
            normalized=normalized,
            modalities=tuple([name for name, prefix in _KINDS if prefix in kinds]),
            vectors=count,
            keys=len(pairs),
            content_hash=_hash_of_files(temporary, (_VECTORS, *_INDEX_FILES)),
            index_hash=_hash_of_files(temporary, _INDEX_FILES),
        )
        (temporary / _MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def write_store(
    path: str | os.PathLike[str],
    vectors: Iterable[tuple[str, np.ndarray]],
    *,
    model: str,
    revision: str | None = None,
    dtype: VectorDtype = "float32",
    normalize: bool = False,
    overwrite: bool = False,
) -> None:
    """Write an embedding store; what was interrupted leaves nothing that opens.

    Args:
        path: folder to make.
        vectors: `(key, vector)`, streamed; keys as `utterance_key`, `image_key` and `query_key` make them, all vectors
            of one length.
        model: name of the encoder, recorded.
        revision: of the encoder, recorded.
        dtype: of the stored numbers; float16 halves the size and is exact to 1e-3 in a cosine.
        normalize: scale every vector to length 1 (a zero vector stays).
        overwrite: replace a store that is there.

    Raises:
        FFRError: for vectors of several lengths, a vector that is no 1-d array of finite numbers, a key given twice,
            or a folder that is there.
    """
    keys: list[str] = []
    blocks = _blocks(vectors, keys, where=str(path), normalize=normalize)
    first = next(blocks, None)
    if first is None:
        raise FFRError(f"{path}: no vectors were given")
    write_arrays(
        path,
        rows=itertools.chain([first], blocks),
        index=((key, row) for row, key in enumerate(keys)),  # asked for after the rows, when all keys are known
        dimension=first.shape[1],
        model=model,
        revision=revision,
        dtype=dtype,
        normalized=normalize,
        overwrite=overwrite,
    )


def _blocks(
    vectors: Iterable[tuple[str, np.ndarray]], keys: list[str], *, where: str, normalize: bool
) -> Iterator[np.ndarray]:
    """The vectors, checked, 1,024 at a time; their keys are appended to `keys`."""
    block: list[np.ndarray] = []
    dimension = 0
    for key, value in vectors:
        vector = np.asarray(value)
        if vector.ndim != 1 or vector.dtype.kind not in "fiu" or not np.isfinite(vector).all():
            raise FFRError(
                f"{where}: key {key}: found {vector.dtype} of shape {vector.shape}, expected a 1-d array of finite "
                "numbers"
            )
        dimension = dimension or len(vector)
        if len(vector) != dimension or dimension == 0:
            raise FFRError(f"{where}: key {key}: dimension {len(vector)}, the first vector has {dimension}")
        if normalize:
            vector = vector.astype(np.float64)
            vector /= np.linalg.norm(vector) or 1.0
        keys.append(key)
        block.append(vector)
        if len(block) == 1024:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)
