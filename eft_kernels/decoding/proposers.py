"""Drafts that no model draws: any function of the text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# propose(texts, k): drafts int64 [B, k], -1 from where a row has none, for texts int64 [n] each, on the CPU, unpadded
Proposer = Callable[[Sequence[torch.Tensor], int], torch.Tensor]


def lookup(longest: int = 3) -> Proposer:
    """Prompt lookup: what followed the last time that a text had its newest tokens, at most ``longest`` of them.

    Saxena, "Prompt Lookup Decoding", 2023.
    """

    def propose(texts: Sequence[torch.Tensor], k: int) -> torch.Tensor:
        drafts = torch.full((len(texts), k), -1, dtype=torch.int64)
        for b, text in enumerate(texts):
            found = _after_last(text, longest)[:k]
            drafts[b, : len(found)] = found
        return drafts

    return propose


def _after_last(text: torch.Tensor, longest: int) -> torch.Tensor:
    """What follows the last earlier occurrence of the longest suffix of ``text`` that has one."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        earlier = text[:-1].unfold(0, n, 1)  # [len - n, n]
        starts = (earlier == text[-n:]).all(1).nonzero()
        if len(starts):
            return text[int(starts[-1]) + n :]
    return text[:0]
