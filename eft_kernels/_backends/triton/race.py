"""Sampling without filters, in one launch: combine, race, reduce.

Bytes: every logit once, plus the chunks that the race looks into again (from L2). A program owns ``TILES * TC`` chunks
of one row. With few rows it owns one tile and draws the noise of every token from registers (`DIRECT`): shortest
latency. With many it streams its tiles, keeping each chunk's maximum, then draws inside the few chunks whose bound
``max s + T g_chunk`` beats the best so far. The last program of a row to arrive merges the row's partial results; the
key order is total, so neither split nor tile can change a token.
"""

import triton
import triton.language as tl

from .rows import Kept, combine, full_tiles, kept_scores, params_of, quick_scores, row_of, tokens_of
from .semantics import (
    BAD,
    CHUNK,
    INF,
    LARGE,
    LOG2E,
    NEG_INF,
    NONE,
    chunk_noise,
    log,
    pack,
    packed_key,
    packed_token,
    times,
    token_gumbel,
    token_words,
)


@triton.jit
def noisy(s, temperature, seed, position, domain, chunk, e, place):
    """Packed keys [256] of one chunk's scores; e and place are its chunk noise."""
    lane = tl.arange(0, CHUNK)
    g = tl.where(lane == place, -log(e), token_gumbel(e, token_words(seed, position, domain, chunk, CHUNK)))
    return tl.where(s > NEG_INF, pack(s + times(temperature, g), chunk * CHUNK + lane), NONE)


