"""`ffr-verl infer` as a user runs it: with vLLM in its own processes, and against vLLM's real server.

One server serves all tests. It knows the SFT model and a LoRA adapter over it, and wants a key.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from ffr_verl.data.demo import write_demo_set
from ffr_verl.data.prepare import prepare
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.data.windows import WindowIds, WindowSettings
from ffr_verl.dialogues import Utterance, parse_dialogue
from ffr_verl.fragments import parse_fragment
from ffr_verl.inference.journal import journal_folder
from ffr_verl.inference.score import answers_of_predictions

pytestmark = pytest.mark.timeout(900)

KEY = "the-servers-key"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "FFR_KEY": KEY, "FFR_BAD": "bad"}
LENGTH = 512


@pytest.fixture(scope="module")
def adapter(folder: Path, sft_model: Path) -> Path:
    """A LoRA adapter that changes the answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration.from_pretrained(sft_model)
    settings = LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", exclude_modules=".*visual.*", init_lora_weights=False
    )
    get_peft_model(model, settings).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def server(folder: Path, sft_model: Path, adapter: Path) -> Iterator[str]:
    """The address of vLLM's server. It is started by its module: the command `vllm` asks for a distribution of that
    name, the CPU build is called `vllm-cpu`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": sft_model,
        "served-model-name": "sft",
        "lora-modules": f"adapter={adapter}",
        "max-lora-rank": 8,
        "host": "127.0.0.1",
        "port": port,
        "api-key": KEY,
        "dtype": "float32",
        "max-model-len": LENGTH,
        "limit-mm-per-prompt": '{"image": 8}',
        "generation-config": "vllm",
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora", *given]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        else:
            pytest.fail("vLLM's server is not ready after 300 s: " + (folder / "server.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def infer(*arguments: Any, check: bool = True, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """The command, with a time limit."""
    command = [sys.executable, "-m", "ffr_verl", "infer", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=seconds)
    assert not check or run.returncode == 0, run.stderr[-3000:]
    return run


def ask(
    server: str, data: Path, output: Path, *more: Any, model: str = "sft", key: str = "FFR_KEY", **how: Any
) -> Any:
    """The command, with the server."""
    where = ("--endpoint", server, "--api-key-env", key, "--model", model, "--max-new-tokens", 48)
    return infer(*where, "--data", data, "--output", output, *more, **how)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logprobs(row: dict[str, Any]) -> list[float]:
    return [token["logprob"] for token in row["logprobs"]["content"]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def families(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that vLLM has started."""
    return [one for one in psutil.Process(process.pid).children(recursive=True) if "VLLM" in " ".join(one.cmdline())]


def test_the_servers_answers(server: str, folder: Path, tmp_path: Path) -> None:
    data = folder / "heldout.rl.parquet"
    run = ask(server, data, tmp_path / "pred.jsonl", "--logprobs")
    rows, found = rows_of(data), lines(tmp_path / "pred.jsonl")
    assert len(rows) == len(found) == 8
    for row, line in zip(rows, found, strict=True):
        assert line["labels"] == row["reward_model"]["ground_truth"]
        assert line["messages"] == [*row["prompt"], {"role": "assistant", "content": line["response"]}]
        assert (line["images"], line["dialogue_id"]) == (row["images"], row["extra_info"]["dialogue_id"])
        assert logprobs(line)
        assert all(value <= 0 for value in logprobs(line))
    assert sum(parse_fragment(line["response"]) is not None for line in found) >= 6, "it has learned the format"
    scored = list(answers_of_predictions(tmp_path / "pred.jsonl", [data]))
    assert [one["response"] for one in scored] == [line["response"] for line in found]
    assert KEY not in (tmp_path / "pred.jsonl").read_text() + run.stdout + run.stderr


def prompt_lengths(data: Path, model: Path, *, image_tokens: int = 4) -> list[int]:
    count = PromptTokens(str(model)).count
    return [count(row["prompt"], [image_tokens] * len(row["images"])) for row in rows_of(data)]


