"""Checkpoints and models of others run no code when they are merged or loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.merge import merge_checkpoint


class Owned:
    """Unpickling it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> object:
        return Path.touch, (self.place,)


def checkpoint(folder: Path) -> Path:
    (folder / "huggingface").mkdir(parents=True)
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    return folder


def test_a_crafted_shard_runs_nothing_unless_it_is_trusted(base_model: Path, tmp_path: Path) -> None:
    import torch

    shards, owned = checkpoint(tmp_path / "c"), tmp_path / "owned"
    file = shards / "model_world_size_1_rank_0.pt"
    for content in ({"w": torch.zeros(2), "x": Owned(owned)}, Owned(owned), {"w": [Owned(owned)]}):
        for new in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=new)
            with pytest.raises(FFRError, match=r"rank_0\.pt: holds something else than tensors .*--trust-checkpoint"):
                merge_checkpoint(shards, tmp_path / "m")
    file.write_bytes(b"no file of torch")
    with pytest.raises(FFRError, match=r"rank_0\.pt: holds something else than tensors"):
        merge_checkpoint(shards, tmp_path / "m")
    assert not owned.exists()
    torch.save({"x": Owned(owned)}, file)
    for part in base_model.glob("*.json"):
        shutil.copy(part, shards / "huggingface")
    with pytest.raises(FFRError, match=r"verl\.model_merger failed"):  # it is no model; but it was read
        merge_checkpoint(shards, tmp_path / "m", trust=True)
    assert owned.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "owned"]


@pytest.mark.parametrize("size", ['"1_rank_0.pt/../../x"', "true", "null", "[" * 100_000, ""])
def test_a_crafted_config_names_no_other_file(tmp_path: Path, size: str) -> None:
    shards = checkpoint(tmp_path / "c")
    (shards / "model_world_size_1_rank_0.pt").touch()
    (shards / "fsdp_config.json").write_text(f'{{"world_size": {size}}}')
    with pytest.raises(FFRError, match=r"fsdp_config\.json: "):
        merge_checkpoint(shards, tmp_path / "m")


def test_pickled_weights_of_a_model_folder_run_nothing(base_model: Path, tmp_path: Path) -> None:
    """transformers, which everything of ours loads models with but vLLM, whose loader asks torch for the same."""
    import torch
    from transformers import AutoModelForImageTextToText

    owned = tmp_path / "owned"
    model = Path(shutil.copytree(base_model, tmp_path / "model"))
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({"x": Owned(owned)}, model / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        AutoModelForImageTextToText.from_pretrained(model)
    assert not owned.exists()
    loaders = (Path(torch.__file__).parents[1] / "vllm/model_executor/model_loader/weight_utils.py").read_text()
    calls = [call.partition(")")[0] for call in loaders.split("torch.load(")[1:]]
    assert calls
    assert all("weights_only=True" in call for call in calls), calls
