"""What can be told of a model from the files of its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

__all__ = ["folder_revision", "has_chat_template"]


def folder_revision(folder: Path) -> str:
    """Tells versions of a local model apart: names and sizes of its files, and the content of the small ones."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}:".encode())
        if size < 2**20:
            digest.update(file.read_bytes())
    return f"folder-{digest.hexdigest()[:16]}"


def has_chat_template(folder: Path) -> bool:
    """Whether transformers finds a chat template there: in a file of its own, or in the tokenizer's or processor's."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    for name in ("tokenizer_config.json", "processor_config.json"):
        file = folder / name
        try:
            if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("chat_template"):
                return True
        except (ValueError, AttributeError):
            continue  # transformers tells what is wrong with the file
    return any((folder / "additional_chat_templates").glob("*.jinja"))