def test_a_kill_a_second_run_and_the_servers_answers(
    server: str, folder: Path, sft_model: Path, adapter: Path, tmp_path: Path
) -> None:
    """vLLM in processes of ours, with an adapter, killed in the middle: nothing of it stays, finished rows do, and the
    answers are those of the server; rows that are too long have an error."""
    data, output = folder / "train.rl.parquet", tmp_path / "new" / "pred.jsonl"
    lengths = prompt_lengths(data, sft_model)[:640]
    longest = sorted(lengths)[600]
    local = ["--model", sft_model, "--lora", adapter, "--data", data, "--output", output, "--logprobs"]
    local += ["--max-model-len", longest, "--max-new-tokens", 48, "--limit", 640]
    command = [sys.executable, "-m", "ffr_verl", "infer", *map(str, local)]
    answers = journal_folder(output) / "answers.jsonl"
    with (tmp_path / "first.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
        try:
            for _ in range(6000):
                assert process.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
                if answers.exists() and answers.stat().st_size:
                    break
                time.sleep(0.05)
            engine = families(process)
            assert engine
        finally:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(engine, timeout=30)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE], "vLLM's processes ended with ours"
    assert not output.exists()
    kept = answers.read_bytes()
    count = kept.count(b"\n")
    assert 64 <= count < 640
    run = infer(*local)
    assert f"resumed: {count} of 640 rows have their answer from an interrupted run" in run.stdout
    found = lines(output)
    for line in kept.splitlines()[:count]:
        record = json.loads(line.rpartition(b"\t")[0])  # a checksum is behind the tab
        assert found[record["row"]]["response"] == record["response"]
    assert ["error" in line for line in found] == [length >= longest for length in lengths]
    assert f"without an answer │ {sum(length >= longest for length in lengths)}" in " ".join(run.stdout.split())
    ask(server, data, tmp_path / "adapter.jsonl", "--limit", 48, "--logprobs", model="adapter")
    ask(server, data, tmp_path / "sft.jsonl", "--limit", 48)
    has_room = [length + 48 <= longest for length in lengths[:48]]
    assert sum(has_room) >= 8
    for ours, theirs, is_compared in zip(found, lines(tmp_path / "adapter.jsonl"), has_room, strict=False):
        if is_compared:
            assert ours["response"] == theirs["response"]
            assert logprobs(ours) == pytest.approx(logprobs(theirs), abs=1e-3)
    of_sft = [line["response"] for line in lines(tmp_path / "sft.jsonl")]
    assert [line["response"] for line in found[:48]] != of_sft, "the adapter is at work"


def test_rows_that_are_too_long_for_the_server(server: str, folder: Path, sft_model: Path, tmp_path: Path) -> None:
    data = folder / "heldout.rl.parquet"
    lengths = prompt_lengths(data, sft_model, image_tokens=1)  # the server counts an image as one when it refuses
    limit = sorted(lengths)[5]
    run = ask(server, data, tmp_path / "pred.jsonl", "--max-new-tokens", LENGTH - limit)
    found = lines(tmp_path / "pred.jsonl")
    assert ["error" in line for line in found] == [length > limit for length in lengths]
    assert all(line["response"] == "" and "400" in line["error"] for line in found if "error" in line)
    assert "without an answer: 400: " in run.stdout


def test_what_a_real_server_refuses(server: str, folder: Path, tmp_path: Path) -> None:
    data, output = folder / "heldout.rl.parquet", tmp_path / "pred.jsonl"
    for options, message in (
        ({"key": "FFR_BAD"}, "the server refuses the key (401: Unauthorized); look at the key in FFR_BAD"),
        ({"model": "gpt"}, "404: The model `gpt` does not exist."),
        ({"server": server.removesuffix("/v1")}, "404: Not Found; most addresses end in /v1"),
        ({"server": "http://127.0.0.1:9/v1"}, "cannot be reached"),
    ):
        run = ask(options.pop("server", server), data, output, check=False, **options)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1)
        assert message in run.stderr
        assert not output.exists()


def test_drawn_answers_follow_the_seed(server: str, folder: Path, tmp_path: Path) -> None:
    def drawn(name: str, *options: Any) -> list[str]:
        ask(server, folder / "heldout.rl.parquet", tmp_path / f"{name}.jsonl", *options)
        return [line["response"] for line in lines(tmp_path / f"{name}.jsonl")]

    first = drawn("a", "--temperature", 1, "--seed", 3)
    assert first == drawn("b", "--temperature", 1, "--seed", 3)
    assert first != drawn("c", "--temperature", 1, "--seed", 4)


