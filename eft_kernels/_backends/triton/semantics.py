"""The meaning, for Triton: csrc/semantics under the same names, held bit for bit to eft_kernels/reference.

Launch with ``enable_fp_fusion=False``: tokens depend on every float32 operation being rounded on its own.
"""

import triton
import triton.language as tl

from ... import parameters

NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
GREEDY, TINY = tl.constexpr(parameters.GREEDY), tl.constexpr(parameters.TINY)
MASKED, LARGE = tl.constexpr(parameters.MASKED), tl.constexpr(parameters.LARGE)
LOG2E = tl.constexpr(1.44269504)
CHUNK = tl.constexpr(256)
SAMPLE, DRAFT, ACCEPT, RESIDUAL = map(tl.constexpr, parameters.STREAM_CODES.values())
COUPLED, TOKEN, BLOCK = map(tl.constexpr, parameters.METHOD_CODES.values())
KIND_CHUNK, KIND_TOKEN = tl.constexpr(0), tl.constexpr(1)
BEST_MASS = tl.constexpr(1 << parameters.MASS_BITS)  # the mass of the best token
MASS_ONE = tl.constexpr(2.0**parameters.MASS_BITS)  # the same, as a float
RESIDUAL_ONE = tl.constexpr(2.0**58)
BAD = tl.constexpr((1 << 63) - 1)  # packed keys: of a row that holds NaN or +inf
NONE = tl.constexpr(-(0x7F800001 << 32))  # of a row that holds no token (yet): key -inf, below all others


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def times(a, b):
    """a * b, rounded before anything is added to it: for sm_100 ptxas makes FFMA2 of packed products and sums in spite
    of ``-fmad=false``, and products that LLVM cannot see into it cannot pack."""
    if not INTERPRETED and tl.target_info.cuda_capability_geq(10, 0):
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.jit
def in_range(x, low, high):
    """NaN is not."""
    return (x >= low) & (x <= high)


# --- math ----------------------------------------------------------------------------------------------------------


@triton.jit
def log_poly(f, k):
    z = f * f
    p = times(f, 7.0376836292e-2) + -1.1514610310e-1
    p = times(p, f) + 1.1676998740e-1
    p = times(p, f) + -1.2420140846e-1
    p = times(p, f) + 1.4249322787e-1
    p = times(p, f) + -1.6668057665e-1
    p = times(p, f) + 2.0000714765e-1
    p = times(p, f) + -2.4999993993e-1
    p = times(p, f) + 3.3333331174e-1
    y = times(f * z, p)
    y = y + times(k, -2.12194440e-4)
    y = y - times(z, 0.5)
    return (f + y) + times(k, 0.693359375)


