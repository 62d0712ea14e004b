"""How long a prompt is for a model, without its processor: text tokens of a tokenizer, image tokens from sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffr_verl.dialogues import IMAGE
from ffr_verl.errors import FFRError, first_line
from ffr_verl.model_families import family_of_model

# Of Qwen's vocabulary on English and Chinese dialogues, where the tags of the wire format are plain text.
_BYTES_OF_A_TOKEN, _BYTES_OF_A_TAG, _TOKENS_OF_A_TAG, _TOKENS_OF_A_MESSAGE = 3.5, 15, 6.7, 5


def estimated_tokens(messages: Sequence[Mapping[str, Any]], image_tokens: Sequence[int]) -> int:
    """About how many tokens a prompt has for a Qwen model, from its length; `PromptTokens` counts them.

    Args:
        messages: of the prompt, texts with `<image>` where an image stands.
        image_tokens: of each image, see `image_tokens`.

    Example:
        >>> estimated_tokens([{"role": "user", "content": "where do they talk about the garden?"}], [64])
        84
    """
    tags = size = 0
    for message in messages:
        text = message["content"]
        tags += text.count("<|")
        size += len(text) if text.isascii() else len(text.encode(errors="replace"))
    words = (size - _BYTES_OF_A_TAG * tags) / _BYTES_OF_A_TOKEN + _TOKENS_OF_A_TAG * tags
    return round(words) + _TOKENS_OF_A_MESSAGE * (len(messages) + 1) + sum(image_tokens)


class PromptTokens:
    """Counts the tokens of prompts.

    Args:
        tokenizer: a model's folder, a `tokenizer.json`, or the name of a hub model (which is fetched).
        model_family: of the model, when it is not the one that its folder tells.

    Attributes:
        family: of the model, for its chat format and the sizes of images.

    Raises:
        FFRError: when the package `tokenizers` is missing, the tokenizer cannot be read, or there is no such family.
    """

    def __init__(self, tokenizer: str, *, model_family: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise FFRError("--tokenizer needs the package tokenizers: pip install tokenizers") from None
        path = Path(tokenizer).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._tokenizer = Tokenizer.from_file(str(file)) if path.exists() else Tokenizer.from_pretrained(tokenizer)
        except Exception as error:  # noqa: BLE001  # the package raises plain Exception
            raise FFRError(
                f"--tokenizer {tokenizer}: {first_line(error)}; give a model's folder, a tokenizer.json or a hub model"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.family = family_of_model(tokenizer, name=model_family)

    def count(self, messages: Sequence[Mapping[str, Any]], image_tokens: Sequence[int]) -> int:
        """Tokens of a prompt in the family's chat format, the start of the answer included.

        Args:
            messages: of the prompt, texts with `<image>` where an image stands.
            image_tokens: of each image, see `image_tokens`.
        """
        system = self.family.default_system
        if system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": system}, *messages]
        text = "".join([f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages])
        text = text.replace(IMAGE, self.family.image_text) + f"<|im_start|>assistant\n{self.family.answer_start}"
        return len(self._tokenizer.encode(text, add_special_tokens=False)) + sum(image_tokens) - len(image_tokens)