@triton.jit
def race(scores: tl.constexpr, context, bound, e, place, chunk, temperature, seed, position, domain, limit=None):
    """The best (packed key, score) over chunks [N] with noise (e, place): ``scores(context, tokens)`` + T g.

    ``bound`` [N] is at least the best key of each chunk, -inf where there is none. limit: a packed key, from which on
    none takes part: that of a winner leaves the first runner-up.
    """
    best, score = tl.cast(NONE, tl.int64), tl.cast(NEG_INF, tl.float32)
    high = tl.max(bound, 0)
    c = tl.min(tl.where(bound == high, chunk, 0x7FFFFFFF), 0)
    while (high > NEG_INF) & ((high > packed_key(best)) | (c <= packed_token(best) // CHUNK)):
        s = scores(context, c * CHUNK + tl.arange(0, CHUNK))
        here = chunk == c
        key = noisy(
            s,
            temperature,
            seed,
            position,
            domain,
            c,
            tl.sum(tl.where(here, e, 0.0), 0),
            tl.sum(tl.where(here, place, 0), 0),
        )
        if limit is not None:
            key = tl.where(key < limit, key, NONE)
        found = tl.max(key, 0)
        score = tl.where(found > best, tl.max(tl.where(key == found, s, NEG_INF), 0), score)
        best = tl.maximum(best, found)
        bound = tl.where(here, NEG_INF, bound)
        high = tl.max(bound, 0)
        c = tl.min(tl.where(bound == high, chunk, 0x7FFFFFFF), 0)
    return best, score


@triton.jit
def race_kept(m, up, row, top, chunk, floor, ceiling, params, domain, limit=None):
    """`race` over the emulated scores from floor to ceiling of chunks whose maxima are ``top`` [N]."""
    e, place = chunk_noise(params.seed, params.position, domain, chunk)
    bound = tl.where(top >= floor, top + times(params.temperature, -log(e)), NEG_INF)
    kept = Kept(m, up, row, floor, ceiling)
    return race(
        kept_scores, kept, bound, e, place, chunk, params.temperature, params.seed, params.position, domain, limit
    )


@triton.jit
def sums(s, top, c):
    """Sum of exp2((s - top) c) of each chunk: s [N, 256], top [N]."""
    return tl.sum(tl.exp2((s - tl.where(top > NEG_INF, top, 0.0)[:, None]) * c), 1)


@triton.jit
def total(top, sum, best, c):
    """Sum of exp2((s - best) c) of the whole row from its parts."""
    return tl.sum(tl.where(top > NEG_INF, sum * tl.exp2((top - best) * c), 0.0), 0)


@triton.jit
def finish(r, tokens, valid, logprobs, raw, best, score, top, sum, sum_c, params, PROCESSED: tl.constexpr):
    """Writes a row's outputs from its winner and its parts [N]: maxima and sums."""
    ok = (best != NONE) & (best != BAD)
    tl.store(tokens + r, tl.where(ok, packed_token(best), -1).to(tl.int64))
    tl.store(valid + r, ok)
    if logprobs is not None:
        high = tl.max(top, 0)
        nan = tl.where(ok, 0.0, float("nan"))
        full = (score - high) - log(tl.where(ok, total(top, sum, high, LOG2E), 1.0))
        tl.store(raw + r, full + nan)
        if PROCESSED:
            mass = total(top, sum_c, high, params.c)
            full = tl.where(
                params.greedy,
                0.0,
                (score - high) * params.inverse_temperature - log(tl.where(ok & ~params.greedy, mass, 1.0)),
            )
        tl.store(logprobs + r, full + nan)


@triton.jit
def write_runners_up(
    r, runners_up, part_key, part_others, winner, n, SPLITS: tl.constexpr, PARTS: tl.constexpr, OTHERS: tl.constexpr
):
    """Writes the n tokens that come after a row's winner, from the keys of its splits."""
    split, k = tl.arange(0, PARTS), tl.arange(0, OTHERS)
    at = r * SPLITS + split
    keys = tl.full([PARTS], NONE, tl.int64)  # of one split the winner itself
    if SPLITS > 1:
        keys = tl.load(part_key + at, mask=split < SPLITS, other=NONE, cache_modifier=".cg")
    there = (split < SPLITS)[:, None] & (k < n)[None, :]
    others = tl.load(part_others + at[:, None] * n + k[None, :], mask=there, other=NONE, cache_modifier=".cg")
    last = tl.where(winner == BAD, NONE, winner)
    for i in range(0, n):
        most = tl.max(tl.max(tl.where(others < last, others, NONE), 1), 0)
        last = tl.maximum(most, tl.max(tl.where(keys < last, keys, NONE), 0))
        tl.store(runners_up + r * n + i, tl.where(last > NONE, packed_token(last), -1).to(tl.int64))


@triton.jit(do_not_specialize=["seed", "position", "domain", "n"])
def sample_kernel(
    m,
    up,
    sampling,
    seed,
    position,
    domain,
    tokens,
    valid,
    logprobs,
    raw,
    arrived,
    part_key,
    part,
    part_others,
    runners_up,
    n,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    TC: tl.constexpr,
    DIRECT: tl.constexpr,
    PROCESSED: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Grid (rows * SPLITS). part_key [rows, SPLITS], part [rows, SPLITS, 4]: score, maximum, sum, sum at temperature.

    runners_up [rows, n], or None; then part_others [rows, SPLITS, n] has the keys of each split's, SPLITS of 1, too.
    PARTS and OTHERS are the powers of two >= SPLITS and n; PROCESSED: a temperature may not be 1.
    """
    r = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    row = row_of(m, up, r)
    params = params_of(sampling, seed, position, m.V, r // m.slots, r % m.slots)
    out_of_range = ~params.valid
    domain = tl.cast(domain, tl.uint32)
    first = split * (TILES * TC)
    if DIRECT:
        chunk = first + tl.arange(0, TC)
        s, bad = combine(m, up, row, tokens_of(chunk))
        e, place = chunk_noise(params.seed, params.position, domain, chunk)
        word = tl.reshape(token_words(params.seed, params.position, domain, first, TC * CHUNK), [TC, CHUNK])
        g = tl.where(tl.arange(0, CHUNK)[None, :] == place[:, None], -log(e)[:, None], token_gumbel(e[:, None], word))
        key = tl.where(s > NEG_INF, pack(s + times(params.temperature, g), tokens_of(chunk)), NONE)
        best = tl.max(tl.max(key, 1), 0)
        score = tl.max(tl.max(tl.where(key == best, s, NEG_INF), 1), 0)
        top = tl.max(s, 1)
        sum, sum_c = top, top
        if logprobs is not None:
            sum = sums(s, top, LOG2E)
            if PROCESSED:
                sum_c = sums(s, top, params.c)
        poisoned = out_of_range | (tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0)
        if runners_up is not None:
            last = best
            for k in range(0, n):
                last = tl.max(tl.max(tl.where(key < last, key, NONE), 1), 0)
                tl.store(part_others + (r * SPLITS + split) * n + k, last)
    else:
        tile = tl.arange(0, TILES)[:, None]
        tops = tl.full([TILES, TC], NEG_INF, tl.float32)
        all_sum, all_sum_c = tops, tops
        whole, tiles = full_tiles(m, first, TILES, TC)
        size = tl.zeros([TC, CHUNK], tl.float32)
        for t in range(whole):
            s, plain = quick_scores(m, up, row, tokens_of(first + t * TC + tl.arange(0, TC)))
            size = tl.maximum(size, tl.abs(plain), propagate_nan=tl.PropagateNan.ALL)
            top = tl.max(s, 1)
            if logprobs is not None:
                all_sum = tl.where(tile == t, sums(s, top, LOG2E)[None, :], all_sum)
                if PROCESSED:
                    all_sum_c = tl.where(tile == t, sums(s, top, params.c)[None, :], all_sum_c)
            tops = tl.where(tile == t, top[None, :], tops)
        # what is left, or all of it where a sum was not finite
        finite = tl.min(tl.min((size < LARGE).to(tl.int32), 1), 0) != 0
        for t in range(tl.where(finite, whole, 0), tiles):
            s, bad = combine(m, up, row, tokens_of(first + t * TC + tl.arange(0, TC)))
            top = tl.max(s, 1)
            if logprobs is not None:
                all_sum = tl.where(tile == t, sums(s, top, LOG2E)[None, :], all_sum)
                if PROCESSED:
                    all_sum_c = tl.where(tile == t, sums(s, top, params.c)[None, :], all_sum_c)
            tops = tl.where(tile == t, tl.max(tl.where(bad, INF, s), 1)[None, :], tops)
        top = tl.reshape(tops, [TILES * TC])
        sum = tl.reshape(all_sum, [TILES * TC])
        sum_c = tl.reshape(all_sum_c, [TILES * TC])
        poisoned = out_of_range | (tl.max(top, 0) == INF)
        best, score = race_kept(
            m,
            up,
            row,
            tl.where(poisoned, NEG_INF, top),
            first + tl.arange(0, TILES * TC),
            tl.cast(NEG_INF, tl.float32),
            tl.cast(INF, tl.float32),
            params,
            domain,
        )
        if runners_up is not None:
            last = best
            for k in range(0, n):
                last, its_score = race_kept(
                    m,
                    up,
                    row,
                    tl.where(poisoned, NEG_INF, top),
                    first + tl.arange(0, TILES * TC),
                    tl.cast(NEG_INF, tl.float32),
                    tl.cast(INF, tl.float32),
                    params,
                    domain,
                    last,
                )
                tl.store(part_others + (r * SPLITS + split) * n + k, last)
    best = tl.where(poisoned, BAD, best)
    if SPLITS == 1:
        if runners_up is not None:
            tl.debug_barrier()
            write_runners_up(r, runners_up, part_key, part_others, best, n, 1, 1, OTHERS)
        finish(r, tokens, valid, logprobs, raw, best, score, top, sum, sum_c, params, PROCESSED)
    else:
        at = r * SPLITS + split
        tl.store(part_key + at, best)
        if logprobs is not None:
            high = tl.max(top, 0)
            tl.store(part + at * 4, score)
            tl.store(part + at * 4 + 1, high)
            tl.store(part + at * 4 + 2, total(top, sum, high, LOG2E))
            if PROCESSED:
                tl.store(part + at * 4 + 3, total(top, sum_c, high, params.c))
        tl.debug_barrier()
        if tl.atomic_add(arrived + r, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(arrived + r, 0)
            here = tl.arange(0, PARTS) < SPLITS
            all_at = r * SPLITS + tl.arange(0, PARTS)
            keys = tl.load(part_key + all_at, mask=here, other=NONE, cache_modifier=".cg")
            winner = tl.max(keys, 0)
            win = tl.cast(0.0, tl.float32)
            highs, sums_1, sums_c = tl.full([PARTS], NEG_INF, tl.float32), here.to(tl.float32), here.to(tl.float32)
            if logprobs is not None:
                scores = tl.load(part + all_at * 4, mask=here, other=NEG_INF, cache_modifier=".cg")
                win = tl.max(tl.where(keys == winner, scores, NEG_INF), 0)
                highs = tl.load(part + all_at * 4 + 1, mask=here, other=NEG_INF, cache_modifier=".cg")
                sums_1 = tl.load(part + all_at * 4 + 2, mask=here, other=0.0, cache_modifier=".cg")
                if PROCESSED:
                    sums_c = tl.load(part + all_at * 4 + 3, mask=here, other=0.0, cache_modifier=".cg")
            if runners_up is not None:
                write_runners_up(r, runners_up, part_key, part_others, winner, n, SPLITS, PARTS, OTHERS)
            finish(r, tokens, valid, logprobs, raw, winner, win, highs, sums_1, sums_c, params, PROCESSED)
