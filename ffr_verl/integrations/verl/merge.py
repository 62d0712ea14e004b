"""From a verl checkpoint to a plain Hugging Face folder, LoRA folded in.

verl's own `verl.model_merger` unites the FSDP shards, in bf16 whatever they were; with LoRA it writes the base weights
and the adapter beside them, which peft folds together here.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError, one_line
from ffr_verl.files import refuse_special, whole_folder
from ffr_verl.integrations.verl.checkpoint_folders import SHARD, steps_of

logger = logging.getLogger(__name__)

# Root mean square of the logits' differences over their standard deviation. verl's merger writes bf16, whose 8 bits
# round every folded weight once; a tiny model measured 1.2 %, without its adapter 97 %.
_LOGIT_TOLERANCE = 0.05


def find_shards(checkpoint: Path) -> Path:
    """The folder of FSDP shards for what a user may point at: the trainer's `default_local_dir` (its newest step is
    taken), a `global_step_N` in it, or `actor` in that; an `FFRError` when shards are missing (a run killed while it
    saved)."""
    if not checkpoint.is_dir():
        raise FFRError(
            f"{checkpoint}: no such folder; give a verl checkpoint such as checkpoints/ffr/sft/global_step_100"
        )
    newest = [step for _, step in steps_of(checkpoint)[:1]]
    for folder in [folder for step in (*newest, checkpoint) for folder in (step / "actor", step)]:
        found = [match for path in folder.glob("model_*.pt") if (match := SHARD.fullmatch(path.name))]
        if not found:
            continue
        missing = sorted(set(range(int(found[0].group(2)))) - {int(match.group(3)) for match in found})
        cut = [match.string for match in found if _is_cut(folder / match.string)]
        if missing or cut or not (folder / "huggingface").is_dir():
            what = (
                f"shards of ranks {missing}"
                if missing
                else f"the end of {cut[0]}"
                if cut
                else "the folder huggingface/"
            )
            raise FFRError(f"{folder}: {what} missing, the checkpoint was cut short; take an earlier global_step_N")
        return folder
    raise FFRError(
        f"{checkpoint}: no FSDP shards (model_world_size_*_rank_*.pt) in it, nor in its newest global_step_*/actor"
    )


def _is_cut(shard: Path) -> bool:
    """Whether an archive, as torch writes one, ends before its table of contents."""
    with shard.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(shard)


def check_shards(shards: Path) -> None:
    """Read the shards as torch reads files that nobody vouches for: tensors and how they are sharded, nothing that
    runs. What passes names nothing else, so verl's merger, which unpickles whatever is named, runs nothing either."""
    import torch
    import torch.distributed.tensor  # which tells torch that its classes are safe

    mend = (
        "a checkpoint of verl holds tensors only; to merge it all the same, trusting who made it: --trust-checkpoint"
    )
    config = shards / "fsdp_config.json"
    refuse_special(config)
    try:
        sizes = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FFRError(f"{config}: cannot be read ({error}); take an earlier global_step_N") from None
    if not isinstance(sizes, dict) or type(sizes.get("world_size")) is not int:  # it becomes part of a file's name
        raise FFRError(f"{config}: found no whole number world_size; take an earlier global_step_N")
    for file in sorted(shards.glob("*model*.pt")):
        try:
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # noqa: BLE001  # torch and pickle raise what they like on such a file
            found = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
            raise FFRError(f"{file}: holds something else than tensors ({one_line(found)}); {mend}") from None


def merge_checkpoint(checkpoint: Path, output: Path, *, force: bool = False, trust: bool = False) -> Path:
    """Write the model of a verl checkpoint (SFT or GRPO, full or LoRA, see `find_shards`) to the folder `output`, for
    transformers, vLLM and the next stage: config, weights in safetensors, tokenizer, processor and chat template.

    Shards that hold something else than tensors, which runs code when it is read, are refused unless `trust` is given.

    Raises:
        FFRError: for an incomplete or refused checkpoint, an existing output without `force`, one that is no model's
            folder, a full disk, when verl's merger fails, or when the logits of a batch are not what they were before.
    """
    shards = find_shards(checkpoint)
    if output.exists() and not output.is_dir():
        raise FFRError(f"{output}: a file; give the name of a folder")
    if output.exists() and not force:
        raise FFRError(f"{output}: there already; give another folder, or --force to replace it")
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise FFRError(f"{output}: --force replaces a model's folder, and this one holds something else; give another")
    if not trust:
        check_shards(shards)
    with whole_folder(output) as folded:
        united = folded / "united"
        command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
        command += ["--local_dir", str(shards), "--target_dir", str(united)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            tail = "\n".join((run.stdout + run.stderr).strip().splitlines()[-15:])
            raise FFRError(f"{shards}: verl.model_merger failed with status {run.returncode}; its last lines:\n{tail}")
        _fold_lora(united, folded)
        shutil.rmtree(united)
    return output


def _fold_lora(united: Path, folded: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(united, dtype="auto")
    adapter = united / "lora_adapter"
    if adapter.is_dir():
        from peft import PeftModel

        if not json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("lora_alpha"):
            # verl.model_merger falls back to 0 without lora_train_meta.json, and the adapter would count for nothing.
            raise FFRError(
                f"{united}: the adapter's lora_alpha is 0; lora_train_meta.json is missing beside the shards"
            )
        with torch.no_grad():
            model = PeftModel.from_pretrained(model, str(adapter))
            before = _logits(model)
            model = model.merge_and_unload(safe_merge=True)
    else:
        before = _logits(model)
    model.save_pretrained(folded)
    AutoProcessor.from_pretrained(united).save_pretrained(folded)
    del model
    compare_logits(before, _logits(AutoModelForImageTextToText.from_pretrained(folded, dtype="auto")))


def _logits(model: Any) -> Any:
    """Logits of a batch of two rows of 16 tokens, in fp32; shape `(2, 16, vocabulary)`."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    # Spread over the vocabulary, and none of the ids that stand for pictures: they would want pictures.
    special = {value for name, value in vars(model.config).items() if name.endswith("_token_id")}
    tokens = [token for token in range(7, vocabulary, max(1, vocabulary // 64)) if token not in special]
    batch = torch.tensor((tokens * 32)[:32]).reshape(2, 16)
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits.float()


def compare_logits(before: Any, after: Any) -> None:
    """Raise an `FFRError` when the logits differ by more than rounding to bf16 does: the model is another one."""
    difference = float((before - after).square().mean().sqrt() / before.std())
    logger.info("logits before and after differ by %.2e of their standard deviation", difference)
    if not difference <= _LOGIT_TOLERANCE:
        raise FFRError(
            f"the merged model is not the one that was trained: the logits of a batch differ by {difference:.1%} of "
            f"their standard deviation, rounding explains {_LOGIT_TOLERANCE:.0%}; please report it"
        )
