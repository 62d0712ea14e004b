"""The difficulty of the rows of RL files, as a parquet file: `ffr-verl score` writes it, a curriculum reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ffr_verl.data.parquet_files import batches_of, open_parquet, rows_of_files, seal_parquet
from ffr_verl.errors import FFRError
from ffr_verl.files import whole_or_nothing
from ffr_verl.fragments import AnswerStyle, Fragment, parse_fragment, parse_gold, parse_leniently
from ffr_verl.metrics import dispersion
from ffr_verl.predictions import row_key
from ffr_verl.samplers.curriculum import RowDifficulty
from ffr_verl.samplers.difficulty import LEVELS, assign_levels, difficulty_f1, mean_logprob, token_entropy

__all__ = ["DifficultyFile", "difficulty_table", "row_key", "row_keys", "rows_of_files", "write_difficulty"]

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("row_key", pa.int64()),
        ("dialogue_id", pa.string()),
        ("query", pa.string()),
        ("is_negative", pa.bool_()),
        ("f1", pa.float64()),
        ("entropy", pa.float64()),
        ("mean_logprob", pa.float64()),
        ("dispersion", pa.float64()),
        ("malformed", pa.bool_()),
        ("pass_rate", pa.float64()),
        ("utterance_hits", pa.int32()),
        ("utterances", pa.int32()),
        ("image_hits", pa.int32()),
        ("images", pa.int32()),
        ("level", pa.string()),
    ]
)
_MODEL = b"ffr_verl.model"
_READ = ("row_key", "f1", "entropy", "level", "is_negative")  # what a curriculum needs
_HITS = ("utterance_hits", "image_hits", "utterances", "images")  # and what files of version 0.1.0 lack


def row_keys(files: Sequence[str | Path]) -> np.ndarray:
    """The keys of the rows of RL files, in order; shape `(rows,)`, int64."""
    keys: list[int] = []
    for file in files:
        for batch in batches_of(file, batch_size=4096, columns=["reward_model", "extra_info"]):
            infos, rewards = batch.column("extra_info"), batch.column("reward_model")
            named = [infos.field("dialogue_id"), infos.field("query"), rewards.field("ground_truth")]
            keys += [row_key(*values) for values in zip(*[one.to_pylist() for one in named], strict=True)]
    return np.array(keys, dtype=np.int64)


def difficulty_table(
    rows: Iterable[Mapping[str, Any]],
    predictions: Iterable[Mapping[str, Any]],
    *,
    model: str,
    style: AnswerStyle = "plain",
) -> pa.Table:
    """The difficulty of rows of an RL file from the answers to them, a line for each.

    A prediction has the `response`, the `logprobs` of its tokens (a list; may be empty), and `pass_rate` where several
    answers were drawn. `model` is what answered, recorded in the file.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for number, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        info, solution = row["extra_info"], row["reward_model"]["ground_truth"]
        if solution is None:
            raise FFRError(f"row {number}: no gold answer; an unlabelled row has no difficulty")
        gold = parse_gold(solution) or Fragment((), ())
        predicted = parse_leniently(prediction["response"], style=style)
        values = {
            "row": number,
            "row_key": row_key(info["dialogue_id"], info["query"], solution),
            "dialogue_id": info["dialogue_id"],
            "query": info["query"],
            "is_negative": not gold.utterance_ids and not gold.image_ids,
            "f1": difficulty_f1(predicted, gold),
            "entropy": token_entropy(prediction["logprobs"]),
            "mean_logprob": mean_logprob(prediction["logprobs"]),
            "dispersion": dispersion(gold.utterance_ids),
            "malformed": parse_fragment(prediction["response"], style=style) is None,
            "pass_rate": prediction.get("pass_rate"),
            "utterance_hits": len(set(predicted.utterance_ids) & set(gold.utterance_ids)),
            "utterances": len(set(predicted.utterance_ids)),
            "image_hits": len(set(predicted.image_ids) & set(gold.image_ids)),
            "images": len(set(predicted.image_ids)),
        }
        for name, value in values.items():
            columns[name].append(value)
    columns["level"] = assign_levels(columns["f1"], columns["entropy"]).tolist()
    return pa.table(columns, schema=_SCHEMA.with_metadata({_MODEL: model.encode()}))


