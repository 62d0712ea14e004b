"""TRL's real GRPOTrainer with our rewards: the page in docs, executed.

TRL lies in a folder of its own, on the path of this test's process alone: beside verl 0.9.1 it would break verl.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ffr_verl.embeddings import image_key, utterance_key, write_store
from ffr_verl.rewards import coherence_reward, f1_reward, format_reward

ROOT = Path(__file__).parents[2]
TRL = os.environ.get("FFR_TRL_PATH")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL 1.16 needs Python 3.11"),
    pytest.mark.skipif(TRL is None, reason="FFR_TRL_PATH is not set: `make e2e` installs TRL and sets it"),
]

# Runs the page's code with fewer, shorter answers, and a reward of weight 0 that writes down what it is given.
RUNNER = """
import json, sys, trl

config, trainer, seen = trl.GRPOConfig, trl.GRPOTrainer, []
small = dict(max_steps=2, per_device_train_batch_size=4, num_generations=4, gradient_accumulation_steps=4,
             use_cpu=True, bf16=False, logging_steps=1, report_to="none", save_strategy="no", max_completion_length=48,
             reward_weights=[1.0, 1.0, 0.3, 0.0])

def spy(prompts, completions, **columns):
    seen.append({name: columns[name] for name in ("solution", "extra_info")} | {"completions": completions})
    return [0.0] * len(completions)

trl.GRPOConfig = lambda **given: config(**{**given, **small})
trl.GRPOTrainer = lambda model, *, reward_funcs, **given: trainer(model, reward_funcs=[*reward_funcs, spy], **given)
names = {}
exec(compile(open("snippet.py").read(), "docs/other_trainers.md", "exec"), names)
json.dump({"log": names["trainer"].state.log_history, "seen": seen}, open("result.json", "w"))
"""


def snippet() -> str:
    page = (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    section = page[page.index("## TRL") : page.index("## ms-swift")]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_two_steps_of_trl_with_the_docs_code(small_train: Path, sft_model: Path, tmp_path: Path) -> None:
    """What TRL logs as mean rewards is what our rewards give for the completions that it generated, in batches that
    mix rows with images and without (a micro-batch is one row's answers, so of one kind)."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.rl.parquet").symlink_to(small_train)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sft").symlink_to(sft_model)
    random, vectors = np.random.default_rng(0), {}
    for info in pq.read_table(data / "train.rl.parquet").column("extra_info").to_pylist():
        for identifier in info["utterance_ids"]:
            vectors[utterance_key(info["dialogue_id"], identifier)] = random.normal(size=8)
        vectors.update((image_key(name), random.normal(size=8)) for name in info["images"])
    write_store(data / "embeddings", vectors.items(), model="random")
    (tmp_path / "snippet.py").write_text(snippet())
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TRL), str(ROOT)]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-4000:]

    result = json.loads((tmp_path / "result.json").read_text())
    history = [entry for entry in result["log"] if "rewards/f1/mean" in entry]
    assert len(history) == len(result["seen"]) == 2
    assert any(len({bool(info["images"]) for info in batch["extra_info"]}) == 2 for batch in result["seen"])
    for entry, batch in zip(history, result["seen"], strict=True):
        rewards: dict[str, list[float]] = {"f1": [], "coherence": [], "format": []}
        for completion, gold, info in zip(batch["completions"], batch["solution"], batch["extra_info"], strict=True):
            content = completion[-1]["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            rewards["f1"].append(f1_reward(text, gold))
            rewards["coherence"].append(coherence_reward(text, gold, extra_info=info, store=vectors))
            rewards["format"].append(format_reward(text))
        for name, values in rewards.items():
            assert entry[f"rewards/{name}/mean"] == pytest.approx(np.mean(values), abs=1e-5), name
        weighted = entry["rewards/f1/mean"] + entry["rewards/coherence/mean"] + 0.3 * entry["rewards/format/mean"]
        assert entry["reward"] == pytest.approx(weighted, abs=1e-5)
    assert max(entry["rewards/format/mean"] for entry in history) > 0, "the trained model writes sound answers"
    assert max(entry["grad_norm"] for entry in history) > 0
