"""The adapters for EasyR1, OpenRLHF and verifiers, as the page in docs uses them; the latter two are called by their
own code, which lies in a folder of its own.

EasyR1 is not on PyPI: its adapter is called as its reward managers call it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor

from ffr_verl import Fragment, format_fragment
from ffr_verl.data.prepare import prepare
from ffr_verl.demo.base_model import write_base_model
from ffr_verl.embeddings import image_key, utterance_key, write_store
from ffr_verl.errors import FFRError
from ffr_verl.integrations.labels import label, read_label, write_labelled_rows
from ffr_verl.integrations.openrlhf import reward_function
from ffr_verl.rewards import coherence_reward, compute_score, f1_reward, format_reward

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8")
ADAPTERS = os.environ.get("FFR_ADAPTERS_PATH")
needs_trainers = pytest.mark.skipif(
    ADAPTERS is None or sys.version_info < (3, 11),
    reason="FFR_ADAPTERS_PATH is not set (`make integration` installs what it names), or Python is older than 3.11",
)
BAD = "no idea"


def snippet(heading: str) -> str:
    found = re.search(r"```python\n(.*?)```", PAGE[PAGE.index(heading) :], re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def project(demo_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names, written as the page says."""
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(demo_set, tmp_path / "pictures")
    prepare(root / "heldout.json", images_root=root, output=tmp_path / "data", split="train")
    random, vectors = np.random.default_rng(0), {}
    for info in pq.read_table("data/train.rl.parquet").column("extra_info").to_pylist():
        vectors.update(
            (utterance_key(info["dialogue_id"], one), random.normal(size=8)) for one in info["utterance_ids"]
        )
        vectors.update((image_key(name), random.normal(size=8)) for name in info["images"])
    write_store(tmp_path / "data" / "embeddings", vectors.items(), model="random")
    exec(snippet("## EasyR1 and OpenRLHF"))
    return tmp_path


def labelled(project: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project / "data" / "train.labelled.jsonl").open()]


def run(program: str, folder: Path, given: Any) -> Any:
    """What a program in an interpreter with the trainers on its path prints last, as JSON."""
    (folder / "given.json").write_text(json.dumps(given))
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ADAPTERS), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def test_labelled_rows_are_those_of_the_file(project: Path) -> None:
    rows, sources = labelled(project), pq.read_table("data/train.rl.parquet").to_pylist()
    assert len(rows) == len(sources) > 0
    assert {bool(row["images"]) for row in rows} == {True, False}
    for row, source in zip(rows, sources, strict=True):
        assert read_label(row["label"]) == (source["reward_model"]["ground_truth"], source["extra_info"])
        assert row["prompt"].count("<image>") == len(row["images"]) == len(source["images"])
        assert row["prompt"] == "\n".join(message["content"] for message in source["prompt"])
        texts = ["".join(part["text"] or "<image>" for part in message["content"]) for message in row["messages"]]
        assert "\n".join(texts) == row["prompt"]
        assert all(Path(image).is_file() for image in row["images"])


def test_easyr1(project: Path) -> None:
    """As `compute_reward_batch` of its reward manager calls the function of the page's file."""
    names: dict[str, Any] = {}
    exec(snippet("**EasyR1**"), names)
    assert (names["REWARD_NAME"], names["REWARD_TYPE"]) == ("ffr", "batch")
    rows = labelled(project)
    answers = [read_label(row["label"])[0] if number % 2 else BAD for number, row in enumerate(rows)]
    inputs = [
        {"response": answer, "response_length": len(answer), "ground_truth": row["label"]}
        for answer, row in zip(answers, rows, strict=True)
    ]
    found = names["compute_score"](inputs, embeddings="data/embeddings")
    for answer, row, scores in zip(answers, rows, found, strict=True):
        expected = compute_score("", answer, *read_label(row["label"]), embeddings="data/embeddings")
        assert scores == {"overall": expected.pop("score"), **expected}
    with pytest.raises(FFRError, match=r"row 0 of the batch: label: found '\{'"):
        names["compute_score"]([{"response": BAD, "response_length": 1, "ground_truth": "{"}])


