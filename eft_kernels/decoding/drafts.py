"""How many drafts a round has, and what became of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from ..checks import index
from ..parameters import MAX_RUNNERS_UP
from .times import ENOUGH, Clock
from .trees import Tree, best, chain, likeliest, size

MAX_DRAFTS = 1024  # a round
# A prior: shares in which a token is the draft's winner, its first runner-up, ..., and how many tokens it counts for.
PRIOR = (0.6, 0.15, 0.07, 0.04, 0.03, 0.02)
PRIOR_TOKENS = 8


class Ranks:
    """How often the token after d accepted drafts was the draft's winner, its first runner-up, and so on."""

    def __init__(self, depth: int, width: int, device: torch.device, earlier: torch.Tensor | None = None):
        # [K, 1 + W] of all rows; the last column: none of those drawn
        self.counts = torch.zeros(depth, width + 1, dtype=torch.int64, device=device)
        # float64 [K, 1 + W], what was counted for earlier texts
        self.earlier = torch.zeros(depth, width + 1, dtype=torch.float64) if earlier is None else earlier

    def add(self, depth: int, drawn: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor) -> None:
        """drawn: int64 [B, W]; tokens: int64 [B], what the text got there; seen: bool [B], rows that count."""
        same = drawn == tokens[:, None]
        rank = torch.where(same.any(1), same.int().argmax(1), self.counts.shape[1] - 1)
        self.counts[depth].index_add_(0, rank, seen.long())

    def weighted(self) -> torch.Tensor:
        """float64 [K, 1 + W] on the CPU; earlier texts count for less than this one."""
        return self.counts.double().cpu() + self.earlier / 2

    def chances(self) -> list[list[float]]:
        """[K][W]: estimates of these shares, not rising with the rank."""
        counts = self.weighted()
        width = counts.shape[1] - 1
        prior = torch.tensor([*PRIOR, *[PRIOR[-1]] * width][:width], dtype=torch.float64)
        of_all = (PRIOR_TOKENS * prior + counts.sum(0)[:width]) / (PRIOR_TOKENS + counts.sum())
        # a depth's own share, with that of all depths for its prior
        own = (2 * PRIOR_TOKENS * of_all + counts[:, :width]) / (2 * PRIOR_TOKENS + counts.sum(1, keepdim=True))
        found: list[list[float]] = own.cummin(1).values.tolist()
        return found


class Drafts:
    """Drafts of a fixed shape, or of a fixed number placed where most are expected to be accepted.

    Args:
      depth: K, how many follow each other.
      width: children of a slot: the winner of its draw and width - 1 runners-up. 1: a chain.
      budget: the most drafts a round, K or more, so that there is room for a chain of K (None: a whole tree).

    Raises: ValueError naming the argument.
    """

    def __init__(self, depth: int, width: int = 1, budget: int | None = None):
        depth = index("depth", depth, 0, MAX_DRAFTS, f"0 to {MAX_DRAFTS}")
        width = index("width", width, 1, MAX_RUNNERS_UP + 1, f"1 to {MAX_RUNNERS_UP + 1}")
        if budget is not None:
            budget = index("budget", budget, max(depth, 1), MAX_DRAFTS, f"{max(depth, 1)} to {MAX_DRAFTS}")
        elif size(depth, width, MAX_DRAFTS) > MAX_DRAFTS:
            raise ValueError(f"width: got {width} with depth {depth}, more than {MAX_DRAFTS} drafts; give a budget")
        self.depth, self.width = depth, width
        most = sys.maxsize if budget is None else budget
        self.budget = min(most, size(depth, width, most))
        self.clock = Clock(0)
        self.expected: float | None = None  # how many times as fast as without drafts the newest shape should be
        self.probing = False  # draw even where no drafts follow, to count how often they would be accepted

    def begin(self, models: int, draft: int | None, rows_in_step: int, device: torch.device) -> None:
        """A new text, of J models, of which that of index ``draft`` drafts (None: no model does).

        rows_in_step: so many rows keep as many tokens each.
        """
        self.ranks = Ranks(self.depth, self.width, device)
        self.clock = Clock(models)
        self.clock.begin(device)
        self.rounds = 0
        self.shape = chain(self.depth) if self.width == 1 else Tree(())

    def tree(self, depth: int) -> Tree:
        """The next round's drafts, at most ``depth`` after each other."""
        # a new shape each time that twice as much is known, so that there are few of them
        if self.width > 1 and self.rounds & (self.rounds - 1) == 0:
            self.shape = best(self.depth, self.width, self.budget, self.ranks.chances())
        self.rounds += 1
        return self.shape.cut(depth)


