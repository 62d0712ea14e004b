"""Greedy answers with log-probabilities, by vLLM's engine in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.data.config import DEFAULT_MAX_PIXELS
from ffr_verl.data.images import resolve_image
from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import FFRError

__all__ = ["Answer", "Generator", "GeneratorSettings"]


@dataclass(frozen=True, slots=True)
class GeneratorSettings:
    """How answers are made.

    Attributes:
        model: a Hugging Face folder or hub name.
        images_root: resolved folder that image paths are relative to.
        max_new_tokens: most tokens of an answer.
        max_model_len: most tokens of prompt and answer.
        max_images: most images of a prompt.
        max_pixels: bound of an image.
        samples: answers drawn at temperature 1 beside the greedy one, for a pass rate; 0 for none.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: share of a GPU's memory that vLLM takes.
        seed: of the drawn answers.
        trust_remote_code: run code that the model's repository brings.
    """

    model: str
    images_root: Path
    max_new_tokens: int = 1024
    max_model_len: int = 15_536
    max_images: int = 8
    max_pixels: int = DEFAULT_MAX_PIXELS
    samples: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row.

    Attributes:
        response: its text, special tokens kept.
        logprobs: natural logarithms of the chosen tokens' probabilities.
        samples: further answers, drawn.
    """

    response: str
    logprobs: tuple[float, ...]
    samples: tuple[str, ...] = ()


class Generator:
    """A model loaded into vLLM, in this process and those that vLLM starts.

    Raises:
        FFRError: when vLLM is missing, or the model cannot be loaded or has no chat template.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        folder = Path(settings.model).expanduser()
        looks_local = settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1
        if looks_local and not (folder / "config.json").is_file():
            raise FFRError(f"--model {settings.model}: no Hugging Face model folder; `ffr-verl merge` makes one")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            import vllm
            from transformers import AutoProcessor
        except ImportError as error:
            raise FFRError(
                f"vllm is not installed ({error}): `make install`, or pip install 'ffr-verl[gpu]'"
            ) from None
        try:
            self._processor = AutoProcessor.from_pretrained(
                settings.model, trust_remote_code=settings.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise FFRError(f"--model {settings.model}: {str(error).splitlines()[0]}") from None
        if not getattr(self._processor, "chat_template", None):
            raise FFRError(
                f"--model {settings.model}: no chat template; save the base model's processor there: "
                "AutoProcessor.from_pretrained(BASE).save_pretrained(...)"
            )
        try:
            self._llm = vllm.LLM(
                model=settings.model,
                max_model_len=settings.max_model_len,
                limit_mm_per_prompt={"image": settings.max_images},
                tensor_parallel_size=settings.tensor_parallel_size,
                trust_remote_code=settings.trust_remote_code,
                seed=settings.seed,
                **_engine_options(settings),
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise FFRError(f"--model {settings.model}: vLLM cannot load it: {str(error).splitlines()[0]}") from None
        common: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "skip_special_tokens": False}
        self._greedy = vllm.SamplingParams(temperature=0.0, logprobs=0, **common)
        self._drawn = vllm.SamplingParams(temperature=1.0, n=max(1, settings.samples), seed=settings.seed, **common)
        self._settings = settings

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answers to rows of an RL file, in their order."""
        prompts: list[Any] = [self._prompt(row) for row in rows]
        greedy = self._llm.generate(prompts, self._greedy, use_tqdm=False)
        drawn: Sequence[Any] = [None] * len(prompts)
        if self._settings.samples:
            drawn = self._llm.generate(prompts, self._drawn, use_tqdm=False)
        return [self._answer(one.outputs[0], more) for one, more in zip(greedy, drawn, strict=True)]

    def _answer(self, output: Any, drawn: Any) -> Answer:
        chosen = [
            float(candidates[token].logprob)
            for token, candidates in zip(output.token_ids, output.logprobs or (), strict=False)
        ]
        samples = () if drawn is None else tuple([self._text(one) for one in drawn.outputs])
        return Answer(self._text(output), tuple(chosen), samples)

    def _text(self, output: Any) -> str:
        """The answer without the token that ends it."""
        ending = self._processor.tokenizer.eos_token or ""
        return str(output.text).removesuffix(ending) if ending else str(output.text)

    def _prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        text = self._processor.apply_chat_template(
            with_image_parts(row["prompt"]), add_generation_prompt=True, tokenize=False
        )
        images = list(self._images(row))
        return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}

    def _images(self, row: Mapping[str, Any]) -> Iterator[Any]:
        """Pictures as verl's dataset gives them to the rollout."""
        import io

        from PIL import Image
        from qwen_vl_utils import fetch_image

        for image in row["images"] or ():
            if isinstance(image, Mapping):
                picture: Any = Image.open(io.BytesIO(image["bytes"]))
            else:
                picture = str(resolve_image(self._settings.images_root, image))
            yield fetch_image({"image": picture, "max_pixels": self._settings.max_pixels})


def _engine_options(settings: GeneratorSettings) -> dict[str, Any]:
    """What differs between a GPU and the CPU build."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        return {"dtype": "float32", "enforce_eager": True}
    return {"gpu_memory_utilization": settings.gpu_memory_utilization}
