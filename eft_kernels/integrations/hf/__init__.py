"""Emulated fine-tuning inside transformers' ``generate``, and as one model of transformers."""

from .arguments import check_tokenizers, end_of_turn, end_tokens
from .cache import EmulatedCache
from .emulated import EmulatedModel
from .generate import EmulatedOutput, InvalidRowError, generate
from .models import cache_name, logits_width

__all__ = [
    "EmulatedCache",
    "EmulatedModel",
    "EmulatedOutput",
    "InvalidRowError",
    "cache_name",
    "check_tokenizers",
    "end_of_turn",
    "end_tokens",
    "generate",
    "logits_width",
]
