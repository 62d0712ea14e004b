"""Commands that are killed, run twice at once, or meet a full or closed disk: what they leave is whole, or not there,
and the same command again gives what an undisturbed one does, with nothing beside it.

What needs a server, an encoder or verl: tests/integration/test_killed_commands.py, test_embed.py, and `make attack`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ATTACKS, HELD

from ffr_verl.cli import main
from ffr_verl.data.demo import demo_rows
from ffr_verl.data.parquet_files import check_pages, check_pair, count_rows

KILLS = max(3, ATTACKS // 20)
COMMANDS = {
    "prepare": "prepare {data}/heldout.json --force --images-root {data} --output {out} --split t "
    "--report {out}/report.json",
    "build": "build --force {small}/short.jsonl {out}/b.jsonl --dialogues 500",
    "evaluate": "evaluate --force {small}/pred.jsonl --bootstrap 200 --json {out}/e.json --csv {out}/e.csv",
    "report": "report {small}/pred.jsonl --output {out}/r.html --images-root {data} --force",
    "score": "score --predictions {small}/pred.jsonl --data {small}/t.rl.parquet --output {out}/d.parquet --force",
}


def in_child(arguments: list[str], before: Callable[[], Any], log: Path) -> int:
    """Start the command in a fork of this process, which has everything imported; gives the process's number."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.argv = ["ffr-verl", *arguments]
        before()
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    finally:
        os._exit(status)