def test_ctrl_c_while_the_model_is_loaded(folder: Path, sft_model: Path, tmp_path: Path) -> None:
    """vLLM's engine gets it too, and its client would wait for the engine for minutes."""
    data, log = folder / "heldout.rl.parquet", tmp_path / "log"
    options = ["--model", sft_model, "--data", data, "--output", tmp_path / "pred.jsonl", "--max-model-len", LENGTH]
    command = [sys.executable, "-m", "ffr_verl", "infer", *map(str, options)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            env={**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            for _ in range(2400):
                assert process.poll() is None, log.read_text()[-3000:]
                if "Loading safetensors" in log.read_text():
                    break
                time.sleep(0.05)
            engine = families(process)
            assert engine
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == 130, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()
    assert "ffr-verl: interrupted" in log.read_text()
    _, alive = psutil.wait_procs(engine, timeout=30)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE], "vLLM's processes ended with ours"


def test_drawn_answers_to_long_prompts(folder: Path, tmp_path: Path) -> None:
    """Prompts that vLLM would read in pieces, which its CPU engine does not survive with a seed."""
    write_demo_set(tmp_path, train_rows=64, heldout_rows=1, turns_per_topic=(4, 6))
    prepare(tmp_path / "train.json", images_root=tmp_path, output=tmp_path, split="train")
    where = ("--model", folder / "base", "--data", tmp_path / "train.rl.parquet", "--output", tmp_path / "pred.jsonl")
    infer(*where, "--max-images", 20, "--max-model-len", 2048, "--max-new-tokens", 16, "--temperature", 1, "--seed", 3)
    found = lines(tmp_path / "pred.jsonl")
    assert len(found) == 64
    assert not [line for line in found if "error" in line]


def test_a_window_that_covers_the_dialogue_is_asking_once(server: str, folder: Path, tmp_path: Path) -> None:
    data = folder / "heldout.rl.parquet"
    ask(server, data, tmp_path / "once.jsonl", "--logprobs")
    ask(server, data, tmp_path / "window.jsonl", "--logprobs", "--window", 6)
    once, window = lines(tmp_path / "once.jsonl"), lines(tmp_path / "window.jsonl")
    assert lines(tmp_path / "window.windows.jsonl") == window
    for one, other in zip(once, window, strict=True):
        assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-3)
        assert {**one, "logprobs": None} == {**other, "logprobs": None}


@pytest.mark.parametrize("ids", ["global", "published"])
def test_windows_are_united(server: str, folder: Path, tmp_path: Path, ids: WindowIds) -> None:
    """On the fly, and prepared before: the same answers; what the windows named is what the dialogue's row names."""
    rows = [row for row in json.loads((folder / "train.json").read_text())[:96] if len(turns(row)) == 6]
    source, data = tmp_path / "rows.json", tmp_path / "whole.rl.parquet"
    source.write_text(json.dumps(rows))
    prepare(source, images_root=folder, output=tmp_path, split="whole")
    prepare(source, images_root=folder, output=tmp_path, split="windows", window=WindowSettings(4, 2, ids))
    ask(server, data, tmp_path / "a.jsonl", "--window", 4, "--stride", 2, "--window-ids", ids)
    ask(server, tmp_path / "windows.rl.parquet", tmp_path / "b.jsonl", "--merge", data)
    infer("--predictions", tmp_path / "a.windows.jsonl", "--merge", data, "--output", tmp_path / "c.jsonl")
    for name in ("b", "c"):
        assert lines(tmp_path / "a.jsonl") == lines(tmp_path / f"{name}.jsonl")
    parts: dict[str, set[str]] = {}
    for row in lines(tmp_path / "a.windows.jsonl"):
        found = parse_fragment(row["response"])
        named = parts.setdefault(row["dialogue_id"].partition("_split_")[0], set())
        first = 0 if ids == "published" else min_image(row["messages"])
        named |= image_names(row["images"], [image - first for image in found.image_ids] if found else [])
    merged = lines(tmp_path / "a.jsonl")
    assert len(merged) == len(rows) > 20
    for row in merged:
        found = parse_fragment(row["response"])
        assert image_names(row["images"], found.image_ids if found else []) == parts[row["dialogue_id"]]
    assert any(parts.values()), "images are named"


def turns(row: dict[str, Any]) -> Sequence[Utterance]:
    return parse_dialogue(row["messages"], "").utterances


def min_image(messages: Sequence[dict[str, str]]) -> int:
    """The first image's id in a prompt."""
    found = messages[1]["content"].partition("<|img_id_start|>")[2].partition("<|img_id_end|>")[0]
    return int(found) if found else 0


def image_names(images: Sequence[str], places: Sequence[int]) -> set[str]:
    return {images[place] for place in places if 0 <= place < len(images)}
