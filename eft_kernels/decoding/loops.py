"""Decoding one token a step, and what every loop writes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .columns import Model
from .drafts import Speculation
from .readers import Batch, layout
from .target import Target
from .text import Prompt, Scores, Text

OnTokens = Callable[[torch.Tensor, list[int]], None]  # new tokens [B, W] and how many of them each row keeps
Piece = TypeVar("Piece")
Whole = TypeVar("Whole")
NewTokens = Generator[tuple[torch.Tensor, list[int]], None, "Decoded"]  # the same, and the whole result in the end


@dataclass
class Decoded:
    """The result of a loop: B rows, T steps of the longest."""

    sequences: torch.Tensor  # int64 [B, P + T]
    lengths: torch.Tensor  # int64 [B], new tokens per row
    failed: dict[int, int]  # row: the step (0 is the first new token) at which it became invalid
    logits: tuple[torch.Tensor, ...] | None  # T x [B, V] float32, emulated scores; 0 after a row's end
    scores: tuple[torch.Tensor, ...] | None  # T x [B, V] float32, processed; a point mass on padding after its end
    speculation: Speculation | None = None


class Steps:
    """Scores per step of the text, from slots that rows reach at different times."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []  # [B, V] each

    def add(self, slots: torch.Tensor, start: list[int], count: list[int]) -> None:
        """Slots [B, W, V]: row b's first count[b] belong to its steps from start[b] on."""
        spans = [(n, n + c) for n, c in zip(start, count) if c]
        for n in range(min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)):
            if n == len(self.steps):
                self.steps.append(slots.new_zeros(slots.shape[0], slots.shape[2]))
            rows = [b for b, (a, c) in enumerate(zip(start, count)) if a <= n < a + c]
            self.steps[n][rows] = slots[rows, [n - start[b] for b in rows]]

    def first(self, n: int) -> Scores:
        return tuple(self.steps[:n])

    def close(self, length: list[int], pad: int | None) -> Scores:
        """The steps; after a row's end a point mass on ``pad`` (None: zeros)."""
        self.steps = self.steps[: max(length)]
        for n, step in enumerate(self.steps):
            rows = [b for b, end in enumerate(length) if end <= n]
            step[rows] = 0.0 if pad is None else float("-inf")
            if pad is not None and 0 <= pad < step.shape[1]:
                step[rows, pad] = 0.0
        return tuple(self.steps)


class Writer:
    """The part both loops share: the text and what is recorded beside it."""

    def __init__(self, prompt: Prompt, target: Target, slots: int):
        self.text = Text(prompt, slots)
        self.logits = Steps() if target.keep_logits else None
        self.scores = Steps() if target.keep_scores else None
        self.length = [0] * prompt.ids.shape[0]  # the host's copy of text.length
        self.ended = [False] * prompt.ids.shape[0]
        self.suspects = False

    def write(
        self,
        tokens: torch.Tensor,
        emitted: torch.Tensor,
        valid: torch.Tensor,
        raw: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        suspect: torch.Tensor | None = None,
    ) -> list[int]:
        """Appends up to W tokens a row ([B, W], raw and scores [B, W, V]) and returns how many each row kept.

        suspect: bool [B]; ``suspects`` says on the host whether there is any.
        """
        seen = None
        if self.scores is not None and scores is not None:
            emit = torch.where(self.text.ended, 0, emitted)
            if self.text.prompt.criteria is not None:  # they may read the scores of the tokens they stop at
                self.scores.add(scores, self.length, emit.tolist())
                seen = self.scores.first
        taken = self.text.append(tokens, emitted, valid, seen)
        found = torch.zeros_like(taken) if suspect is None else suspect.long()
        # the round's one synchronisation
        host: list[list[int]] = torch.stack([taken, self.text.ended.long(), found]).tolist()
        kept, ended, suspects = host
        self.suspects = any(suspects)
        for record, slots in ((self.logits, raw), (self.scores, scores)):
            if record is not None and slots is not None:
                record.add(slots, self.length, kept)
        self.length = [n + k for n, k in zip(self.length, kept)]
        self.ended = [bool(e) for e in ended]
        return kept

    def decoded(self, speculation: Speculation | None = None) -> Decoded:
        steps = max(self.length)
        failed = {b: n for b, n in enumerate(self.text.failed.tolist()) if n >= 0}
        logits = None if self.logits is None else self.logits.close(self.length, None)
        scores = None if self.scores is None else self.scores.close(self.length, self.text.prompt.pad)
        return Decoded(self.text.prefix(steps), self.text.length, failed, logits, scores, speculation)


def plain(models: Sequence[Model], target: Target, prompt: Prompt, *, on_tokens: OnTokens | None = None) -> Decoded:
    """One token per row and step: J forwards, one `sample`.

    on_tokens(tokens [B, W], kept): called with the new tokens of every step and how many of them each row keeps.
    """
    return finished(plain_steps(models, target, prompt), on_tokens and (lambda new: on_tokens(*new)))


def finished(steps: Generator[Piece, None, Whole], on_piece: Callable[[Piece], object] | None) -> Whole:
    """What a generator returns in the end; ``on_piece`` is called with each of what it yields."""
    while True:
        try:
            piece = next(steps)
        except StopIteration as end:
            whole: Whole = end.value
            return whole
        if on_piece is not None:
            on_piece(piece)


@torch.no_grad()
def plain_steps(models: Sequence[Model], target: Target, prompt: Prompt) -> NewTokens:
    """`plain` step by step, for a caller that takes the tokens as they come."""
    out, step = Writer(prompt, target, 1), 0
    columns, feed = layout(prompt)
    batch = Batch(models, len(feed), feed.device)
    while True:
        inputs = columns.inputs(feed.shape[1])
        logits = [batch.back(model(batch.of(feed), *inputs, 1)[:, -1]) for model in models]  # J x [B, V_j]
        columns.width += feed.shape[1]
        tokens, valid, raw, scores = target.sample(logits, out.text, step)
        new = tokens[:, None]
        kept = out.write(new, valid.long(), valid, *(s if s is None else s[:, None] for s in (raw, scores)))
        if any(kept):
            yield new, kept
        if all(out.ended):
            return out.decoded()
        feed, step = new.clamp(min=0), step + 1
        if (stay := batch.shrink(out.ended)) is not None:
            columns.take_rows(stay)
            for model in models:
                model.take_rows(stay)  # type: ignore[attr-defined]
