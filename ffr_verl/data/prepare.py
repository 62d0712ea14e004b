"""`ffr-verl prepare`: rows, checked, as parquet for both training stages."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.checks.problems import Problem, ProblemKind, ProblemLog
from ffr_verl.data.checks.validation import RowChecker
from ffr_verl.data.parquet_writer import SplitWriter
from ffr_verl.data.sources import AUTO, find_source
from ffr_verl.data.sources.raw_dialogues import RawDialogueError
from ffr_verl.data.sources.rows import RowSettings, rows_of_record
from ffr_verl.data.sources.source import DEFAULT_GAP_HOURS, Notes, ReadSettings, read_image_map
from ffr_verl.data.statistics import SplitStatistics
from ffr_verl.data.templates import TEMPLATES, Language, PromptTemplate
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import unwritable
from ffr_verl.errors import FFRError, printable
from ffr_verl.files import check_output, disk_errors, whole_or_nothing
from ffr_verl.images import read_image_facts, resolve_image
from ffr_verl.model_families import family_of_model
from ffr_verl.settings import DEFAULT_MAX_IMAGES, DEFAULT_MAX_PIXELS, DEFAULT_MAX_PROMPT_TOKENS

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
    sft_path: Path | None  # file for SFT; `None` of unlabelled rows
    rejected_path: Path | None  # the rows left out with the reasons; `None` when there are none
    source_format: str  # name of the format that was read
    left_out: Mapping[str, int]  # what of the dialogues written no row holds, and how often


def prepare(
    source: Path,
    *,
    images_root: Path,
    output: Path,
    split: str,
    source_format: str = AUTO,
    unlabelled: bool = False,
    queries: Sequence[str] = (),
    gap_hours: float = DEFAULT_GAP_HOURS,
    image_map: Path | None = None,
    skip_invalid: bool = False,
    decode: bool = False,
    embed_images: bool = False,
    max_images: int = DEFAULT_MAX_IMAGES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    tokenizer: str | None = None,
    model_family: str | None = None,
    max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
    against: Sequence[Path] = (),
    window: WindowSettings | None = None,
    language: Language | None = None,
    template: Path | None = None,
    captions: bool = False,
    report: Path | None = None,
    force: bool = True,
    on_position: Callable[[int], None] = lambda position: None,
) -> PrepareSummary:
    """Check every row of `source` and write `{split}.rl.parquet` and `{split}.sft.parquet` into `output`.

    Memory does not grow with the source but for some 500 bytes a row, to tell repeated rows and for the files' footer.

    The options are those of the command, whose help says what they do, but files that are there are replaced by
    default (`force`); `on_position` is told after each row how many bytes of the source have been read.

    Returns:
        What was written, and what was found.

    Raises:
        FFRError: for anything wrong with the input (a table of problems by kind), or a full disk. Nothing is written
            then but the report; files of an earlier call stay as they were.
    """
    started = time.monotonic()
    log, statistics, left_out = ProblemLog(), SplitStatistics(), Counter[str]()
    paths = [output / f"{split}.{name}" for name in ("rl.parquet", "sft.parquet", "rejected.jsonl")]
    with contextlib.ExitStack() as stack:
        if report is not None:
            inputs = [source, *against, template, image_map, *paths]
            # By a call that was refused.
            may_replace = force or (not any(path.exists() for path in paths) and _is_report(report))
            check_output(report, force=may_replace, example="report.json", inputs=inputs, option="--report")
            stack.enter_context(_reported(report, source, split, log, statistics, left_out))
        root = images_root.expanduser().resolve()
        if not split or Path(split).name != split or split.startswith(".") or unwritable(split):
            raise FFRError(f"--split: found {split!r}; give a plain name such as train")
        if not root.is_dir():
            raise FFRError(f"--images-root: {images_root}: no such folder")
        if not source.exists():
            raise FFRError(f"{source}: no such file")
        for path in (*paths[: 1 if unlabelled else 2], paths[2]):
            check_output(path, force=force, example=path.name, inputs=[source, *against], option="--split")
        name, form = find_source(source_format, source)
        for option, is_given in (("--language", language), ("--template", template), ("--captions", captions)):
            if is_given and form.has_prompts:
                raise FFRError(f"{option}: MLDR rows bring their prompts; it goes with --format dialogue")
        if language is not None and template is not None:
            raise FFRError("--language and --template: give one of them")
        texts = PromptTemplate.read(template) if template else TEMPLATES[language] if language else None
        read = ReadSettings({} if image_map is None else read_image_map(image_map), gap_hours)
        making = RowSettings(read, texts, captions, unlabelled, queries)
        making.check(name, form)
        if unlabelled and paths[1].exists():
            raise FFRError(f"{paths[1]}: is there from rows with gold answers; give another --split, or remove it")
        tokens = None if tokenizer is None else PromptTokens(tokenizer, model_family=model_family)
        checker = RowChecker(
            images_root=root,
            decode=decode,
            max_images=max_images,
            max_pixels=max_pixels,
            family=family_of_model(None, name=model_family) if tokens is None else tokens.family,
            tokens=tokens,
            max_prompt_tokens=max_prompt_tokens,
            other_splits=OtherSplits(against),
            has_prompts=form.has_prompts,
            window=window,
            unlabelled=unlabelled,
        )
        stack.enter_context(disk_errors(output))
        stack.enter_context(_seldom_collected())
        stack.enter_context(_made_folder(output))
        rl_path, sft_path, rejected_path = stack.enter_context(whole_or_nothing(paths, place=output))
        with contextlib.ExitStack() as files:
            image_bytes = functools.partial(_image_bytes, root, decode=decode) if embed_images else None
            writer = SplitWriter(rl_path, sft_path, split, root, checker.family, image_bytes)
            files.callback(writer.close)
            rejected = files.enter_context(rejected_path.open("w", encoding="utf-8"))
            are_good = False
            try:
                for number, row in form.records(source, read, on_position):
                    notes = Notes()
                    try:
                        made, problems = checker.check(number, rows_of_record(form, number, row, making, notes))
                    except RawDialogueError as error:  # what else can be told of a row that gives no rows?
                        rest = {"dialogue_id": row.get("dialogue_id"), "images": list(error.images)}
                        made, problems = [], [Problem(number, *problem) for problem in error.problems]
                        problems += checker.check_id_and_images(number, rest)
                    if notes.left_out:
                        left = "; ".join([f"{what}: {count}" for what, count in notes.left_out.items()])
                        problems.append(Problem(number, ProblemKind.LEFT_OUT, "dialogue", left))
                    if log.add(problems):
                        told = {"row": number, "problems": [one.to_dict() for one in problems], "content": row}
                        rejected.write(json.dumps(told) + "\n")
                        continue
                    are_good = are_good or bool(made)
                    if not log.rejected or skip_invalid:
                        left_out.update(notes.left_out)
                        for part in made:
                            writer.add(part)
                            statistics.add(part)
            except FFRError as error:  # the file itself is broken
                if not log.rejected:
                    raise
                raise FFRError(f"{error}\nrows before it have problems too:\n{log.table(errors=True)}") from None
            if log.rejected and not (skip_invalid and writer.rows):
                what = "1 row is" if log.rejected == 1 else f"{log.rejected:,} rows are"
                why = f"nothing was written ({_SKIP})" if are_good else "none is left"
                raise FFRError(f"{source}: {what} refused, {why}:\n{log.table(errors=True)}")
            if not writer.rows:
                raise FFRError(f"{source}: no rows in it")
            writer.finish()
        if unlabelled:
            sft_path.unlink()  # there is nothing to learn from
        if not log.rejected:
            for path in (rejected_path, paths[2]):  # an earlier call's would be taken for this one's
                path.unlink(missing_ok=True)
    rejected_at = paths[2] if log.rejected else None
    seconds = time.monotonic() - started
    return PrepareSummary(
        rows=statistics.rows,
        rejected=log.rejected,
        problems=log,
        statistics=statistics.summary(),
        seconds=seconds,
        rl_path=paths[0],
        sft_path=None if unlabelled else paths[1],
        rejected_path=rejected_at,
        source_format=name,
        left_out=dict(left_out.most_common()),
    )


def _image_bytes(root: Path, name: str, *, decode: bool) -> bytes:
    """The content of an image, which is looked at: it may be another file by now than the one that was checked."""
    try:
        data = resolve_image(root, name).read_bytes()
        read_image_facts(data, decode=decode)
    except (ValueError, OSError) as error:
        raise FFRError(
            f"{root / name}: changed while it was read: {error}; leave the images alone meanwhile"
        ) from None
    return data


def _is_report(path: Path) -> bool:
    """Whether a file is one that `_reported` has written."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"source", "split", "rows_written"} <= found.keys()


@contextlib.contextmanager
def _reported(
    path: Path, source: Path, split: str, log: ProblemLog, statistics: SplitStatistics, left_out: Counter[str]
) -> Iterator[None]:
    """Write the report, whatever happens inside; that it can be written is seen before."""
    failure: BaseException | None = None
    with whole_or_nothing([path], mend="give another --report") as (temporary,):
        temporary.touch()
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # raised again when the report is in its place
            failure = error
        told = str(failure) if isinstance(failure, FFRError) else f"interrupted ({type(failure).__name__})"
        rows = 0 if failure is not None else statistics.rows
        content = {
            "source": printable(str(source)),
            "split": split,
            "rows_written": rows,
            "rows_rejected": log.rejected,
            "error": told if failure is not None else None,
            "problems": log.report(),
            "left_out": dict(left_out.most_common()) if rows else {},
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
