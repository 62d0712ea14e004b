"""A tiny Qwen2-VL, built from its configuration, with a word-level tokenizer and a processor that transformers and
vLLM load.

It stands in for Qwen2-VL-7B-Instruct where there is no GPU and no model hub: the same classes, the same file layout,
about 0.9 million parameters. Its weights lie in the package; `tools/pretraining.py` made them.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from ffr_verl.data.demo import demo_vocabulary
from ffr_verl.errors import FFRError, one_line
from ffr_verl.fragments import TAGS
from ffr_verl.model_families import QWEN2_VL
from ffr_verl.settings import DEFAULT_MAX_PIXELS

__all__ = ["build_tokenizer", "write_base_model"]

_IMAGE_TOKENS = (QWEN2_VL.image_start, QWEN2_VL.image_end, QWEN2_VL.image_pad)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_IMAGE_TOKENS, "<|video_pad|>")
_PROMPT_TAGS = tuple([f"<|{name}_{end}|>" for name in ("utt_id", "img_id", "query") for end in ("start", "end")])
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

    The tags are ordinary added tokens: verl drops special ones when it decodes an answer for the reward.
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


def write_base_model(output: Path, *, seed: int | None = None) -> Path:
    """Write model, tokenizer and processor to the folder `output` (replaced as a whole) and return it.

    The weights are the pretrained ones; with a `seed` they are random, as `tools/pretraining.py` begins.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,  # of 32 channels: vLLM's CPU attention takes no smaller ones
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            # With the default, 0.02, so small a model does not find the matching of query and utterance.
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
            "hidden_size": 128,
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
    torch.manual_seed(seed or 0)
    model = Qwen2VLForConditionalGeneration(config)
    if seed is None:
        weights = Path(str(resources.files("ffr_verl.demo") / "weights" / "base.safetensors"))
        try:
            model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        except RuntimeError as error:
            raise FFRError(
                f"{weights}: the demo's vocabulary has changed since; make the weights again: python "
                f"tools/pretraining.py ({one_line(str(error))})"
            ) from None
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
