"""Where rows come from: the formats that `ffr-verl prepare`, `build` and `inspect` read, in one table.

Another format is one more entry; a third party's is an entry point of the group `ffr_verl.sources`, a `Source` or a
function from a path to raw dialogues, or is given as `pkg://module:name` or `path/to/file.py:name`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ffr_verl.data.sources.dialogcc import DIALOGCC
from ffr_verl.data.sources.guard import guarded
from ffr_verl.data.sources.json_document import records_of_rows
from ffr_verl.data.sources.locomo import LOCOMO
from ffr_verl.data.sources.mmdd import MMDD
from ffr_verl.data.sources.mmdialog import MMDIALOG
from ffr_verl.data.sources.photochat import PHOTOCHAT
from ffr_verl.data.sources.slack import SLACK
from ffr_verl.data.sources.source import Probe, Source
from ffr_verl.data.sources.telegram import TELEGRAM
from ffr_verl.data.sources.wechat import WECHAT
from ffr_verl.doors import Door, entry_points, load_door, parse_door
from ffr_verl.errors import FFRError

__all__ = ["AUTO", "ENTRY_POINTS", "SOURCES", "Source", "all_sources", "find_source", "source_of_file"]

AUTO = "auto"
ENTRY_POINTS = "ffr_verl.sources"
_TEXTS = {".csv", ".txt", ".md"}  # no JSON
_QUERIES = frozenset({"query_text", "queries", "gt_turns"})
_OTHER_TURNS = frozenset({"share_photo", "shared_image"})

SOURCES: Mapping[str, Source] = {
    "mldr": Source(
        about="rows with prompts",
        example='{"dialogue_id": "d1", "images": ["cat.png"], "messages": [{"role": "user", "content": "…"}, {"role": '
        '"assistant", "content": "…"}], "solution": "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[0]'
        '<|img_ids_end|>"}',
        records=records_of_rows,
        fits=lambda probe: {"messages", "role"} <= probe.keys,
        has_gold=True,
        has_prompts=True,
    ),
    "dialogue": Source(
        about="raw dialogues with queries and gold turns",
        example='{"dialogue_id": "w1", "dialogue": [{"speaker": "Ann", "utterance": "look at him"}, {"speaker": '
        '"Ann", "utterance": [{"image_url": "cat.jpg", "caption": "a cat"}]}], "query_text": "the cat", '
        '"gt_turns": [0, 1]}',
        records=records_of_rows,
        fits=lambda probe: "dialogue" in probe.keys and bool(_QUERIES & probe.keys or not _OTHER_TURNS & probe.keys),
        has_gold=True,
    ),
    "telegram": TELEGRAM,
    "slack": SLACK,
    "wechat": WECHAT,
    "locomo": LOCOMO,
    "photochat": PHOTOCHAT,
    "dialogcc": DIALOGCC,
    "mmdialog": MMDIALOG,
    "mmdd": MMDD,
}


def find_source(name: str, path: Path) -> tuple[str, Source]:
    """The format of a name, see the module; of `auto`, the one that a file fits.

    Args:
        name: as `--format` takes it.
        path: the file.

    Returns:
        Its name, and the format.

    Raises:
        FFRError: for a name that is none, or a format of a third party that cannot be loaded.
    """
    if name == AUTO:
        return source_of_file(path)
    if name in SOURCES:
        return name, SOURCES[name]
    return name, _opened(parse_door(name, where="--format"))


def all_sources(on_broken: Callable[[str], None] = lambda message: None) -> dict[str, Source]:
    """Every format by its name, those of third parties among them; `on_broken` is told of those that cannot be
    loaded, which are left out."""
    found = dict(SOURCES)
    for name in entry_points(ENTRY_POINTS):
        try:
            found.setdefault(name, _opened(Door(None, None, name)))
        except FFRError as error:
            on_broken(str(error))
    return found


def source_of_file(path: Path) -> tuple[str, Source]:
    """The one format that a file fits, as far as its start tells; MLDR rows where JSON fits none.

    Raises:
        FFRError: when it fits none or several.
    """
    probe = Probe.of(path)
    fitting = [(name, source) for name, source in all_sources().items() if source.fits(probe)]
    if len(fitting) > 1:
        names = [name for name, _ in fitting]
        raise FFRError(f"{path}: may be of the format {' or '.join(names)}; say which with --format {names[0]}")
    if fitting:
        return fitting[0]
    if probe.text.strip() and path.suffix.lower() in _TEXTS:
        raise FFRError(
            f"{path}: of none of the formats {', '.join(SOURCES)}; `ffr-verl prepare --format list` describes them"
        )
    return "mldr", SOURCES["mldr"]  # whose reader says what is wrong with the file


def _opened(door: Door) -> Source:
    found = load_door(door, where="--format", group=ENTRY_POINTS, known=[AUTO, *SOURCES])
    if isinstance(found, Source):
        return found if found in SOURCES.values() else guarded(found, str(door))
    if callable(found) and not isinstance(found, type):
        return guarded(Source.of_function(found), str(door))
    kind = type(found).__name__
    raise FFRError(f"--format: {door} is of type {kind}, expected a Source or a function from a path to raw dialogues")
