"""Checkpoints that were cut short are refused before a run starts, with the step to go on from."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Literal

import pytest

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.checkpoint_folders import best_checkpoint, check_resume, keep_best, missing_in_step

Stage = Literal["sft", "grpo"]


def archive(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", "x" * 1000)


def write_step(folder: Path, number: int, stage: Stage, *, world: int = 2) -> Path:
    step = folder / f"global_step_{number}"
    model = step / "actor" if stage == "grpo" else step
    for kind in ("model", "optim", "extra_state"):
        for rank in range(world):
            archive(model / f"{kind}_world_size_{world}_rank_{rank}.pt")
    archive(step / ("data.pt" if stage == "grpo" else "data_0.pt"))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(number))
    return step


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_whole_checkpoint_is_gone_on_from(tmp_path: Path, stage: Stage) -> None:
    assert check_resume(tmp_path, stage) is None
    write_step(tmp_path, 4, stage)
    write_step(tmp_path, 8, stage)
    assert check_resume(tmp_path, stage) == 8


@pytest.mark.parametrize(
    "name", ["data.pt", "actor/optim_world_size_2_rank_1.pt", "actor/model_world_size_2_rank_0.pt"]
)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_cut_one_is_refused_and_the_last_whole_one_named(tmp_path: Path, name: str, how: str) -> None:
    write_step(tmp_path, 4, "grpo")
    file = write_step(tmp_path, 8, "grpo") / name
    content = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    with pytest.raises(FFRError) as caught:
        check_resume(tmp_path, "grpo")
    assert f"{tmp_path / 'global_step_8'}: the checkpoint was cut short: {name} missing" in str(caught.value)
    assert str(caught.value).endswith(f"resume from step 4: echo 4 > {tracker}")
    tracker.write_text("4")
    assert check_resume(tmp_path, "grpo") == 4


@pytest.mark.parametrize("content", ["", "eight", "8\x00"])
def test_a_tracker_that_names_no_step_is_refused(tmp_path: Path, content: str) -> None:
    """verl ends with a ValueError on it."""
    write_step(tmp_path, 8, "grpo")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(FFRError, match=r"expected the number of a step.*resume from step 8: echo 8 >"):
        check_resume(tmp_path, "grpo")


def test_a_tracker_of_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    """verl begins anew then, without a word."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(FFRError, match=r"names step 8, and .*global_step_8 is not there; no step in it is whole"):
        check_resume(tmp_path, "grpo")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_another_number_of_ranks_is_refused(tmp_path: Path, stage: Stage) -> None:
    """verl looks for a file of a rank that is not there, in each worker."""
    write_step(tmp_path, 8, stage)
    assert check_resume(tmp_path, stage, ranks=2) == 8
    with pytest.raises(FFRError, match=r"global_step_8: written by 2 ranks, and this run has 4; .*`ffr-verl merge`"):
        check_resume(tmp_path, stage, ranks=4)


def test_shards_of_other_nodes_may_lie_on_their_disks(tmp_path: Path) -> None:
    step = write_step(tmp_path, 8, "grpo", world=4)
    for path in [*step.rglob("*_rank_2.pt"), *step.rglob("*_rank_3.pt")]:
        path.unlink()
    assert len(missing_in_step(step, "grpo")) == 6
    assert check_resume(tmp_path, "grpo", all_ranks=False) == 8


def test_what_the_run_does_not_load_may_be_missing(tmp_path: Path) -> None:
    """`checkpoint.save_contents=[model]` writes no optimizer, and verl then loads none."""
    step = write_step(tmp_path, 8, "grpo")
    for path in [*step.rglob("optim_*"), *step.rglob("extra_state_*")]:
        path.unlink()
    assert check_resume(tmp_path, "grpo", contents=["model", "hf_model"]) == 8
    with pytest.raises(FFRError, match="cut short: actor/optim_world_size_2_rank_0"):
        check_resume(tmp_path, "grpo")


def note(folder: Path, **results: float) -> None:
    """`validation.json` of a run: `s4=0.5` is the metric after step 4."""
    content = {name.removeprefix("s"): {"micro_joint_f1": value} for name, value in results.items()}
    (folder / "validation.json").write_text(json.dumps(content))


def test_the_best_checkpoint_is_kept_when_the_newest_is_worse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As verl calls it: after a save, before that step is validated; verl then removes older ones itself."""
    write_step(tmp_path, 4, "grpo")
    note(tmp_path, s0=0.9)
    assert keep_best(tmp_path, "micro_joint_f1") is None, "step 0 was validated and has no checkpoint"
    assert not caplog.records, "every run begins so"
    note(tmp_path, s0=0.9, s4=0.5)
    write_step(tmp_path, 8, "grpo")
    assert keep_best(tmp_path, "micro_joint_f1") == 4
    kept = tmp_path / "best" / "global_step_4"
    assert not missing_in_step(kept, "grpo")
    assert (kept / "data.pt").stat().st_ino == (tmp_path / "global_step_4" / "data.pt").stat().st_ino, "linked"
    shutil.rmtree(tmp_path / "global_step_4")
    note(tmp_path, s0=0.9, s4=0.5, s8=0.4)
    write_step(tmp_path, 12, "grpo")
    assert keep_best(tmp_path, "micro_joint_f1") == 4
    note(tmp_path, s0=0.9, s4=0.5, s8=0.4, s12=0.6)
    assert best_checkpoint(tmp_path, "micro_joint_f1") == (12, 0.6, tmp_path / "global_step_12"), "validated last"
    assert keep_best(tmp_path, "micro_joint_f1") == 12
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["global_step_12"]


def test_a_best_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    write_step(tmp_path, 4, "grpo")
    (write_step(tmp_path, 8, "grpo") / "data.pt").unlink()
    note(tmp_path, s4=0.4, s8=0.5)
    assert best_checkpoint(tmp_path, "micro_joint_f1")[0] == 4


def test_what_is_missing_for_a_best_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match=r"no checkpoint of a validated step is there \(validated: none\)"):
        best_checkpoint(tmp_path, "micro_joint_f1")
    write_step(tmp_path, 4, "grpo")
    note(tmp_path, s4=0.4)
    with pytest.raises(FFRError, match=r"validation\.json: no 'micro_f1' in it; it has micro_joint_f1"):
        best_checkpoint(tmp_path, "micro_f1")
    (tmp_path / "validation.json").write_text("[1]")
    with pytest.raises(FFRError, match=r"validation\.json: not what a training run wrote"):
        best_checkpoint(tmp_path, "micro_joint_f1")


def test_a_metric_that_is_no_number_is_never_best(tmp_path: Path) -> None:
    for step in (1, 2):
        write_step(tmp_path, step, "grpo")
    (tmp_path / "validation.json").write_text('{"1": {"m": NaN}, "2": {"m": 0.5}}')
    assert best_checkpoint(tmp_path, "m")[:2] == (2, 0.5)


@pytest.mark.parametrize("text", ['{"1": {"m": ' + 400 * "9" + "}}", 100_000 * "["])
def test_odd_results_are_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "validation.json").write_text(text)
    with pytest.raises(FFRError, match=r"validation\.json: not what a training run wrote"):
        best_checkpoint(tmp_path, "m")


def test_results_in_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "validation.json")
    with pytest.raises(FFRError, match=r"validation\.json: a pipe or a device"):
        best_checkpoint(tmp_path, "m")
