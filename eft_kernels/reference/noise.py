"""Noise: a pure function of (seed, position, stream, slot, token), and the race that draws a token by it.

argmax_v s_v + T g_v with g_v = -log E_v, E_v i.i.d. Exp(1), is a sample of softmax(s / T) (the Gumbel-max trick).
"""

from __future__ import annotations

import torch

from ..parameters import STREAM_CODES

CHUNK = 256
KIND_CHUNK, KIND_TOKEN = 0, 1
WORD = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


# --- random words --------------------------------------------------------------------------------------------------


def philox(key: tuple[torch.Tensor, torch.Tensor], counter: Words) -> Words:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for a 64-bit key and a 128-bit counter."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0 = c0 * 0xD2511F53  # the low 64 bits wrap as unsigned ones do
        p1 = c2 * 0xCD9E8D57
        high0, low0 = (p0 >> 32) & WORD, p0 & WORD
        high1, low1 = (p1 >> 32) & WORD, p1 & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & WORD
        k1 = (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def row_seed(seed: int | torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The seed of a batch's row where one is given for all rows: row 0 keeps it, row i has splitmix64's i-th from there
    (Steele et al., OOPSLA 2014). Integers or int64 tensors of 64-bit words."""

    def shifted(x: torch.Tensor, n: int) -> torch.Tensor:  # as unsigned
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = seed + row * (0x9E3779B97F4A7C15 - (1 << 64))  # the low 64 bits wrap as unsigned ones do
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return torch.where(row == 0, seed, x ^ shifted(x, 31))


def words(
    seed: torch.Tensor, position: torch.Tensor, stream: int, slot: int | torch.Tensor, kind: int, index: torch.Tensor
) -> Words:
    """The four words of one use. All counters are laid out here and nowhere else:

    key = seed; counter = (position low, position high, index, kind | stream << 1 | slot << 3), where index is the
    chunk (token // 256) for KIND_CHUNK and token // 4 for KIND_TOKEN. Ranges of different uses are disjoint.
    """
    domain = torch.as_tensor(kind + (stream << 1) + (slot << 3), device=seed.device)
    seed, position, index, domain = torch.broadcast_tensors(seed, position, index, domain)
    key = seed & WORD, (seed >> 32) & WORD
    return philox(key, (position & WORD, (position >> 32) & WORD, index, domain))


# --- logarithms and exponential variables --------------------------------------------------------------------------


def log_poly(f: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """log(1 + f) + k log 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1] (Cephes logf)."""
    z = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = f * z * p
    y = y + k * -2.12194440e-4
    y = y - z * 0.5
    return (f + y) + k * 0.693359375


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(f, k) with x = (1 + f) 2^k, 1 + f in [sqrt(1/2), sqrt(2)), for positive normal float32 x."""
    bits = x.contiguous().view(torch.int32) - 0x3F3504F3
    k = bits >> 23
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    return m - 1.0, k.to(torch.float32)


def log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal float32."""
    return log_poly(*split(x))


def exponential(u: torch.Tensor) -> torch.Tensor:
    """Exp(1) = -log1p(-u) with full relative precision for small u; u in (0, 1 - 2^-24]."""
    f, k = split(1.0 - u)
    return -log_poly(torch.where(k == 0, -u, f), k)


def uniform(r: torch.Tensor) -> torch.Tensor:
    """float32 (r + 1/2) 2^-32 of a word, at most 1 - 2^-24."""
    return ((r.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


# --- noise of chunks and tokens ------------------------------------------------------------------------------------


def chunk_noise(
    seed: torch.Tensor, position: torch.Tensor, stream: int, slot: int | torch.Tensor, chunk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest of a chunk's 256 Exp(1) variables and the place (0..255) where it is.

    The minimum is Exp(1) / 256; a second word refines the first where that is small, so the tail is right to 2^-57.
    """
    r0, r1, r2, _ = words(seed, position, stream, slot, KIND_CHUNK, chunk)
    fine = ((((r0 & 0xFF) << 24) | (r1 >> 8)).to(torch.float32) + 0.5) * 2.0**-56
    u = torch.where(r0 < 256, fine, uniform(r0))
    return exponential(u) * 2.0**-8, r2 & 0xFF


def gumbel(
    seed: torch.Tensor, position: torch.Tensor, stream: int, slot: int | torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """-log E_v for every token, [R, V]; seed, position, slot [R, 1] int64.

    E_v is the chunk's minimum at its place, and minimum + Exp(1)_v elsewhere (memoryless), so all are i.i.d. Exp(1).
    """
    token = torch.arange(vocab_size, device=seed.device)
    chunks = torch.arange((vocab_size + CHUNK - 1) // CHUNK, device=seed.device)
    e, place = chunk_noise(seed, position, stream, slot, chunks)
    e, place = e[:, token // CHUNK], place[:, token // CHUNK]
    quads = torch.arange((vocab_size + 3) // 4, device=seed.device)
    word = torch.stack(words(seed, position, stream, slot, KIND_TOKEN, quads), dim=-1).flatten(-2)[:, :vocab_size]
    g_chunk = -log(e)
    g = -log(e + exponential(uniform(word)))
    g = torch.minimum(g_chunk, g)  # so that the chunk's bound holds exactly
    return torch.where(token % CHUNK == place, g_chunk, g)


def accept_uniform(seed: torch.Tensor, position: torch.Tensor, slot: int | torch.Tensor) -> torch.Tensor:
    """float64 uniform in (0, 1) of the accept stream."""
    r0, r1, _, _ = words(seed, position, STREAM_CODES["accept"], slot, KIND_CHUNK, torch.zeros_like(seed))
    return (r0.to(torch.float64) + (r1.to(torch.float64) + 0.5) * 2.0**-32) * 2.0**-32


# --- the race ------------------------------------------------------------------------------------------------------


def first_max(key: torch.Tensor) -> torch.Tensor:
    """The lowest id of the largest key, [R]."""
    ids = torch.arange(key.shape[1], device=key.device).expand_as(key)
    return torch.where(key == key.amax(1, keepdim=True), ids, key.shape[1]).amin(1)


def keys(
    scores: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: int,
    slot: torch.Tensor,
) -> torch.Tensor:
    """s_v + T * (-log E_v), [R, V]; scores [R, V] with -inf for excluded tokens."""
    return scores + temperature[:, None] * gumbel(
        seed[:, None], position[:, None], stream, slot[:, None], scores.shape[1]
    )


def race(
    scores: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: int,
    slot: torch.Tensor,
) -> torch.Tensor:
    """The token of the largest key, lowest id on ties, [R]."""
    return first_max(keys(scores, temperature, seed, position, stream, slot))


def after_winner(key: torch.Tensor, n: int) -> torch.Tensor:
    """The n tokens of the next largest keys, lower ids first on ties, [R, n]; -1 where there are fewer."""
    order = key.sort(dim=1, descending=True, stable=True)
    ids = torch.where(order.values > float("-inf"), order.indices, -1)[:, 1 : n + 1]
    return torch.nn.functional.pad(ids, (0, n - ids.shape[1]), value=-1)
