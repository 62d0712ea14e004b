"""Telling versions of a model in a local folder apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["folder_revision"]


def folder_revision(folder: Path) -> str:
    """Tells versions of a local model apart: names and sizes of its files, and the content of the small ones."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}:".encode())
        if size < 2**20:
            digest.update(file.read_bytes())
    return f"folder-{digest.hexdigest()[:16]}"
