"""What a launch is given, and a row's scores from it.

A row r of a launch is slot ``r % slots`` of batch row ``r // slots`` (`sample`: one slot). Rows of the tuned model's
up-scaling filter carry `Upscale`.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from ...parameters import NAMES, PARAMETERS
from .semantics import CHUNK, GREEDY, INF, LARGE, LOG2E, MASKED, NEG_INF, TINY, in_range, row_seed, times

COUNT = tl.constexpr(len(PARAMETERS))
INTEGER = tl.constexpr(tuple(p.type is int for p in PARAMETERS))
FILTER = tl.constexpr(tuple(p.stage == "filter" for p in PARAMETERS))
OFF, LOW, HIGH = (
    tl.constexpr(tuple(float(x) for x in column)) for column in zip(*((p.off, p.low, p.high) for p in PARAMETERS))
)
TEMPERATURE, TOP_K = tl.constexpr(NAMES.index("temperature")), tl.constexpr(NAMES.index("top_k"))


class Models(NamedTuple):
    """Logits and weights of the J models of a launch."""

    z: tuple  # J pointers
    stride: tuple  # J strides of a batch row, in elements
    slot_stride: tuple  # J strides of a slot
    index: object  # pointer to int64, or None: the row of the logits that each row reads
    logit_rows: object  # how many there are
    w: object  # pointer to float32 weights, or None
    w_stride: object  # 0 or J: of a batch row
    numbers: tuple  # J numbers where w is None
    mask: object  # pointer to int32 words, or None
    words: object  # words of a row
    starts: object  # token_bias, `workspace.SortedBias`: pointers, or Nones
    ids: object
    values: object
    entries: object  # of a row
    V: object
    slots: object


class Sampling(NamedTuple):
    """Per-row parameters in the order of the table: a pointer [B], or None and a number.

    The numbers of seed and position are arguments of their own, for Triton compiles anew for an integer that is 1 or
    divisible by 16; the others are floats, integers too (a top_k that is on is below 2^22, and exact).
    """

    pointers: tuple
    numbers: tuple
    seed: object
    position: object
    depths: object  # int64 [B, slots] or None: how far a slot's position is from the row's
    slots: object


class Upscale(NamedTuple):
    """The up-scaling filter's state of every row (pointers [rows]), or Nones."""

    top_p: object  # float32 upscale_top_p [B] or None, and a number
    top_p_value: object
    nucleus_floor: object  # float32: the smallest of the tuned model's logits in its nucleus
    nucleus_shift: object  # float32: sum_j w_j lse_j, taken off scores in the nucleus
    tail_shift: object  # float32: lse of the tuned model, taken off its logits in the tail
    tuned: object  # constexpr: which model


class Row(NamedTuple):
    """One row: base pointers, weights, mask.

    Loops use what is here: inside one, Triton 3.6 loses the compile-time values (1 is one) of a kernel's own tuples.
    """

    z: tuple
    w: tuple
    mask: object
    starts: object  # token_bias
    ids: object
    values: object
    upscaled: object  # whether the up-scaling filter is on; the rest of it as in Upscale
    nucleus_floor: object
    nucleus_shift: object
    tail_shift: object
    tuned: object  # constexpr
    V: object


# One row's sampling parameters as numbers, all off where one is out of range, which makes the row invalid, and what
# follows from them: scores times c are base-2 exponents; filtered: some token may be left out.
RowParams = namedtuple(
    "RowParams", [*NAMES, "valid", "greedy", "inverse_temperature", "c", "filtered", "seed", "position"]
)


@triton.jit
def value(pointer, number, b, dtype: tl.constexpr):
    if pointer is None:
        return tl.cast(number, dtype)
    else:
        return tl.load(pointer + b).to(dtype)


@triton.jit
def scales_of(temperature):
    """Whether a temperature is greedy, it (0 where greedy), and one over it (0 where greedy)."""
    greedy = temperature < GREEDY
    temperature = tl.where(greedy, 0.0, temperature)
    return greedy, temperature, tl.where(greedy, 0.0, tl.div_rn(1.0, tl.where(greedy, 1.0, temperature)))


@triton.jit
def seed_of(pointer, number, b):
    if pointer is None:
        return row_seed(tl.cast(number, tl.int64), b)
    else:
        return tl.load(pointer + b)


@triton.jit
def noise_of(s, seed, position, b, slot):
    """Seed and position of batch row b at a slot."""
    if s.depths is not None:
        slot = tl.load(s.depths + b * s.slots + slot)
    return seed_of(s.seed, seed, b), value(s.position, position, b, tl.int64) + slot


