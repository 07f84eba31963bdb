"""Judging drafts: acceptance, block verification, and the residual where a row stops.

`stats_kernel` and `row_kernel` have left the state of every slot of target and draft. Bytes: the chunks the residual
looks into, and for rows without filters the logits once more (from L2) for their exact mass.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .race import race, race_kept
from .rows import combine, noise_of, params_of, row_of, scales_of, tokens_of, value
from .semantics import (
    BLOCK,
    COUPLED,
    LOG2E,
    MASS_ONE,
    NEG_INF,
    NONE,
    RESIDUAL,
    RESIDUAL_ONE,
    SAMPLE,
    accept_token,
    accept_uniform,
    block_passes,
    block_ratio,
    chunk_noise,
    log,
    mass,
    packed_token,
    residual,
)

SLACK = tl.constexpr(1e-3)  # nats: over the bound of a chunk's residual, for its logarithm is not quite monotone


class Side(NamedTuple):
    """Target or draft: what scores a row, and its `State` (of Nones: the draft of a deterministic proposer)."""

    m: object
    up: object
    state: object
    temperature: object  # float32 [B] or None, and a number
    temperature_value: object


class View(NamedTuple):
    """One row of a `Side`, as numbers."""

    row: object
    best: object
    floor: object
    ceiling: object
    total: object
    token: object  # of a greedy row
    greedy: object
    c: object


@triton.jit
def view(side, r):
    row = row_of(side.m, side.up, r)
    total = tl.load(side.state.total + r)
    greedy, _, inverse_temperature = scales_of(
        value(side.temperature, side.temperature_value, r // side.m.slots, tl.float32)
    )
    return View(
        row,
        tl.load(side.state.best + r),
        tl.load(side.state.floor + r),
        tl.load(side.state.ceiling + r),
        tl.maximum(total, 1),
        tl.load(side.state.greedy + r),
        greedy,
        inverse_temperature * LOG2E,
    )


@triton.jit
def mass_of(side, v, token):
    """Masses of tokens after filters; the one of a greedy row has all."""
    s, _ = combine(side.m, side.up, v.row, token)
    kept = tl.where((s >= v.floor) & (s <= v.ceiling) & (s > NEG_INF), mass(s, v.best, v.c), 0)
    return tl.where(v.greedy, tl.where(token == v.token, 1 << 40, 0).to(tl.int64), kept)


@triton.jit(do_not_specialize=["seed", "position"])
def mass_kernel(m, up, sampling, seed, position, state, SPLITS: tl.constexpr, TILES: tl.constexpr, TC: tl.constexpr):
    """Grid (rows * SPLITS): adds up the exact mass of the rows that no filter touched (state.total is 0 there)."""
    r = (tl.program_id(0) // SPLITS).to(tl.int64)
    params = params_of(sampling, seed, position, m.V, r // m.slots, r % m.slots)
    if ~params.greedy & ~params.filtered:
        row = row_of(m, up, r)
        best = tl.load(state.best + r)
        a = tl.zeros([TC, 256], tl.int64)
        for t in range(TILES):
            s, _ = combine(
                m, up, row, tokens_of((tl.program_id(0) % SPLITS) * (TILES * TC) + t * TC + tl.arange(0, TC))
            )
            a += tl.where(s > NEG_INF, mass(s, best, params.c), 0)
        tl.atomic_add(state.total + r, tl.sum(tl.sum(a, 1), 0), sem="relaxed")


# --- acceptance ----------------------------------------------------------------------------------------------------


@triton.jit
def length_of(draft_lengths, b, slots):
    """How many drafts batch row b has; on a GPU nobody has checked."""
    return tl.minimum(tl.maximum(tl.load(draft_lengths + b), 0), slots - 1).to(tl.int32)


@triton.jit
def ends_of(target, draft, b, length, slots, METHOD: tl.constexpr):
    """How many drafts of batch row b count: its length, or up to the first invalid slot."""
    end = length
    for i in range(0, slots):
        r = b * slots + i
        ok = tl.load(target.state.valid + r)
        if (METHOD != COUPLED) and (draft.state.best is not None):
            ok = ok & (tl.load(draft.state.valid + r) | (length <= i))
        end = tl.where(ok, end, tl.minimum(end, i))
    return end


@triton.jit(do_not_specialize=["slots"])
def draft_mass_kernel(target, draft, draft_tokens, masses, slots):
    """Grid (B * (slots - 1)): of the token proposed at each slot its mass in the target, the target's total, and the
    same in the draft distribution, into masses int64 [B, slots, 4].

    A kernel of its own, for in a loop over slots Triton 3.6 loses the compile-time values of a kernel's tuples.
    """
    at = tl.program_id(0).to(tl.int64)
    b, i = at // (slots - 1), at % (slots - 1)
    r = b * slots + i
    proposed = tl.load(draft_tokens + at)
    in_bounds = (proposed >= 0) & (proposed < target.m.V)
    token = tl.where(in_bounds, proposed, 0).to(tl.int32)
    at_target = view(target, r)
    tl.store(masses + r * 4, tl.where(in_bounds, mass_of(target, at_target, token), 0))
    tl.store(masses + r * 4 + 1, at_target.total)
    d, d_total = tl.cast(1 << 40, tl.int64), tl.cast(1 << 40, tl.int64)  # all on the draft
    if draft.state.best is not None:
        at_draft = view(draft, r)
        d = mass_of(draft, at_draft, token)
        d_total = at_draft.total
    tl.store(masses + r * 4 + 2, tl.where(in_bounds, d, 1))
    tl.store(masses + r * 4 + 3, d_total)


@triton.jit
def masses_at(masses, r):
    """What `draft_mass_kernel` left of row r: t, t_total, d, d_total."""
    at = masses + r * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit(do_not_specialize=["seed", "position", "slots"])
def accept_kernel(
    target,
    draft,
    sampling,
    seed,
    position,
    draft_tokens,
    draft_lengths,
    own,
    masses,
    accepted,
    factor,
    ratios,
    slots,
    METHOD: tl.constexpr,
):
    """Grid (B): accepted [B] and, for "block", the ratio after every draft [B, slots] (float64).

    own: the target's own samples [B, slots], for "coupled", else masses of `draft_mass_kernel`. factor [B]: of the
    residual where the row stops.
    """
    b = tl.program_id(0).to(tl.int64)
    end = ends_of(target, draft, b, length_of(draft_lengths, b, slots), slots, METHOD)
    count = tl.cast(0, tl.int32)
    if METHOD == BLOCK:
        ratio = tl.cast(1.0, tl.float64)
        for i in range(0, end):
            t, t_total, d, d_total = masses_at(masses, b * slots + i)
            ratio = block_ratio(ratio, t, t_total, d, d_total)
            tl.store(ratios + b * slots + i, ratio)
        tl.store(accepted + b, end)  # how many count; `block_kernel` says how many are accepted
    else:
        going = count < end
        while going:
            if METHOD == COUPLED:
                proposed = tl.load(draft_tokens + b * (slots - 1) + count)
                going = (proposed >= 0) & (proposed == tl.load(own + b * slots + count))
            else:
                t, t_total, d, d_total = masses_at(masses, b * slots + count)
                row_seed, at = noise_of(sampling, seed, position, b, count)
                u = accept_uniform(row_seed, at, tl.cast(count, tl.uint32))
                going = accept_token(u, t, t_total, d, d_total)
            count += going.to(tl.int32)
            going = going & (count < end)
        tl.store(accepted + b, count)
    tl.store(factor + b, 1.0)


# --- trees of "coupled" --------------------------------------------------------------------------------------------


@triton.jit
def parent_of(parents, b, slot, slots):
    """The slot that a slot >= 1 follows, -1 where there is none: on a GPU nobody has checked."""
    parent = tl.load(parents + b * (slots - 1) + slot - 1)
    return tl.where((parent >= 0) & (parent < slot), parent, -1)


@triton.jit(do_not_specialize=["slots"])
def depth_kernel(parents, depths, slots):
    """Grid (B * slots): how many drafts lead to each slot, int64 [B, slots]."""
    at = tl.program_id(0).to(tl.int64)
    b, slot = at // slots, at % slots
    depth = tl.cast(0, tl.int64)
    while slot > 0:
        slot = parent_of(parents, b, slot, slots)
        depth += 1
    tl.store(depths + at, depth)


@triton.jit(do_not_specialize=["slots"])
def tree_kernel(parents, draft_tokens, draft_lengths, own, tokens, emitted, valid, path, slots, SP: tl.constexpr):
    """Grid (B): the longest path of drafts that are all the target's ``own`` samples [B, slots], and its tokens; among
    equally long ones, the path that ends in the lowest slot. SP is the power of two >= slots."""
    b = tl.program_id(0).to(tl.int64)
    length = length_of(draft_lengths, b, slots)
    lane = tl.arange(0, SP)
    depths = tl.where(lane == 0, 0, -1)  # of accepted slots
    for i in range(1, length + 1):
        parent = parent_of(parents, b, i, slots)
        before = tl.max(tl.where(lane == parent, depths, -1), 0)
        proposed = tl.load(draft_tokens + b * (slots - 1) + i - 1)
        drawn = tl.load(own + b * slots + tl.maximum(parent, 0))
        accepted = (before >= 0) & (proposed >= 0) & (proposed == drawn)
        depths = tl.where((lane == i) & accepted, before + 1, depths)
    longest = tl.max(depths, 0)
    last = tl.min(tl.where(depths == longest, lane, SP), 0).to(tl.int64)
    slots_of = tl.where(lane == 0, 0, -1).to(tl.int64)
    depth = longest
    while depth > 0:
        slots_of = tl.where(lane == depth, last, slots_of)
        last = tl.maximum(parent_of(parents, b, tl.maximum(last, 1), slots), 0)
        depth -= 1
    drawn = tl.load(own + b * slots + slots_of, mask=slots_of >= 0, other=-1)
    tl.store(path + b * slots + lane, slots_of, mask=lane < slots)
    tl.store(tokens + b * slots + lane, drawn, mask=lane < slots)
    count = tl.sum((drawn >= 0).to(tl.int32), 0)
    tl.store(emitted + b, count.to(tl.int64))
    tl.store(valid + b, count == longest + 1)


# --- residuals -----------------------------------------------------------------------------------------------------


class SlotResidual(NamedTuple):
    """Context of `residual_scores`."""

    target: object
    draft: object
    at_target: object
    at_draft: object
    a: object  # factor 2^58 / total of the target
    b: object  # 2^58 / total of the draft
    proposed: object  # of a deterministic proposer


@triton.jit
def slot_residual(target, draft, r, factor):
    """`SlotResidual` of row r."""
    at_target = view(target, r)
    b = tl.cast(RESIDUAL_ONE / MASS_ONE, tl.float64)
    at_draft = at_target
    if draft.state.best is not None:
        at_draft = view(draft, r)
        b = RESIDUAL_ONE / at_draft.total.to(tl.float64)
    return at_target, at_draft, factor * (RESIDUAL_ONE / at_target.total.to(tl.float64)), b


@triton.jit
def residuals(c, token):
    """max(0, factor t / T - d / D) of tokens in units of 2^-58, float64."""
    t = mass_of(c.target, c.at_target, token)
    if c.draft.state.best is not None:
        d = mass_of(c.draft, c.at_draft, token)
    else:
        d = tl.where(token == c.proposed, 1 << 40, 0).to(tl.int64)
    return residual(t, d, c.a, c.b)


@triton.jit
def residual_scores(c, token):
    r = residuals(c, token)
    return tl.where(r > 0.0, log(tl.maximum(r, 1.0).to(tl.float32)), NEG_INF)


@triton.jit(do_not_specialize=["slots"])
def residual_kernel(
    target,
    draft,
    draft_tokens,
    accepted,
    ratios,
    residual_sums,
    slots,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    TC: tl.constexpr,
):
    """Grid (B * slots * SPLITS), "block": adds to residual_sums, int64 [B, slots], the whole residual at slot i + 1
    after draft i passed, each token's truncated to an integer."""
    at = (tl.program_id(0) // SPLITS).to(tl.int64)
    b, i = at // slots, at % slots
    if i + 1 < tl.load(accepted + b):
        ratio = tl.load(ratios + at)
        if ratio > 0:
            proposed = tl.load(draft_tokens + b * (slots - 1) + i + 1)
            at_target, at_draft, x, y = slot_residual(target, draft, at + 1, ratio)
            c = SlotResidual(target, draft, at_target, at_draft, x, y, proposed)
            a = tl.zeros([TC, 256], tl.int64)
            for t in range(TILES):
                chunk = (tl.program_id(0) % SPLITS) * (TILES * TC) + t * TC + tl.arange(0, TC)
                a += residuals(c, tokens_of(chunk)).to(tl.int64)
            tl.atomic_add(residual_sums + at, tl.sum(tl.sum(a, 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=["seed", "position", "slots"])
def block_kernel(sampling, seed, position, accepted, factor, ratios, residual_sums, slots):
    """Grid (B): the longest prefix that passes (Sun et al., algorithm 2)."""
    b = tl.program_id(0).to(tl.int64)
    end = tl.load(accepted + b)
    count, f = tl.cast(0, tl.int32), tl.cast(1.0, tl.float64)
    for i in range(0, end):
        row_seed, at = noise_of(sampling, seed, position, b, i)
        u = accept_uniform(row_seed, at, tl.cast(i, tl.uint32))
        ratio = tl.load(ratios + b * slots + i)
        passes = block_passes(u, ratio, tl.load(residual_sums + b * slots + i), i + 1 == end)
        count = tl.where(passes, i + 1, count)
        f = tl.where(passes, ratio, f)
    tl.store(accepted + b, count)
    tl.store(factor + b, f)


# --- the token after the accepted drafts ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "position", "slots"])
def last_kernel(
    target,
    draft,
    sampling,
    seed,
    position,
    top,
    draft_tokens,
    draft_lengths,
    own,
    accepted,
    factor,
    tokens,
    emitted,
    valid,
    slots,
    chunks,
    METHOD: tl.constexpr,
    CP: tl.constexpr,
    SP: tl.constexpr,
):
    """Grid (B): tokens [B, slots]: the accepted drafts, the residual's or the target's own sample, -1."""
    b = tl.program_id(0).to(tl.int64)
    length = length_of(draft_lengths, b, slots)
    i = tl.load(accepted + b)
    r = b * slots + i
    ok = tl.load(target.state.valid + r)
    if (METHOD != COUPLED) and (draft.state.best is not None):
        ok = ok & (tl.load(draft.state.valid + r) | (length <= i))
    token = tl.cast(-1, tl.int64)
    if METHOD == COUPLED:
        token = tl.where(ok, tl.load(own + r), -1)
    else:
        if ok:
            params = params_of(sampling, seed, position, target.m.V, b, i)
            at = view(target, r)
            chunk = tl.arange(0, CP)
            high = tl.load(top + r * chunks + chunk, mask=chunk < chunks, other=NEG_INF)
            winner = tl.cast(NONE, tl.int64)
            if (i < length) & ~params.greedy:
                proposed = tl.load(draft_tokens + b * (slots - 1) + i)
                at_target, at_draft, x, y = slot_residual(target, draft, r, tl.load(factor + b))
                domain = tl.cast((i << 3) | (RESIDUAL << 1), tl.uint32)
                e, place = chunk_noise(params.seed, params.position, domain, chunk)
                most = mass(high, at.best, params.c).to(tl.float64) * x
                bound = log(tl.maximum(most, 1.0).to(tl.float32)) + SLACK - log(e)
                bound = tl.where((high >= at.floor) & (high > NEG_INF) & (most >= 1.0), bound, NEG_INF)
                winner, _ = race(
                    residual_scores,
                    SlotResidual(target, draft, at_target, at_draft, x, y, proposed),
                    bound,
                    e,
                    place,
                    chunk,
                    tl.cast(1.0, tl.float32),
                    params.seed,
                    params.position,
                    domain,
                )
            if winner == NONE:
                winner, _ = race_kept(
                    target.m,
                    target.up,
                    at.row,
                    high,
                    chunk,
                    at.floor,
                    at.ceiling,
                    params,
                    tl.cast(SAMPLE << 1, tl.uint32),
                )
            token = tl.where(winner > NONE, packed_token(winner), -1).to(tl.int64)
    slot = tl.arange(0, SP)
    drafts = tl.load(draft_tokens + b * (slots - 1) + slot, mask=slot < i, other=-1)
    tl.store(tokens + b * slots + slot, tl.where(slot == i, token, drafts), mask=slot < slots)
    tl.store(emitted + b, (i + ok.to(tl.int32)).to(tl.int64))
    tl.store(valid + b, ok)
