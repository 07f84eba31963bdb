"""Decoding loops over models that give logits and keep a cache: torch only, no model library.

`plain` decodes one token a step, `speculative` drafts and verifies several a round (arXiv 2310.12962, section 3.4).
`Model` is what a model has to offer, `Target` what is sampled, `Prompt` where it starts and ends, `Drafts` what a round
of speculation has.
"""

from .columns import Columns, Model, NodeModel, OwnPrompt, take_columns
from .drafts import Auto, Drafts, Speculation
from .loops import Decoded, NewTokens, OnTokens, finished, plain, plain_steps
from .proposers import Proposer, lookup
from .rounds import speculative, speculative_rounds
from .target import Target, Value
from .text import Prompt, Text
from .trees import Tree

__all__ = [
    "Auto",
    "Columns",
    "Decoded",
    "Drafts",
    "Model",
    "NewTokens",
    "NodeModel",
    "OnTokens",
    "OwnPrompt",
    "Prompt",
    "Proposer",
    "Speculation",
    "Target",
    "Text",
    "Tree",
    "Value",
    "finished",
    "lookup",
    "plain",
    "plain_steps",
    "speculative",
    "speculative_rounds",
    "take_columns",
]
