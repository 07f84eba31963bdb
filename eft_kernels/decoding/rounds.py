"""Decoding by rounds: drafts, verification by all models, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checks import one_of
from ..parameters import METHODS
from .columns import Model
from .drafts import Drafts, Ranks, Speculation
from .loops import Decoded, NewTokens, OnTokens, Writer, finished
from .proposers import Proposer
from .readers import Batch, Reader, reader_of
from .target import Target
from .text import Prompt, Text
from .times import Clock
from .trees import Tree, chain

Read = Callable[[torch.Tensor, Tree, range, torch.Tensor], torch.Tensor]  # see `Reader.read`


def speculative(
    models: Sequence[Model],
    target: Target,
    prompt: Prompt,
    *,
    draft: int | Proposer,
    drafts: Drafts,
    method: str,
    on_tokens: OnTokens | None = None,
) -> Decoded:
    """Rounds of drafting by models[draft] and verification by all (Leviathan et al., arXiv 2211.17192).

    At the start of a round every cache holds each row's text but its newest token. The drafting model reads that
    and its own drafts level by level, the others all of them in one forward; the logits kept from drafting are the
    draft distribution and, unless their weight is 0, a term of the target. Then the caches drop what was rejected.

    draft: the index of the drafting model, or a function of the texts (`Proposer`), whose drafts all models read in one
    forward. drafts: how many, see `Drafts`. method: "coupled", "token" or "block", see `eft_kernels.verify`.
    """
    rounds = speculative_rounds(models, target, prompt, draft=draft, drafts=drafts, method=method)
    return finished(rounds, on_tokens and (lambda new: on_tokens(*new)))


class Round:
    """A tree of drafts and what was drawn for it."""

    def __init__(self, tree: Tree, feed: torch.Tensor):
        self.tree, self.feed = tree, feed
        self.tokens = feed[:, :0]  # int64 [B, N], -1: there is none
        # of each depth: the slots that were drawn from, and the draws int64 [B, E, W]
        self.draws: list[tuple[list[int], torch.Tensor]] = []
        self.remaining = torch.zeros_like(feed[:, 0])  # [B], drafts that each row may have after each other
        self.begun = False  # nodes were read

    @property
    def lengths(self) -> torch.Tensor:
        """Drafts of each row, [B]; those of a chain come first."""
        return (self.tokens >= 0).sum(1)

    def draw(
        self, read: Read, target: Target, text: Text, remaining: torch.Tensor, method: str, width: int
    ) -> torch.Tensor:
        """Drafts level by level, from the first ``width`` tokens of each draw; the drafting model's logits [B, N+1, V]
        of all slots."""
        self.begun, self.remaining, tree = True, remaining, self.tree
        steps, level = [], self.feed
        alive = ~text.ended[:, None]  # [B, n], of the level's slots
        for depth, slots in enumerate(tree.levels):
            steps.append(read(level.clamp(min=0), tree, slots, remaining))
            if depth == len(tree.levels) - 1:
                break
            children = tree.levels[depth + 1]
            parents = tree.parents[children.start - 1 : children.stop - 1]
            inner = sorted(set(parents))
            drawn, valid = self._drawn(
                steps[-1][:, [s - slots.start for s in inner]], inner, target, text, method, width
            )
            place, rank = [inner.index(p) for p in parents], list(tree.ranks[children.start : children.stop])
            alive = (alive[:, [p - slots.start for p in parents]] & valid[:, place]) & (depth < remaining)[:, None]
            level = torch.where(alive, drawn[:, place, rank], -1)
            alive = level >= 0
            self.tokens = torch.cat([self.tokens, level], 1)
        return torch.cat(steps, 1)

    def probe(self, logits: torch.Tensor, target: Target, text: Text, width: int) -> None:
        """Without drafts: draws from the drafting model's logits [B, 1, V] only to count them."""
        self._drawn(logits, [0], target, text, "coupled", width)

    def take(self, propose: Proposer, text: Text, remaining: torch.Tensor, vocab_size: int) -> None:
        """A chain of drafts that no model draws, as long as the longest that was proposed."""
        self.begun, self.remaining, k = True, remaining, len(self.tree)
        if not k:
            return
        drafts = checked(propose(text.rows(), k), len(remaining), k, vocab_size).to(remaining.device)
        there = (torch.arange(k, device=remaining.device) < remaining[:, None]) & ~text.ended[:, None]
        # a row's drafts end at its first that is none
        self.tokens = torch.where(((drafts >= 0) & there).cummin(1).values, drafts, -1)
        self.tree = chain(int(self.lengths.max()))
        self.tokens = self.tokens[:, : len(self.tree)]
        self.draws = [([i], self.tokens[:, i, None, None]) for i in range(len(self.tree))]

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
        accepted: torch.Tensor,
        kept: torch.Tensor,
        method: str,
    ) -> None:
        """Adds to ``ranks`` what became of the draws at the slots on the path.

        tokens: int64 [B, K+1], the target's, of which ``kept`` [B] are in the text; accepted: int64 [B], drafts.
        """
        for depth, (slots, drawn) in enumerate(self.draws):
            seen = (depth < kept) & (depth < self.remaining)
            if method != "coupled":
                # other noise than the target's: a draft is accepted or not, whatever the token is that replaces it
                drafts = drawn[:, 0]  # [B, 1], of a chain
                ranks.add(depth, drafts, torch.where(accepted > depth, drafts[:, 0], -2), seen & (drafts[:, 0] >= 0))
                continue
            slot = path[:, depth] if path is not None else torch.full_like(kept, depth)
            at = slot[:, None] == torch.tensor(slots, device=slot.device)  # [B, E]
            own = drawn[torch.arange(len(drawn), device=slot.device), at.int().argmax(1)]  # [B, W]
            ranks.add(depth, own, tokens[:, depth], seen & at.any(1) & (own[:, 0] >= 0))


