"""Which folder of shards a user means, and what merging refuses to touch."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.merge import check_shards, find_shards, merge_checkpoint


def checkpoint(folder: Path, *, ranks: tuple[int, ...] = (0, 1), world_size: int = 2, whole: bool = True) -> Path:
    folder.mkdir(parents=True)
    for rank in ranks:
        (folder / f"model_world_size_{world_size}_rank_{rank}.pt").touch()
    if whole:
        (folder / "huggingface").mkdir()
    return folder


def test_the_newest_step_of_a_run_is_taken(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint(tmp_path / "grpo" / f"global_step_{step}" / "actor")
        checkpoint(tmp_path / "sft" / f"global_step_{step}")
    (tmp_path / "grpo" / "global_step_best").mkdir()
    assert find_shards(tmp_path / "grpo") == tmp_path / "grpo" / "global_step_10" / "actor"
    assert find_shards(tmp_path / "sft") == tmp_path / "sft" / "global_step_10"
    assert find_shards(tmp_path / "grpo" / "global_step_9") == tmp_path / "grpo" / "global_step_9" / "actor"
    actor = tmp_path / "grpo" / "global_step_9" / "actor"
    assert find_shards(actor) == actor


def test_a_checkpoint_cut_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match=r"shards of ranks \[1\] missing, the checkpoint was cut short"):
        find_shards(checkpoint(tmp_path / "a" / "global_step_1", ranks=(0,)).parent)
    with pytest.raises(FFRError, match="the folder huggingface/ missing"):
        find_shards(checkpoint(tmp_path / "b" / "global_step_1", whole=False).parent)
    with pytest.raises(FFRError, match="no such folder"):
        find_shards(tmp_path / "absent")
    shard = checkpoint(tmp_path / "c" / "global_step_1") / "model_world_size_2_rank_0.pt"
    with zipfile.ZipFile(shard, "w") as archive:
        archive.writestr("data.pkl", bytes(100))
    assert find_shards(shard.parent) == shard.parent
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(
        FFRError, match=r"the end of model_world_size_2_rank_0\.pt missing, the checkpoint was cut short"
    ):
        find_shards(shard.parent)
    os.mkfifo(shard.parent / "fsdp_config.json")
    with pytest.raises(FFRError, match=r"fsdp_config\.json: a pipe or a device"):
        check_shards(shard.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FFRError, match="no FSDP shards"):
        find_shards(tmp_path / "empty")


def test_folders_that_are_no_models_are_never_replaced(tmp_path: Path) -> None:
    shards = checkpoint(tmp_path / "run" / "global_step_1")
    output = tmp_path / "work"
    output.mkdir()
    (output / "notes.txt").write_text("keep")
    with pytest.raises(FFRError, match=r"notes\.txt: a file; give the name of a folder"):
        merge_checkpoint(shards, output / "notes.txt", force=True)
    with pytest.raises(FFRError, match="there already"):
        merge_checkpoint(shards, output)
    with pytest.raises(FFRError, match="holds something else"):
        merge_checkpoint(shards, output, force=True)
    assert (output / "notes.txt").read_text() == "keep"