class Auto(Drafts):
    """The number and shape of drafts that should give the most tokens a second.

    That follows from the shares of accepted drafts and the times of passes, both measured while it decodes. A larger
    round than any so far is tried where the line through the known times says that it gains. One object may serve
    several texts, one after the other, and begins each with what it knows; it is for one batch size. Its arguments are
    the most that it may choose.
    """

    # rounds without drafts that the first text begins with, and after how many rounds there is another
    PLAIN, AGAIN = ENOUGH, 128
    # after how many rounds times that were seen too few times are forgotten: then, and each time twice as many
    FORGET = 32
    # tokens of the first pass that is tried beside those over one
    FIRST = 4
    # what must be gained, as a factor: less is within what times vary by
    GAIN = 1.03

    def __init__(self, depth: int = 12, width: int = 4, budget: int = 32):
        super().__init__(min(depth, budget), width, budget)
        self.earlier: Ranks | None = None  # of the text before
        self.expected = 1.0

    def begin(self, models: int, draft: int | None, rows_in_step: int, device: torch.device) -> None:
        self.ranks = Ranks(self.depth, self.width, device, None if self.earlier is None else self.earlier.weighted())
        self.clock = Clock(models) if self.earlier is None else self.clock
        self.clock.begin(device)
        self.earlier = self.ranks
        self.forget_at = self.FORGET
        self.draft, self.rows_in_step, self.rounds, self.next = draft, rows_in_step, 0, 0
        self.shape = chain(0)

    def tree(self, depth: int) -> Tree:
        self.rounds += 1
        plain = len(self.clock.outside.seen.get(0, ())) < self.PLAIN or self.rounds % self.AGAIN == 0
        if not plain and self.rounds >= self.next:
            if self.rounds >= self.forget_at:
                self.clock.forget()
                self.forget_at = 2 * self.rounds
            self.shape = self._fastest()
            self.next = self.rounds + max(1, self.rounds // 4)
        shape = chain(0) if plain else self.shape.cut(depth)
        # without drafts a draw, now and then, tells how many would be accepted
        self.probing = len(shape) == 0 and (self.rounds < 8 or self.rounds % 8 == 0)
        return shape

    def _fastest(self) -> Tree:
        chances = [[c**self.rows_in_step for c in row] for row in self.ranks.chances()]
        verifying = [t for j, t in enumerate(self.clock.of_model) if j != self.draft]
        # the largest that is tried: four tokens at first, for two may take longer than four do, then twice the last
        most = min(self.budget, *(max(self.FIRST - 1, 2 * max(t.seen)) for t in verifying))
        together = [sum(t.at(n + 1) for t in verifying) for n in range(most + 1)]
        own = [0.0] * (most + 1)  # a level of n drafts
        if self.draft is not None:
            own = [self.clock.of_model[self.draft].at(n) for n in range(most + 1)]
        plain = together[0] + own[1] + self.clock.outside.at(0)
        fastest, found = self.GAIN / plain, (0, 0)
        for depth in range(1, min(self.depth, most) + 1):
            beside = own[1] + self.clock.outside.at(depth)
            levels, tokens = [0] * depth, 1.0
            for n, (node, likely) in zip(range(1, most + 1), likeliest(depth, self.width, chances)):
                levels[len(node) - 1] += 1
                tokens += likely
                speed = tokens / (together[n] + beside + sum(own[m] for m in levels))
                if levels[-1] and speed > fastest:
                    fastest, found = speed, (depth, n)
        self.expected = fastest * plain if found[0] else 1.0
        return best(found[0], self.width, found[1], chances)


@dataclass
class Speculation:
    """What speculation did, per row; int64 [B] on the CPU. The pass over the prompt is a round without drafts."""

    rounds: torch.Tensor  # in which the row was still being written
    drafted: torch.Tensor  # tokens proposed to it
    accepted: torch.Tensor  # of these, the ones in its text
    emitted: torch.Tensor  # tokens of its text
    # int64 [K, 1 + width] of all rows: how often, after as many accepted drafts, the token was the draft's winner, its
    # first runner-up, ...; the last column: none of those drawn
    ranks: torch.Tensor
    seconds: tuple[float, ...]  # in passes of each model after the prompt, and outside of all of them
    plain_seconds: float | None  # of a round without drafts; None where there were too few
    expected: float | None  # how many times as fast as without drafts the chosen drafts are expected to be ("auto")

    @property
    def speedup(self) -> float | None:
        """How many times as fast as rounds without drafts the text was written, after its first token."""
        steps, seconds = int(self.emitted.max()) - 1, sum(self.seconds)
        return self.plain_seconds * steps / seconds if self.plain_seconds and seconds else None

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that was accepted, over all rows."""
        return float(self.accepted.sum() / self.drafted.sum().clamp(min=1))

    @property
    def tokens_per_round(self) -> float:
        """Tokens a row gained per round, over all rows."""
        return float(self.emitted.sum() / self.rounds.sum().clamp(min=1))
