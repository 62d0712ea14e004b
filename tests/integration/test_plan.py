"""`ffr-verl plan` against what the parts really take: torch, transformers, peft, verl and vLLM are the oracles."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from benchmarks import hardware
from ffr_verl.cli import app
from ffr_verl.demo.base_model import write_base_model
from ffr_verl.errors import FFRError
from ffr_verl.images import image_tokens
from ffr_verl.inference.generate import LORA_RANKS
from ffr_verl.integrations.verl.memory import ModelShape, Run, plan_memory, read_model, read_run, read_training
from ffr_verl.integrations.verl.memory.model_shape import Training

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "benchmarks" / "models"
DOCS = ROOT / "docs" / "hardware.md"
LORA = Training(lora_rank=8, exclude_modules=".*visual.*")
FULL = Training(freeze_tower=True)
GIB = 2**30
Composed = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """verl filters prompts in a fork, in other tests, which would hang after torch has used threads here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("models") / "tiny")


def sft(composed: Composed, model: Path, *overrides: str, **chosen: Any) -> tuple[ModelShape, Run]:
    config = composed("sft_trainer", "+recipe=ffr_sft", *overrides)
    shape = read_model(model, read_training(config))
    return shape, read_run(config, shape, **chosen)


def grpo(composed: Composed, model: Path, *overrides: str, **chosen: Any) -> tuple[ModelShape, Run]:
    config = composed("main_ppo", "+recipe=ffr_grpo", *overrides)
    shape = read_model(model, read_training(config))
    return shape, read_run(config, shape, **chosen)


