"""How many drafts a round has, and what became of them."""

from __future__ import annotations

import torch

from .trees import Tree, best, chain, size

# Shares in which a token is the draft's winner, its first runner-up, ...: what is assumed before any was seen, and the
# number of tokens that this counts for.
BEFORE, WEIGHT = (0.6, 0.15, 0.07, 0.04, 0.03, 0.02), 8


class Ranks:
    """How often the token after d accepted drafts was the draft's winner, its first runner-up, and so on."""

    def __init__(self, depth: int, width: int, device: torch.device):
        # [K, 1 + W] of all rows; the last column: none of those drawn
        self.counts = torch.zeros(depth, width + 1, dtype=torch.int64, device=device)

    def add(self, depth: int, drawn: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor) -> None:
        """drawn: int64 [B, W]; tokens: int64 [B], what the text got there; seen: bool [B], rows that count."""
        same = drawn == tokens[:, None]
        rank = torch.where(same.any(1), same.int().argmax(1), self.counts.shape[1] - 1)
        self.counts[depth].index_add_(0, rank, seen.long())

    def chances(self) -> list[list[float]]:
        """[K][W]: estimates of these shares, not rising with the rank."""
        counts = self.counts.double().cpu()
        width = counts.shape[1] - 1
        before = torch.tensor([*BEFORE, *[BEFORE[-1]] * width][:width], dtype=torch.float64)
        of_all = (WEIGHT * before + counts.sum(0)[:width]) / (WEIGHT + counts.sum())
        own = (2 * WEIGHT * of_all + counts[:, :width]) / (2 * WEIGHT + counts.sum(1, keepdim=True))
        found: list[list[float]] = own.cummin(1).values.tolist()
        return found


class Drafts:
    """Drafts of a fixed shape, or of a fixed number placed where most are expected to be accepted.

    Args:
      depth: K, how many follow each other.
      width: children of a slot: the winner of its draw and width - 1 runners-up. 1: a chain.
      budget: the most drafts a round (None: a whole tree).
    """

    def __init__(self, depth: int, width: int = 1, budget: int | None = None):
        self.depth, self.width = depth, width
        self.budget = size(depth, width) if budget is None else min(budget, size(depth, width))
        self.drawn = width  # tokens of a draw
        self.rounds = 0
        self.shape = chain(depth) if width == 1 else Tree(())

    def begin(self, device: torch.device) -> None:
        """A new text, on ``device``."""
        self.ranks = Ranks(self.depth, self.drawn, device)
        self.rounds = 0

    def tree(self, depth: int) -> Tree:
        """The next round's drafts, at most ``depth`` after each other."""
        # a new shape each time that twice as much is known, so that there are few of them
        if self.width > 1 and self.rounds & (self.rounds - 1) == 0:
            self.shape = best(self.depth, self.width, self.budget, self.ranks.chances())
        self.rounds += 1
        return self.shape.cut(depth)
