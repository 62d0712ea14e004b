"""`ffr-verl prepare`: rows, checked, as parquet for both training stages."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.data.checks.checked_row import CheckedRow, CheckSettings, check_limits
from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.checks.problems import Problem, ProblemLog
from ffr_verl.data.checks.validation import RowChecker
from ffr_verl.data.config import DEFAULT_MAX_PIXELS
from ffr_verl.data.parquet_writer import RejectedRows, SplitWriter
from ffr_verl.data.sources import SOURCES, SourceFormat
from ffr_verl.data.sources.json_rows import read_rows
from ffr_verl.data.sources.raw_dialogues import RawDialogueError
from ffr_verl.data.statistics import SplitStatistics
from ffr_verl.data.templates import TEMPLATES, Language, PromptTemplate
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import unwritable
from ffr_verl.errors import FFRError, printable
from ffr_verl.files import check_output, disk_errors, whole_or_nothing
from ffr_verl.images import resolve_image

__all__ = ["PrepareSummary", "prepare"]

_COLLECT_AFTER = 20_000


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What was read and written.

    Attributes:
        rows: written, to each of the two files.
        rejected: rows of the source that were left out.
        problems: kinds of problems, warnings among them, and the first of each.
        statistics: see `SplitStatistics.summary`.
        seconds: wall time.
        rl_path: file for GRPO.
        sft_path: file for SFT.
        rejected_path: the rows left out with the reasons; `None` when there are none.
    """

    rows: int
    rejected: int
    problems: ProblemLog
    statistics: Mapping[str, float | None]
    seconds: float
    rl_path: Path
    sft_path: Path
    rejected_path: Path | None


def prepare(
    source: Path,
    *,
    images_root: Path,
    output: Path,
    split: str,
    source_format: SourceFormat = "mldr",
    data_source: str = "ffr/mldr",
    skip_invalid: bool = False,
    decode: bool = False,
    embed_images: bool = False,
    max_images: int = 8,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    tokenizer: str | None = None,
    max_prompt_tokens: int = 14_512,
    against: Sequence[Path] = (),
    window: WindowSettings | None = None,
    language: Language | None = None,
    template: Path | None = None,
    captions: bool = False,
    report: Path | None = None,
    on_position: Callable[[int], None] = lambda position: None,
) -> PrepareSummary:
    """Check every row of `source` and write `{split}.rl.parquet` and `{split}.sft.parquet` into `output`.

    Memory does not grow with the source but for some 130 bytes a row, to tell repeated rows and for the files' footer.

    Args:
        source: a JSON list or JSONL, gzipped or not.
        images_root: folder that the rows' image paths are relative to; recorded in the files.
        output: folder for the files; made when missing.
        split: name of the split.
        source_format: a name of `ffr_verl.data.sources.SOURCES`.
        data_source: value of verl's field of that name.
        skip_invalid: write the good rows, and the others with the reasons as `{split}.rejected.jsonl`.
        decode: decode every image, instead of reading its header and end.
        embed_images: store the images' bytes in the files, instead of their paths.
        max_images: most images of a row.
        max_pixels: bound to which the model shrinks an image; the recipes' `data.ffr.max_pixels`.
        tokenizer: of the model, to count prompt tokens: a folder, a tokenizer.json or a hub name.
        max_prompt_tokens: most tokens of a prompt, checked with a `tokenizer`.
        against: parquet files of other splits, whose dialogues must not occur.
        window: cut dialogues that are longer.
        language: of the instructions around raw dialogues; by default each dialogue's own.
        template: a YAML file with instructions for raw dialogues, see `PromptTemplate.read`.
        captions: write the captions of raw dialogues into the prompt.
        report: where a JSON report is written, also when the source is refused.
        on_position: told after each row how many bytes of the source have been read.

    Returns:
        What was written, and what was found.

    Raises:
        FFRError: for anything wrong with the input (a table of problems by kind), or a full disk. Nothing is written
            then but the report; files of an earlier call stay as they were.
    """
    started = time.monotonic()
    log, statistics = ProblemLog(), SplitStatistics()
    paths = [output / f"{split}.{name}" for name in ("rl.parquet", "sft.parquet", "rejected.jsonl")]
    with contextlib.ExitStack() as stack:
        if report is not None:
            check_output(
                report, force=True, example="report.json", inputs=[source, *against, *paths], option="--report"
            )
            stack.enter_context(_reported(report, source, split, log, statistics))
        root = images_root.expanduser().resolve()
        _check_arguments(source_format, split, images_root, root, language, template, captions)
        texts = TEMPLATES[language] if language is not None else None
        if template is not None:
            texts = PromptTemplate.read(template)
        form = SOURCES[source_format]
        settings = CheckSettings(
            images_root=root,
            decode=decode,
            max_images=max_images,
            max_pixels=max_pixels,
            tokens=None if tokenizer is None else PromptTokens(tokenizer),
            max_prompt_tokens=max_prompt_tokens,
            other_splits=OtherSplits(against),
            has_prompts=form.has_prompts,
        )
        checker = RowChecker(settings)

        def checked(number: int, row: Mapping[str, Any]) -> tuple[list[CheckedRow], list[Problem]]:
            """The rows that a row of the source gives, and all problems; of no use when one is an error."""
            try:
                rows = form.rows(row, template=texts, captions=captions)
            except RawDialogueError as error:
                # What else can be told of a row that gives no rows.
                rest = {"dialogue_id": row.get("dialogue_id"), "images": list(error.images)}
                found = [Problem(number, *problem) for problem in error.problems]
                return [], [*found, *checker.check_id_and_images(number, rest)]
            made: list[CheckedRow] = []
            problems: list[Problem] = []
            for one in rows:
                good, found = checker.check(number, one)
                problems += found
                for part in () if good is None else [good] if window is None else good.cut(window):
                    limited, found = check_limits(number, part, settings)
                    problems += found
                    made.append(limited)
            return made, list(dict.fromkeys(problems))  # several queries of a dialogue have the same problems

        stack.enter_context(disk_errors(output))
        stack.enter_context(_seldom_collected())
        stack.enter_context(_made_folder(output))
        rl_path, sft_path, rejected_path = stack.enter_context(whole_or_nothing(paths, place=output))
        with contextlib.ExitStack() as files:
            writer = SplitWriter(
                rl_path,
                sft_path,
                split=split,
                data_source=data_source,
                images_root=root,
                image_bytes=(lambda name: resolve_image(root, name).read_bytes()) if embed_images else None,
            )
            files.callback(writer.close)
            rejected = RejectedRows(rejected_path)
            files.callback(rejected.close)
            for number, row in _rows(source, log, on_position):
                made, problems = checked(number, row)
                if log.add(problems):
                    rejected.add({"row": number, "problems": [_record(found) for found in problems], "content": row})
                elif not log.rejected or skip_invalid:
                    for part in made:
                        writer.add(part)
                        statistics.add(part)
            if log.rejected and not skip_invalid:
                raise FFRError(_refusal(source, log))
            if not writer.rows:
                what = f"every row is refused:\n{log.table(errors=True)}" if log.rejected else "no rows in it"
                raise FFRError(f"{source}: {what}")
            writer.finish()
        if not log.rejected:
            paths[2].unlink(missing_ok=True)  # an earlier call's, which would be taken for this one's
    return PrepareSummary(
        rows=len(statistics),
        rejected=log.rejected,
        problems=log,
        statistics=statistics.summary(),
        seconds=time.monotonic() - started,
        rl_path=paths[0],
        sft_path=paths[1],
        rejected_path=paths[2] if log.rejected else None,
    )


