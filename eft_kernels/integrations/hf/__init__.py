"""Emulated fine-tuning inside transformers' ``generate``."""

from .arguments import check_tokenizers, end_tokens
from .generate import EmulatedOutput, InvalidRowError, generate
from .models import cache_name, logits_width

__all__ = [
    "EmulatedOutput",
    "InvalidRowError",
    "cache_name",
    "check_tokenizers",
    "end_tokens",
    "generate",
    "logits_width",
]
