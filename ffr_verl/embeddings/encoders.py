"""Encoders: any model of sentence-transformers 6, for texts and, where it can, for images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffr_verl.errors import FFRError, first_line, install_extra
from ffr_verl.images import open_picture
from ffr_verl.model_families import folder_revision, is_absent


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """Which model, and how it is run; see the options of `ffr-verl embed`."""

    model: str
    revision: str | None = None
    device: str | None = None
    batch_size: int = 64
    normalize: bool = True
    trust_remote_code: bool = False


class SentenceEncoder:
    """A loaded model; `FFRError` when sentence-transformers is missing or the model cannot be loaded."""

    def __init__(self, settings: EncoderSettings) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise FFRError(
                f"sentence-transformers is not installed: {install_extra('embed')}, into this environment or one "
                "of its own (docs/embeddings.md)"
            ) from None
        folder = Path(settings.model).expanduser()
        if is_absent(settings.model):
            raise FFRError(f"--model {settings.model}: no such folder")
        try:
            self._model = SentenceTransformer(
                str(folder) if folder.is_dir() else settings.model,
                revision=settings.revision,
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            where = f" on --device {settings.device}" if settings.device is not None else ""
            raise FFRError(
                f"--model {settings.model}: cannot be loaded{where}: {first_line(error)} (give a folder or the hub "
                "name of a sentence-transformers model, and a device that is here)"
            ) from None
        self._settings = settings
        found = getattr(self._model.model_card_data, "base_model_revision", None)
        of_hub = str(found) if found else None
        self.revision = settings.revision or (folder_revision(folder) if folder.is_dir() else of_hub)

    @property
    def takes_images(self) -> bool:
        """Whether images can be given to this model."""
        return bool(self._model.supports("image"))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, shape `(len(texts), dimension)`, float32."""
        # As {"text": ...}: a bare text that looks like the address or path of a picture would be fetched or opened.
        return self._encode([{"text": text} for text in texts])

    def encode_images(self, paths: Sequence[Path]) -> np.ndarray:
        """Vectors of image files, shape `(len(paths), dimension)`, float32."""
        blocks = []
        for start in range(0, len(paths), self._settings.batch_size):
            images = []
            for path in paths[start : start + self._settings.batch_size]:
                try:
                    images.append({"image": open_picture(path)})
                except ValueError as error:
                    raise FFRError(f"{path}: {error}; replace the image") from None
            blocks.append(self._encode(images))
        return np.concatenate(blocks)

    def _encode(self, items: list[Any]) -> np.ndarray:
        vectors = self._model.encode(
            items,
            batch_size=self._settings.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=self._settings.normalize,
        )
        return np.asarray(vectors, dtype=np.float32)
