"""What filters keep of a row, an interval of scores; the up-scaling filter; and what follows from them.

Two launches: `stats_kernel` reads each logit once and leaves every chunk's maximum and sum; `row_kernel`, a program a
row, finds the threshold among the few tokens that can matter (those of chunks whose maximum is high enough, read again
from L2), then samples there. Bytes: J V itemsize a row, 8 V / 256 for the chunks, and what is looked into again.

Masses are exact integers. The one sum over the whole row, the total of top-p, is first taken in float32 with an error
below ``slack``; only where that leaves the last token in doubt is the row summed exactly.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ... import parameters
from .race import race_kept, sums, total
from .rows import (
    Kept,
    combine,
    full_tiles,
    is_allowed,
    kept_scores,
    own_scores,
    params_of,
    quick_scores,
    raw_scores,
    row_of,
    tokens_of,
    value,
)
from .semantics import (
    BEST_MASS,
    CHUNK,
    INF,
    LARGE,
    LOG2E,
    MASS_ONE,
    NEG_INF,
    NONE,
    TINY,
    log,
    log_total,
    mass,
    mass_limit,
    mean_score,
    ordered,
    pack,
    packed_token,
    surprise,
    times,
    typical_interval,
    unordered,
)

HUGE = tl.constexpr(1 << 62)
NOWHERE = tl.constexpr(parameters.MAX_VOCAB)  # a chunk beyond every vocabulary
NO_MASS = tl.constexpr(parameters.MASS_BITS + 1.0)  # scores so many powers of two below the best have none


class State(NamedTuple):
    """What later kernels need of every row, pointers [rows]; total only where exact masses are asked for."""

    best: object  # float32, the largest score
    floor: object  # float32, the smallest score kept
    ceiling: object  # float32, the largest one
    lse: object  # float32, log of the sum of exp(s - best)
    log_kept: object  # float32, the same of what is kept, at temperature
    total: object  # int64 mass of what is kept, or 0: not filtered, `mass_kernel` adds it up
    greedy: object  # int64, the token of a greedy row
    valid: object  # bool


@triton.jit
def put_stats(s, bad, row, chunk, chunks, top, sum, sum_c, c):
    """Maxima and sums of scores [TC, 256] to their place in the row."""
    high = tl.max(s, 1)
    there = chunk < chunks
    tl.store(top + row + chunk, tl.max(tl.where(bad, INF, s), 1), mask=there)
    if sum is not None:
        tl.store(sum + row + chunk, sums(s, high, LOG2E), mask=there)
    if sum_c is not None:
        tl.store(sum_c + row + chunk, sums(s, high, c), mask=there)


@triton.jit(do_not_specialize=["seed", "position"])
def stats_kernel(
    m,
    up,
    sampling,
    seed,
    position,
    top,
    sum,
    sum_c,
    chunks,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    TC: tl.constexpr,
):
    """Grid (rows * SPLITS): maxima (+inf: a bad row) and sums of every chunk, [rows, chunks]."""
    r = (tl.program_id(0) // SPLITS).to(tl.int64)
    row = row_of(m, up, r)
    c = params_of(sampling, seed, position, m.V, r // m.slots, r % m.slots).c
    first = (tl.program_id(0) % SPLITS) * (TILES * TC)
    whole, tiles = full_tiles(m, first, TILES, TC)
    size = tl.zeros([TC, CHUNK], tl.float32)
    for t in range(whole):
        chunk = first + t * TC + tl.arange(0, TC)
        s, plain = quick_scores(m, up, row, tokens_of(chunk))
        size = tl.maximum(size, tl.abs(plain), propagate_nan=tl.PropagateNan.ALL)
        put_stats(s, False, r * chunks, chunk, chunks, top, sum, sum_c, c)
    # what is left, or all of it where a sum was not finite
    finite = tl.min(tl.min((size < LARGE).to(tl.int32), 1), 0) != 0
    for t in range(tl.where(finite, whole, 0), tiles):
        chunk = first + t * TC + tl.arange(0, TC)
        s, bad = combine(m, up, row, tokens_of(chunk))
        put_stats(s, bad, r * chunks, chunk, chunks, top, sum, sum_c, c)


# --- searching -----------------------------------------------------------------------------------------------------


@triton.jit
def gather(
    scores: tl.constexpr, context, top, chunk, low, found, buffer, TC: tl.constexpr, PACKED: tl.constexpr = False
):
    """All ``scores`` >= low of chunks [N] with maxima ``top`` into ``buffer``; their number. found: [N] scratch.

    PACKED: with their tokens, as int64.
    """
    take = (top >= low) & (top > NEG_INF)
    number = tl.sum(take.to(tl.int32), 0)
    tl.store(found + tl.cumsum(take.to(tl.int32), 0) - 1, chunk, mask=take)
    tl.debug_barrier()
    count = 0
    for i in range(0, number, TC):
        lane = i + tl.arange(0, TC)
        c = tl.load(found + lane, mask=lane < number, other=NOWHERE)
        s = scores(context, tokens_of(c))
        keep = tl.reshape(((s >= low) & (s > NEG_INF)).to(tl.int32), [TC * 256])
        x = s
        if PACKED:
            x = pack(s, tokens_of(c))
        x = tl.reshape(x, [TC * 256])
        tl.store(buffer + count + tl.cumsum(keep, 0) - 1, x, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.debug_barrier()
    return count


@triton.jit
def keys_of(x, floor, mean, NEAREST: tl.constexpr):
    """What scores are searched by: themselves; `NEAREST`: how near those from ``floor`` on are to ``mean``."""
    if NEAREST:
        return tl.where(x >= floor, -tl.abs(x - mean), NEG_INF)
    else:
        return x


@triton.jit
def find_threshold(
    buffer, count, low, high, limit, best, c, floor, mean, N: tl.constexpr, MASS: tl.constexpr, NEAREST: tl.constexpr
):
    """The smallest key (`keys_of`) of ``buffer`` in [low, high] with less than ``limit`` above it, in number or mass.

    Also what is above it, and what would be above anything lower (HUGE: not looked at). Bisection over the order of
    float32, each end moved on to the next score there is.
    """
    low, high = ordered(low).to(tl.int64), ordered(high).to(tl.int64)
    above, below = tl.cast(0, tl.int64), tl.cast(HUGE, tl.int64)
    while low < high:
        middle = (low + ((high - low) >> 1)).to(tl.int32)
        a = tl.zeros([N], tl.int64)
        least, most = tl.full([N], 0x7FFFFFFF, tl.int32), tl.full([N], -0x7FFFFFFF, tl.int32)
        for i in range(0, count, N):
            lane = i + tl.arange(0, N)
            x = tl.load(buffer + lane, mask=lane < count, other=NEG_INF)
            o = ordered(keys_of(x, floor, mean, NEAREST))
            over = o > middle
            if MASS:
                a += tl.where(over, mass(x, best, c), 0)
            else:
                a += over.to(tl.int64)
            least = tl.minimum(least, tl.where(over, o, 0x7FFFFFFF))
            most = tl.maximum(most, tl.where(over, -0x7FFFFFFF, o))
        sum = tl.sum(a, 0)
        under = sum < limit
        above = tl.where(under, sum, above)
        below = tl.where(under, below, sum)
        next = tl.maximum(low, tl.max(most, 0).to(tl.int64))
        low = tl.where(under, low, tl.minimum(high, tl.min(least, 0).to(tl.int64)))
        high = tl.where(under, next, high)
    return unordered(high.to(tl.int32)), above, below


@triton.jit
def kth(buffer, count, k, low, high, N: tl.constexpr):
    """The k-th largest of ``buffer``; it lies in [low, high]."""
    x, above, below = find_threshold(buffer, count, low, high, k, high, 0.0, 0.0, 0.0, N, False, False)
    return x


@triton.jit
def nucleus(buffer, count, low, best, c, limit, N: tl.constexpr):
    """`find_threshold` where the mass above reaches ``limit``; it lies in [low, best]."""
    return find_threshold(buffer, count, low, best, limit, best, c, 0.0, 0.0, N, True, False)


@triton.jit
def mass_in(buffer, count, floor, ceiling, best, c, N: tl.constexpr):
    """The exact mass of the scores in ``buffer`` from ``floor`` to ``ceiling``."""
    a = tl.zeros([N], tl.int64)
    for i in range(0, count, N):
        lane = i + tl.arange(0, N)
        x = tl.load(buffer + lane, mask=lane < count, other=NEG_INF)
        a += tl.where((x >= floor) & (x <= ceiling) & (lane < count), mass(x, best, c), 0)
    return tl.sum(a, 0)


@triton.jit
def typical(buffer, count, floor, best, p, c, N: tl.constexpr):
    """Floor and ceiling of what typical_p keeps of the scores in ``buffer`` from ``floor`` on."""
    a, b = tl.zeros([N], tl.int64), tl.zeros([N], tl.int64)
    for i in range(0, count, N):
        lane = i + tl.arange(0, N)
        x = tl.load(buffer + lane, mask=lane < count, other=NEG_INF)
        left = (x >= floor) & (lane < count)
        a += tl.where(left, mass(x, best, c), 0)
        b += tl.where(left, surprise(x, best, c), 0)
    all_mass = tl.sum(a, 0)
    mean = mean_score(best, c, tl.sum(b, 0), all_mass)
    low, high = tl.cast(NEG_INF, tl.float32), tl.cast(0.0, tl.float32)
    reach, above, below = find_threshold(
        buffer, count, low, high, mass_limit(p, all_mass), best, c, floor, mean, N, True, True
    )
    return typical_interval(mean, -reach, floor)


@triton.jit
def mass_of_row(context, best, c, chunks, TC: tl.constexpr):
    """The exact mass of the whole row."""
    a = tl.zeros([TC, 256], tl.int64)
    for i in range(0, chunks, TC):
        s = kept_scores(context, tokens_of(i + tl.arange(0, TC)))
        a += tl.where(s > NEG_INF, mass(s, best, c), 0)
    return tl.sum(tl.sum(a, 1), 0)


@triton.jit
def cutoff(best, p, share, temperature, V):
    """A score too low for the nucleus of mass p, where all of the row is at least ``share`` times the best's mass:
    the V tokens at or below it hold less than 1 - p together."""
    low = best + temperature * (log(tl.maximum((1.0 - p) * share / V, 1e-30)) - 1e-3)
    return low - tl.abs(low) * 1e-6


@triton.jit
def kept_interval(
    m,
    up,
    row,
    params,
    best,
    top,
    tops,
    approximate,
    chunk,
    chunks,
    found,
    buffer,
    slack,
    TC: tl.constexpr,
    N: tl.constexpr,
    TYPICAL: tl.constexpr,
):
    """The smallest and the largest score that filters keep, and the exact mass kept."""
    use_k = params.top_k > 0
    use_p = params.top_p < 1.0
    everything, ceiling = tl.cast(NEG_INF, tl.float32), tl.cast(INF, tl.float32)
    least = everything
    if params.min_p > 0.0:
        least = best + times(params.temperature, log(tl.maximum(params.min_p, TINY)))
    low = least
    if use_k:
        low = everything
        if params.top_k <= chunks:  # no lower than the k-th largest maximum
            low = kth(tops, chunks, params.top_k, low, best, N)
    elif use_p:
        low = cutoff(best, params.top_p, approximate * (1.0 - slack), params.temperature, row.V.to(tl.float32))
    elif TYPICAL:
        low = tl.maximum(low, best - tl.div_rn(NO_MASS, params.c))
    count = gather(kept_scores, Kept(m, up, row, everything, ceiling), top, chunk, low, found, buffer, TC)
    floor = everything
    if use_k:
        floor = kth(buffer, count, params.top_k, low, best, N)
    if use_p:
        if use_k:
            all_mass = mass_in(buffer, count, floor, ceiling, best, params.c, N)
            floor, above, below = nucleus(buffer, count, floor, best, params.c, mass_limit(params.top_p, all_mass), N)
        else:
            units = (approximate * MASS_ONE).to(tl.float64)
            error = units * slack + row.V
            floor, above, below = nucleus(buffer, count, low, best, params.c, mass_limit(params.top_p, units), N)
            if (above >= mass_limit(params.top_p, units - error)) | (below < mass_limit(params.top_p, units + error)):
                all_mass = mass_of_row(Kept(m, up, row, everything, ceiling), best, params.c, chunks, TC)
                floor, above, below = nucleus(buffer, count, low, best, params.c, mass_limit(params.top_p, all_mass), N)
    floor = tl.maximum(floor, least)
    if TYPICAL:
        if params.typical_p < 1.0:
            floor, ceiling = typical(buffer, count, floor, best, params.typical_p, params.c, N)
    return floor, ceiling, mass_in(buffer, count, floor, ceiling, best, params.c, N)


@triton.jit(do_not_specialize=["seed", "position", "domain", "n"])
def row_kernel(
    m,
    up,
    sampling,
    seed,
    position,
    domain,
    top,
    sum,
    sum_c,
    found,
    buffer,
    slack,
    state,
    tokens,
    valid,
    logprobs,
    raw,
    runners_up,
    n,
    chunks,
    CP: tl.constexpr,
    TC: tl.constexpr,
    N: tl.constexpr,
    FILTERED: tl.constexpr,
    TYPICAL: tl.constexpr,
):
    """Grid (rows): thresholds from `stats_kernel`'s maxima and sums [rows, chunks]; CP is the power of two >= chunks.

    Writes ``state`` where it is asked for, samples where ``tokens`` is, and with them ``runners_up`` [rows, n].
    Scratch: found int32 [rows, chunks], buffer float32 [rows, V].
    """
    r = tl.program_id(0).to(tl.int64)
    row = row_of(m, up, r)
    params = params_of(sampling, seed, position, m.V, r // m.slots, r % m.slots)
    chunk = tl.arange(0, CP)
    here = chunk < chunks
    tops = top + r * chunks
    high = tl.load(tops + chunk, mask=here, other=NEG_INF)
    best = tl.max(high, 0)
    ok = (best < INF) & (best > NEG_INF) & params.valid
    high = tl.where(ok, high, NEG_INF)
    best = tl.where(ok, best, 0.0)
    lse, approximate = 0.0, 1.0
    if sum is not None:
        lse = log(tl.maximum(total(high, tl.load(sum + r * chunks + chunk, mask=here, other=0.0), best, LOG2E), 1.0))
    if sum_c is not None:
        parts = tl.load(sum_c + r * chunks + chunk, mask=here, other=0.0)
        approximate = tl.maximum(total(high, parts, best, params.c), 1.0)
    floor, ceiling = tl.cast(NEG_INF, tl.float32), tl.cast(INF, tl.float32)
    mass_kept = tl.cast(0, tl.int64)
    log_kept = log(tl.cast(approximate, tl.float32))
    if FILTERED:
        if ok & params.filtered:
            floor, ceiling, mass_kept = kept_interval(
                m,
                up,
                row,
                params,
                best,
                high,
                tops,
                approximate,
                chunk,
                chunks,
                found + r * chunks,
                buffer + r * row.V,
                slack,
                TC,
                N,
                TYPICAL,
            )
            if mass_kept > 0:
                log_kept = log_total(mass_kept)
    if params.greedy:
        floor, log_kept, mass_kept = best, 0.0, tl.cast(BEST_MASS, tl.int64)
    token = tl.cast(-1, tl.int64)
    if (tokens is not None) or params.greedy:
        winner, score = race_kept(m, up, row, high, chunk, floor, ceiling, params, tl.cast(domain, tl.uint32))
        token = tl.where(winner > NONE, packed_token(winner), -1).to(tl.int64)
        if tokens is not None:
            tl.store(tokens + r, token)
            tl.store(valid + r, ok)
        if logprobs is not None:
            nan = tl.where(ok, 0.0, float("nan"))
            tl.store(raw + r, (score - best) - lse + nan)
            tl.store(
                logprobs + r, tl.where(params.greedy, 0.0, (score - best) * params.inverse_temperature - log_kept) + nan
            )
        if runners_up is not None:
            last, lowest = winner, tl.where(params.greedy, NEG_INF, floor)
            for k in range(0, n):
                last, its_score = race_kept(
                    m, up, row, high, chunk, lowest, ceiling, params, tl.cast(domain, tl.uint32), last
                )
                tl.store(runners_up + r * n + k, tl.where(last > NONE, packed_token(last), -1).to(tl.int64))
    if state is not None:
        tl.store(state.best + r, best)
        tl.store(state.floor + r, floor)
        tl.store(state.ceiling + r, ceiling)
        tl.store(state.lse + r, lse)
        tl.store(state.log_kept + r, log_kept)
        tl.store(state.total + r, mass_kept)
        tl.store(state.greedy + r, token)
        tl.store(state.valid + r, ok)


# --- up-scaling filter ---------------------------------------------------------------------------------------------


@triton.jit
def own_logits(m, row, token, s, j: tl.constexpr):
    """Model j's logits where scores s exclude nothing, -inf elsewhere."""
    z = tl.load(row.z[j] + token, mask=token < row.V, other=NEG_INF).to(tl.float32)
    return tl.where(s > NEG_INF, z, NEG_INF)


