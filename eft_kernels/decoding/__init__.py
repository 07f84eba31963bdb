"""Decoding loops over models that give logits and keep a cache: torch only, no model library.

`plain` decodes one token a step, `speculative` drafts and verifies several a round (arXiv 2310.12962, section 3.4).
`Model` is what a model has to offer, `Target` what is sampled, `Prompt` where it starts and ends.
"""

from .columns import Columns, Model, OwnPrompt, take_columns
from .loops import Decoded, OnTokens, Speculation, plain, speculative
from .target import Target, Value
from .text import Prompt, Text

__all__ = [
    "Columns",
    "Decoded",
    "Model",
    "OnTokens",
    "OwnPrompt",
    "Prompt",
    "Speculation",
    "Target",
    "Text",
    "Value",
    "plain",
    "speculative",
    "take_columns",
]
