"""The plain and the speculative decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .columns import Model
from .drafts import Drafts, Ranks
from .readers import layout, reader_of
from .target import Target
from .text import Prompt, Scores, Text
from .times import Clock
from .trees import Tree, chain

OnTokens = Callable[[torch.Tensor, list[int]], None]  # new tokens [B, W] and how many of them each row keeps
Read = Callable[[torch.Tensor, Tree, range, torch.Tensor], torch.Tensor]  # see `Reader.read`
Piece = TypeVar("Piece")
Whole = TypeVar("Whole")
NewTokens = Generator[tuple[torch.Tensor, list[int]], None, "Decoded"]  # the same, and the whole result in the end


@dataclass
class Speculation:
    """What speculation did, per row; int64 [B] on the CPU. The pass over the prompt is a round without drafts."""

    rounds: torch.Tensor  # in which the row was still being written
    drafted: torch.Tensor  # tokens proposed to it
    accepted: torch.Tensor  # of these, by the verifier
    emitted: torch.Tensor  # tokens of its text
    # int64 [K, 1 + width] of all rows: how often, after as many accepted drafts, the token was the draft's winner, its
    # first runner-up, ...; the last column: none of those drawn
    ranks: torch.Tensor
    seconds: tuple[float, ...]  # in passes of each model after the prompt, and outside of all of them
    plain_seconds: float | None  # of a round without drafts; None where there was none
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


def speculative(
    models: Sequence[Model],
    target: Target,
    prompt: Prompt,
    *,
    draft: int,
    drafts: Drafts,
    method: str,
    on_tokens: OnTokens | None = None,
) -> Decoded:
    """Rounds of drafting by models[draft] and verification by all (Leviathan et al., arXiv 2211.17192).

    At the start of a round every cache holds each row's text but its newest token. The drafting model reads that
    and its own drafts level by level, the others all of them in one forward; the logits kept from drafting are the
    draft distribution and, unless their weight is 0, a term of the target. Then the caches drop what was rejected.

    drafts: how many, see `Drafts`. method: "coupled", "token" or "block", see `eft_kernels.verify`.
    """
    rounds = speculative_rounds(models, target, prompt, draft=draft, drafts=drafts, method=method)
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
    columns, feed = layout(prompt)
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


class Round:
    """A tree of drafts and what was drawn for it."""

    def __init__(self, tree: Tree, feed: torch.Tensor):
        self.tree, self.feed = tree, feed
        self.tokens = feed[:, :0]  # int64 [B, N], -1: there is none
        # of each depth: the slots that were drawn from, and the draws int64 [B, E, W]
        self.draws: list[tuple[list[int], torch.Tensor]] = []
        self.left = torch.zeros_like(feed[:, 0])  # [B], drafts that each row may have after each other
        self.begun = False  # nodes were read

    @property
    def lengths(self) -> torch.Tensor:
        """Drafts of each row, [B]; those of a chain come first."""
        return (self.tokens >= 0).sum(1)

    def draw(self, read: Read, target: Target, text: Text, left: torch.Tensor, method: str, width: int) -> torch.Tensor:
        """Drafts level by level, from the first ``width`` tokens of each draw; the drafting model's logits [B, N+1, V]
        of all slots."""
        self.begun, self.left, tree = True, left, self.tree
        steps, level = [], self.feed
        alive = ~text.ended[:, None]  # [B, n], of the level's slots
        for depth, slots in enumerate(tree.levels):
            steps.append(read(level.clamp(min=0), tree, slots, left))
            if depth == len(tree.levels) - 1:
                break
            children = tree.levels[depth + 1]
            parents = tree.parents[children.start - 1 : children.stop - 1]
            inner = sorted(set(parents))
            drawn, valid = self._drawn(
                steps[-1][:, [s - slots.start for s in inner]], inner, target, text, method, width
            )
            place, rank = [inner.index(p) for p in parents], list(tree.ranks[children.start : children.stop])
            alive = (alive[:, [p - slots.start for p in parents]] & valid[:, place]) & (depth < left)[:, None]
            level = torch.where(alive, drawn[:, place, rank], -1)
            alive = level >= 0
            self.tokens = torch.cat([self.tokens, level], 1)
        return torch.cat(steps, 1)

    def look(self, logits: torch.Tensor, target: Target, text: Text, left: torch.Tensor, width: int) -> None:
        """Without drafts: draws from the drafting model's logits [B, 1, V] only to count them."""
        self._drawn(logits, [0], target, text, "coupled", width)

    def _drawn(
        self, logits: torch.Tensor, slots: list[int], target: Target, text: Text, method: str, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        depth = len(self.draws)
        drawn, valid = target.draft(logits, text.length + depth, depth, method, width - 1)
        self.draws.append((slots, drawn))
        return drawn, valid

    def count(
        self,
        ranks: Ranks,
        tokens: torch.Tensor,
        path: torch.Tensor | None,
        hits: torch.Tensor,
        writing: torch.Tensor,
        method: str,
    ) -> None:
        """Adds to ``ranks`` what became of the draws at the slots on the path.

        tokens: int64 [B, K+1], what was drawn there from the target; hits: int64 [B], drafts accepted.
        """
        for depth, (slots, drawn) in enumerate(self.draws):
            seen = writing & (hits >= depth) & (depth < self.left)
            if method != "coupled":  # drawn with other noise than the target's: not the same token need be accepted
                ranks.add(depth, drawn[:, 0], torch.where(hits > depth, drawn[:, 0, 0], -2), seen)
                continue
            slot = path[:, depth] if path is not None else torch.full_like(hits, depth)
            at = slot[:, None] == torch.tensor(slots, device=slot.device)  # [B, E]
            own = drawn[torch.arange(len(drawn), device=slot.device), at.int().argmax(1)]  # [B, W]
            ranks.add(depth, own, tokens[:, depth], seen & at.any(1) & (own[:, 0] >= 0))


@torch.no_grad()
def speculative_rounds(
    models: Sequence[Model], target: Target, prompt: Prompt, *, draft: int, drafts: Drafts, method: str
) -> NewTokens:
    """`speculative` round by round, for a caller that takes the tokens as they come."""
    out = Writer(prompt, target, drafts.depth + 1)
    text, readers = out.text, [reader_of(model, prompt) for model in models]
    if drafts.width > 1 and not all(reader.trees for reader in readers):
        raise ValueError(f"drafts: got a tree of width {drafts.width}, allowed is 1: not all models take a tree")
    in_step = any(reader.in_step for reader in readers)
    drafts.begin(len(models), draft, len(text.length) if in_step else 1, text.ids.device)
    clock, read = drafts.clock, [timed(reader.read, drafts.clock, j) for j, reader in enumerate(readers)]
    rounds, drafted, accepted = (torch.zeros_like(text.length) for _ in range(3))
    # the first round is the pass over the prompt, without drafts
    feed, reach = prompt.ids[:, -1:], [1] * len(text.length)
    round_ = Round(chain(0), feed)
    logits = [reader.begin() for reader in readers]  # J x [B, 1, V_j]
    while True:
        tree, lengths = round_.tree, round_.lengths
        ver, raw, scores = target.verify(logits, text, tree, round_.tokens, lengths, reach, method, draft)
        tokens, path = ver.tokens[:, : len(tree.levels)], ver.path
        emitted, valid, suspect = ver.num_emitted, ver.valid, None
        writing, hits = ~text.ended, lengths  # hits: drafts accepted, [B]
        if path is not None:
            path = path[:, : len(tree.levels)].clamp(min=0)  # [B, K+1]
            raw, scores = (x if x is None else taken(x, path) for x in (raw, scores))
        if len(tree):
            # NaN at a draft reaches other slots through attention (0 * NaN), and their cached columns: a row is invalid
            # only if it is so without drafts, so a round without any follows
            suspect = ~valid & (lengths > 0)
            valid = valid | suspect
            if in_step:  # what a row has beyond the others is judged again: drafts of another slot, so with fresh noise
                least = emitted.masked_fill(text.ended, len(tree.levels)).min()
                valid, emitted = valid | (emitted > least), emitted.clamp(max=least)
            hits = torch.minimum(ver.num_emitted - ver.valid.long(), emitted)
            drafted += lengths
            accepted += torch.where(writing, hits, 0)
        if round_.draws:
            round_.count(drafts.ranks, tokens, path, hits, writing & (emitted > 0), method)
        rounds += writing
        kept = out.write(tokens, emitted, valid, raw, scores, suspect)
        clock.stop(len(tree.levels) - 1, learn=round_.begun)
        if any(kept):
            yield tokens, kept
        clock.start()
        if all(out.ended):
            done = Speculation(
                rounds=rounds.cpu(),
                drafted=drafted.cpu(),
                accepted=accepted.cpu(),
                emitted=text.length.cpu(),
                ranks=drafts.ranks.counts.cpu(),
                seconds=tuple(clock.totals),
                plain_seconds=clock.plain(),
                expected=drafts.expected,
            )
            return out.decoded(done)
        newest = torch.tensor(kept, device=feed.device)[:, None]
        feed = torch.where(newest > 0, tokens.gather(1, (newest - 1).clamp(min=0)).clamp(min=0), feed)
        for reader in readers if round_.begun else ():
            reader.accept(path, kept, out.ended)
            if out.suspects:
                reader.clean()

        # K this round; a row near its end takes fewer, for one token more is emitted than accepted
        left = (prompt.max_new_tokens - 1 - text.length).clamp(min=0)  # [B]
        most = max(prompt.max_new_tokens - 1 - n for n, e in zip(out.length, out.ended) if not e)
        most = min([most, *(room - 1 for reader in readers if (room := reader.room()) is not None)])
        failed = any(n == 0 and not e for n, e in zip(kept, out.ended))
        tree = drafts.tree(0 if failed else most)
        reach = [0 if e else min(len(tree.levels), prompt.max_new_tokens - n) for n, e in zip(out.length, out.ended)]
        round_ = Round(tree, feed)
        own = round_.draw(read[draft], target, text, left, method, drafts.width)  # [B, N+1, V]
        if drafts.curious and method == "coupled":
            round_.look(own, target, text, left, drafts.width)
        ids, every = torch.cat([feed, round_.tokens.clamp(min=0)], 1), range(len(tree) + 1)
        logits = [own if j == draft else read[j](ids, tree, every, left) for j in range(len(models))]


def timed(read: Read, clock: Clock, model: int) -> Read:
    def timed_read(ids: torch.Tensor, tree: Tree, slots: range, left: torch.Tensor) -> torch.Tensor:
        with clock.a_pass(model, len(slots)):
            return read(ids, tree, slots, left)

    return timed_read


def taken(x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Of slots [B, N+1, V] those of a path [B, P]: [B, P, V]."""
    return x.gather(1, path[:, :, None].expand(-1, -1, x.shape[2]))