@triton.jit
def split(x):
    b = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    k = (b >> 23).to(tl.float32)
    f = ((b & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    return f, k


@triton.jit
def log(x):
    f, k = split(x)
    return log_poly(f, k)


@triton.jit
def exp2_parts(x):
    x = tl.maximum(x, -126.0)
    n = (x + 12582912.0) - 12582912.0
    f = x - n
    p = times(f, 1.535336188319500e-4) + 1.339887440266574e-3
    p = times(p, f) + 9.618437357674640e-3
    p = times(p, f) + 5.550332471162809e-2
    p = times(p, f) + 2.402264791363012e-1
    p = times(p, f) + 6.931472028550421e-1
    return times(p, f) + 1.0, n


# --- noise ---------------------------------------------------------------------------------------------------------


@triton.jit
def row_seed(seed, row):
    """The seed of a batch's row where one is given for all rows (int64)."""
    x = seed.to(tl.uint64) + row.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return tl.where(row == 0, seed, (x ^ (x >> 31)).to(tl.int64))


@triton.jit
def words(seed, position, domain, index):
    """Four words; domain is kind | stream << 1 | slot << 3, index the chunk or token // 4."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, index.to(tl.uint32), tl.cast(domain, tl.uint32))


@triton.jit
def exponential(u):
    f, k = split(1.0 - u)
    return -log_poly(tl.where(k == 0.0, -u, f), k)


@triton.jit
def uniform(r):
    return tl.minimum((r.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)


@triton.jit
def chunk_noise(seed, position, domain, chunk):
    """The smallest Exp(1) of each chunk, and its place (0..255)."""
    r0, r1, r2, _ = words(seed, position, domain | KIND_CHUNK, chunk)
    fine = (((r0 & 0xFF) << 24) | (r1 >> 8)).to(tl.float32) + 0.5
    u = tl.where(r0 < 256, fine * 1.3877787807814457e-17, uniform(r0))
    return exponential(u) * 0.00390625, (r2 & 0xFF).to(tl.int32)


@triton.jit
def token_gumbel(chunk_e, word):
    """-log E of a token that is not at its chunk's place."""
    return tl.minimum(-log(chunk_e), -log(chunk_e + exponential(uniform(word))))


@triton.jit
def token_words(seed, position, domain, chunk, N: tl.constexpr):
    """Words of the N tokens from ``chunk * 256``: [N]."""
    r0, r1, r2, r3 = words(seed, position, domain | KIND_TOKEN, chunk * 64 + tl.arange(0, N // 4))
    return tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [N])


@triton.jit
def accept_uniform(seed, position, slot):
    r0, r1, _, _ = words(seed, position, (slot << 3) | (ACCEPT << 1), slot * 0)
    return (r0.to(tl.float64) + (r1.to(tl.float64) + 0.5) * 2.3283064365386963e-10) * 2.3283064365386963e-10


# --- mass ----------------------------------------------------------------------------------------------------------


@triton.jit
def mass(s, best, c):
    """exp2((s - best) c) as int64 fixed point, 2^40 at the best score, truncated."""
    p, n = exp2_parts(times(s - best, c))
    wide = (p * 16777216.0).to(tl.int32).to(tl.int64) << 16
    return wide >> tl.minimum(-(n.to(tl.int32)), 63).to(tl.int64)


@triton.jit
def surprise(s, best, c):
    """mass times how many bits the score is below the best, truncated (the bits to 2^-16, then the product)."""
    x = tl.maximum(times(s - best, c), -126.0)
    return (mass(s, best, c) * (x * -65536.0).to(tl.int64)) >> 16


@triton.jit
def log_total(total):
    return log(total.to(tl.float32) * 9.094947017729282e-13)


@triton.jit
def mass_limit(p, total):
    return tl.maximum((p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


# --- intervals of scores --------------------------------------------------------------------------------------------


@triton.jit
def mean_score(best, c, surprises, total):
    """The mean of scores, by the sums of their surprise() and their mass."""
    bits = surprises.to(tl.float64) / tl.maximum(total, 1).to(tl.float64)
    return best - tl.div_rn(bits.to(tl.float32), c)


@triton.jit
def edge(center, reach):
    """The smallest x with center - x <= reach. Bisection over the order of floats."""
    zero = ordered(center).to(tl.int64) * 0
    low, high = zero - 0x7F800001, zero + 0x7F800000
    for _ in range(32):
        middle = low + ((high - low) >> 1)
        inside = center - unordered(middle.to(tl.int32)) <= reach
        low, high = tl.where(inside, low, tl.minimum(middle + 1, high)), tl.where(inside, middle, high)
    return unordered(high.to(tl.int32))


@triton.jit
def typical_interval(mean, reach, floor):
    """typical_p keeps the scores of which |s - mean| <= reach; ``floor``: what the filters before it keep."""
    return tl.maximum(floor, edge(mean, reach)), -edge(-mean, reach)


# --- accept --------------------------------------------------------------------------------------------------------


@triton.jit
def accept_token(u, t, t_total, d, d_total):
    return (u * d.to(tl.float64)) * t_total.to(tl.float64) < t.to(tl.float64) * d_total.to(tl.float64)


@triton.jit
def residual(t, d, a, b):
    """max(0, factor t / T - d / D) in units of 2^-58; a = factor 2^58 / T, b = 2^58 / D."""
    r = t.to(tl.float64) * a - d.to(tl.float64) * b
    return tl.where(r >= 1.0, r, 0.0)


@triton.jit
def block_ratio(ratio, t, t_total, d, d_total):
    step = ratio * ((t.to(tl.float64) * d_total.to(tl.float64)) / (d.to(tl.float64) * t_total.to(tl.float64)))
    ratio = tl.where((ratio > 0) & (t != 0), tl.where(d == 0, 1.0, tl.minimum(step, 1.0)), 0.0)
    return ratio


@triton.jit
def block_passes(u, ratio, residual_sum, last):
    r = residual_sum.to(tl.float64)
    whole = r + (1.0 - ratio) * RESIDUAL_ONE
    return tl.where(last, u < ratio, (u * whole < r) | (whole == 0.0))


# --- order ---------------------------------------------------------------------------------------------------------


@triton.jit
def ordered(x):
    """int32 that compares as the float32 does; -0 and 0 are one."""
    b = (x + 0.0).to(tl.int32, bitcast=True)
    return b ^ ((b >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(b):
    return (b ^ ((b >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, token):
    """int64 whose order is that of the key, then of the lower id."""
    return (ordered(key).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def packed_key(packed):
    return unordered((packed >> 32).to(tl.int32))


@triton.jit
def packed_token(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