@needs_trainers
def test_openrlhf(project: Path) -> None:
    """Its executor loads the page's file and fetches the rewards of real prompts with image tokens."""
    processor = AutoProcessor.from_pretrained(write_base_model(project / "model"))
    (project / "ffr_reward.py").write_text(snippet("**OpenRLHF**"))
    given, answers = [], []
    for number, row in enumerate(labelled(project)):
        prompt = processor.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        answers.append(read_label(row["label"])[0] if number % 2 else BAD)
        query = prompt.replace("<|image_pad|>", "<|image_pad|>" * 4) + answers[-1] + "<|im_end|>"
        given.append([query, prompt, row["label"]])
    program = """
import asyncio, json
from openrlhf.utils.agent import SingleTurnAgentExecutor

executor = SingleTurnAgentExecutor("ffr_reward.py")
rows = [[[one] for one in row] for row in json.load(open("given.json"))]
print(json.dumps([asyncio.run(executor._fetch_rewards_via_func(*row))[0] for row in rows]))
"""
    for (_, _, text), answer, found in zip(given, answers, run(program, project, given), strict=True):
        scores = compute_score("", answer, *read_label(text), embeddings="data/embeddings")
        score = scores.pop("score")
        assert found == {"rewards": score, "scores": score, "extra_logs": scores}


def test_what_openrlhf_would_only_log_is_refused_at_once() -> None:
    with pytest.raises(FFRError, match="unknown key; did you mean 'length_penalty'"):
        reward_function(lenght_penalty=0.5)
    gold = format_fragment(Fragment((0,), ()))
    with pytest.raises(FFRError, match="does not hold the prompt's last line"):
        reward_function()(["another text"], ["<|im_start|>assistant\n"], [label(gold, {})])


@needs_trainers
def test_verifiers(project: Path) -> None:
    """`Task.score` of the page's task, and of a bare task whose settings name a reward."""
    rows = [read_label(row["label"]) for row in labelled(project)]
    program = (
        snippet("## verifiers")
        + """
import asyncio, json

class Bare(vf.Task[FragmentData]):
    pass

class Trace:  # what `Task.score` reads and records
    def __init__(self, reply):
        self.last_reply, self.rewards, self.metrics = reply, {}, {}
    def record_reward(self, name, value, weight):
        self.rewards[name] = [value, weight]

found = []
settings = Bare.config_type()(rewards={"mcc": {"fn": "ffr_verl.integrations.verifiers:mcc", "weight": 0.5}})
for solution, info in json.load(open("given.json")):
    data = FragmentData(prompt="?", solution=solution, extra_info=info)
    for reply in (solution, "no idea"):
        traces = Trace(reply), Trace(reply)
        asyncio.run(FragmentTask(data).score(traces[0]))
        asyncio.run(Bare(data, settings).score(traces[1]))
        found.append([traces[0].rewards, traces[1].rewards])
print(json.dumps(found))
"""
    )
    found = iter(run(program, project, rows))
    for solution, info in rows:
        for reply in (solution, BAD):
            ours, by_settings = next(found)
            assert ours == {
                "f1": [f1_reward(reply, solution), 1.0],
                "coherence": [
                    pytest.approx(coherence_reward(reply, solution, extra_info=info, store="data/embeddings")),
                    1.0,
                ],
                "format": [format_reward(reply), 0.3],
            }
            assert by_settings == {"mcc": [1.0 if reply == solution else 0.0, 0.5]}


def test_rows_with_their_images_inside_are_refused(demo_set: Path, tmp_path: Path) -> None:
    written = prepare(
        demo_set / "heldout.json", images_root=demo_set, output=tmp_path, split="heldout", embed_images=True
    )
    with pytest.raises(FFRError, match="holds its images, and JSON takes paths"):
        write_labelled_rows(written.rl_path, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
