"""The command's options: those that would do nothing are refused, and nothing is contacted or loaded by them."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ffr_verl.cli import app
from ffr_verl.cli.infer import infer
from ffr_verl.cli.report import report
from ffr_verl.cli.score import score
from ffr_verl.errors import FFRError
from ffr_verl.evaluation.report import ReportSettings, RunPageSettings
from ffr_verl.inference.endpoint import EndpointSettings
from ffr_verl.inference.generate import GeneratorSettings, _lora_rank

SERVER = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data NAME.rl.parquet"),
        (["--data", "DATA"], "give --model: a model folder or hub name, or with --endpoint a name"),
        (
            ["--data", "DATA", "--endpoint", "http://127.0.0.1:9/v1"],
            "cannot be reached .*; is the address right",
        ),
        (["--data", "DATA", "--model", "m", "--api-key-env", "KEY"], "--api-key-env goes with --endpoint URL"),
        (["--data", "DATA", "--model", "m", "--concurrency", "8"], "--concurrency goes with --endpoint URL"),
        (["--data", "DATA", "--model", "m", "--allow-errors"], "--allow-errors goes with --endpoint URL"),
        (["--data", "DATA", *SERVER, "--lora", "x"], "--lora is the server's business"),
        (
            ["--data", "DATA", *SERVER, "--tensor-parallel-size", "2"],
            "--tensor-parallel-size is the server's business",
        ),
        (["--data", "DATA", *SERVER, "--stride", "2"], "--stride goes with --window TURNS"),
        (["--data", "DATA", *SERVER, "--window-ids", "global"], "--window-ids goes with --window TURNS"),
        (["--data", "DATA", *SERVER, "--window", "4", "--stride", "5"], "--stride: found 5; give 1 to 4"),
        (["--data", "DATA", *SERVER, "--merge", "DATA", "--window", "4"], "--window does not go with --merge"),
        (["--data", "DATA", *SERVER, "--merge", "DATA", "--limit", "4"], "--limit does not go with --merge"),
        (["--predictions", "p.jsonl"], "--predictions: give the file of the whole dialogues too, with --merge"),
        (["--predictions", "p.jsonl", "--merge", "DATA", *SERVER], "--model does not go with --predictions"),
        (["--predictions", "p.jsonl", "--merge", "DATA", "--data", "DATA"], "--data does not go with --predictions"),
        (["--predictions", "p.jsonl", "--merge", "DATA"], r"p\.jsonl: no such file"),
        (["--data", "DATA", *SERVER, "--body", "[1]"], "--body: found"),
        (["--data", "DATA", *SERVER, "--max-images", "0"], r"images, at most 0; raise --max-images"),
        (["--data", "SFT", *SERVER], r"no column .*; this stage needs NAME\.rl\.parquet"),
        (["--data", "none.parquet", *SERVER], "none.parquet: no such file"),
        (
            ["--data", "DATA", *SERVER, "--images-root", "/nowhere"],
            "no such file .*; bring the images there, or give --images-root",
        ),
        (
            ["--data", "DATA", "--model", "sft"],
            "--model sft: no Hugging Face model folder; `ffr-verl merge` makes one",
        ),
        (["--data", "DATA", *SERVER, "--output", "p.jsonl.gz"], "the file is not compressed; give a name without .gz"),
        (["--data", "DATA", "--model", "./none"], "no Hugging Face model folder; `ffr-verl merge` makes one"),
        (["--data", "DATA", "--model", "o/m", "--lora", "none"], "--lora none: no adapter_config.json in it"),
    ],
)
def test_options_that_are_refused(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"DATA": str(parquet / "heldout.rl.parquet"), "SFT": str(parquet / "heldout.sft.parquet")}
    given = [names.get(option, option) for option in options]
    result: Any = CliRunner().invoke(app, ["infer", "--output", "pred.jsonl", *given])
    assert isinstance(result.exception, FFRError), result.output
    with pytest.raises(FFRError, match=message):
        raise result.exception
    assert not Path("pred.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "settings", "set_otherwise"),
    [
        (infer, GeneratorSettings, {"max_pixels", "samples", "seed", "logprobs"}),
        (infer, EndpointSettings, {"max_pixels", "url", "body"}),
        (score, GeneratorSettings, {"max_pixels", "temperature", "top_p", "seed", "logprobs", "lora"}),
        (report, ReportSettings, {"training", "title"}),
        (report, RunPageSettings, {"training", "rollouts", "title", "follow"}),
    ],
)
def test_options_are_the_settings_of_the_same_names(command: Any, settings: Any, set_otherwise: set[str]) -> None:
    options = inspect.signature(command).parameters
    for field in dataclasses.fields(settings):
        if field.name not in set_otherwise:
            assert field.name in options
            assert field.default in (options[field.name].default, dataclasses.MISSING), field.name


@pytest.mark.parametrize("rank", ["0", "-1", "513", '"8"', "[]"])
def test_an_adapter_of_no_rank_is_refused(tmp_path: Path, rank: str) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    with pytest.raises(FFRError, match="no rank r from 1 to 512; save the adapter again with peft"):
        _lora_rank(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--predictions", "p.jsonl", "--max-model-len", "9"], "--max-model-len is of answers by --model"),
        (
            ["score", "--predictions", "p.jsonl", "--samples", "2"],
            "--samples is of answers by --model; it does not go",
        ),
        (["embed", "--model", "m", "--ray-gpus", "1"], "--ray-gpus goes with --ray ADDRESS"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    parquet: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    data = str(parquet / "heldout.rl.parquet")
    given = [*arguments, *(["--data", data] if arguments[0] == "score" else [data]), "--output", str(tmp_path / "out")]
    result: Any = CliRunner().invoke(app, given)
    with pytest.raises(FFRError, match=message):
        raise result.exception
