"""Log-probs, the most likely tokens, entropy and total variation, from the state that `row_kernel` leaves.

Bytes: `logprobs_kernel` reads each logit once more (from L2 where it fits) and writes 4 V; `ids_kernel` reads one token
of each model for each id.
"""

import triton
import triton.language as tl

from .filter import gather, kth
from .rows import Kept, combine, kept_scores, logits_at, params_of, row_of, tokens_of
from .semantics import CHUNK, INF, LOG2E, NEG_INF, NONE, log, packed_key, packed_token, times


@triton.jit
def processed_logprobs(s, token, state, r, params):
    """After temperature and filters."""
    lp = times(s - tl.load(state.best + r), params.inverse_temperature) - tl.load(state.log_kept + r)
    kept = (s >= tl.load(state.floor + r)) & (s <= tl.load(state.ceiling + r)) & (s > NEG_INF)
    lp = tl.where(kept, lp, NEG_INF)
    return tl.where(params.greedy, tl.where(token == tl.load(state.greedy + r), 0.0, NEG_INF), lp)


@triton.jit
def raw_logprobs(s, state, r):
    """Of the emulated distribution."""
    return (s - tl.load(state.best + r)) - tl.load(state.lse + r)


@triton.jit
def changes(params):
    """Whether temperature or filters make the processed distribution another one."""
    return (params.temperature != 1.0) | params.filtered


