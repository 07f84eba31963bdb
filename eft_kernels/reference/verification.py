"""`verify` by the definition: which drafts are accepted, and the token after them. t: the target's masses, d: the
draft distribution's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..dispatch import Verified
from ..parameters import STREAM_CODES, DraftParams, Params, TokenBias
from .masses import MASS_BITS, RESIDUAL_BITS
from .noise import accept_uniform, first_max, log, race
from .rows import NEG_INF, Rows, read_rows

NAN = float("nan")


class Slot:
    """One of K + 1 slots, all rows: target, draft distribution, masses of both."""

    def __init__(
        self,
        logits: Sequence[torch.Tensor],
        p: Params,
        i: int,
        depth: torch.Tensor | int,
        length: torch.Tensor,
        proposed: torch.Tensor | None,
        method: str,
        draft: int,
        drawn_by: DraftParams,
    ) -> None:
        rows = torch.arange(p.lead(logits)[0], device=logits[0].device)
        mask = None if p.token_mask is None else p.token_mask[:, i]
        bias = None if p.token_bias is None else TokenBias(*(x[:, i] for x in p.token_bias))
        there = None
        if p.row_index is None:
            logits = [z[:, i] for z in logits]
        else:
            logits, there = read_rows(logits, p.row_index[:, i])
        self.i = i
        self.target = Rows(logits, p, rows, mask, bias, there)
        self.target.position = self.target.position + depth
        self.scores, self.valid = self.target.combine()
        _, self.t = self.target.process(self.scores)
        self.t_total = self.t.sum(1).clamp(min=1)
        if draft >= 0:
            drafter = Rows([logits[draft]], drawn_by.of(p), rows, mask, bias, there)
            scores, valid = drafter.combine()
            _, self.d = drafter.process(scores)
            if method != "coupled":
                self.valid = self.valid & (valid | (length <= i))
        else:  # a deterministic proposer
            ids = torch.arange(p.vocab_size, device=rows.device)
            self.d = torch.where(ids == proposed[:, None], 1 << MASS_BITS, 0) if proposed is not None else self.t
        self.d_total = self.d.sum(1).clamp(min=1)

    def sample(self) -> torch.Tensor:
        """The target's own sample, [R]."""
        r = self.target
        kept, _ = r.process(self.scores)
        return race(kept, r.temperature, r.seed, r.position, STREAM_CODES["sample"], torch.zeros_like(r.seed))

    def uniform(self) -> torch.Tensor:
        return accept_uniform(self.target.seed, self.target.position, torch.full_like(self.target.seed, self.i))

    def residual(self, factor: torch.Tensor) -> torch.Tensor:
        """max(0, factor t / T - d / D) in units of 2^-58, 0 below one unit; float64 [R, V]."""
        a = factor * (2.0**RESIDUAL_BITS / self.t_total.to(torch.float64))
        b = 2.0**RESIDUAL_BITS / self.d_total.to(torch.float64)
        residual = self.t.to(torch.float64) * a[:, None] - self.d.to(torch.float64) * b[:, None]
        return torch.where(residual >= 1, residual, 0.0)

    def sample_residual(self, residual: torch.Tensor) -> torch.Tensor:
        r = self.target
        score = torch.where(residual > 0, log(residual.clamp(min=1).to(torch.float32)), NEG_INF)
        slot = torch.full_like(r.seed, self.i)
        return race(score, torch.ones_like(r.temperature), r.seed, r.position, STREAM_CODES["residual"], slot)


class Accepted(NamedTuple):
    number: torch.Tensor  # int64 [R]
    factor: torch.Tensor  # float64 [R], of the residual at the slot where the row stops


def accept_coupled(slots: list[Slot], drafts: torch.Tensor, lengths: torch.Tensor) -> Accepted:
    """Drafts are accepted while they are the target's own samples."""
    number = torch.zeros_like(lengths)
    going = torch.ones_like(lengths, dtype=torch.bool)
    for slot in slots[:-1]:
        going = going & (slot.i < lengths) & (drafts[:, slot.i] == slot.sample())
        number += going
    return Accepted(number, torch.ones_like(lengths, dtype=torch.float64))


