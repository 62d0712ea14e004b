"""The base model that the demo starts from: a tiny Qwen2-VL that reads dialogues and pictures, as a real VLM does.

    python tools/pretraining.py --output ffr_verl/demo/weights

draws weights, trains them on four tasks with the words and pictures of the demo set, and writes `base.safetensors`
(fp16) and `base.json`, which the package carries. None of the tasks asks for the answer of fragment retrieval: that is
what stage 1 teaches.

- lines: which lines of a short dialogue belong to a query, in plain words (`utterances 1 2 images 0`);
- picture: which words go with a picture;
- words: which words go with a word;
- repeat: a well-formed answer that stands in the prompt is written once more.

A model so small does not find by chance that a query and an utterance speak of the same thing (not in 600
updates), so the weights are drawn with two habits of larger ones: words of a topic lie near each other, the first
two layers attend to what is alike. It then takes some 400 updates on one-turn topics without pictures, at a learning
rate of 7e-4; at 2e-3 it had not after 200, and with pictures and all tasks from the start not after 650.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from ffr_verl.data.demo import INSTRUCTION, SYSTEM, TOPICS, demo_rows
from ffr_verl.demo.base_model import PRETRAINING_TEXTS, write_base_model
from ffr_verl.files import whole_or_nothing
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PretrainingSettings:
    """How the base model is made: by `steps` updates with AdamW, see `_lr_factor`."""

    steps: int = 1700
    batch_size: int = 64
    lr: float = 7e-4
    warmup: int = 100
    # The first updates: the task lines alone, one turn a topic, no pictures, and a word of the query in every line.
    matching_steps: int = 600
    # Longest part of each topic in the dialogues afterwards, one value for each equal share of the updates.
    turns: tuple[int, ...] = (1, 2, 3)
    heldout: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Example:
    prompt: str
    answer: str
    pictures: tuple[str, ...] = ()


def _in_words(solution: str) -> str:
    fragment = parse_fragment(solution)
    assert fragment is not None
    lists = [" ".join(map(str, ids)) or "none" for ids in (fragment.utterance_ids, fragment.image_ids)]
    return f"utterances {lists[0]} images {lists[1]}"


def _chat(user: str, system: str = SYSTEM) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def _lines(row: dict[str, Any]) -> _Example:
    user = row["messages"][1]["content"].replace(INSTRUCTION, PRETRAINING_TEXTS["lines"])
    return _Example(_chat(user), _in_words(row["solution"]), tuple([str(image) for image in row["images"]]))


def _other(rng: random.Random, pictures: Sequence[str]) -> _Example:
    kind = rng.choice(("picture", "words", "repeat", "repeat"))
    if kind == "repeat":
        ids = sorted(rng.sample(range(16), rng.randint(0, 6))), sorted(rng.sample(range(8), rng.randint(0, 3)))
        text = format_fragment(Fragment(*map(tuple, ids)))
        return _Example(_chat(f"{PRETRAINING_TEXTS['repeat']} {text}"), text)
    if kind == "picture":
        name = rng.choice(pictures)
        topic = next(topic for topic in TOPICS if Path(name).name.startswith(topic.name))
        return _Example(_chat(f"<image>\n{PRETRAINING_TEXTS['picture']}"), " ".join(topic.words), (name,))
    topic = rng.choice(TOPICS)
    word = rng.choice(topic.words)
    others = " ".join(one for one in topic.words if one != word)
    return _Example(_chat(f"{PRETRAINING_TEXTS['words']} {word}"), others)


class _Batches:
    """Examples as tensors; each picture is read once."""

    def __init__(self, folder: Path, processor: Any) -> None:
        self._folder = folder
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._pixels: dict[str, torch.Tensor] = {}
        self._grids: dict[str, torch.Tensor] = {}
        self._image_pad = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def _ids(self, example: _Example) -> tuple[list[int], list[int]]:
        text, *rest = example.prompt.split("<image>")
        for name, after in zip(example.pictures, rest, strict=True):
            if name not in self._pixels:
                with Image.open(self._folder / name) as image:
                    found = self._processor.image_processor(images=[image.convert("RGB")], return_tensors="pt")
                self._pixels[name], self._grids[name] = found["pixel_values"], found["image_grid_thw"]
            count = int(self._grids[name].prod()) // 4
            text += "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" + after
        prompt, answer = (
            self._tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (text, example.answer + "<|im_end|>")
        )
        return prompt, answer

    def tokens(self, words: Sequence[str]) -> Any:
        """Token ids of words, at the start of a text and inside one."""
        return self._tokenizer.convert_tokens_to_ids([*words, *(f" {word}" for word in words)])

    def tensors(self, examples: Sequence[_Example], *, with_answer: bool = True) -> dict[str, torch.Tensor]:
        """Padded on the right with the answer, on the left without it."""
        pairs = [self._ids(example) for example in examples]
        width = max(len(prompt) + len(answer) * with_answer for prompt, answer in pairs)
        shape = (len(pairs), width)
        ids = torch.full(shape, self._tokenizer.pad_token_id)
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, (prompt, answer) in enumerate(pairs):
            tokens = torch.tensor(prompt + answer if with_answer else prompt)
            place = slice(0, len(tokens)) if with_answer else slice(width - len(tokens), width)
            ids[row, place], mask[row, place] = tokens, 1
            if with_answer:
                labels[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
        batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self._image_pad).long()}
        names = [name for example in examples for name in example.pictures]
        if names:
            batch["pixel_values"] = torch.cat([self._pixels[name] for name in names])
            batch["image_grid_thw"] = torch.cat([self._grids[name] for name in names])
        return {**batch, "labels": labels} if with_answer else batch

    def share_right(self, model: Any, examples: Sequence[_Example]) -> float:
        """Share of greedy answers that are right to the letter."""
        model.eval()
        right = 0
        for start in range(0, len(examples), 64):
            chunk = examples[start : start + 64]
            inputs = self.tensors(chunk, with_answer=False)
            with torch.no_grad():
                made = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            texts = self._tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(text.strip() == example.answer for text, example in zip(texts, chunk, strict=True))
        model.train()
        return right / len(examples)


@torch.no_grad()
def _give_habits(model: Any, batches: _Batches) -> None:
    """Put the words of a topic near each other, and make queries of the first two layers those of their keys."""
    embeddings = model.get_input_embeddings().weight
    spread = float(embeddings.std())
    for topic in TOPICS:
        shared = spread * torch.randn(embeddings.shape[1])
        for token in batches.tokens(topic.words):
            embeddings[token] = 0.2**0.5 * embeddings[token] + 0.8**0.5 * shared
    for layer in model.model.language_model.layers[:2]:
        queries, keys = layer.self_attn.q_proj, layer.self_attn.k_proj
        heads = keys.weight.unflatten(0, (-1, layer.self_attn.head_dim))
        groups = queries.weight.shape[0] // keys.weight.shape[0]
        queries.weight.copy_(heads.repeat_interleave(groups, dim=0).flatten(0, 1))
        for projection in (queries, keys):
            projection.bias.zero_()


def pretrain(output: Path, settings: PretrainingSettings) -> dict[str, float]:
    """Write `base.safetensors` and `base.json` to the folder `output`; returns the held-out share of right answers to
    the first task by the number of turns a topic."""
    rng = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base_model(folder / "model", seed=settings.seed)
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model", attn_implementation="sdpa")
        batches = _Batches(folder, AutoProcessor.from_pretrained(folder / "model"))
        torch.manual_seed(settings.seed)
        _give_habits(model, batches)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, settings))
        started = time.monotonic()
        streams: dict[tuple[int, bool], Iterator[dict[str, Any]]] = {}
        model.train()
        for step in range(settings.steps):
            is_matching = step < settings.matching_steps
            over = (step - settings.matching_steps) / (settings.steps - settings.matching_steps)
            turns = 1 if is_matching else settings.turns[int(over * len(settings.turns))]
            if (turns, is_matching) not in streams:
                shares = {"image_share": 0.0, "literal_share": 1.0} if is_matching else {}
                streams[turns, is_matching] = _rows(folder, turns, settings.seed, **shares)
            lines = settings.batch_size if is_matching else settings.batch_size * 3 // 4
            examples = [_lines(row) for row in itertools.islice(streams[turns, is_matching], lines)]
            pictures = sorted(str(path.relative_to(folder)) for path in (folder / "images").iterdir())
            examples += [_other(rng, pictures) for _ in range(settings.batch_size - len(examples))]
            loss = model(**batches.tensors(examples)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 49:
                logger.info("step %d: loss %.3f, %.0f s", step + 1, loss.item(), time.monotonic() - started)
            if step % 200 == 199:
                rows = _rows(folder, turns, settings.seed + 7)
                right = batches.share_right(model, [_lines(row) for row in itertools.islice(rows, 64)])
                logger.info("turns up to %d: %.3f right", turns, right)
        right_by_turns = {}
        for turns in range(1, 5):
            rows = _rows(folder, turns, settings.seed + 1_000_003, least=turns)
            heldout = [_lines(row) for row in itertools.islice(rows, settings.heldout)]
            right_by_turns[str(turns)] = batches.share_right(model, heldout)
        state = {key: value.to(torch.float16).contiguous() for key, value in model.state_dict().items()}
        record = {"settings": asdict(settings), "share_of_right_answers_by_turns": right_by_turns}
        with whole_or_nothing([output / "base.safetensors", output / "base.json"]) as (weights, description):
            save_file(state, weights, metadata={"format": "pt"})
            description.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return right_by_turns


def _lr_factor(step: int, settings: PretrainingSettings) -> float:
    """Of the peak: warm-up, level while the matching is found, then a cosine down to a tenth."""
    if step < settings.matching_steps:
        return min(1.0, (step + 1) / settings.warmup)
    over = (step - settings.matching_steps) / (settings.steps - settings.matching_steps)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * over))


def _rows(
    folder: Path, turns: int, seed: int, *, least: int = 1, image_share: float = 0.25, literal_share: float = 0.8
) -> Iterator[dict[str, Any]]:
    shares = {"image_share": image_share, "literal_share": literal_share}
    return demo_rows(folder / "images", rows=10**9, seed=seed, turns_per_topic=(least, turns), emblems=16, **shares)


def main() -> None:
    """The command of the module's docstring."""
    defaults = PretrainingSettings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--turns", type=int, nargs="+", default=list(defaults.turns))
    parser.add_argument("--seed", type=int, default=defaults.seed)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = PretrainingSettings(steps=given.steps, turns=tuple(given.turns), seed=given.seed)
    logger.info("right: %s", pretrain(given.output, settings))


if __name__ == "__main__":
    main()
