"""Answers of a run in progress survive a kill at any moment, and are never mixed with those of other work."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from ffr_verl.errors import FFRError
from ffr_verl.files import check_output
from ffr_verl.inference.journal import AnswerJournal

WORK = {"model": "m", "max_new_tokens": 48, "rows": "abc"}

# Appends rows, one after another, until it is killed; tells each that is kept.
WRITER = """
import sys
from pathlib import Path
from ffr_verl.inference.journal import AnswerJournal
with AnswerJournal(Path(sys.argv[1]), {"model": "m"}, rows=10**6) as journal:
    for row in range(10**6):
        if row not in journal:
            journal.append([(row, {"response": f"answer {row}" * 50})])
            print(row, flush=True)
"""


def responses(journal: AnswerJournal) -> list[str | None]:
    return [None if record is None else record["response"] for record in journal.records()]


def test_answers_come_back_in_the_order_of_the_rows(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "a", WORK, rows=4) as journal:
        journal.append([(2, {"response": "two"}), (0, {"response": "zéro\u2028"})])
        journal.append([(3, {"response": "three", "logprobs": [-0.5]})])
        assert (0 in journal, 1 in journal) == (True, False)
    with AnswerJournal(tmp_path / "a", WORK, rows=4) as journal:
        assert journal.answered == 3
        assert responses(journal) == ["zéro\u2028", None, "two", "three"]
        journal.append([(1, {"response": "one"})])
        assert responses(journal) == ["zéro\u2028", "one", "two", "three"]
        journal.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", [1, 17, -1])
def test_a_line_that_was_not_finished_is_asked_again(tmp_path: Path, torn: int) -> None:
    with AnswerJournal(tmp_path / "a", WORK, rows=3) as journal:
        journal.append([(0, {"response": "zero"})])
    file = tmp_path / "a" / "answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole.replace(b'"row": 0', b'"row": 1')[:torn])
    with AnswerJournal(tmp_path / "a", WORK, rows=3) as journal:
        assert responses(journal) == ["zero", None, None]
        journal.append([(1, {"response": "one"})])
    with AnswerJournal(tmp_path / "a", WORK, rows=3) as journal:
        assert responses(journal) == ["zero", "one", None]


def test_killed_while_it_writes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    process.stdout.close()
    with AnswerJournal(tmp_path / "a", {"model": "m"}, rows=10**6) as journal:
        assert journal.answered in (len(told), len(told) + 1)
        assert all(row in journal for row in told)
        kept = [record["response"] for record in journal.records() if record is not None]
        assert kept == [f"answer {row}" * 50 for row in range(journal.answered)]


def test_other_work_is_refused_and_forgotten_on_request(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "a", WORK, rows=2) as journal:
        journal.append([(0, {"response": "zero"})])
    other = {**WORK, "max_new_tokens": 64, "rows": "abd"}
    with pytest.raises(
        FFRError, match=r"different: max_new_tokens, rows\); finish that one, or forget it with --restart"
    ):
        AnswerJournal(tmp_path / "a", other, rows=2)
    with AnswerJournal(tmp_path / "a", WORK, rows=2) as journal:
        assert journal.answered == 1
    with AnswerJournal(tmp_path / "a", other, rows=2, restart=True) as journal:
        assert journal.answered == 0


def test_a_run_that_ended_before_its_first_answer_is_in_nobodys_way(tmp_path: Path) -> None:
    for work in ({"url": "http://wrong"}, {"url": "http://right"}):
        with AnswerJournal(tmp_path / "a", work, rows=1) as journal:
            assert journal.answered == 0
    with AnswerJournal(tmp_path / "a", {"url": "http://right"}, rows=1) as journal:
        journal.append([(0, {"response": "zero"})])
    with pytest.raises(FFRError, match="different: url"):
        AnswerJournal(tmp_path / "a", {"url": "http://wrong"}, rows=1)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    for restart in (False, True):
        with pytest.raises(FFRError, match="another run is writing it; wait for its end, or end it"):
            AnswerJournal(tmp_path / "a", {"model": "m"}, rows=10**6, restart=restart)
    process.kill()
    process.stdout.close()
    process.wait()
    AnswerJournal(tmp_path / "a", {"model": "m"}, rows=10**6).__exit__(None, None, None)


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    with AnswerJournal(tmp_path / "a", WORK, rows=3) as journal:
        journal.append([(row, {"response": "x"}) for row in range(3)])
    file = tmp_path / "a" / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert lines[0].endswith(b"\t%08x\n" % zlib.crc32(lines[0].rpartition(b"\t")[0]))
    for damaged in (
        b"\0\0\0\n",
        lines[1].replace(b"x", b"y"),
        b"[]\n",
        b'{"row": 9}\n',
        b'{"row": -1, "response": "x"}\n',
        b'{"row": true, "response": "x"}\n',
        b'{"row": 1, "response": null}\n',
        b'{"row": 1, "logprobs": [null]}\n',
        b"[" * 200_000 + b"\n",
    ):
        sealed = damaged if b"\t" in damaged else b"%s\t%08x\n" % (damaged[:-1], zlib.crc32(damaged[:-1]))
        file.write_bytes(lines[0] + sealed + lines[2])
        with pytest.raises(FFRError, match=r"answers\.jsonl: line 2 is damaged; start again with --restart"):
            AnswerJournal(tmp_path / "a", WORK, rows=3)


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerJournal(tmp_path / "a", WORK, rows=3) as journal:
        journal.append([(0, {"response": "zero"})])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(FFRError, match="File too large; run the same command again when that is mended"):
                journal.append([(1, {"response": "one" * 100})])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.append([(2, {"response": "two"})])  # of another request that was under way
    with AnswerJournal(tmp_path / "a", WORK, rows=3) as journal:
        assert responses(journal) == ["zero", None, "two"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FFRError, match="give --output in a folder that can be written"):
        AnswerJournal(tmp_path / "file" / "a", WORK, rows=1)


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match=r"a folder; give the name of a file, such as .*pred\.jsonl"):
        check_output(tmp_path, force=True, example="pred.jsonl")
    (tmp_path / "pred.jsonl").write_text(json.dumps({}))
    with pytest.raises(FFRError, match="is there already; choose another --output, or replace it with --force"):
        check_output(tmp_path / "pred.jsonl", force=False, example="pred.jsonl")
    check_output(tmp_path / "pred.jsonl", force=True, example="pred.jsonl")
    check_output(tmp_path / "other.jsonl", force=False, example="pred.jsonl")
