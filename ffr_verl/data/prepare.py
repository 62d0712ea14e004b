"""`ffr-verl prepare`: rows, checked, as parquet for both training stages."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.data.checks.checked_row import CheckedRow, CheckSettings, check_limits
from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.checks.problems import Problem, ProblemLog
from ffr_verl.data.checks.validation import RowChecker
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
from ffr_verl.model_families import family_of_model
from ffr_verl.settings import DEFAULT_MAX_PIXELS

__all__ = ["PrepareSummary", "prepare"]

_COLLECT_AFTER = 100_000  # more than a row group holds
_SKIP = "--skip-invalid writes the others"


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What was read and written."""

    rows: int  # written, to each of the two files
    rejected: int  # rows of the source that were left out
    problems: ProblemLog  # kinds of problems, warnings among them, and the first of each
    statistics: Mapping[str, float | None]  # see `SplitStatistics.summary`
    seconds: float  # wall time
    rl_path: Path  # file for GRPO
    sft_path: Path  # file for SFT
    rejected_path: Path | None  # the rows left out with the reasons; `None` when there are none


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
    model_family: str | None = None,
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
        model_family: of the model, see `ffr_verl.model_families`: sizes of images and chat format; by default the one
            of the `tokenizer`'s folder.
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
            inputs = [source, *against, *paths]
            check_output(report, force=True, example="report.json", inputs=inputs, option="--report")
            stack.enter_context(_reported(report, source, split, log, statistics))
        root = images_root.expanduser().resolve()
        if not split or Path(split).name != split or split.startswith(".") or unwritable(split):
            raise FFRError(f"--split: found {split!r}; give a plain name such as train")
        if not root.is_dir():
            raise FFRError(f"--images-root: {images_root}: no such folder")
        if source_format not in SOURCES:
            raise FFRError(f"--format: found {source_format!r}; give one of {', '.join(SOURCES)}")
        form = SOURCES[source_format]
        for option, is_given in (("--language", language), ("--template", template), ("--captions", captions)):
            if is_given and form.has_prompts:
                raise FFRError(f"{option}: MLDR rows bring their prompts; it goes with --format dialogue")
        if language is not None and template is not None:
            raise FFRError("--language and --template: give one of them")
        texts = PromptTemplate.read(template) if template else TEMPLATES[language] if language else None
        tokens = None if tokenizer is None else PromptTokens(tokenizer, model_family=model_family)
        settings = CheckSettings(
            images_root=root,
            decode=decode,
            max_images=max_images,
            max_pixels=max_pixels,
            family=family_of_model(None, name=model_family) if tokens is None else tokens.family,
            tokens=tokens,
            max_prompt_tokens=max_prompt_tokens,
            other_splits=OtherSplits(against),
            has_prompts=form.has_prompts,
        )
        checker = RowChecker(settings)
        stack.enter_context(disk_errors(output))
        stack.enter_context(_seldom_collected())
        stack.enter_context(_made_folder(output))
        rl_path, sft_path, rejected_path = stack.enter_context(whole_or_nothing(paths, place=output))
        with contextlib.ExitStack() as files:
            image_bytes = (lambda name: resolve_image(root, name).read_bytes()) if embed_images else None
            writer = SplitWriter(rl_path, sft_path, split, data_source, root, settings.family, image_bytes)
            files.callback(writer.close)
            rejected = RejectedRows(rejected_path)
            files.callback(rejected.close)
            try:
                for number, row in read_rows(source, on_position=on_position):
                    try:
                        made, problems = _checked(
                            number, form.rows(row, template=texts, captions=captions), checker, window
                        )
                    except RawDialogueError as error:  # what else can be told of a row that gives no rows?
                        rest = {"dialogue_id": row.get("dialogue_id"), "images": list(error.images)}
                        made, problems = [], [Problem(number, *problem) for problem in error.problems]
                        problems += checker.check_id_and_images(number, rest)
                    if log.add(problems):
                        rejected.add({"row": number, "problems": [one.to_dict() for one in problems], "content": row})
                    elif not log.rejected or skip_invalid:
                        for part in made:
                            writer.add(part)
                            statistics.add(part)
            except FFRError as error:  # the file itself is broken
                if not log.rejected:
                    raise
                raise FFRError(f"{error}\nrows before it have problems too:\n{log.table(errors=True)}") from None
            if log.rejected and not (skip_invalid and writer.rows):
                what = "1 row is refused" if log.rejected == 1 else f"{log.rejected:,} rows are refused"
                what = "every row is refused" if skip_invalid else f"{what}, nothing was written ({_SKIP})"
                raise FFRError(f"{source}: {what}:\n{log.table(errors=True)}")
            if not writer.rows:
                raise FFRError(f"{source}: no rows in it")
            writer.finish()
        if not log.rejected:
            paths[2].unlink(missing_ok=True)  # an earlier call's, which would be taken for this one's
    rejected_at = paths[2] if log.rejected else None
    seconds = time.monotonic() - started
    return PrepareSummary(
        len(statistics), log.rejected, log, statistics.summary(), seconds, paths[0], paths[1], rejected_at
    )


def _checked(
    number: int, rows: Iterable[Mapping[str, Any]], checker: RowChecker, window: WindowSettings | None
) -> tuple[list[CheckedRow], list[Problem]]:
    """The rows and windows that a row of the source gives, and all problems; of no use when one is an error."""
    made: list[CheckedRow] = []
    problems: list[Problem] = []
    for one in rows:
        good, found = checker.check(number, one)
        problems += found
        for part in () if good is None else [good] if window is None else good.cut(window):
            limited, found = check_limits(number, part, checker.settings)
            problems += found
            made.append(limited)
    return made, list(dict.fromkeys(problems))  # several queries of a dialogue have the same problems


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