@triton.jit(do_not_specialize=["seed", "position"])
def logprobs_kernel(
    m,
    up,
    sampling,
    seed,
    position,
    state,
    out,
    SCORES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    TC: tl.constexpr,
):
    """Grid (rows * SPLITS): out float32 [rows, V], log-probs or SCORES."""
    r = (tl.program_id(0) // SPLITS).to(tl.int64)
    row = row_of(m, up, r)
    params = params_of(sampling, seed, position, m.V, r // m.slots, r % m.slots)
    nan = tl.where(tl.load(state.valid + r), 0.0, float("nan"))
    other = changes(params)
    for t in range(TILES):
        token = tokens_of((tl.program_id(0) % SPLITS) * (TILES * TC) + t * TC + tl.arange(0, TC))
        s, _ = combine(m, up, row, token)
        lp = s
        if not SCORES:
            lp = raw_logprobs(s, state, r)
            if other:
                lp = processed_logprobs(s, token, state, r, params)
        tl.store(out + r * row.V + token, lp + nan, mask=token < row.V)


@triton.jit(do_not_specialize=["seed", "position", "number"])
def ids_kernel(m, up, sampling, seed, position, state, ids, number, emitted, path, logprobs, raw, N: tl.constexpr):
    """Grid (rows): log-probs of ids [rows, number] into ``logprobs``.

    With ``raw`` (`verify`: one id a row, -1 where there is none) both kinds; else the processed one where it is
    another. path: of a tree, the slot whose distribution a row's id is from.
    """
    out = tl.program_id(0).to(tl.int64)
    r = out
    if path is not None:
        r = out // m.slots * m.slots + tl.maximum(tl.load(path + out), 0)
    row = row_of(m, up, r)
    params = params_of(sampling, seed, position, m.V, r // m.slots, r % m.slots)
    nan = tl.where(tl.load(state.valid + r), 0.0, float("nan"))
    length = 1
    if emitted is not None:
        length = tl.load(emitted + out // m.slots) - out % m.slots
    for i in range(0, number, N):
        at = i + tl.arange(0, N)
        token = tl.load(ids + out * number + at, mask=at < number, other=0)
        there = (token >= 0) & (token < row.V)  # on a GPU nobody has checked
        there = there & (length > 0)
        token = tl.where(there, token, 0).to(tl.int32)
        s, _ = combine(m, up, row, token)
        full = raw_logprobs(s, state, r)
        lp = processed_logprobs(s, token, state, r, params)
        if raw is not None:
            tl.store(raw + out * number + at, tl.where(there, full + nan, float("nan")), mask=at < number)
        else:
            lp = tl.where(changes(params), lp, full)
        tl.store(logprobs + out * number + at, tl.where(there, lp + nan, float("nan")), mask=at < number)


@triton.jit(do_not_specialize=["n"])
def top_kernel(
    m, up, top, found, buffer, state, ids, logprobs, n, chunks, CP: tl.constexpr, TC: tl.constexpr, N: tl.constexpr
):
    """Grid (rows): the n most likely tokens, ids and logprobs [rows, n]; -1 and -inf where there are fewer.

    Scratch: found int32 [rows, chunks], buffer int64 [rows, V].
    """
    r = tl.program_id(0).to(tl.int64)
    row = row_of(m, up, r)
    chunk = tl.arange(0, CP)
    high = tl.load(top + r * chunks + chunk, mask=chunk < chunks, other=NEG_INF)
    ok = tl.load(state.valid + r)
    high = tl.where(ok, high, NEG_INF)
    low = tl.cast(NEG_INF, tl.float32)
    if ok & (n <= chunks):  # no lower than the n-th largest maximum
        low = kth(top + r * chunks, chunks, n, low, tl.load(state.best + r), N)
    keys = buffer + r * row.V
    kept = Kept(m, up, row, low, tl.cast(INF, tl.float32))
    count = gather(kept_scores, kept, high, chunk, low, found + r * chunks, keys, TC, True)
    last = tl.cast(0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in range(0, n):
        best = tl.full([N], NONE, tl.int64)
        for j in range(0, count, N):
            lane = j + tl.arange(0, N)
            key = tl.load(keys + lane, mask=lane < count, other=NONE)
            best = tl.maximum(best, tl.where(key < last, key, NONE))
        last = tl.max(best, 0)
        there = last > NONE
        tl.store(ids + r * n + i, tl.where(there, packed_token(last), -1).to(tl.int64))
        tl.store(logprobs + r * n + i, tl.where(there, raw_logprobs(packed_key(last), state, r), NEG_INF))


@triton.jit
def diagnostics_kernel(m, up, state, z, stride, entropy, tv, chunks, TC: tl.constexpr):
    """Grid (rows): entropy of the emulated distribution, and its total variation to the tuned model's own (logits z)
    over the tokens not excluded."""
    r = tl.program_id(0).to(tl.int64)
    row = row_of(m, up, r)
    at, slot, there = logits_at(m, r)  # not `_`, which the loops below carry
    z = z + at * stride
    best, sum = tl.full([TC, CHUNK], NEG_INF, tl.float32), tl.zeros([TC, CHUNK], tl.float32)
    nonfinite = tl.zeros([TC, CHUNK], tl.int32)  # NaN or +inf: a tuned model of weight 0 may hold them
    for t in range(0, chunks, TC):
        token = tokens_of(t + tl.arange(0, TC))
        s, _ = combine(m, up, row, token)
        x = tl.load(z + token, mask=s > NEG_INF, other=NEG_INF).to(tl.float32)
        nonfinite = tl.where(x < INF, nonfinite, 1)
        higher = tl.maximum(best, x)
        shift = tl.where((higher > NEG_INF) & (higher < INF), higher, 0.0)
        sum = times(sum, tl.exp2((best - shift) * LOG2E)) + tl.exp2((x - shift) * LOG2E)
        best = higher
    high = tl.max(tl.max(best, 1), 0)
    high = tl.where((high > NEG_INF) & (high < INF), high, 0.0)
    log_sum = log(tl.maximum(tl.sum(tl.sum(sum * tl.exp2((best - high) * LOG2E), 1), 0), 1e-30))
    h, d = tl.zeros([TC, CHUNK], tl.float32), tl.zeros([TC, CHUNK], tl.float32)
    for t in range(0, chunks, TC):
        token = tokens_of(t + tl.arange(0, TC))
        s, _ = combine(m, up, row, token)
        lp = raw_logprobs(s, state, r)
        p = tl.exp2(lp * LOG2E)
        x = tl.load(z + token, mask=s > NEG_INF, other=NEG_INF).to(tl.float32)
        h += tl.where(p > 0.0, times(p, lp), 0.0)
        d += tl.abs(p - tl.exp2(((x - high) - log_sum) * LOG2E))
    nan = tl.where(tl.load(state.valid + r), 0.0, float("nan"))
    tl.store(entropy + r, nan - tl.sum(tl.sum(h, 1), 0))
    fine = tl.max(tl.max(nonfinite, 1), 0) == 0
    tl.store(tv + r, tl.where(fine, 0.5 * tl.sum(tl.sum(d, 1), 0) + nan, float("nan")))