def masses_of_draft(slot: Slot, drafts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each draft t, T, d and D, float64; of one outside the vocabulary t is 0."""
    V = slot.t.shape[1]
    in_vocab = (drafts[:, slot.i] >= 0) & (drafts[:, slot.i] < V)
    id = drafts[:, slot.i].clamp(0, V - 1)[:, None]
    t = torch.where(in_vocab, slot.t.gather(1, id)[:, 0], 0)
    d = torch.where(in_vocab, slot.d.gather(1, id)[:, 0], 1)
    return tuple(x.to(torch.float64) for x in (t, slot.t_total, d, slot.d_total))


def accept_token(slots: list[Slot], drafts: torch.Tensor, lengths: torch.Tensor) -> Accepted:
    """Each draft with probability min(1, (t / T) / (d / D)) (Leviathan et al., arXiv 2211.17192)."""
    number = torch.zeros_like(lengths)
    going = torch.ones_like(lengths, dtype=torch.bool)
    for slot in slots[:-1]:
        t, t_total, d, d_total = masses_of_draft(slot, drafts)
        u = slot.uniform()
        going = going & (slot.i < lengths) & ((u * d) * t_total < t * d_total)
        number += going
    return Accepted(number, torch.ones_like(lengths, dtype=torch.float64))


def accept_block(slots: list[Slot], drafts: torch.Tensor, lengths: torch.Tensor) -> Accepted:
    """Block verification (Sun et al., arXiv 2403.10444, algorithm 2): the longest prefix that passes."""
    number = torch.zeros_like(lengths)
    factor = torch.ones_like(lengths, dtype=torch.float64)
    ratio = torch.ones_like(factor)  # the paper's p_i
    for slot in slots[:-1]:
        t, t_total, d, d_total = masses_of_draft(slot, drafts)
        step = torch.where(d > 0, (t * d_total) / (d * t_total), torch.where(t > 0, float("inf"), 0.0))
        ratio = torch.where(ratio > 0, (ratio * step).clamp(max=1.0), 0.0)
        following = torch.zeros_like(ratio)
        if slot.i + 2 < len(slots):  # truncated one by one, so that the sum does not depend on order
            following = slots[slot.i + 1].residual(ratio).to(torch.int64).sum(1).to(torch.float64)
        whole = following + (1.0 - ratio) * 2.0**RESIDUAL_BITS
        u = slot.uniform()
        passes = torch.where(lengths == slot.i + 1, u < ratio, (u * whole < following) | (whole == 0))
        passes = passes & (slot.i < lengths)
        number = torch.where(passes, slot.i + 1, number)
        factor = torch.where(passes, ratio, factor)
    return Accepted(number, factor)


def depths(parents: torch.Tensor) -> torch.Tensor:
    """How many drafts lead to each slot of trees, [B, N + 1]; a draft whose parent is no slot before it has none."""
    depth = torch.zeros(parents.shape[0], parents.shape[1] + 1, dtype=torch.int64, device=parents.device)
    for i in range(1, depth.shape[1]):
        parent = parents[:, i - 1]
        there = (parent >= 0) & (parent < i)
        depth[:, i] = 1 + torch.where(there, depth.gather(1, parent.clamp(0, i - 1)[:, None])[:, 0], 0)
    return depth


def accept_tree(own: torch.Tensor, parents: torch.Tensor, drafts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The slots of the longest path whose drafts are all the target's ``own`` samples [B, N + 1] (-1: invalid); among
    equally long ones, the path that ends in the lowest slot. [B, N + 1], -1 after its end."""
    B, S = own.shape
    paths = torch.full((B, S, S), -1, dtype=torch.int64, device=own.device)  # to each slot, where it is accepted
    paths[:, 0, 0] = 0
    rows = torch.arange(B, device=own.device)
    for i in range(1, S):
        parent, token = parents[:, i - 1], drafts[:, i - 1]
        there = (parent >= 0) & (parent < i) & (i <= lengths)
        parent = parent.clamp(0, i - 1)
        before = paths[rows, parent]
        accepted = there & (before[:, 0] == 0) & (token >= 0) & (token == own[rows, parent])
        before[rows, (before >= 0).sum(1).clamp(max=S - 1)] = i
        paths[:, i] = torch.where(accepted[:, None], before, -1)
    longest = first_max((paths >= 0).sum(2))
    return paths[rows, longest]


ACCEPT = {"coupled": accept_coupled, "token": accept_token, "block": accept_block}


@torch.no_grad()
def verify(
    logits: Sequence[torch.Tensor],
    p: Params,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    parents: torch.Tensor | None,
    method: str,
    draft: int,
    drawn_by: DraftParams,
    logprobs: bool,
) -> Verified:
    """``draft`` is -1 for a deterministic proposer; ``parents`` are of "coupled" alone."""
    B, S = p.lead(logits)
    device = logits[0].device
    draft_lengths = draft_lengths.clamp(0, S - 1)
    depth = torch.arange(S, device=device).expand(B, S) if parents is None else depths(parents)
    slots = [
        Slot(
            logits,
            p,
            i,
            depth[:, i],
            draft_lengths,
            draft_tokens[:, i] if i < S - 1 else None,
            method,
            draft,
            drawn_by,
        )
        for i in range(S)
    ]
    if parents is not None:
        return verify_tree(slots, parents, draft_tokens, draft_lengths, logprobs)
    # a row ends its drafts at the first invalid slot, and is invalid if it gets there
    index = torch.arange(S, device=device)
    ends = torch.where(torch.stack([slot.valid for slot in slots], 1), S, index).amin(1)
    lengths = torch.minimum(draft_lengths, ends)
    accepted = ACCEPT[method](slots, draft_tokens, lengths)

    tokens = torch.full((B, S), -1, dtype=torch.int64, device=device)
    emitted = torch.zeros(B, dtype=torch.int64, device=device)
    valid = torch.zeros(B, dtype=torch.bool, device=device)
    for slot in slots:
        here = accepted.number == slot.i
        if not bool(here.any()):
            continue
        last = slot.sample()
        if method != "coupled" and slot.i < S - 1:
            residual = slot.residual(accepted.factor)
            rejected = (slot.i < lengths) & (residual > 0).any(1)
            last = torch.where(rejected, slot.sample_residual(residual), last)
        tokens[:, slot.i] = torch.where(here, torch.where(slot.valid, last, -1), tokens[:, slot.i])
        valid = torch.where(here, slot.valid, valid)
        emitted = torch.where(here, slot.i + slot.valid.to(torch.int64), emitted)
    tokens[:, : S - 1] = torch.where(index[: S - 1] < accepted.number[:, None], draft_tokens, tokens[:, : S - 1])
    if not logprobs:
        return tokens, emitted, valid, None, None, None

    lp = torch.full((B, S), NAN, dtype=torch.float32, device=device)
    raw = lp.clone()
    for slot in slots:
        there, ids = slot.i < emitted, tokens[:, slot.i].clamp(min=0)[:, None]
        processed, emulated = (slot.target.log_softmax(slot.scores, x).gather(1, ids)[:, 0] for x in (True, False))
        lp[:, slot.i] = torch.where(there, processed, lp[:, slot.i])
        raw[:, slot.i] = torch.where(there, emulated, raw[:, slot.i])
    return tokens, emitted, valid, lp, raw, None


def verify_tree(
    slots: list[Slot], parents: torch.Tensor, drafts: torch.Tensor, lengths: torch.Tensor, logprobs: bool
) -> Verified:
    """`verify` of "coupled" drafts that are trees."""
    own = torch.stack([torch.where(slot.valid, slot.sample(), -1) for slot in slots], 1)
    path = accept_tree(own, parents, drafts, lengths)
    there, at = path >= 0, path.clamp(min=0)
    tokens = torch.where(there, own.gather(1, at), -1)
    ok = tokens >= 0
    emitted, valid = ok.sum(1), ok.sum(1) == there.sum(1)
    if not logprobs:
        return tokens, emitted, valid, None, None, path
    processed, emulated = (
        torch.stack([slot.target.log_softmax(slot.scores, x) for slot in slots], 1)  # [B, N + 1, V]
        for x in (True, False)
    )
    rows = torch.arange(len(path), device=path.device)[:, None]
    lp, raw = (torch.where(ok, x[rows, at, tokens.clamp(min=0)], NAN) for x in (processed, emulated))
    return tokens, emitted, valid, lp, raw, path