@triton.jit(do_not_specialize=["rows"])
def own_stats_kernel(m, up, top, rows, chunks, SPLITS: tl.constexpr, TILES: tl.constexpr, TC: tl.constexpr):
    """Grid (rows * SPLITS): every model's own maximum of every chunk over tokens not excluded, [J, rows, chunks]."""
    r = (tl.program_id(0) // SPLITS).to(tl.int64)
    row = row_of(m, up, r)
    if row.upscaled:
        first = (tl.program_id(0) % SPLITS) * (TILES * TC)
        whole, tiles = full_tiles(m, first, TILES, TC)
        size = tl.zeros([TC, CHUNK], tl.float32)
        for t in range(whole):
            chunk = first + t * TC + tl.arange(0, TC)
            token = tokens_of(chunk)
            plain = tl.zeros([TC, CHUNK], tl.float32)
            for j in tl.static_range(len(m.z)):
                z = tl.load(row.z[j] + token).to(tl.float32)
                plain = plain + times(row.w[j], z)
                if m.mask is not None:
                    z = tl.where(is_allowed(row, token, True), z, NEG_INF)
                tl.store(top + (j * rows + r) * chunks + chunk, tl.max(z, 1), mask=chunk < chunks)
            size = tl.maximum(size, tl.abs(plain), propagate_nan=tl.PropagateNan.ALL)
        # what is left, or all of it where a sum was not finite: some token may be excluded
        finite = tl.min(tl.min((size < LARGE).to(tl.int32), 1), 0) != 0
        for t in range(tl.where(finite, whole, 0), tiles):
            chunk = first + t * TC + tl.arange(0, TC)
            token = tokens_of(chunk)
            s, bad, own = raw_scores(m, up, row, token)
            for j in tl.static_range(len(m.z)):
                tl.store(
                    top + (j * rows + r) * chunks + chunk,
                    tl.max(own_logits(m, row, token, s, j), 1),
                    mask=chunk < chunks,
                )


@triton.jit
def own_best(top, at, chunks, CP: tl.constexpr):
    """The largest of the maxima of one model and row, 0 where there is none, and they themselves."""
    chunk = tl.arange(0, CP)
    high = tl.load(top + at * chunks + chunk, mask=chunk < chunks, other=NEG_INF)
    best = tl.max(high, 0)
    return tl.where((best > NEG_INF) & (best < INF), best, 0.0), high


@triton.jit(do_not_specialize=["rows"])
def own_mass_kernel(
    m, up, top, totals, rows, chunks, SPLITS: tl.constexpr, TILES: tl.constexpr, TC: tl.constexpr, CP: tl.constexpr
):
    """Grid (rows * SPLITS): adds every model's exact mass to totals int64 [J, rows], which starts at 0."""
    r = (tl.program_id(0) // SPLITS).to(tl.int64)
    row = row_of(m, up, r)
    if row.upscaled:
        bests = ()
        for j in tl.static_range(len(m.z)):
            best, high = own_best(top, j * rows + r, chunks, CP)
            bests = bests + (best,)
        for t in range(TILES):
            token = tokens_of((tl.program_id(0) % SPLITS) * (TILES * TC) + t * TC + tl.arange(0, TC))
            s, bad, own = raw_scores(m, up, row, token)
            for j in tl.static_range(len(m.z)):
                z = own_logits(m, row, token, s, j)
                a = tl.where(z > NEG_INF, mass(z, bests[j], LOG2E), 0)
                tl.atomic_add(totals + j * rows + r, tl.sum(tl.sum(a, 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def own_row_kernel(
    m, up, top, totals, found, buffer, rows, chunks, CP: tl.constexpr, TC: tl.constexpr, N: tl.constexpr
):
    """Grid (rows): `Upscale` from the masses: what to take off in nucleus and tail, and where the nucleus ends."""
    r = tl.program_id(0).to(tl.int64)
    row = row_of(m, up, r)
    if row.upscaled:
        shift = tl.cast(0.0, tl.float32)
        for j in tl.static_range(len(m.z)):
            best, high = own_best(top, j * rows + r, chunks, CP)
            lse = best + log_total(tl.maximum(tl.load(totals + j * rows + r), 1))
            shift = tl.where(row.w[j] != 0, shift + times(row.w[j], lse), shift)
        all_mass = tl.maximum(tl.load(totals + row.tuned * rows + r), 1)
        best, high = own_best(top, row.tuned * rows + r, chunks, CP)
        p = value(up.top_p, up.top_p_value, r // m.slots, tl.float32)
        share = all_mass.to(tl.float32) * 9.0949e-13  # a little below 2^-40
        low = cutoff(best, p, share, 1.0, row.V.to(tl.float32))
        count = gather(
            own_scores,
            Kept(m, up, row, 0.0, 0.0),
            high,
            tl.arange(0, CP),
            low,
            found + r * chunks,
            buffer + r * row.V,
            TC,
        )
        floor, above, below = nucleus(buffer + r * row.V, count, low, best, LOG2E, mass_limit(p, all_mass), N)
        tl.store(up.nucleus_floor + r, floor)
        tl.store(up.nucleus_shift + r, shift)
        tl.store(up.tail_shift + r, best + log_total(all_mass))
