"""Decoding by rounds: drafts, verification by all models, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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

    draft: or a function of the texts, see `Proposer`; all models read its drafts in one forward. drafts: how many, see
    `Drafts`. method: "coupled", "token" or "block", see `eft_kernels.verify`.
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

    def look(self, logits: torch.Tensor, target: Target, text: Text, width: int) -> None:
        """Without drafts: draws from the drafting model's logits [B, 1, V] only to count them."""
        self._drawn(logits, [0], target, text, "coupled", width)

    def take(self, propose: Proposer, text: Text, left: torch.Tensor, vocab_size: int | None) -> None:
        """A chain of drafts that no model draws."""
        self.begun, self.left, k = True, left, len(self.tree)
        if not k:
            return
        drafts = propose(text.rows(), k)
        if not isinstance(drafts, torch.Tensor) or drafts.shape != (len(left), k) or drafts.is_floating_point():
            got = list(drafts.shape) if isinstance(drafts, torch.Tensor) else type(drafts).__name__
            raise ValueError(f"draft: proposed {got}, expected int64 {[len(left), k]}, -1 where there is no draft")
        depth = torch.arange(k, device=left.device)
        there = (depth < left[:, None]) & ~text.ended[:, None]
        drafts = drafts.to(left.device, torch.int64)
        known = (drafts >= 0) & (drafts < (1 << 62 if vocab_size is None else vocab_size))
        # a row's drafts end at its first that is none
        self.tokens = torch.where((known & there).cummin(1).values, drafts, -1)
        self.draws = [([i], self.tokens[:, i, None, None]) for i in range(k)]

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
            seen = writing & (hits >= depth) & (depth < self.left) & (drawn[:, 0, 0] >= 0 if len(slots) == 1 else True)
            if method != "coupled":  # drawn with other noise than the target's: not the same token need be accepted
                ranks.add(depth, drawn[:, 0], torch.where(hits > depth, drawn[:, 0, 0], -2), seen)
                continue
            slot = path[:, depth] if path is not None else torch.full_like(hits, depth)
            at = slot[:, None] == torch.tensor(slots, device=slot.device)  # [B, E]
            own = drawn[torch.arange(len(drawn), device=slot.device), at.int().argmax(1)]  # [B, W]
            ranks.add(depth, own, tokens[:, depth], seen & at.any(1) & (own[:, 0] >= 0))


@torch.no_grad()
def speculative_rounds(
    models: Sequence[Model], target: Target, prompt: Prompt, *, draft: int | Proposer, drafts: Drafts, method: str
) -> NewTokens:
    """`speculative` round by round, for a caller that takes the tokens as they come."""
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
        own_path, own_kept = path if path is None else batch.of(path), [kept[b] for b in batch.held]
        for reader in readers if round_.begun else ():
            reader.accept(own_path, own_kept, [out.ended[b] for b in batch.held])
            if out.suspects:
                reader.clean()
        if (stay := batch.shrink(out.ended)) is not None:
            for reader in readers:
                reader.take_rows(stay)

        # K this round; a row near its end takes fewer, for one token more is emitted than accepted
        left = (prompt.max_new_tokens - 1 - text.length).clamp(min=0)  # [B]
        most = max(prompt.max_new_tokens - 1 - n for n, e in zip(out.length, out.ended) if not e)
        most = min([most, *(room - 1 for reader in readers if (room := reader.room()) is not None)])
        failed = any(n == 0 and not e for n, e in zip(kept, out.ended))
        tree = drafts.tree(0 if failed else most)
        reach = [0 if e else min(len(tree.levels), prompt.max_new_tokens - n) for n, e in zip(out.length, out.ended)]
        round_ = Round(tree, feed)
        own: torch.Tensor | None = None  # [B, N+1, V] of the drafting model
        if not isinstance(draft, int):
            round_.take(draft, text, left, target.vocab_size or len(logits[0][0, 0]))
        else:
            own = round_.draw(read[draft], target, text, left, method, drafts.width)
            if drafts.curious and method == "coupled":
                round_.look(own, target, text, drafts.width)
        ids, every = torch.cat([feed, round_.tokens.clamp(min=0)], 1), range(len(tree) + 1)
        logits = [
            own if own is not None and j == draft else read[j](ids, tree, every, left) for j in range(len(models))
        ]


def pass_of(reader: Reader, clock: Clock, model: int, batch: Batch) -> Read:
    """`Reader.read` of all rows, timed."""

    def read(ids: torch.Tensor, tree: Tree, slots: range, left: torch.Tensor) -> torch.Tensor:
        with clock.a_pass(model, len(slots)):
            return batch.back(reader.read(batch.of(ids), tree, slots, batch.of(left)))

    return read


def taken(x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Of slots [B, N+1, V] those of a path [B, P]: [B, P, V]."""
    return x.gather(1, path[:, :, None].expand(-1, -1, x.shape[2]))