@triton.jit
def params_of(s, seed, position, V, b, slot):
    """`RowParams` of batch row b at a slot."""
    given = ()
    valid = True
    for i in tl.static_range(COUNT):
        if INTEGER[i]:
            x = value(s.pointers[i], s.numbers[i], b, tl.int64)
        else:
            x = value(s.pointers[i], s.numbers[i], b, tl.float32)
            valid = valid & in_range(x, LOW[i], HIGH[i])
        given = given + (x,)
    values = ()
    filtered = False
    for i in tl.static_range(COUNT):
        off = tl.cast(OFF[i], given[i].dtype)
        x = tl.where(valid, given[i], off)
        if i == TOP_K:
            x = tl.where((x < 0) | (x >= V), off, x)
        if FILTER[i]:
            filtered = filtered | (x != off)
        if i == TEMPERATURE:
            greedy, x, inverse_temperature = scales_of(x)
        values = values + (x,)
    seed, position = noise_of(s, seed, position, b, slot)
    return RowParams(
        *values, valid, greedy, inverse_temperature, inverse_temperature * LOG2E, filtered & ~greedy, seed, position
    )


@triton.jit
def logits_at(m, r):
    """Where row r's logits are: batch row and slot, or row and 0 of an index; and whether the index names a row."""
    if m.index is None:
        return r // m.slots, r % m.slots, True
    else:
        at = tl.load(m.index + r)
        there = (at >= 0) & (at < m.logit_rows)
        return tl.where(there, at, 0), tl.cast(0, tl.int64), there