def _rows(
    source: Path, log: ProblemLog, on_position: Callable[[int], None]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The source's rows; when the file itself is broken, the problems of the rows before are told too."""
    try:
        yield from read_rows(source, on_position=on_position)
    except FFRError as error:
        if not log.rejected:
            raise
        raise FFRError(f"{error}\nrows before it have problems too:\n{log.table(errors=True)}") from None


def _check_arguments(
    source_format: SourceFormat,
    split: str,
    images_root: Path,
    root: Path,
    language: Language | None,
    template: Path | None,
    captions: bool,
) -> None:
    if not split or Path(split).name != split or split.startswith(".") or unwritable(split):
        raise FFRError(f"--split: found {split!r}; give a plain name such as train")
    if not root.is_dir():
        raise FFRError(f"--images-root: {images_root}: no such folder")
    if source_format not in SOURCES:
        raise FFRError(f"--format: found {source_format!r}; give one of {', '.join(SOURCES)}")
    if SOURCES[source_format].has_prompts:
        for option, is_given in (("--language", language), ("--template", template), ("--captions", captions)):
            if is_given:
                raise FFRError(f"{option}: MLDR rows bring their prompts; it goes with --format dialogue")
    elif language is not None and template is not None:
        raise FFRError("--language and --template: give one of them")


def _record(problem: Problem) -> dict[str, Any]:
    kind = problem.kind
    return {"kind": kind.value, "error": kind.is_error, "field": problem.field, "message": problem.message}


def _refusal(source: Path, log: ProblemLog) -> str:
    count = "1 row is" if log.rejected == 1 else f"{log.rejected:,} rows are"
    what = f"{count} refused, nothing was written (--skip-invalid writes the others)"
    return f"{source}: {what}:\n{log.table(errors=True)}"


@contextlib.contextmanager
def _reported(path: Path, source: Path, split: str, log: ProblemLog, statistics: SplitStatistics) -> Iterator[None]:
    """Write the report, whatever happens inside; that it can be written is seen before."""
    failure: BaseException | None = None
    with whole_or_nothing([path], mend="give another --report") as (temporary,):
        temporary.touch()
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # raised again when the report is in its place
            failure = error
        told = str(failure) if isinstance(failure, FFRError) else f"interrupted ({type(failure).__name__})"
        rows = 0 if failure is not None else len(statistics)
        content = {
            "source": printable(str(source)),
            "split": split,
            "rows_written": rows,
            "rows_rejected": log.rejected,
            "error": told if failure is not None else None,
            "problems": log.report(),
            "statistics": statistics.summary() if rows else None,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and take away what was made of it when the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something else is in it by now
            for path in made:
                path.rmdir()
        raise


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Fewer runs of the garbage collector: rows make many small objects and no cycles, it would take a tenth of the
    time to find nothing."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _COLLECT_AFTER), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
