"""The dialogues of a chat in any source format, as `prepare --unlabelled` checks and writes them, without a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ffr_verl.data.checks.checked_row import CheckedRow
from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.checks.validation import RowChecker
from ffr_verl.data.parquet_writer import rl_row
from ffr_verl.data.sources import AUTO, find_source
from ffr_verl.data.sources.rows import RowSettings, chat_rows
from ffr_verl.dialogues import with_query
from ffr_verl.errors import FFRError
from ffr_verl.model_families import QWEN2_VL, family_named
from ffr_verl.settings import DEFAULT_MAX_PIXELS

_ANY_QUERY = "?"  # stands in a prompt until `with_query` puts another one there


@dataclass(frozen=True, slots=True)
class Chat:
    """A file, or a folder where the format is one, and how its dialogues are read."""

    path: Path
    images_root: Path  # resolved
    source_format: str = AUTO  # as `--format` takes it
    settings: RowSettings = field(default_factory=RowSettings)
    model_family: str = QWEN2_VL.name

    def dialogues(self, on_note: Callable[[str, int], None] = lambda what, count: None) -> Iterator[CheckedRow]:
        """Each dialogue once, its prompt without gold; `on_note` is told what of them is in no row, and how often.

        Raises:
            FFRError: for a file that cannot be read or has no dialogue, and for the first dialogue that `prepare`
                would refuse.
        """
        name, source = find_source(self.source_format, self.path)
        if source.has_prompts and self.settings.template is not None:
            raise FFRError(f"--template: {name} rows bring their prompts; leave it out")
        checker = RowChecker(
            images_root=self.images_root,
            decode=False,
            max_pixels=DEFAULT_MAX_PIXELS,
            family=family_named(self.model_family),
            max_images=2**31,  # of a window or a request, which is looked at where it is made
            tokens=None,
            max_prompt_tokens=0,
            other_splits=OtherSplits(()),
            has_prompts=source.has_prompts,
            window=None,
            unlabelled=True,
        )
        queries = () if source.has_prompts else (_ANY_QUERY,)
        seen: set[int] = set()
        rows = chat_rows(self.path, queries, source_format=name, settings=self.settings, on_note=on_note)
        for number, row in enumerate(rows):
            made, problems = checker.check(number, [row])
            for problem in problems:
                if problem.kind.is_error:
                    raise FFRError(f"{self.path}: {problem} ({problem.kind.value}); {problem.kind.mend}")
            if made[0].fingerprint not in seen:  # rows with prompts ask of one dialogue several times
                seen.add(made[0].fingerprint)
                yield made[0]
        if not seen:
            raise FFRError(f"{self.path}: no dialogue in it, read as {name}; give a chat with messages, or --format")


def asked(dialogue: CheckedRow, query: str, *, index: int = 0) -> dict[str, Any]:
    """A row of an RL file that asks a dialogue something; a `ValueError` for a query that no prompt can hold."""
    messages = with_query(dialogue.messages, query)
    row = replace(dialogue, messages=messages, dialogue=replace(dialogue.dialogue, query=query.strip()))
    return rl_row(row, index=index, split="", images=row.images)