def loaded(model: Path, training: Training) -> Any:
    """The model with its weights, as verl's engine prepares it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    found = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    if training.lora_rank:
        chosen = {"target_modules": "all-linear", "exclude_modules": training.exclude_modules}
        return get_peft_model(found, LoraConfig(task_type="CAUSAL_LM", r=training.lora_rank, bias="none", **chosen))
    for name, parameter in found.named_parameters():
        parameter.requires_grad_("visual" not in name)
    return found


def size_of(tensors: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


# The published checkpoints: total_size of the 2B's model.safetensors.index.json is 4,417,971,200 bytes of bf16.
@pytest.mark.parametrize(("name", "parameters"), [("qwen2_vl_2b", 2_208_985_600), ("qwen2_vl_7b", 8_291_375_616)])
def test_published_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    shape = read_model(MODELS / name, Training(freeze_tower=True))
    assert shape.base == parameters
    assert shape.trained == parameters - shape.parameters["vision tower"]
    assert (shape.parameters["head"] == 0) == name.endswith("2b"), "its head is its embeddings"


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
def test_weights_gradients_and_optimiser_are_those_of_a_real_step(
    composed: Composed, tiny_model: Path, training: Training
) -> None:
    model = loaded(tiny_model, training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]

    rank = f"model.lora_rank={training.lora_rank}"
    shape, run = sft(composed, tiny_model, rank, "engine.strategy=fsdp2", "engine.model_dtype=fp32", gpus=1)
    parts = plan_memory(shape, run, gpu=GIB).parts
    assert parts["weights"] == size_of(model.parameters())
    assert parts["gradients"] == size_of(gradients)
    assert parts["optimiser"] == size_of(moments)
    by_part = {"vision tower": 0, "language layers": 0}
    for name, one in model.named_parameters():
        if "lora" not in name and ("visual" in name or ".layers." in name):
            by_part["vision tower" if "visual" in name else "language layers"] += one.numel()
    assert {name: shape.parameters[name] for name in by_part} == by_part


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_units_are_those_that_verl_wraps(tiny_model: Path, strategy: str) -> None:
    from verl.utils.fsdp_utils import _select_fsdp2_wrap_targets

    model = loaded(tiny_model, FULL)
    wrapped = _select_fsdp2_wrap_targets(model, model._no_split_modules)
    if strategy == "fsdp":  # FSDP1 wraps the classes alone
        wrapped = [one for one in wrapped if type(one).__name__ in model._no_split_modules]
    sizes = sorted(sum(p.numel() for p in one.parameters()) for one in wrapped)
    shape = read_model(tiny_model, replace(FULL, strategy=strategy))
    assert shape.units == (sizes[-1], sizes[-2])
    assert shape.root == shape.base - sum(sizes)


def test_a_token_in_the_kv_cache_is_that_of_vllm(composed: Composed, tiny_model: Path) -> None:
    from transformers import AutoConfig
    from vllm.config.lora import MaxLoRARanks
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for model, parallel in ((tiny_model, 1), (MODELS / "qwen2_vl_7b", 1), (MODELS / "qwen2_vl_7b", 4)):
        text = AutoConfig.from_pretrained(model).get_text_config()
        page = FullAttentionSpec(
            block_size=16,
            num_kv_heads=text.num_key_value_heads // parallel,
            head_size=text.hidden_size // text.num_attention_heads,
            dtype=torch.bfloat16,
        )
        override = f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel}"
        found = plan_memory(*grpo(composed, model, override), gpu=80 * GIB).kv
        assert found["bytes a token"] * 16 == page.page_size_bytes * text.num_hidden_layers
        assert found["tokens"] == found["pool"] // (found["bytes a token"] * 16) * 16
    assert sorted(get_args(MaxLoRARanks)) == list(LORA_RANKS)


class Tracker(TorchDispatchMode):
    """Bytes of the storages that operations make and that live at once."""

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.kept = [one.untyped_storage() for one in existing]
        self.known = {one._cdata for one in self.kept}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in self.known:
                storage = one.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return made

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Flash(torch.autograd.Function):
    """Keeps what flash attention keeps, and computes nothing: the meta device has no kernel of it."""

    @staticmethod
    def forward(context: Any, query: Any, key: Any, value: Any) -> Any:
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        out = torch.empty_like(query)
        context.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:  # type: ignore[override]
        return tuple(torch.empty_like(one) for one in context.saved_tensors[:3])


class CrossEntropy(torch.autograd.Function):
    """Keeps the logits and writes their gradient over them, as flash-attn's does."""

    @staticmethod
    def forward(context: Any, logits: Any) -> Any:
        context.save_for_backward(logits)
        return torch.empty((), device=logits.device)

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:  # type: ignore[override]
        return context.saved_tensors[0]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Attention that is `Flash`, with keys and values repeated to all heads as in verl's patched Qwen2-VL."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(_module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
        return Flash.apply(query, key, value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = attention, lambda *_, **__: None
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all"])
@pytest.mark.parametrize("rank", [8, 0], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["qwen2_vl_2b", "qwen2_vl_7b"])
def test_activations_are_at_least_what_autograd_keeps_and_hardly_more(
    composed: Composed, tmp_path: Path, name: str, rank: int, checkpointing: bool
) -> None:
    """A training step of the real classes on the meta device, in bf16, text alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    config, tokens = AutoConfig.from_pretrained(MODELS / name), 4096
    config.text_config.num_hidden_layers, config.text_config.layer_types = 4, ["full_attention"] * 4  # a quick one
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if rank:
        model.enable_input_require_grads()
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM", r=rank, target_modules="all-linear", exclude_modules=LORA.exclude_modules
            ),
            autocast_adapter_dtype=False,
        )
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Gradients are another part of the plan: a parameter's is made, and dropped at once.
    for one in model.parameters():
        if one.requires_grad:
            one.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    tracker = Tracker(*model.parameters(), *model.buffers(), ids)
    with without_kernels(), tracker:
        out = model(input_ids=ids, position_ids=ids.expand(3, 1, -1), use_cache=False)
        loss = CrossEntropy.apply(out.logits)
        del out
        loss.backward()

    overrides = (f"model.lora_rank={rank}", f"model.enable_gradient_checkpointing={checkpointing}")
    shape, run = sft(composed, tmp_path, *overrides, "engine.strategy=fsdp2", f"data.max_token_len_per_gpu={tokens}")
    shape, run = replace(shape, tower=None, trained_unit=0, root=0, units=(0, 0)), replace(run, visual_tokens=0)
    activations = plan_memory(shape, run, gpu=GIB).phases[0].parts["activations"]
    # A gradient that is being made is another part: the head's, which waits for that of tied embeddings.
    own = 0 if rank else 2 * max(one.numel() for one in model.parameters())
    assert 1 <= activations / (tracker.peak - own) <= 1.1


def test_logits_are_a_row_of_the_vocabulary_for_each_token(composed: Composed, tiny_model: Path) -> None:
    model, tokens = loaded(tiny_model, FULL), 64
    logits = model(input_ids=torch.zeros(1, tokens, dtype=torch.long)).logits
    precision = ("engine.model_dtype=fp32", "+engine.mixed_precision={param_dtype:fp32}")
    for attention, copies in (("flash_attention_2", 1), ("sdpa", 3)):
        override = f"+model.override_config.attn_implementation={attention}"
        shape, run = sft(composed, tiny_model, *precision, override, f"data.max_token_len_per_gpu={tokens}")
        ends = tokens * shape.hidden * (5 + 2 * 4)
        assert plan_memory(shape, run, gpu=GIB).parts["logits"] == copies * size_of([logits]) + ends


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_vision_tower_takes_no_more_than_planned(composed: Composed, tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 128, "head_dim": 32, "layer_types": ["full_attention"]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    width = {"embed_dim": 256, "hidden_size": 64} if name == "qwen2_vl" else {"hidden_size": 256}
    vision = {**width, "depth": 2, "num_heads": 4, "intermediate_size": 680, "out_hidden_size": 64}
    vision |= {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model(name, text_config=text, vision_config=vision)
    config.save_pretrained(tmp_path)
    tower = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).model.visual.requires_grad_(False)
    shape = read_model(tmp_path, FULL)
    assert shape.tower is not None
    side = 16
    pixels = torch.zeros(side * side, shape.tower.patch_values)
    tracker = Tracker(*tower.parameters(), *tower.buffers(), pixels)
    with without_kernels(), tracker:
        tower(pixels.to(torch.bfloat16), torch.tensor([[1, side, side]]))

    config = composed("sft_trainer", "+recipe=ffr_sft", "model.lora_rank=0", "engine.strategy=fsdp2")
    run = replace(read_run(config, shape), visual_tokens=side * side // shape.family.merge_size**2)
    parts = plan_memory(shape, run, gpu=GIB).parts
    assert parts["pixels"] == size_of([pixels])
    assert 1 <= parts["vision tower"] / tracker.peak <= 1.4


def test_visual_tokens_are_the_most_that_images_can_have(composed: Composed, tiny_model: Path) -> None:
    shape, run = grpo(composed, tiny_model, gpus=1)
    sizes = [(width, height) for width in range(28, 4000, 199) for height in range(28, 4000, 173)]
    most = max(
        image_tokens(*one, max_pixels=602_112, family=shape.family) for one in sizes if max(one) < 100 * min(one)
    )
    assert 0.97 <= most / (run.visual_tokens / 8) <= 1
    assert grpo(composed, tiny_model, gpus=1, images=2)[1].visual_tokens == run.visual_tokens // 4
    assert grpo(composed, tiny_model, gpus=1, images=1000)[1].visual_tokens == 15_536, "no more than the micro-batch"


ACTOR = "actor_rollout_ref.actor.fsdp_config"
VLLM = "actor_rollout_ref.rollout"


def test_what_an_override_does_to_the_phases(composed: Composed) -> None:
    def phases(*overrides: str, **chosen: Any) -> dict[str, Any]:
        found = plan_memory(*grpo(composed, MODELS / "qwen2_vl_2b", *overrides, **chosen), gpu=80 * GIB)
        return {**{phase.name: dict(phase.parts) for phase in found.phases}, "host": found.host, "kv": found.kv}

    usual = phases()
    assert usual["rollout"]["vLLM"] == 40 * GIB
    assert usual["update"]["vLLM"] == usual["log-probs"]["vLLM"] == 0, "it sleeps"
    assert usual["host"]["sleeping vLLM"] == 8 * usual["weights to vLLM"]["vLLM"]

    offloaded = phases(f"{ACTOR}.param_offload=true", f"{ACTOR}.optimizer_offload=true")
    assert offloaded["rollout"]["weights"] == offloaded["rollout"]["optimiser"] == 0
    assert offloaded["update"] == usual["update"], "both are back while it trains"
    assert phases(f"{ACTOR}.offload_policy=true")["update"]["weights"] == 0

    awake = phases(f"{VLLM}.free_cache_engine=false")
    assert all(awake[name]["vLLM"] == 40 * GIB for name in ("log-probs", "update", "weights to vLLM"))

    two_nodes = phases(nodes=2)
    assert math.isclose(two_nodes["update"]["weights"], usual["update"]["weights"] / 2, abs_tol=1)
    assert phases(f"{ACTOR}.fsdp_size=8", nodes=2)["update"]["weights"] == usual["update"]["weights"]

    halves = phases(f"{VLLM}.tensor_model_parallel_size=2")
    assert halves["kv"]["bytes a token"] * 2 == usual["kv"]["bytes a token"]
    assert halves["kv"]["answers of a step"] == 2 * usual["kv"]["answers of a step"] == 128
    assert phases(f"{VLLM}.tensor_model_parallel_size=8")["kv"]["bytes a token"] == halves["kv"]["bytes a token"]

    full = phases("actor_rollout_ref.model.lora_rank=0")
    assert full["host"]["reference model"] == 4 * 2_208_985_600, "verl's reference is fp32 unless told otherwise"
    assert "reference model" not in usual["host"], "the base without its adapter"
    assert full["weights to vLLM"]["on their way"] > 2 * 2048 * 2**20


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([f"{VLLM}.tensor_model_parallel_size=3"], [], "tensor_model_parallel_size=3 does not divide 8 GPUs"),
        ([f"{ACTOR}.ulysses_sequence_parallel_size=2"], ["--gpus", "1"], "size=2 does not divide 1 GPUs"),
        (["trainer.v1.trainer_mode=separate_async"], [], "the plan knows sync and colocate_async"),
        ([f"{ACTOR}.model_dtype=int4"], [], "found 'int4'; the plan knows fp32"),
        ([f"{ACTOR}.parm_offload=true"], [], "parm_offload"),
        ([], ["--model", "nowhere"], "nowhere: no such folder"),
        ([], ["--model", "."], "no config.json there"),
    ],
)
def test_what_cannot_be_planned_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], options: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in options else ["--model", str(tiny_model)]
    result = CliRunner().invoke(app, ["plan", *model, *options, "+recipe=ffr_grpo", *overrides])
    assert isinstance(result.exception, FFRError)
    assert message in str(result.exception)


def test_a_broken_config_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(FFRError, match=r"config\.json: .*no_such_model"):
        read_model(tmp_path, FULL)


def test_the_table_and_json_say_the_same(tiny_model: Path) -> None:
    arguments = ["plan", "--model", str(tiny_model), "--gpu-memory", "2", "--gpus", "1", "+recipe=ffr_grpo"]
    table = CliRunner().invoke(app, arguments).stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    for phase in found["phases"]:
        assert f"{phase['total'] / GIB:9.2f}   {phase['verdict']}" in table
    assert "not counted: CUDA contexts" in table
    assert f"peak: {max(found['phases'], key=lambda one: one['total'])['name']}" in table
    assert found["peak"] == max(phase["total"] for phase in found["phases"])


def test_too_small_a_share_for_vllm_is_said(composed: Composed) -> None:
    plan = plan_memory(*grpo(composed, MODELS / "qwen2_vl_7b", gpus=1), gpu=24 * GIB)
    assert plan.verdict(plan.peak) == "too large"
    assert any("does not hold one row" in note for note in plan.notes)


def test_docs_show_what_plan_says() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for table in hardware.tables().split("\n\n"):
        assert table in text
    for overrides in hardware.TRAINED.values():
        assert overrides in text


def test_every_override_in_the_docs_composes_and_every_logger_is_one_of_verl(composed: Composed) -> None:
    from verl.utils.tracking import Tracking

    text = DOCS.read_text(encoding="utf-8")
    found = {one for one in re.findall(r"`([a-z_][\w.]*\.[^`\n]*=[^`\n]*)`", text) if "=[console," not in one}
    assert len(found) > 20
    for one in sorted(found):
        trainer = "main_ppo" if re.search("actor_rollout_ref|max_prompt_length", one) else "sft_trainer"
        recipe = "ffr_grpo" if trainer == "main_ppo" else "ffr_sft"
        composed(trainer, f"+recipe={recipe}", *one.split())
    loggers = re.findall(r"`(trainer\.logger=\[console,(\w+)\])`", text)
    for override, name in loggers:
        assert name in Tracking.supported_backend
        assert list(composed("main_ppo", "+recipe=ffr_grpo", override).trainer.logger) == ["console", name]
    listed = text[text.index("verl 0.9.1 knows") :].partition(";")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(Tracking.supported_backend)
