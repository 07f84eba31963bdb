"""The texts of a batch as they grow: what was emitted, and which rows have ended and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Scores = tuple[torch.Tensor, ...]  # float32 [B, V] of each step so far
Criteria = Callable[[torch.Tensor, Scores | None], torch.Tensor]


@dataclass
class Prompt:
    """Left-padded prompts and the rules that end a row. B rows of P columns."""

    ids: torch.Tensor  # int64 [B, P]
    left: torch.Tensor  # int64 [B], columns of padding before each row's prompt
    max_new_tokens: int
    eos: list[int] = field(default_factory=list)  # a row ends after any of these
    pad: int = 0  # fills a row after its end
    known: int = 0  # padding below this is given to the models as it is, the rest as id 0
    # criteria(ids [B, P + n], scores so far) -> bool [B]: whether each row ends with its newest token
    criteria: Callable[[torch.Tensor, tuple[torch.Tensor, ...] | None], torch.Tensor] | None = None

    def readable(self) -> torch.Tensor:
        """ids with 0 where padding has an id that a model may not know."""
        padding = torch.arange(self.ids.shape[1], device=self.ids.device) < self.left[:, None]
        return self.ids.masked_fill(padding & ((self.ids < 0) | (self.ids >= self.known)), 0)


class Text:
    """Prompts followed by new tokens: row b's lie in columns P .. P + length[b] - 1 of ``ids``, then padding."""

    def __init__(self, prompt: Prompt, slots: int):
        self.prompt, self.start = prompt, prompt.ids.shape[1]
        rows = prompt.ids.shape[0]
        new = prompt.ids.new_full((rows, prompt.max_new_tokens + slots), prompt.pad)
        self.ids = torch.cat([prompt.ids, new], 1)  # [B, P + max_new_tokens + slots]
        self.length = prompt.ids.new_zeros(rows)  # [B], new tokens
        self.ended = torch.zeros(rows, dtype=torch.bool, device=prompt.ids.device)
        self.failed = prompt.ids.new_full((rows,), -1)  # [B], the step at which a row became invalid
        self.eos = torch.tensor(prompt.eos, dtype=torch.int64, device=prompt.ids.device)

    def prefix(self, n: int) -> torch.Tensor:
        """ids [B, P + n] as plain decoding holds them after n steps."""
        return self.ids[:, : self.start + n].contiguous()

    def rows(self) -> list[torch.Tensor]:
        """The ids of each row on the CPU, int64 [n], without padding."""
        spans = zip(self.prompt.left.tolist(), (self.start + self.length).tolist())
        return [row[a:b] for row, (a, b) in zip(self.ids.cpu(), spans)]

    def put(self, tokens: torch.Tensor, there: torch.Tensor) -> None:
        """Writes tokens [B, W] after each row's text where ``there`` [B, W], padding elsewhere; lengths stay."""
        columns = self.start + self.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.ids.scatter_(1, columns, torch.where(there, tokens, self.prompt.pad))

    def append(
        self,
        tokens: torch.Tensor,
        emitted: torch.Tensor,
        valid: torch.Tensor,
        scores: Callable[[int], Scores] | None = None,
    ) -> torch.Tensor:
        """Adds the first ``emitted[b]`` of tokens [B, W] to each row, up to the one that ends it.

        Rows that are not ``valid`` [B] end after their emitted tokens, marked in ``failed``. ``scores(n)`` gives the
        criteria's second argument for n steps. Returns how many tokens each row took, [B]; 0 once ended.
        """
        slots = torch.arange(tokens.shape[1], device=tokens.device)
        new = slots < torch.where(self.ended, 0, emitted)[:, None]  # [B, W]
        ends = torch.isin(tokens, self.eos) | (self.length[:, None] + slots + 1 >= self.prompt.max_new_tokens)
        if self.prompt.criteria is not None:
            self.put(tokens, new)
            ends |= self._stops_at(self.prompt.criteria, new, scores)
        ends &= new
        stops = ends.any(1)
        kept = torch.where(stops, ends.long().argmax(1) + 1, new.sum(1))
        self.put(tokens, slots < kept[:, None])
        failed = ~(valid | self.ended | stops)
        self.length = self.length + kept
        self.failed = torch.where(failed, self.length, self.failed)
        self.ended = self.ended | stops | failed
        return kept

    def _stops_at(self, criteria: Criteria, new: torch.Tensor, scores: Callable[[int], Scores] | None) -> torch.Tensor:
        """Which new tokens end their row, by their own prefixes: one call per length that occurs. bool [B, W]."""
        ends, count = torch.zeros_like(new), new.sum(1)
        lengths = [(a, a + c) for a, c in zip(self.length.tolist(), count.tolist()) if c]
        for n in range(min((a for a, _ in lengths), default=0) + 1, max((b for _, b in lengths), default=0) + 1):
            slot = n - 1 - self.length  # [B], the slot whose prefix has n new tokens
            here = (slot >= 0) & (slot < count)
            if not bool(here.any()):
                continue
            done = criteria(self.prefix(n), scores(n) if scores else None).to(ends.device)
            ends |= (here & done)[:, None] & (torch.arange(new.shape[1], device=new.device) == slot[:, None])
        return ends