@triton.jit
def row_of(m, up, r):
    """`Row` r of the launch; r is int64. Where an index names no row its first weight, and so every score, is NaN."""
    b = r // m.slots
    at, slot, there = logits_at(m, r)
    z, w = (), ()
    for j in tl.static_range(len(m.z)):
        z = z + (m.z[j] + at * m.stride[j] + slot * m.slot_stride[j],)
        if m.w is None:
            weight = tl.cast(m.numbers[j], tl.float32)
        else:
            weight = tl.load(m.w + b * m.w_stride + j).to(tl.float32)
        if (m.index is not None) and j == 0:
            weight = tl.where(there, weight, float("nan"))
        w = w + (weight,)
    mask, starts, ids, values = r, r, r, r  # not None, as it returns
    upscaled, nucleus_floor, nucleus_shift, tail_shift = False, 0.0, 0.0, 0.0
    if m.mask is not None:
        mask = m.mask + r * m.words
    if m.starts is not None:
        starts = m.starts + r * ((m.V + (CHUNK - 1)) // CHUNK + 1)
        ids, values = m.ids + r * m.entries, m.values + r * m.entries
    if up.nucleus_floor is not None:
        p = value(up.top_p, up.top_p_value, b, tl.float32)
        upscaled = (p >= TINY) & (p < 1.0)
        nucleus_floor = tl.load(up.nucleus_floor + r)
        nucleus_shift = tl.load(up.nucleus_shift + r)
        tail_shift = tl.load(up.tail_shift + r)
    V = tl.cast(m.V, tl.int32)
    return Row(z, w, mask, starts, ids, values, upscaled, nucleus_floor, nucleus_shift, tail_shift, up.tuned, V)


@triton.jit
def is_allowed(row, token, in_bounds):
    word = tl.load(row.mask + (token >> 5), mask=in_bounds, other=0)
    return ((word >> (token & 31)) & 1) != 0


@triton.jit
def scaled(up, row, s, tuned_logits):
    """Scores under the up-scaling filter: in the tuned model's nucleus normalised, in the tail its own."""
    x = tl.where(tuned_logits >= row.nucleus_floor, s - row.nucleus_shift, tuned_logits - row.tail_shift)
    return tl.where(s > NEG_INF, tl.where(row.upscaled, x, s), NEG_INF)


@triton.jit
def raw_scores(m, up, row, token):
    """sum_j w_j z_j (-inf: excluded, or beyond V), where the row is bad, and the tuned model's logits (`Upscale`)."""
    tl.static_assert(row.tuned is not None)
    in_bounds = token < row.V
    s = tl.zeros(token.shape, tl.float32)
    low = tl.full(token.shape, INF, tl.float32)
    high = tl.full(token.shape, NEG_INF, tl.float32)
    tuned_logits = s
    for j in tl.static_range(len(row.z)):
        w = row.w[j]
        reads = in_bounds
        if up.nucleus_floor is not None and j == row.tuned:
            reads = tl.where((w != 0) | row.upscaled, in_bounds, False)
        elif m.w is not None:
            reads = tl.where(w != 0, in_bounds, False)
        z = tl.load(row.z[j] + token, mask=reads, other=0.0).to(tl.float32)
        low = tl.minimum(low, z)
        high = tl.maximum(high, z, propagate_nan=tl.PropagateNan.ALL)
        if up.nucleus_floor is not None and j == row.tuned:
            tuned_logits = z
            s = tl.where(w != 0, s + times(w, z), s)
        else:
            s = s + times(w, z)
    s = tl.where((low == NEG_INF) | ((low <= MASKED) & ~(tl.abs(s) < LARGE)) | ~in_bounds, NEG_INF, s)
    bad = ~(high < INF) | ~(s < INF)
    if m.mask is not None:
        allowed = is_allowed(row, token, in_bounds)
        s = tl.where(allowed, s, NEG_INF)
        bad = bad & allowed
    return s, bad, tuned_logits


@triton.jit
def biased(row, token, s):
    """Scores with their entries of token_bias, where they are not excluded."""
    chunk = tl.minimum(token // CHUNK, (row.V - 1) // CHUNK)
    first = tl.load(row.starts + chunk)
    count = tl.load(row.starts + chunk + 1) - first
    most = count
    if token.type.is_block():
        most = tl.max(count)
    for i in range(0, most):
        at = tl.where(i < count, first + i, first)
        here = (tl.load(row.ids + at, mask=i < count, other=-1) == token) & (s > NEG_INF)
        s = tl.where(here, s + tl.load(row.values + at, mask=here, other=0.0), s)
    return s


@triton.jit
def combine(m, up, row, token):
    """Emulated scores of tokens (-inf: excluded, or beyond V), and where the row is bad."""
    s, bad, tuned_logits = raw_scores(m, up, row, token)
    if up.nucleus_floor is not None:
        s = scaled(up, row, s, tuned_logits)
        bad = bad | ~(s < INF)  # overflown
    if m.starts is not None:
        s = biased(row, token, s)
        bad = bad | ~(s < INF)
    return s, bad


@triton.jit
def quick_scores(m, up, row, token):
    """Emulated scores of tokens below V, and the plain sums: where one is LARGE or not finite, `combine` decides."""
    s = tl.zeros(token.shape, tl.float32)
    if len(row.z) > 0:
        s = times(row.w[0], tl.load(row.z[0] + token).to(tl.float32))
    tuned_logits = s
    for j in tl.static_range(len(row.z)):
        z = tl.load(row.z[j] + token).to(tl.float32)
        if j > 0:
            s = s + times(row.w[j], z)
        if up.nucleus_floor is not None and j == row.tuned:
            tuned_logits = z
    plain = s
    if up.nucleus_floor is not None:
        s = scaled(up, row, s, tuned_logits)
        plain = tl.maximum(tl.abs(plain), tl.abs(s), propagate_nan=tl.PropagateNan.ALL)
    if m.mask is not None:
        s = tl.where(is_allowed(row, token, True), s, NEG_INF)
    return s, plain


@triton.jit
def full_tiles(m, first, TILES: tl.constexpr, TC: tl.constexpr):
    """Of the TILES tiles of TC chunks from chunk ``first``: how many lie below V whole, and how many at all."""
    left = m.V - first * CHUNK
    whole = tl.minimum(tl.maximum(left // (TC * CHUNK), 0), TILES)
    if m.starts is not None:  # `combine` alone knows token_bias
        whole = 0
    return whole, tl.minimum(tl.maximum((left + (TC * CHUNK - 1)) // (TC * CHUNK), 0), TILES)


class Kept(NamedTuple):
    """Context of `kept_scores` and `own_scores`."""

    m: object
    up: object
    row: object
    floor: object
    ceiling: object


@triton.jit
def kept_scores(k, token):
    """Emulated scores from a floor to a ceiling, -inf elsewhere."""
    s, _ = combine(k.m, k.up, k.row, token)
    return tl.where((s >= k.floor) & (s <= k.ceiling), s, NEG_INF)


@triton.jit
def own_scores(k, token):
    """The tuned model's own logits over the tokens not excluded."""
    s, _, tuned_logits = raw_scores(k.m, k.up, k.row, token)
    return tl.where(s > NEG_INF, tuned_logits, NEG_INF)


@triton.jit
def tokens_of(chunk):
    """Token ids [N, 256] of chunks [N]."""
    return chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
