"""A tiny model of a family, built from its configuration, with a word-level tokenizer and a processor that
transformers and vLLM load.

It stands in for models such as Qwen2-VL-7B-Instruct where there is no GPU and no model hub: the same classes, the same
file layout, about 0.9 million parameters. The weights of a Qwen2-VL lie in the package; `tools/pretraining.py` made
them.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ffr_verl.data.demo import demo_vocabulary
from ffr_verl.errors import FFRError, one_line
from ffr_verl.files import whole_folder
from ffr_verl.fragments import TAGS
from ffr_verl.model_families import QWEN2_VL, ModelFamily
from ffr_verl.settings import DEFAULT_MAX_PIXELS

_IMAGE_TOKENS = (QWEN2_VL.image_start, QWEN2_VL.image_end, QWEN2_VL.image_pad)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_IMAGE_TOKENS, "<|video_pad|>")
_PROMPT_TAGS = tuple([f"<|{name}_{end}|>" for name in ("utt_id", "img_id", "query") for end in ("start", "end")])
_UNKNOWN = "<|unknown|>"
_PUNCTUATION = ("[", "]", ", ", ",", ";", ":", " ", "\n", ".", "?", "!", "'")
_LARGEST_ID = 127
_HIDDEN_SIZE = 128

# Instructions and answer words of the tasks that the base model was pretrained on, see `tools/pretraining.py`.
PRETRAINING_TEXTS = {
    "lines": "which lines belong to the query",
    "picture": "which words go with the picture",
    "words": "which words go with",
    "repeat": "write once more",
    "answer": "utterances images none",
}


def _chat_template(family: ModelFamily) -> str:
    """As the family's own: ChatML, an image item becomes the vision tokens; a system message where there is none, or a
    thought before each answer, which `enable_thinking=False` keeps empty, and no messages without a user's."""
    start = json.dumps(family.answer_start)
    system = json.dumps(f"<|im_start|>system\n{family.default_system}<|im_end|>\n")
    default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system} }}}}{{% endif %}}"
    users = "messages | selectattr('role', 'equalto', 'user') | list"
    no_user = f"{{% if not {users} %}}{{{{ raise_exception('No user query found') }}}}{{% endif %}}"
    thought = f"{{{{ {start} if enable_thinking is defined and not enable_thinking else '<think>\\n' }}}}"
    return (
        f"{default if family.default_system else ''}{no_user if family.answer_start else ''}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {start} }}}}{{% endif %}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
        f"{family.image_text}"
        "{% elif item['type'] == 'video' or 'video' in item %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        f"{thought if family.answer_start else ''}{{% endif %}}"
    )


def build_tokenizer(family: ModelFamily = QWEN2_VL):  # type: ignore[no-untyped-def]  # a transformers class, imported late
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
    if family.answer_start:
        tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_chat_template(family),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": QWEN2_VL.image_pad, "video_token": "<|video_pad|>"},
    )


def _family_config(family: ModelFamily) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the text part and the vision tower of a family's configuration have beside those of the others."""
    tower = {"hidden_size": 64, "out_hidden_size": _HIDDEN_SIZE, "intermediate_size": 128}
    if family.name == "qwen2_vl":
        return {}, {"embed_dim": 64, "hidden_size": _HIDDEN_SIZE, "mlp_ratio": 2}
    if family.name == "qwen2_5_vl":
        return {}, {**tower, "fullatt_block_indexes": [1]}
    tower |= {"num_position_embeddings": 256}
    interleaved = {"mrope_interleaved": True}
    if family.name == "qwen3_vl":
        return {"head_dim": 32, "rope_parameters": interleaved}, {**tower, "deepstack_visual_indexes": [0]}
    if family.name == "qwen3_5":  # the first layers are linear attention
        text = {
            "head_dim": 64,
            "rope_parameters": {**interleaved, "mrope_section": [2, 3, 3]},  # a quarter of a head
            "mamba_ssm_dtype": "float32",  # as the published models': vLLM's CPU kernels take no other state
            "layer_types": ["linear_attention"] * 2 + ["full_attention"],
            **{f"linear_{kind}_head_dim": 32 for kind in ("key", "value")},
            **{f"linear_num_{kind}_heads": _HIDDEN_SIZE // 32 for kind in ("key", "value")},
        }
        return text, tower
    raise FFRError(f"no tiny model of {family.name} can be made: its configuration is not in base_model.py")


def write_base_model(output: Path, *, family: ModelFamily = QWEN2_VL, seed: int | None = None) -> Path:
    """Write model, tokenizer and processor to the folder `output` (replaced as a whole) and return it.

    The weights are the pretrained ones, of Qwen2-VL; with a `seed` they are random, of any dense family.
    """
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    tokenizer = build_tokenizer(family)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    text, tower = _family_config(family)
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [4, 6, 6],
        **text.pop("rope_parameters", {}),
    }
    config = AutoConfig.for_model(
        family.name,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _HIDDEN_SIZE,
            "intermediate_size": 3 * _HIDDEN_SIZE,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,  # of 32 channels: vLLM's CPU attention takes no smaller ones
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": rope,
            # With the default, 0.02, so small a model does not find the matching of query and utterance.
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "patch_size": family.patch_size,
            "spatial_merge_size": family.merge_size,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "initializer_range": 0.08,
            **tower,
        },
        image_token_id=ids[family.image_pad],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[family.image_start],
        vision_end_token_id=ids[family.image_end],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed or 0)
    model = AutoModelForImageTextToText.from_config(config)
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
    bounds = {"min_pixels": family.min_pixels, "max_pixels": DEFAULT_MAX_PIXELS}
    sizes = {"patch_size": family.patch_size, "merge_size": family.merge_size}
    processor = getattr(transformers, str(PROCESSOR_MAPPING_NAMES[family.name]))(
        image_processor=Qwen2VLImageProcessor(**bounds, **sizes),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, str(VIDEO_PROCESSOR_MAPPING_NAMES[family.name]))(**bounds, **sizes),
        chat_template=_chat_template(family),
    )
    with whole_folder(output) as temporary:
        for part in (model, processor, tokenizer):
            part.save_pretrained(temporary)
    return output
