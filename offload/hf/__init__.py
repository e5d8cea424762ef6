"""Hugging Face: import of model directories. Reading is in `source`, building in `model`."""

from __future__ import annotations

from .model import load_tokenizer, open_pretrained
from .source import PretrainedSource

__all__ = ["PretrainedSource", "load_tokenizer", "open_pretrained"]
