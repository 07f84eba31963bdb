"""The plain and the speculative decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .columns import Columns, Model
from .target import Target
from .text import Prompt, Scores, Text

OnTokens = Callable[[torch.Tensor, list[int]], None]  # new tokens [B, W] and how many of them each row keeps
Piece = TypeVar("Piece")
Whole = TypeVar("Whole")
NewTokens = Generator[tuple[torch.Tensor, list[int]], None, "Decoded"]  # the same, and the whole result in the end


@dataclass
class Speculation:
    """What speculation did, per row; int64 [B] on the CPU."""

    rounds: torch.Tensor  # in which the row was still being written
    drafted: torch.Tensor  # tokens proposed to it
    accepted: torch.Tensor  # of these, by the verifier
    emitted: torch.Tensor  # tokens of its text

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that was accepted, over all rows."""
        return float(self.accepted.sum() / self.drafted.sum().clamp(min=1))

    @property
    def tokens_per_round(self) -> float:
        """Tokens a row gained per round, over all rows."""
        return float(self.emitted.sum() / self.rounds.sum().clamp(min=1))


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

    def write(
        self,
        tokens: torch.Tensor,
        emitted: torch.Tensor,
        valid: torch.Tensor,
        raw: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> list[int]:
        """Appends up to W tokens a row ([B, W], raw and scores [B, W, V]) and returns how many each row kept."""
        seen = None
        if self.scores is not None and scores is not None:
            emit = torch.where(self.text.ended, 0, emitted)
            if self.text.prompt.criteria is not None:  # they may read the scores of the tokens they stop at
                self.scores.add(scores, self.length, emit.tolist())
                seen = self.scores.first
        taken = self.text.append(tokens, emitted, valid, seen)
        host: list[list[int]] = torch.stack([taken, self.text.ended.long()]).tolist()  # the round's one synchronisation
        kept, ended = host
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


def _layout(prompt: Prompt) -> tuple[Columns, torch.Tensor]:
    """The layout of the caches, without columns that are padding in every row, and the prompts to begin with."""
    longest = prompt.ids.shape[1] - prompt.left + prompt.max_new_tokens
    spare = int(prompt.left.min())
    return Columns(prompt.left - spare, longest - 1), prompt.readable()[:, spare:]


def plain(models: Sequence[Model], target: Target, prompt: Prompt, *, on_tokens: OnTokens | None = None) -> Decoded:
    """One token per row and step: J forwards, one `sample`.

    on_tokens(tokens [B, W], kept): called with the new tokens of every step and how many of them each row keeps.
    """
    return finished(plain_steps(models, target, prompt), on_tokens and (lambda new: on_tokens(*new)))


def speculative(
    models: Sequence[Model],
    target: Target,
    prompt: Prompt,
    *,
    draft: int,
    draft_tokens: int,
    method: str,
    on_tokens: OnTokens | None = None,
) -> Decoded:
    """Rounds of drafting by models[draft] and verification by all (Leviathan et al., arXiv 2211.17192).

    At the start of a round every cache holds each row's text but its newest token. The drafting model reads that
    and its own K drafts one by one, the others all K + 1 in one forward; the logits kept from drafting are the draft
    distribution and, unless their weight is 0, a term of the target. Then the caches drop what was rejected.

    method: "coupled", "token" or "block", see `eft_kernels.verify`.
    """
    rounds = speculative_rounds(models, target, prompt, draft=draft, draft_tokens=draft_tokens, method=method)
    return finished(rounds, on_tokens and (lambda new: on_tokens(*new)))


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
    columns, feed = _layout(prompt)
    while True:
        inputs = columns.inputs(feed.shape[1])
        logits = [model(feed, *inputs, 1)[:, -1] for model in models]  # J x [B, V_j]
        columns.width += feed.shape[1]
        tokens, valid, raw, scores = target.sample(logits, out.text, step)
        new = tokens[:, None]
        kept = out.write(new, valid.long(), valid, *(s if s is None else s[:, None] for s in (raw, scores)))
        if any(kept):
            yield new, kept
        if all(out.ended):
            return out.decoded()
        feed, step = new.clamp(min=0), step + 1


@torch.no_grad()
def speculative_rounds(
    models: Sequence[Model], target: Target, prompt: Prompt, *, draft: int, draft_tokens: int, method: str
) -> NewTokens:
    """`speculative` round by round, for a caller that takes the tokens as they come."""
    out = Writer(prompt, target, draft_tokens + 1)
    columns, feed = _layout(prompt)
    text, without_drafts = out.text, False
    together = not all(getattr(model, "can_realign", True) for model in models)
    rounds, drafted, accepted = (torch.zeros_like(text.length) for _ in range(3))
    while True:
        # K this round; a row near its end takes fewer, for one token more is emitted than accepted
        most, read = 1 if without_drafts else draft_tokens + 1, columns.width + feed.shape[1]
        reach = [0 if e else min(most, prompt.max_new_tokens - n) for n, e in zip(out.length, out.ended)]
        k = max(reach) - 1
        k = min([k, *(b - read for m in models if (b := getattr(m, "boundary", None)) and b >= read)])
        reach = [min(r, k + 1) for r in reach]
        lengths = (prompt.max_new_tokens - 1 - text.length).clamp(0, k).masked_fill(text.ended, 0)  # [B]

        start, step, alive = columns.width, feed, ~text.ended
        steps: list[torch.Tensor] = []  # logits [B, 1, V] each
        proposed: list[torch.Tensor] = []  # drafts [B] each
        for j in range(k + 1):
            steps.append(models[draft](step, *columns.inputs(step.shape[1]), 1))
            columns.width += step.shape[1]
            if j < k:
                tokens, valid = target.draft(steps[j][:, -1], text.length + j, j, method)
                alive = alive & valid  # a row's drafts end where the drafting model fails
                lengths = torch.where(alive, lengths, lengths.clamp(max=j))
                proposed.append(tokens.clamp(min=0))
                step = proposed[j][:, None]
        drafts = torch.stack(proposed, 1) if k else text.ids[:, :0]  # [B, K]
        columns.width = start
        ids = torch.cat([feed, drafts], 1)
        inputs = columns.inputs(ids.shape[1])
        logits = [
            torch.cat(steps, 1) if i == draft else model(ids, *inputs, k + 1) for i, model in enumerate(models)
        ]  # J x [B, K+1, V_j]
        columns.width += ids.shape[1]

        ver, raw, scores = target.verify(logits, text, drafts, lengths, reach, method, draft)
        # NaN at a draft reaches the slots before it through attention (0 * NaN), and their cached columns: a row is
        # invalid only if it is so without drafts, so a round without any follows
        suspect = ~ver.valid & (lengths > 0)
        if start == 0 and bool(suspect.any()):
            for model in models:
                model.crop(columns.width)
            columns.width, without_drafts = 0, True
            continue
        writing, emitted, valid = ~text.ended, ver.num_emitted, ver.valid | suspect
        if together:  # what a row has beyond the others is judged again: drafts of another slot, so with fresh noise
            least = emitted.masked_fill(text.ended, k + 1).min()
            valid, emitted = valid | (emitted > least), emitted.clamp(max=least)
        rounds += writing
        drafted += lengths
        accepted += torch.where(writing, torch.minimum(ver.num_emitted - ver.valid.long(), emitted), 0)
        kept = out.write(ver.tokens, emitted, valid, raw, scores)
        if any(kept):
            yield ver.tokens, kept
        if all(out.ended):
            stats = (rounds, drafted, accepted, text.length)
            return out.decoded(Speculation(*(s.cpu() for s in stats)))
        without_drafts = any(n == 0 and not e for n, e in zip(kept, out.ended))
        newest = torch.tensor(kept, device=drafts.device)[:, None]
        feed = torch.where(newest > 0, ver.tokens.gather(1, (newest - 1).clamp(min=0)).clamp(min=0), feed[:, -1:])
        # of the K + 1 columns from the round's first token on, a row keeps all but those after its newest token's
        columns.rollback(models, k + 1, kept, out.ended)