def end_of(pid: int) -> int:
    """Exit status of a child, or less the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder: Path) -> dict[str, bytes]:
    """Of the files in a folder; hidden ones, too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def killer(renames: int) -> Callable[[], None]:
    """Have this process killed at its so-manieth renaming, before it happens."""

    def before() -> None:
        real, left = os.replace, [renames]

        def replace(source: Any, target: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replace  # type: ignore[assignment]
        Path.replace = lambda self, target: replace(self, target)  # type: ignore[method-assign]

    return before


class Bench:
    """A command, an output folder, and what it gives when nobody disturbs it."""

    def __init__(self, name: str, small: Path, data: Path, folder: Path) -> None:
        self.folder, self.log = folder / "out", folder / "log"
        text = COMMANDS[name].format(small=small, data=data, out=self.folder)
        self.arguments, self.name = text.split(), name
        first = self.undisturbed()
        self.clear()
        started = time.monotonic()
        self.good = [self.undisturbed(), first]
        self.seconds = time.monotonic() - started
        # A page has the minute in which it was made.
        self.same = {name for name, data in self.good[0].items() if first[name] == data and not name.endswith(".html")}
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def start(self, before: Callable[[], Any] = lambda: None) -> int:
        self.folder.mkdir(exist_ok=True)
        return in_child(self.arguments, before, self.log)

    def undisturbed(self) -> dict[str, bytes]:
        assert end_of(self.start()) == 0, self.log.read_text()
        return content(self.folder)

    def check_whole(self, left: dict[str, bytes]) -> None:
        """That these files are the good ones."""
        for name in self.same & left.keys():
            assert left[name] == self.good[0][name], f"{self.name}: {name} is not whole"
        assert all(data.rstrip().endswith(b"</html>") for name, data in left.items() if name.endswith(".html"))

    def judge(self, kind: str) -> None:
        """What is there is whole; the same command again gives all of it and takes what was left away."""
        left = {name: data for name, data in content(self.folder).items() if not name.startswith(".")}
        self.check_whole(left)
        HELD[f"{kind} {self.name}: {'files there' if left else 'nothing there'}"] += 1
        again = self.undisturbed()
        assert again.keys() == self.good[0].keys()
        self.check_whole(again)
        self.clear()


@pytest.fixture(scope="module", params=list(COMMANDS))
def measured(
    request: pytest.FixtureRequest, small: Path, demo_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    return Bench(request.param, small, demo_set, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def bench(measured: Bench) -> Bench:
    measured.clear()
    return measured


def test_killed_at_any_moment(bench: Bench, source: random.Random) -> None:
    for _ in range(KILLS):
        pid = bench.start()
        time.sleep(source.uniform(0.0, 1.1 * bench.seconds))
        os.kill(pid, signal.SIGKILL)
        if end_of(pid) == -signal.SIGKILL:
            bench.judge("kill -9,")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_between_two_renames(bench: Bench, renames: int) -> None:
    if end_of(bench.start(killer(renames))) == -signal.SIGKILL:
        bench.judge("kill -9 at a renaming,")


def test_a_mixed_pair_of_a_killed_call_is_refused(small: Path, demo_set: Path, tmp_path: Path) -> None:
    """The RL file of the second call, the SFT file of the first."""
    bench = Bench("prepare", small, demo_set, tmp_path)
    bench.undisturbed()
    rows = json.loads((demo_set / "heldout.json").read_text())[:9]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    bench.arguments[1] = str(tmp_path / "few.json")
    assert end_of(bench.start(killer(1))) == -signal.SIGKILL
    rl, sft = (bench.folder / f"t.{kind}.parquet" for kind in ("rl", "sft"))
    assert (count_rows(rl), count_rows(sft)) == (9, 16)
    for file in (rl, sft):
        with pytest.raises(ValueError, match=r"holds other rows than t\.\w+\.parquet beside it"):
            check_pair([file])
    bench.undisturbed()
    check_pair([rl, sft])


def test_two_writers_at_once(bench: Bench, tmp_path: Path, demo_set: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(list(demo_rows(tmp_path / "images", rows=30, seed=9))))
    for _ in range(KILLS):
        first = bench.start()
        if bench.name == "prepare":  # the other one of other rows
            kept, bench.arguments = bench.arguments, list(bench.arguments)
            bench.arguments[1] = str(other)
            bench.arguments = [str(tmp_path) if one == str(demo_set) else one for one in bench.arguments]
            second, bench.arguments = bench.start(), kept
        else:
            second = bench.start()
        statuses = end_of(first), end_of(second)
        assert statuses[0] in (0, 2)
        assert statuses[1] in (0, 2)
        assert 0 in statuses, bench.log.read_text()
        for file in bench.folder.glob("*.parquet"):
            check_pages([file])
            check_pair([file])
        assert content(bench.folder).keys() == bench.good[0].keys()
        HELD[f"two writers, {bench.name}: whole"] += 1
        bench.clear()


def test_a_disk_that_gets_full(bench: Bench, source: random.Random) -> None:
    """By a limit to the size of a file, which gives the errors that a full disk gives at the same places."""
    largest = max(map(len, bench.good[0].values()))
    for _ in range(KILLS):
        most = source.randrange(largest)
        status = end_of(bench.start(lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))
        said = bench.log.read_text()
        assert status in (0, 2), said
        # The log is a file, too: the limit may cut the message itself.
        assert status == 0 or "too large" in said.lower() or len(said.encode()) == most, said
        left = content(bench.folder)
        assert not [name for name in os.listdir(bench.folder) if name.startswith(".")], left.keys()
        bench.check_whole({name: data for name, data in left.items() if name != "report.json"})
        HELD[f"full disk, {bench.name}: {'told' if status else 'fitted'}"] += 1
        bench.clear()


def test_a_clock_that_goes_back(bench: Bench) -> None:
    """As Python sees it: an hour with each look."""
    looks = itertools.count()
    changed = {"time": lambda: 1e9 - 3600 * next(looks), "time_ns": lambda: 10**18 - 3600 * 10**9 * next(looks)}
    assert end_of(bench.start(lambda: [setattr(time, name, clock) for name, clock in changed.items()])) == 0
    left = content(bench.folder)
    assert left.keys() == bench.good[0].keys()
    bench.check_whole(left)
    HELD[f"a clock that goes back, {bench.name}: the same"] += 1


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null/x", "/dev/full"])
def test_places_that_cannot_be_written(bench: Bench, place: str) -> None:
    """As a disk that is read-only; the tests may run as root, whom permissions do not stop."""
    arguments = [one.replace(str(bench.folder), place) for one in bench.arguments]
    status = end_of(in_child(arguments, lambda: None, bench.log))
    said = bench.log.read_text()
    assert status == 2, said
    assert said.count("error: ") == 1, said
    assert place in said or "/dev" in said, said
    HELD[f"no place to write, {bench.name}: told"] += 1


def test_a_link_of_a_temporary_name_is_not_followed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of names of before, of names like those of now with the number of a process that has ended, and of the very
    name, were it guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in bench.good[0]:
        path = bench.folder / name
        node = os.uname().nodename
        for planted in (f".{path.name}.partial", f".{path.name}.{node}.999999999.aaaa.partial"):
            path.with_name(planted).symlink_to(victim)
    bench.undisturbed()
    assert victim.read_text() == "precious"
    bench.clear()
    monkeypatch.setattr("secrets.token_hex", lambda _size: "guessed")

    def plant() -> None:
        for name in bench.good[0]:
            path = bench.folder / name
            path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.guessed.partial").symlink_to(tmp_path)

    status = end_of(bench.start(plant))
    assert status == 2, bench.log.read_text()
    assert "File exists" in bench.log.read_text()
    assert sorted(tmp_path.iterdir()) == [victim]


@pytest.mark.skipif(ATTACKS < 1000, reason="the long part: FFR_ATTACKS=1000 or more (make attack)")
def test_merge_killed(base_model: Path, tmp_path: Path, source: random.Random) -> None:
    """A checkpoint as verl writes one, of one rank; each run takes as long as importing verl."""
    import torch
    from safetensors.torch import load_file

    shards, output = tmp_path / "c", tmp_path / "m"
    shutil.copytree(base_model, shards / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    (shards / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    weights = {name: tensor for file in base_model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    torch.save(weights, shards / "model_world_size_1_rank_0.pt")
    command = [sys.executable, "-m", "ffr_verl", "merge", str(shards), "--output", str(output), "--force"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    taken, good = time.monotonic() - started, sorted(content(output))
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(source.uniform(0.5, 1.0) * taken)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            assert sorted(content(output)) == good, "the model of before stays"
            HELD["kill -9, merge: files there"] += 1
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "m"]