def write_difficulty(table: pa.Table, path: Path) -> None:
    """Write a table of `difficulty_table`; the file appears whole."""
    with whole_or_nothing([path]) as (temporary,):
        pq.write_table(table, temporary, write_page_checksum=True)
        seal_parquet(temporary)


class DifficultyFile:
    """A file of `ffr-verl score`; `FFRError` when it is missing, another file, or holds values that are none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        mend = "make it with `ffr-verl score`"
        with open_parquet(self.path, mend=mend, absent=mend) as parquet:
            names = parquet.schema_arrow.names
            table = parquet.read(columns=[name for name in (*_READ, *_HITS) if name in names])
            table = table.cast(pa.schema([_SCHEMA.field(name) for name in table.column_names]))
        missing = [name for name in _READ if name not in names]
        if missing:
            raise FFRError(f"{path}: no column {', '.join(missing)}; make it with `ffr-verl score`")
        for name in _READ:
            if table.column(name).null_count:
                raise FFRError(
                    f"{path}: column {name}: {table.column(name).null_count} values are missing; make the file again"
                )
        # Right ids and named ids of an answer, means over the rows, shape `(2, 2)`: the second index is utterances and
        # images. `None` of a file that does not say.
        self.mean_hits: np.ndarray | None = None
        if set(_HITS) <= set(names):
            self.mean_hits = np.array([pc.mean(table.column(name)).as_py() or 0.0 for name in _HITS]).reshape(2, 2)
        self.keys = table.column("row_key").to_numpy()
        levels = table.column("level")
        known = pc.index_in(levels, value_set=pa.array(LEVELS))
        if known.null_count:
            unknown = sorted(set(levels.unique().to_pylist()) - set(LEVELS))
            raise FFRError(
                f"{path}: column level: found {', '.join(unknown)}; expected {', '.join(LEVELS)}; make the file again"
            )
        self._rows = RowDifficulty(
            table.column("f1").to_numpy(),
            table.column("entropy").to_numpy(),
            np.array(LEVELS)[known.to_numpy()],
            table.column("is_negative").to_numpy(),
        )
        # The published entropy of an answer of one token is a little below 0: -log(1 + 1e-12).
        bounds = (("f1", self._rows.f1, 0.0, 1.0), ("entropy", self._rows.entropy, -1e-9, np.inf))
        for name, values, least, most in bounds:
            wrong = np.flatnonzero(~((values >= least) & (values <= most) & np.isfinite(values)))
            if len(wrong):
                raise FFRError(
                    f"{path}: row {wrong[0]}: {name} is {values[wrong[0]]}; make the file again with `ffr-verl score`"
                )

    def of_rows(self, keys: np.ndarray, *, name: str) -> RowDifficulty:
        """The difficulty of the rows of a data set, by their `row_keys`; it may be a part of those that were scored.
        Raises `FFRError`, which names the data set, when rows were not scored."""
        order = np.argsort(self.keys, kind="stable")
        places = np.minimum(np.searchsorted(self.keys[order], keys), max(len(order) - 1, 0))
        found = self.keys[order][places] == keys if len(order) else np.zeros(len(keys), bool)
        if not found.all():
            first = int(np.flatnonzero(~found)[0])
            what = "of another data set: " if not found.any() else ""
            raise FFRError(
                f"{self.path}: {what}{int((~found).sum())} of {len(keys)} rows of {name} are not in it (row {first} "
                f"...); score them: ffr-verl score --model MODEL --data {name} --output {self.path} --force"
            )
        rows, chosen = self._rows, order[places]
        return RowDifficulty(rows.f1[chosen], rows.entropy[chosen], rows.levels[chosen], rows.is_negative[chosen])
