"""The curriculum through the parts that verl trains with: its dataset, its sampler, torchdata's StatefulDataLoader."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoProcessor, AutoTokenizer
from verl.trainer.ppo.utils import create_rl_sampler
from verl.utils.dataset.rl_dataset import collate_fn

from ffr_verl.data.parquet_files import rows_of_files
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.datasets import FFRDataset
from ffr_verl.rewards import compute_score
from ffr_verl.samplers.difficulty_file import difficulty_table, write_difficulty
from ffr_verl.samplers.sampler import activate, active_sampler

pytestmark = pytest.mark.timeout(300)

ORDERS = ["published", "ascending", "competence", "shuffled", "online"]
BATCH = 12


@pytest.fixture(scope="module")
def difficulty(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `ffr-verl score` writes it, of answers that are right to all degrees."""
    file = tmp_path_factory.mktemp("difficulty") / "difficulty.parquet"
    rows = list(rows_of_files([parquet / "train.rl.parquet"]))
    golds = [row["reward_model"]["ground_truth"] for row in rows]
    source = np.random.default_rng(0)
    answers = [
        {
            "response": golds[number if source.random() < 0.5 else (number + 1) % len(golds)],
            "logprobs": (-source.random(5)).tolist(),
        }
        for number in range(len(rows))
    ]
    write_difficulty(difficulty_table(rows, answers, model="made up"), file)
    return file


class Run:
    """A training run as far as the data goes: verl's own loader, fetched from as verl's trainer does."""

    def __init__(self, file: Path, base_model: Path, curriculum: dict[str, Any], *, batch: int = BATCH) -> None:
        config = OmegaConf.create(
            {
                "train_files": str(file),
                "max_prompt_length": 100_000,
                "filter_overlong_prompts": False,
                "truncation": "error",
                "image_key": "images",
                "return_multi_modal_inputs": False,
                "shuffle": False,
                "cache_dir": str(file.parent / "cache"),
                "ffr": {"curriculum": curriculum},
            }
        )
        tokenizer, processor = AutoTokenizer.from_pretrained(base_model), AutoProcessor.from_pretrained(base_model)
        self.dataset = FFRDataset(str(file), tokenizer, config, processor=processor)
        self.loader = StatefulDataLoader(
            self.dataset,
            batch_size=batch,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=create_rl_sampler(config, self.dataset),
        )
        self._iterator: Any = None

    def step(self, number: int) -> list[int]:
        """Fetch a batch, the next epoch's first one after the last; then tell the curriculum the rewards."""
        try:
            self._iterator = self._iterator or iter(self.loader)
            batch = next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
            batch = next(self._iterator)
        rows = [int(row) for row in batch["ffr_row"]]
        sampler = self.dataset.curriculum
        if sampler is not None:
            sampler.update({row: (row * 7 + number) % 10 / 10 for row in rows})
        return rows

    def save(self) -> bytes:
        """As verl saves it: through torch, in `data.pt`."""
        buffer = io.BytesIO()
        torch.save(self.loader.state_dict(), buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        self.loader.load_state_dict(torch.load(io.BytesIO(saved), weights_only=False))


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_goes_on_with_the_same_rows(
    parquet: Path, base_model: Path, difficulty: Path, order: str
) -> None:
    """At every cut of two epochs, the end of an epoch among them."""
    file = parquet / "train.rl.parquet"
    curriculum = {"difficulty": str(difficulty), "order": order, "seed": 1}
    whole = Run(file, base_model, curriculum)
    steps = 2 * (len(whole.dataset) // BATCH) + 1
    saved, rows = [], []
    for number in range(steps):
        saved.append(whole.save())
        rows.append(whole.step(number))
    assert any(set(rows[0]) != set(other) for other in rows)
    resumed = Run(file, base_model, curriculum)
    for cut in range(0, steps, 3):
        resumed.load(saved[cut])
        resumed._iterator = None
        found = [resumed.step(number) for number in range(cut, steps)]
        assert found == rows[cut:], f"cut at step {cut}"


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_has_each_row_once_but_for_online(
    parquet: Path, base_model: Path, difficulty: Path, order: str
) -> None:
    run = Run(parquet / "train.rl.parquet", base_model, {"difficulty": str(difficulty), "order": order}, batch=1)
    assert active_sampler() is run.dataset.curriculum
    epochs = [[run.step(number)[0] for number in range(len(run.dataset))] for _ in range(2)]
    for rows in epochs:
        assert order == "online" or len(set(rows)) == len(rows)
    if order in ("published", "ascending"):
        assert epochs[0] == epochs[1]
    else:
        assert epochs[0] != epochs[1]


def test_a_row_keeps_its_number_in_the_file(parquet: Path, base_model: Path, difficulty: Path) -> None:
    file = parquet / "train.rl.parquet"
    infos = pq.read_table(file).column("extra_info").to_pylist()
    run = Run(file, base_model, {"difficulty": str(difficulty), "order": "online"})
    for position in range(20):
        row = run.dataset[position]
        assert infos[row["ffr_row"]]["index"] == row["extra_info"]["index"]


def test_a_checkpoint_of_another_curriculum_is_refused(parquet: Path, base_model: Path, difficulty: Path) -> None:
    file = parquet / "train.rl.parquet"
    runs = {order: Run(file, base_model, {"difficulty": str(difficulty), "order": order}) for order in ORDERS[:2]}
    runs["none"] = Run(file, base_model, {})
    for run in runs.values():
        run.step(0)
    saved = {name: run.save() for name, run in runs.items()}
    for taken in ("published", "none"):
        runs["ascending"].load(saved[taken])
        with pytest.raises(FFRError, match="belongs to another order"):
            iter(runs["ascending"].loader)
    runs["none"].load(saved["ascending"])
    with pytest.raises(FFRError, match="belongs to another order"):
        iter(runs["none"].loader)


@pytest.mark.parametrize("order", ["shuffled", "online", "published"])
def test_without_a_difficulty_file(
    parquet: Path, base_model: Path, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Orders that can start without one do; the others keep the order of the file, and say so."""
    with caplog.at_level(logging.WARNING):
        run = Run(parquet / "train.rl.parquet", base_model, {"order": order})
    rows = [run.step(number) for number in range(4)]
    if order == "published":
        assert rows == np.arange(4 * BATCH).reshape(4, BATCH).tolist()
        assert (
            "published needs data.ffr.curriculum.difficulty, which is null: the rows come in the order of"
            in caplog.text
        )
    else:
        assert rows != np.arange(4 * BATCH).reshape(4, BATCH).tolist()
        assert "which is null" not in caplog.text


def test_rows_say_where_the_policy_stands(parquet: Path, base_model: Path, difficulty: Path) -> None:
    run = Run(parquet / "train.rl.parquet", base_model, {"order": "shuffled", "difficulty": str(difficulty)})
    sampler = run.dataset.curriculum
    assert sampler is not None
    assert sampler.micro is not None
    counts = run.dataset[0]["extra_info"]["micro_counts"]
    assert counts == sampler.micro.counts()
    assert 0 < counts["image"][0] < counts["image"][1] < counts["image"][3]
    sampler.micro.observe([[[0, 9, 9, 9], [0, 9, 9, 9]]] * 500)
    again = run.dataset[1]["extra_info"]["micro_counts"]
    assert again["utterance"][1] > counts["utterance"][1]
    score = compute_score("ffr/mldr", "", run.dataset[2]["reward_model"]["ground_truth"], run.dataset[2]["extra_info"])
    assert score["f1"] == 0.0


@pytest.fixture(autouse=True)
def _no_sampler_is_left() -> Any:
    yield
    activate(None)
