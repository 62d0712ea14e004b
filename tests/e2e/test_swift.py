"""ms-swift's real GRPO and `swift infer`: the page in docs, executed.

ms-swift lies in a folder of its own, on the path of this test's processes alone: it takes another TRL than TRL's test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffr_verl.dialogues import extra_info, parse_dialogue
from ffr_verl.embeddings import image_key, utterance_key, write_store
from ffr_verl.rewards import coherence_reward, f1_reward, format_reward

ROOT = Path(__file__).parents[2]
SWIFT = os.environ.get("FFR_SWIFT_PATH")
SECTION = re.search(
    r"\n## ms-swift\n.*?(?=\n## )", (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8"), re.DOTALL
)

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(SWIFT is None, reason="FFR_SWIFT_PATH is not set: `make e2e` installs ms-swift and sets it"),
]

# The id of the tiny model's image token, and a reward of weight 0 that writes down what it is given.
SPY = """
import json
from swift.rewards import ORM, orms
from swift.template.templates.qwen import Qwen2VLTemplate

Qwen2VLTemplate.image_token_id = json.load(open("models/sft/config.json"))["image_token_id"]

class Spy(ORM):
    def __call__(self, completions, dialogue_id, solution, **columns):
        with open("seen.jsonl", "a") as file:
            print(json.dumps([completions, dialogue_id, solution]), file=file)
        return [0.0] * len(completions)

orms["spy"] = Spy
"""
CPU = "--torch_dtype float32 --attn_impl sdpa --use_hf true --dataset_num_proc 1"
SMALL = (
    "--external_plugins ffr_plugin.py spy.py --reward_funcs ffr_f1 ffr_coherence ffr_format spy "
    "--reward_weights 1 1 0.3 0 --use_vllm false --tuner_type full "
    "--num_generations 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_steps 2 "
    "--logging_steps 1 --max_length 2048 --max_completion_length 48 --save_strategy no --eval_strategy no "
    "--split_dataset_ratio 0 --dataloader_num_workers 0 --report_to none --add_version false"
)


def block(kind: str, number: int) -> str:
    assert SECTION is not None
    return re.findall(rf"```{kind}\n(.*?)```", SECTION.group(), re.DOTALL)[number]


def swift(command: str, more: str, folder: Path) -> None:
    """A command of the page, with options for the CPU and a short run: of an option given twice the last counts."""
    variable, _, name, *options = shlex.split(command.replace("\\\n", " "))
    variables = dict([variable.split("=")])
    run = subprocess.run(
        [sys.executable, "-m", f"swift.cli.{name}", *options, *shlex.split(more)],
        cwd=folder,
        env={
            **os.environ,
            **variables,
            "PYTHONPATH": os.pathsep.join([str(SWIFT), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "MODELSCOPE_CACHE": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture
def project(folder: Path, sft_model: Path, tmp_path: Path) -> Path:
    """A project of a user's, with the files that the page names; images lie below `data`."""
    for name in ("data", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "models" / "sft").symlink_to(sft_model)
    for split in ("train", "heldout"):
        rows = json.loads((folder / f"{split}.json").read_text())[:32]
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(rows))
        (tmp_path / "data" / f"images_{split}").symlink_to(folder / f"images_{split}")
    (tmp_path / "spy.py").write_text(SPY)
    return tmp_path


def test_two_steps_of_grpo_with_the_docs_plugin(project: Path) -> None:
    """What ms-swift logs as mean rewards is what our rewards give for the completions that it generated."""
    random, vectors, infos = np.random.default_rng(0), {}, {}
    for row in json.loads((project / "data" / "train.json").read_text()):
        info = extra_info(parse_dialogue(row["messages"], row["dialogue_id"]), row["images"])
        infos[row["dialogue_id"]] = info
        vectors.update(
            (utterance_key(row["dialogue_id"], one), random.normal(size=8)) for one in info["utterance_ids"]
        )
        vectors.update((image_key(name), random.normal(size=8)) for name in row["images"])
    write_store(project / "data" / "embeddings", vectors.items(), model="random")
    (project / "ffr_plugin.py").write_text(block("python", 0))
    swift(block("bash", 0), f"{CPU} {SMALL}", project)

    log: list[dict[str, Any]] = [json.loads(line) for line in (project / "outputs" / "logging.jsonl").open()]
    history = [entry for entry in log if "rewards/f1/mean" in entry]
    seen = [json.loads(line) for line in (project / "seen.jsonl").open()]
    assert len(history) == len(seen) == 2
    for entry, (completions, dialogues, golds) in zip(history, seen, strict=True):
        assert len(completions) == 8
        rows = list(zip(completions, golds, [infos[name] for name in dialogues], strict=True))
        means = {
            "f1": np.mean([f1_reward(text, gold) for text, gold, _ in rows]),
            "coherence": np.mean(
                [coherence_reward(text, gold, extra_info=i, store=vectors) for text, gold, i in rows]
            ),
            "format": np.mean([format_reward(text) for text, _, _ in rows]),
        }
        assert {name: float(entry[f"rewards/{name}/mean"]) for name in means} == pytest.approx(means, abs=1e-5)
        weighted = means["f1"] + means["coherence"] + 0.3 * means["format"]
        assert float(entry["reward"]) == pytest.approx(weighted, abs=1e-5)
    assert max(float(entry["rewards/format/mean"]) for entry in history) > 0, "the trained model writes sound answers"
    assert max(float(entry["grad_norm"]) for entry in history) > 0


def test_answers_of_swift_infer_are_evaluated(project: Path) -> None:
    """With their `dialogue_id`, so that they compare with another file."""
    (project / "keep_columns.py").write_text(block("python", 1))
    infer, evaluate = block("bash", 1).rsplit("\n", 2)[:2]
    swift(
        infer,
        f"{CPU} --external_plugins keep_columns.py spy.py --max_new_tokens 48 --infer_backend transformers",
        project,
    )

    rows = json.loads((project / "data" / "heldout.json").read_text())
    answers = [json.loads(line) for line in (project / "answers.jsonl").open()]
    assert [answer["dialogue_id"] for answer in answers] == [row["dialogue_id"] for row in rows]
    assert [answer["labels"] for answer in answers] == [row["solution"] for row in rows]
    assert any(format_reward(answer["response"]) for answer in answers)
    command = [
        sys.executable,
        "-m",
        "ffr_verl",
        *shlex.split(evaluate)[1:],
        "--compare",
        "answers.jsonl",
        "--json",
        "out",
    ]
    subprocess.run(command, cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    found = json.loads((project / "out").read_text())
    assert found["samples"] == len(rows) == found["comparison"]["matched"]
    scores = [f1_reward(answer["response"], answer["labels"]) for answer in answers]
    assert found["rewards"]["f1"] == pytest.approx(np.mean(scores))
