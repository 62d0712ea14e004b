"""A tiny Qwen2-VL, built from its configuration, with a word-level tokenizer and a processor that transformers and
vLLM load.

It stands in for Qwen2-VL-7B-Instruct where there is no GPU and no model hub: the same classes, the same file layout,
about 0.9 million parameters. Its weights lie in the package; `tools/pretraining.py` made them.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from ffr_verl.data.demo import demo_vocabulary
from ffr_verl.errors import FFRError
from ffr_verl.fragments import TAGS
from ffr_verl.model_families import QWEN2_VL
from ffr_verl.settings import DEFAULT_MAX_PIXELS

__all__ = ["build_tokenizer", "write_base_model", "write_random_model"]

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    QWEN2_VL.image_start,
    QWEN2_VL.image_end,
    QWEN2_VL.image_pad,
    "<|video_pad|>",
)
_PROMPT_TAGS = (
    "<|utt_id_start|>",
    "<|utt_id_end|>",
    "<|img_id_start|>",
    "<|img_id_end|>",
    "<|query_start|>",
    "<|query_end|>",
)
_UNKNOWN = "<|unknown|>"
_PUNCTUATION = ("[", "]", ", ", ",", ";", ":", " ", "\n", ".", "?", "!", "'")
_LARGEST_ID = 127

# Instructions and answer words of the tasks that the base model was pretrained on, see `tools/pretraining.py`.
PRETRAINING_TEXTS = {
    "lines": "which lines belong to the query",
    "picture": "which words go with the picture",
    "words": "which words go with",
    "repeat": "write once more",
    "answer": "utterances images none",
}

# The layout of the Qwen2-VL template: ChatML, an image item becomes the vision tokens.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    f"{QWEN2_VL.image_text}"
    "{% elif item['type'] == 'video' or 'video' in item %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():  # type: ignore[no-untyped-def]  # a transformers class, imported late
    """A `PreTrainedTokenizerFast` whose tokens are the demo's words, the ids 0 to 127 and the FFR tags.

    The tags are ordinary added tokens, never special ones: verl drops special tokens when it decodes an answer for the
    reward. Decoding what was encoded gives the same text, except for words that the demo set does not have.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    taught = [word for text in PRETRAINING_TEXTS.values() for word in text.split()]
    words = [*demo_vocabulary(), "system", "user", "assistant", *taught]
    tokens = [_UNKNOWN, *_PUNCTUATION, *map(str, range(_LARGEST_ID + 1)), *words, *(f" {word}" for word in words)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    pattern = Regex(r", |\n|[0-9]+| ?[A-Za-z]+[0-9]*|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (*TAGS, *_PROMPT_TAGS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": QWEN2_VL.image_pad, "video_token": "<|video_pad|>"},
    )


def write_base_model(output: Path) -> Path:
    """Write the pretrained base model, tokenizer and processor to the folder `output` and return it.

    Raises:
        FFRError: when the weights of the package belong to another vocabulary: words of the demo set have changed
            since; make them again with `python tools/pretraining.py`.
    """
    return _write(output, seed=0, weights=Path(str(resources.files("ffr_verl.demo") / "weights" / "base.safetensors")))


def _load(model: Any, weights: Path) -> None:
    from safetensors.torch import load_file

    state = {name: value.float() for name, value in load_file(weights).items()}
    mine = model.state_dict()
    wrong = [name for name in mine if name not in state or state[name].shape != mine[name].shape]
    if wrong:
        raise FFRError(
            f"{weights}: {wrong[0]} is of another shape or missing: the demo's vocabulary has changed since; make the "
            "weights again: python tools/pretraining.py"
        )
    model.load_state_dict(state)


def write_random_model(output: Path, *, seed: int = 0, hidden_size: int = 128, layers: int = 3) -> Path:
    """Write a model with random weights, tokenizer and processor to the folder `output` (replaced as a whole).

    Weights are drawn with `initializer_range` 0.08: with the default 0.02 so small a model does not find the matching
    of query and utterance.

    Args:
        output: a folder that becomes loadable with `from_pretrained`.
        seed: of the random weights.
        hidden_size: width of the language model, a multiple of 32: heads have 32 channels, vLLM's CPU attention takes
            no smaller ones.
        layers: depth of the language model.
    """
    return _write(output, seed=seed, hidden_size=hidden_size, layers=layers)


def _write(output: Path, *, seed: int, hidden_size: int = 128, layers: int = 3, weights: Path | None = None) -> Path:
    import torch
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 3,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": max(1, hidden_size // 64),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "hidden_size": hidden_size,
            "patch_size": QWEN2_VL.patch_size,
            "spatial_merge_size": QWEN2_VL.merge_size,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "initializer_range": 0.08,
        },
        image_token_id=ids[QWEN2_VL.image_pad],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[QWEN2_VL.image_start],
        vision_end_token_id=ids[QWEN2_VL.image_end],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    if weights is not None:
        _load(model, weights)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    pixels = {"min_pixels": QWEN2_VL.min_pixels, "max_pixels": DEFAULT_MAX_PIXELS}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=_CHAT_TEMPLATE,
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return output
