"""What a split is like: counts, means and 95th percentiles of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ffr_verl.data.checks.checked_row import CheckedRow
from ffr_verl.data.tokens import estimated_tokens
from ffr_verl.metrics import dispersion

_FIGURES = {  # by their names in the closing table
    "turns": "turns of a dialogue",
    "images": "images of a dialogue",
    "row_turns": "turns of a row",
    "row_images": "images of a row",
    "gold_utterances": "gold utterances, where not empty",
    "gold_images": "gold images, where not empty",
    "dispersion": "dispersion (span / size, 1 = dense)",
    "image_tokens": "image tokens of a row",
    "estimated_tokens": "prompt tokens of a row, about",
    "prompt_tokens": "prompt tokens of a row",
}


class SplitStatistics:
    """Counts how often each value occurs, so that memory grows with the dialogues, not with the rows."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[float]] = {name: Counter() for name in _FIGURES}
        self._dialogues: set[int] = set()
        self.rows = self._empty = self._unlabelled = 0

    def add(self, row: CheckedRow) -> None:
        """Take a row."""
        counts = self._counts
        utterance_ids, image_ids = ((), ()) if row.gold is None else (row.gold.utterance_ids, row.gold.image_ids)
        turns, images = len(row.dialogue.utterances), len(row.images)
        self.rows += 1
        if row.fingerprint not in self._dialogues:
            self._dialogues.add(row.fingerprint)
            whole_turns, whole_images = row.whole_size or (turns, images)
            counts["turns"][whole_turns] += 1
            counts["images"][whole_images] += 1
        counts["row_turns"][turns] += 1
        counts["row_images"][images] += 1
        if utterance_ids or image_ids:
            counts["gold_utterances"][len(utterance_ids)] += 1
            counts["gold_images"][len(image_ids)] += 1
        elif row.gold is None:
            self._unlabelled += 1
        else:
            self._empty += 1
        if utterance_ids:
            counts["dispersion"][dispersion(utterance_ids)] += 1
        counts["image_tokens"][sum(row.image_tokens)] += 1
        counts["estimated_tokens"][estimated_tokens(row.prompt, row.image_tokens)] += 1
        if row.prompt_tokens is not None:
            counts["prompt_tokens"][row.prompt_tokens] += 1

    def summary(self) -> dict[str, float | None]:
        """Figures by name, `None` for those of no row: `rows`, `dialogues`, `empty_gold_share`, and the mean and 95th
        percentile (`…_mean`, `…_p95`) of each of `_FIGURES`."""
        figures: dict[str, float | None] = {"rows": self.rows, "dialogues": len(self._dialogues)}
        for name, counts in self._counts.items():
            values = np.repeat(np.array(list(counts), dtype=np.float64), list(counts.values()))
            figures[f"{name}_mean"] = round(float(values.mean()), 4) if len(values) else None
            figures[f"{name}_p95"] = round(float(np.percentile(values, 95)), 4) if len(values) else None
        labelled = self.rows - self._unlabelled
        figures["empty_gold_share"] = round(self._empty / labelled, 4) if labelled else None
        return figures


def table_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of the closing table: name, mean (or count), 95th percentile."""
    lines = [(name, f"{figures[name]:,}", "") for name in ("rows", "dialogues")]
    hidden = "estimated_tokens" if figures.get("prompt_tokens_mean") is not None else None
    for name, label in _FIGURES.items():
        mean = figures.get(f"{name}_mean")
        if mean is not None and name != hidden:
            lines.append((label, f"{mean:,.1f}", f"{figures[f'{name}_p95']:,.4g}"))
    share = figures.get("empty_gold_share")
    return [*lines, ("empty golds", f"{share:.1%}", "")] if share is not None else lines