def checked(drafts: object, rows: int, k: int, vocab_size: int) -> torch.Tensor:
    """What a proposer gave, int64 [rows, k]; ValueError for anything else."""
    expected = f"integers {[rows, k]}, ids below {vocab_size}, -1 where there is no draft"
    if not isinstance(drafts, torch.Tensor):
        raise ValueError(f"draft: proposed {type(drafts).__name__}, expected a tensor of {expected}")
    whole = not (drafts.is_floating_point() or drafts.is_complex() or drafts.dtype is torch.bool)
    if drafts.shape != (rows, k) or not whole:
        raise ValueError(f"draft: proposed {drafts.dtype} {list(drafts.shape)}, expected {expected}")
    low, high = int(drafts.min()), int(drafts.max())
    if low < -1 or high >= vocab_size:
        raise ValueError(f"draft: proposed {low if low < -1 else high}, expected {expected}")
    return drafts.to(torch.int64)


@torch.no_grad()
def speculative_rounds(
    models: Sequence[Model], target: Target, prompt: Prompt, *, draft: int | Proposer, drafts: Drafts, method: str
) -> NewTokens:
    """`speculative` round by round, for a caller that takes the tokens as they come."""
    _check(draft, len(models), drafts, method)
    out = Writer(prompt, target, drafts.depth + 1)
    text, readers = out.text, [reader_of(model, prompt) for model in models]
    if drafts.width > 1 and not all(reader.trees for reader in readers):
        raise ValueError(f"drafts: got a tree of width {drafts.width}, allowed is 1: not all models take a tree")
    in_step = any(reader.in_step for reader in readers)
    by = draft if isinstance(draft, int) else None  # the drafting model
    drafts.begin(len(models), by, len(text.length) if in_step else 1, text.ids.device)
    batch = Batch(models, len(text.length), text.ids.device)
    clock, read = drafts.clock, [pass_of(reader, drafts.clock, j, batch) for j, reader in enumerate(readers)]
    rounds, drafted, accepted = (torch.zeros_like(text.length) for _ in range(3))
    # the first round is the pass over the prompt, without drafts
    feed, reach = prompt.ids[:, -1:], [1] * len(text.length)
    round_ = Round(chain(0), feed)
    logits = [reader.begin() for reader in readers]  # J x [B, 1, V_j]
    while True:
        tree, lengths = round_.tree, round_.lengths
        ver, raw, scores = target.verify(logits, text, tree, round_.tokens, lengths, reach, method, by)
        tokens, path = ver.tokens[:, : len(tree.levels)], ver.path
        emitted, valid, suspect = ver.num_emitted, ver.valid, None
        writing, hits = ~text.ended, lengths  # hits: drafts accepted, [B]
        if path is not None:
            path = path[:, : len(tree.levels)].clamp(min=0)  # [B, K+1]
            raw, scores = (x if x is None else at_slots(x, path) for x in (raw, scores))
        if len(tree):
            # NaN at a draft reaches other slots through attention (0 * NaN), and their cached columns: a row is invalid
            # only if it is so without drafts, so a round without any follows
            suspect = ~valid & (lengths > 0)
            valid = valid | suspect
            if in_step:  # what a row has beyond the others is judged again: drafts of another slot, so with fresh noise
                least = emitted.masked_fill(text.ended, len(tree.levels)).min()
                valid, emitted = valid | (emitted > least), emitted.clamp(max=least)
            hits = torch.minimum(ver.num_emitted - ver.valid.long(), emitted)
        kept = out.write(tokens, emitted, valid, raw, scores, suspect)
        taken = torch.tensor(kept, device=feed.device)  # [B], tokens that are in the text
        rounds += writing
        if len(tree):
            drafted += lengths
            accepted += torch.minimum(hits, taken)
        if round_.draws:
            round_.count(drafts.ranks, tokens, path, hits, taken, method)
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
        newest = tokens.gather(1, (taken[:, None] - 1).clamp(min=0)).clamp(min=0)
        feed = torch.where(taken[:, None] > 0, newest, feed)
        own_path, own_kept = path if path is None else batch.of(path), [kept[b] for b in batch.held]
        for reader in readers if round_.begun else ():
            reader.accept(own_path, own_kept, [out.ended[b] for b in batch.held])
            if out.suspects:
                reader.clean()
        if (stay := batch.shrink(out.ended)) is not None:
            for reader in readers:
                reader.take_rows(stay)

        # K this round; a row near its end takes fewer, for one token more is emitted than accepted
        remaining = (prompt.max_new_tokens - 1 - text.length).clamp(min=0)  # [B]
        most = max(prompt.max_new_tokens - 1 - n for n, e in zip(out.length, out.ended) if not e)
        most = min([most, *(room - 1 for reader in readers if (room := reader.room()) is not None)])
        failed = any(n == 0 and not e for n, e in zip(kept, out.ended))
        round_ = Round(drafts.tree(0 if failed else most), feed)
        own: torch.Tensor | None = None  # [B, N+1, V] of the drafting model
        if not isinstance(draft, int):
            round_.take(draft, text, remaining, target.vocab_size or len(logits[0][0, 0]))
        else:
            own = round_.draw(read[draft], target, text, remaining, method, drafts.width)
            if drafts.probing and method == "coupled":
                round_.probe(own, target, text, drafts.width)
        tree = round_.tree
        reach = [0 if e else min(len(tree.levels), prompt.max_new_tokens - n) for n, e in zip(out.length, out.ended)]
        ids, every = torch.cat([feed, round_.tokens.clamp(min=0)], 1), range(len(tree) + 1)
        logits = [
            own if own is not None and j == draft else read[j](ids, tree, every, remaining) for j in range(len(models))
        ]


def _check(draft: object, models: int, drafts: Drafts, method: str) -> None:
    if not callable(draft) and (type(draft) is not int or not 0 <= draft < models):
        raise ValueError(f"draft: got {draft!r}, allowed are 0 to {models - 1}, the models, or a function")
    one_of("method", method, METHODS)
    if drafts.width > 1 and (method != "coupled" or callable(draft)):
        why = f"method={method!r}" if method != "coupled" else "drafts of no model"
        raise ValueError(f"drafts: got a tree of width {drafts.width}, allowed is 1 with {why}")


def pass_of(reader: Reader, clock: Clock, model: int, batch: Batch) -> Read:
    """`Reader.read` of all rows, timed."""

    def read(ids: torch.Tensor, tree: Tree, slots: range, remaining: torch.Tensor) -> torch.Tensor:
        with clock.a_pass(model, len(slots)):
            return batch.back(reader.read(batch.of(ids), tree, slots, batch.of(remaining)))

    return read


def at_slots(x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Of slots [B, N+1, V] those of a path [B, P]: [B, P, V]."""
    return x.gather(1, path[:, :, None].expand(-1, -1, x.shape[2]))
