"""What a split is like: counts, means and 95th percentiles of its rows."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from ffr_verl.data.checked_row import CheckedRow
from ffr_verl.data.tokens import estimated_tokens

__all__ = ["SplitStatistics", "table_rows"]


class SplitStatistics:
    """Collects some numbers of each row; 44 bytes a row."""

    def __init__(self) -> None:
        self._dialogues = array("q")
        self._columns = {
            name: array("i")
            for name in (
                "turns",
                "images",
                "gold_utterances",
                "gold_images",
                "span",
                "image_tokens",
                "prompt_tokens",
                "estimated_tokens",
            )
        }

    def add(self, row: CheckedRow) -> None:
        """Take a row."""
        gold = row.gold.utterance_ids
        self._dialogues.append(row.fingerprint)
        for name, value in (
            ("turns", len(row.dialogue.utterances)),
            ("images", len(row.images)),
            ("gold_utterances", len(gold)),
            ("gold_images", len(row.gold.image_ids)),
            ("span", max(gold) - min(gold) + 1 if gold else 0),
            ("image_tokens", sum(row.image_tokens)),
            ("prompt_tokens", -1 if row.prompt_tokens is None else row.prompt_tokens),
            ("estimated_tokens", estimated_tokens(row.messages[:-1], row.image_tokens)),
        ):
            self._columns[name].append(value)

    def __len__(self) -> int:
        return len(self._dialogues)

    def summary(self) -> dict[str, float | None]:
        """Figures by name; `None` for those of no row.

        Returns:
            `rows`, `dialogues`; mean and 95th percentile (`…_mean`, `…_p95`) of `turns` and `images` over dialogues
            and over rows (`row_turns`, `row_images`); `empty_gold_share`; of rows whose gold is not empty
            `gold_utterances`, `gold_images` and `dispersion` (span of the gold utterances over their number, 1 for a
            dense fragment); `image_tokens`; `estimated_tokens` of the prompt; `prompt_tokens` where they were counted.
        """
        dialogues = np.frombuffer(self._dialogues, dtype=np.int64)
        columns = {name: np.frombuffer(values, dtype=np.int32) for name, values in self._columns.items()}
        _, first = np.unique(dialogues, return_index=True)
        size, span = columns["gold_utterances"], columns["span"]
        filled = (size > 0) | (columns["gold_images"] > 0)
        counted = columns["prompt_tokens"][columns["prompt_tokens"] >= 0]
        figures: dict[str, float | None] = {"rows": len(dialogues), "dialogues": len(first)}
        measured: dict[str, np.ndarray] = {
            "turns": columns["turns"][first],
            "images": columns["images"][first],
            "row_turns": columns["turns"],
            "row_images": columns["images"],
            "gold_utterances": size[filled],
            "gold_images": columns["gold_images"][filled],
            "dispersion": span[size > 0] / size[size > 0],
            "image_tokens": columns["image_tokens"],
            "estimated_tokens": columns["estimated_tokens"],
            "prompt_tokens": counted,
        }
        for name, values in measured.items():
            figures[f"{name}_mean"] = round(float(values.mean()), 4) if len(values) else None
            figures[f"{name}_p95"] = round(float(np.percentile(values, 95)), 4) if len(values) else None
        figures["empty_gold_share"] = round(float((~filled).mean()), 4) if len(filled) else None
        return figures


def table_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of the closing table: name, mean (or count), 95th percentile.

    Example:
        >>> table_rows({"rows": 2, "dialogues": 1, "turns_mean": 3.0, "turns_p95": 4.0, "empty_gold_share": 0.5})
        [('rows', '2', ''), ('dialogues', '1', ''), ('turns of a dialogue', '3.0', '4'), ('empty golds', '50.0%', '')]
    """
    lines = [(name, f"{figures[name]:,}", "") for name in ("rows", "dialogues")]
    for name, label in (
        ("turns", "turns of a dialogue"),
        ("images", "images of a dialogue"),
        ("row_turns", "turns of a row"),
        ("row_images", "images of a row"),
        ("gold_utterances", "gold utterances, where not empty"),
        ("gold_images", "gold images, where not empty"),
        ("dispersion", "dispersion (span / size, 1 = dense)"),
        ("image_tokens", "image tokens of a row"),
        ("estimated_tokens", "prompt tokens of a row, about"),
        ("prompt_tokens", "prompt tokens of a row"),
    ):
        if name == "estimated_tokens" and figures.get("prompt_tokens_mean") is not None:
            continue
        mean = figures.get(f"{name}_mean")
        if mean is not None:
            lines.append((label, f"{mean:,.1f}", f"{figures[f'{name}_p95']:,.4g}"))
    share = figures.get("empty_gold_share")
    return [*lines, ("empty golds", f"{share:.1%}", "")] if share is not None else lines
