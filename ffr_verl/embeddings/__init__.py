"""Vectors of utterances, images and queries for the rewards coherence and relevance: the store, and the encoders that
fill it.

Light: importing it loads neither torch nor sentence-transformers.
"""

from __future__ import annotations

from ffr_verl.embeddings.store import EmbeddingStore, StoreManifest, image_key, query_key, utterance_key, write_store

__all__ = ["EmbeddingStore", "StoreManifest", "image_key", "query_key", "utterance_key", "write_store"]
