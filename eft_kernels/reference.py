"""The definition, in PyTorch. Every other backend returns the same tokens, bit for bit.

What makes that possible: scores and noise are float32 operations in one stated order, without contraction; logarithm
and exponential are the polynomials below; masses are 64-bit fixed point, so that their sums do not depend on order.
The names are those of csrc/semantics. Any device; slow on purpose (nothing is fused, every token's noise is drawn).

Shapes: R rows, V tokens, J models. Integers that are 32-bit words are kept in int64 tensors.
"""

from __future__ import annotations

import torch

from .arguments import dtype_of
from .parameters import FILTERS, GREEDY, LARGE, MASKED, PARAMETERS, STREAM_CODES, TINY, DraftParams, Params

NEG_INF = float("-inf")
LOG2E = 1.44269504  # float32(log2 e)
CHUNK = 256
MASS_BITS = 40  # the mass of the best token is 2^40
RESIDUAL_BITS = 58  # the residual of a whole distribution is 2^58
KIND_CHUNK, KIND_TOKEN = 0, 1


# --- noise ---------------------------------------------------------------------------------------------------------


def philox(key: tuple, counter: tuple) -> tuple:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for a 64-bit key and a 128-bit counter."""
    mask = 0xFFFFFFFF
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits wrap as unsigned ones do
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def row_seed(seed, row) -> torch.Tensor:
    """The seed of a batch's row where one is given for all rows: row 0 keeps it, row i has splitmix64's i-th from there
    (Steele et al., OOPSLA 2014). Integers or int64 tensors of 64-bit words."""

    def shifted(x, n):  # as unsigned
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = seed + row * (0x9E3779B97F4A7C15 - (1 << 64))  # the low 64 bits wrap as unsigned ones do
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return torch.where(row == 0, seed, x ^ shifted(x, 31))


def words(seed, position, stream: int, slot, kind: int, index) -> tuple:
    """The four words of one use. All counters are laid out here and nowhere else:

    key = seed; counter = (position low, position high, index, kind | stream << 1 | slot << 3), where index is the
    chunk (token // 256) for KIND_CHUNK and token // 4 for KIND_TOKEN. Ranges of different uses are disjoint.
    """
    mask = 0xFFFFFFFF
    domain = kind + (stream << 1) + (slot << 3)
    shape = torch.broadcast_shapes(*(x.shape for x in (seed, position, index, torch.as_tensor(domain))))
    index = index.expand(shape)
    counter = (position & mask) + 0 * index, ((position >> 32) & mask) + 0 * index, index, domain + 0 * index
    return philox((seed & mask, (seed >> 32) & mask), counter)


def log_poly(f: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """log(1 + f) + k log 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1] (Cephes logf)."""
    z = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    for c in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        p = p * f + c
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


def chunk_noise(seed, position, stream: int, slot, chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest of a chunk's 256 Exp(1) variables and the place (0..255) where it is.

    The minimum is Exp(1) / 256; a second word refines the first where that is small, so the tail is right to 2^-57.
    """
    r0, r1, r2, _ = words(seed, position, stream, slot, KIND_CHUNK, chunk)
    fine = ((((r0 & 0xFF) << 24) | (r1 >> 8)).to(torch.float32) + 0.5) * 2.0**-56
    u = torch.where(r0 < 256, fine, uniform(r0))
    return exponential(u) * 2.0**-8, r2 & 0xFF


def gumbel(seed, position, stream: int, slot, vocab_size: int) -> torch.Tensor:
    """-log E_v for every token, [R, V]; seed, position, slot [R, 1] int64.

    E_v is the chunk's minimum at its place, and minimum + Exp(1)_v elsewhere (memoryless), so all are i.i.d. Exp(1).
    """
    token = torch.arange(vocab_size, device=seed.device)
    e, place = chunk_noise(seed, position, stream, slot, torch.arange((vocab_size + 255) // 256, device=seed.device))
    e, place = e[:, token // CHUNK], place[:, token // CHUNK]
    quads = words(seed, position, stream, slot, KIND_TOKEN, torch.arange((vocab_size + 3) // 4, device=seed.device))
    word = torch.stack(quads, dim=-1).flatten(-2)[:, :vocab_size]
    g_chunk = -log(e)
    g = torch.minimum(g_chunk, -log(e + exponential(uniform(word))))  # minimum: the chunk's bound holds exactly
    return torch.where(token % CHUNK == place, g_chunk, g)


def accept_uniform(seed, position, slot) -> torch.Tensor:
    """float64 uniform in (0, 1) of the accept stream."""
    zero = torch.zeros_like(seed)
    r0, r1, _, _ = words(seed, position, STREAM_CODES["accept"], slot, KIND_CHUNK, zero)
    return (r0.to(torch.float64) + (r1.to(torch.float64) + 0.5) * 2.0**-32) * 2.0**-32


def race(scores, temperature, seed, position, stream: int, slot) -> torch.Tensor:
    """argmax_v of s_v + T * (-log E_v), lowest id on ties, [R]; scores [R, V] with -inf for excluded tokens."""
    g = gumbel(seed[:, None], position[:, None], stream, slot[:, None], scores.shape[1])
    return first_max(scores + temperature[:, None] * g)


def first_max(key: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(key.shape[1], device=key.device).expand_as(key)
    return torch.where(key == key.amax(1, keepdim=True), ids, key.shape[1]).amin(1)


# --- mass ----------------------------------------------------------------------------------------------------------


def mass(scores, best, c) -> torch.Tensor:
    """exp2((s - best) c) as int64 fixed point, 2^40 at the best score, truncated; scores [R, V], best and c [R]."""
    x = ((scores - best[:, None]) * c[:, None]).clamp(min=-126.0)
    n = torch.round(x)
    f = x - n
    p = f * 1.535336188319500e-4 + 1.339887440266574e-3
    for a in (9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1, 1.0):
        p = p * f + a
    q, shift = (p * 2.0**24).to(torch.int64), n.to(torch.int64) + (MASS_BITS - 24)
    return torch.where(shift >= 0, q << shift.clamp(min=0), q >> (-shift).clamp(0, 63))


def log_total(total: torch.Tensor) -> torch.Tensor:
    """log of a fixed-point mass, float32; 0 for the mass of one best token."""
    return log(total.to(torch.float32) * 2.0**-MASS_BITS)


def mass_limit(p, total) -> torch.Tensor:
    """The mass strictly above a token must be below this for the token to be in the nucleus of mass p."""
    return (p.to(torch.float64) * total.to(torch.float64)).to(torch.int64).clamp(min=1)


def nucleus(scores, masses, limit) -> torch.Tensor:
    """The smallest score kept by a nucleus: the mass strictly above it is below ``limit`` [R]. Ties stay."""
    order = scores.sort(dim=1, descending=True)
    sorted_mass = masses.gather(1, order.indices)
    above = sorted_mass.cumsum(1) - sorted_mass
    # of equal scores all have the mass above the first one
    starts = torch.ones_like(above, dtype=torch.bool)
    starts[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    above = torch.where(starts, above, 0).cummax(1).values
    kept = above < limit[:, None]
    return torch.where(kept, order.values, float("inf")).amin(1)


# --- rows ----------------------------------------------------------------------------------------------------------


class Rows:
    """Rows with every parameter as a tensor [R]; ``index`` maps rows to the batch when rows are (row, slot) pairs.

    Values need not have been checked. A row is invalid, that row alone, where a parameter of float32 is outside the
    range of `PARAMETERS` (NaN is) or a weight is not finite; all its parameters are off then. ``top_k`` <= 0 or >= V is
    off; draft lengths are clamped to [0, K]; a draft outside [0, V) is never accepted; an id outside has log-prob NaN;
    seed and position are any 64 bits.
    """

    def __init__(self, logits, p: Params, index=None, mask=None):
        rows, device = logits[0].shape[0], logits[0].device

        def per_row(value, dtype):
            value = torch.as_tensor(value, dtype=dtype, device=device)
            if value.dim() == 0:
                return value.expand(rows)
            return value if index is None else value[index]

        w = torch.as_tensor(p.weights, dtype=torch.float32, device=device)
        w = w.expand(rows, -1) if w.dim() == 1 else w if index is None else w[index]
        self.in_range = w.isfinite().all(1)
        self.weights = torch.where(w.isfinite(), w, 0.0)  # [R, J]
        values = {q: per_row(getattr(p, q.name), dtype_of(q)) for q in PARAMETERS}
        in_range = torch.ones_like(self.in_range)
        for q, value in values.items():
            if q.type is float:
                in_range = in_range & (value >= q.low) & (value <= q.high)
        for q, value in values.items():
            setattr(self, q.name, torch.where(in_range, value, q.off))
        self.in_range = self.in_range & in_range
        self.top_k = torch.where((self.top_k < 0) | (self.top_k >= p.vocab_size), 0, self.top_k)
        row = torch.arange(rows, device=device) if index is None else index
        self.seed = per_row(p.seed, torch.int64) if isinstance(p.seed, torch.Tensor) else row_seed(p.seed, row)
        self.position = per_row(p.position, torch.int64)
        self.greedy = self.temperature < GREEDY
        self.temperature = torch.where(self.greedy, 0.0, self.temperature)
        self.inverse = torch.where(self.greedy, 0.0, 1.0 / self.temperature)
        self.c = self.inverse * LOG2E  # scores times c are base-2 exponents
        self.logits, self.vocab_size, self.tuned = logits, p.vocab_size, p.tuned
        self.allowed = None
        if mask is not None:
            token = torch.arange(p.vocab_size, device=device)
            self.allowed = (mask[:, token // 32] >> (token % 32).to(torch.int32)) & 1 != 0

    def filtered(self) -> torch.Tensor:
        """Whether some token may be left out, [R]."""
        on = torch.stack([getattr(self, q.name) != q.off for q in FILTERS]).any(0)
        return on & ~self.greedy

    def combine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Emulated scores [R, V] and whether each row is valid.

        -inf is excluded, also where a sum or the up-scaling filter overflows to it. So is a token that a model masks by
        a logit <= `MASKED`, such as torch.finfo.min, where the sum is not below `LARGE` in size: masks that cancel (of
        base and ref alone) are numbers. Any other that comes to NaN or +inf makes the row invalid, and so does having
        no token left.
        """
        V, dev = self.vocab_size, self.logits[0].device
        s = torch.zeros(self.logits[0].shape[0], V, dtype=torch.float32, device=dev)
        excluded = torch.zeros_like(s, dtype=torch.bool) if self.allowed is None else ~self.allowed
        bad, masked = torch.zeros_like(excluded), torch.zeros_like(excluded)
        first = torch.ones(s.shape[0], 1, dtype=torch.bool, device=dev)
        for j, z in enumerate(self.logits):
            z, w = z[:, :V].to(torch.float32), self.weights[:, j : j + 1]
            active = w != 0
            s = torch.where(active, torch.where(first, w * z, s + w * z), s)
            first = first & ~active
            counts = active | (self.upscale_top_p[:, None] < 1) if j == self.tuned else active
            excluded, masked = excluded | (counts & (z == NEG_INF)), masked | (counts & (z <= MASKED))
            bad = bad | (counts & (z.isnan() | (z == float("inf"))))
        excluded = excluded | (masked & ~(s.abs() < LARGE))
        bad = bad | (~excluded & ~(s < float("inf")))
        if self.allowed is not None:
            bad = bad & self.allowed
        s = torch.where(excluded, NEG_INF, s)
        valid = self.in_range & ~bad.any(1) & (s != NEG_INF).any(1)
        s = self.upscale(torch.where(valid[:, None], s, 0.0))  # any scores do where the row is reported invalid
        valid = valid & (s < float("inf")).all(1) & (s != NEG_INF).any(1)
        return torch.where(valid[:, None], s, 0.0), valid

    def own(self, j: int, excluded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Model j alone over the tokens not excluded: logits, masses, total, the best logit."""
        z = self.logits[j][:, : self.vocab_size].to(torch.float32)
        z = torch.where(excluded, NEG_INF, z)
        best = torch.where(torch.isinf(z.amax(1)), 0.0, z.amax(1))
        masses = torch.where(z == NEG_INF, 0, mass(z, best, torch.full_like(best, LOG2E)))
        return z, masses, masses.sum(1).clamp(min=1), best

    def upscale(self, s) -> torch.Tensor:
        """The up-scaling filter (arXiv 2310.12962, section 4.4): outside the tuned model's own nucleus of mass
        ``upscale_top_p`` a token scores log p_tuned, inside it scores sum_j w_j log p_j."""
        on = self.upscale_top_p < 1
        if not bool(on.any()):
            return s
        excluded = s == NEG_INF
        d, first = torch.zeros_like(self.top_p), torch.ones_like(on)
        for j in range(len(self.logits)):
            w = self.weights[:, j]
            _, _, total, best = self.own(j, excluded)
            lse = best + log_total(total)
            d = torch.where(w != 0, torch.where(first, w * lse, d + w * lse), d)
            first = first & (w == 0)
        z, masses, total, best = self.own(self.tuned, excluded)
        inside = z >= nucleus(z, masses, mass_limit(self.upscale_top_p, total))[:, None]
        scores = torch.where(inside, s - d[:, None], z - (best + log_total(total))[:, None])
        return torch.where(on[:, None] & ~excluded, scores, s)

    def keep(self, s) -> torch.Tensor:
        """The smallest score that top-k, top-p and min-p keep, [R]; greedy rows keep the best."""
        best = s.amax(1)
        lowest = torch.full_like(best, NEG_INF)
        if not bool(self.filtered().any()):
            return torch.where(self.greedy, best, lowest)
        kth = s.sort(1, descending=True).values.gather(1, (self.top_k - 1).clamp(min=0)[:, None])[:, 0]
        lowest = torch.where(self.top_k > 0, kth, lowest)
        masses = torch.where(s >= lowest[:, None], mass(s, best, self.c), 0)
        tau = nucleus(s, masses, mass_limit(self.top_p, masses.sum(1)))
        log_min_p = torch.where(self.min_p > 0, log(self.min_p.clamp(min=TINY)), NEG_INF)
        floor = torch.where(self.min_p > 0, best + self.temperature * log_min_p, NEG_INF)
        lowest = torch.maximum(lowest, floor)
        lowest = torch.where(self.top_p < 1, torch.maximum(lowest, tau), lowest)
        return torch.where(self.greedy, best, lowest)

    def process(self, s) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores with -inf outside the filters, and the masses of what is left (greedy: one token's)."""
        kept = torch.where(s >= self.keep(s)[:, None], s, NEG_INF)
        masses = torch.where(kept == NEG_INF, 0, mass(kept, s.amax(1), self.c))
        ids = torch.arange(s.shape[1], device=s.device)
        point = torch.where(ids == first_max(s)[:, None], 1 << MASS_BITS, 0)
        return kept, torch.where(self.greedy[:, None], point, masses)

    def log_softmax(self, s, processed: bool) -> torch.Tensor:
        """log p of every token [R, V]: raw emulated, or after temperature and filters."""
        best = s.amax(1)
        if not processed:
            total = torch.where(s == NEG_INF, 0, mass(s, best, torch.full_like(best, LOG2E))).sum(1)
            return (s - best[:, None]) - log_total(total)[:, None]
        kept, masses = self.process(s)
        lp = (kept - best[:, None]) * self.inverse[:, None] - log_total(masses.sum(1))[:, None]
        lp = torch.where(kept == NEG_INF, NEG_INF, lp)
        return torch.where(self.greedy[:, None], torch.where(masses > 0, lp.new_zeros(()), NEG_INF), lp)


# --- operations ----------------------------------------------------------------------------------------------------


def blocks(rows: int, vocab_size: int):
    """Slices of rows that bound the temporaries."""
    step = max(1, (1 << 21) // max(1, vocab_size))
    return [slice(i, min(rows, i + step)) for i in range(0, rows, step)]


def _rows(logits, p: Params, part: slice) -> Rows:
    index = torch.arange(logits[0].shape[0], device=logits[0].device)[part]
    return Rows([z[part] for z in logits], p, index, None if p.token_mask is None else p.token_mask[part])


@torch.no_grad()
def sample(logits, p: Params, stream: str, slot: int, logprobs: bool, top_logprobs: int, diagnostics: bool):
    B, dev = logits[0].shape[0], logits[0].device
    tokens = torch.full((B,), -1, dtype=torch.int64, device=dev)
    valid = torch.zeros(B, dtype=torch.bool, device=dev)
    n = min(top_logprobs, p.vocab_size)
    nan, f32 = float("nan"), dict(dtype=torch.float32, device=dev)
    lp, raw = (torch.full((B,), nan, **f32) if logprobs else None for _ in range(2))
    top_ids = torch.full((B, top_logprobs), -1, dtype=torch.int64, device=dev) if top_logprobs else None
    top_lp = torch.full((B, top_logprobs), NEG_INF, **f32) if top_logprobs else None
    entropy, tv = (torch.full((B,), nan, **f32) if diagnostics else None for _ in range(2))
    for part in blocks(B, p.vocab_size):
        r = _rows(logits, p, part)
        s, ok = r.combine()
        kept, _ = r.process(s)
        chosen = race(kept, r.temperature, r.seed, r.position, STREAM_CODES[stream], torch.full_like(r.seed, slot))
        tokens[part], valid[part] = torch.where(ok, chosen, -1), ok
        if logprobs:
            lp[part] = torch.where(ok, r.log_softmax(s, True).gather(1, chosen[:, None])[:, 0], nan)
        if logprobs or top_logprobs or diagnostics:
            full = r.log_softmax(s, False)
        if logprobs:
            raw[part] = torch.where(ok, full.gather(1, chosen[:, None])[:, 0], nan)
        if top_logprobs:
            best = s.sort(dim=1, descending=True, stable=True)  # scores: log-probs are rounded once more
            values, ids = best.values[:, :n], best.indices[:, :n]
            there = ok[:, None] & (values > NEG_INF)
            top_ids[part, :n] = torch.where(there, ids, -1)
            top_lp[part, :n] = torch.where(there, full.gather(1, ids), NEG_INF)
        if diagnostics:
            prob = full.exp()
            h = -torch.where(prob > 0, prob * full, 0.0).sum(1)
            z, _, total, best = r.own(r.tuned, s == NEG_INF)
            own = (z - best[:, None]) - log_total(total)[:, None]
            fine = (z < float("inf")).all(1)  # a tuned model of weight 0 may hold anything
            entropy[part] = torch.where(ok, h, nan)
            tv[part] = torch.where(ok & fine, 0.5 * (prob - own.exp()).abs().sum(1), nan)
    return tokens, valid, lp, raw, top_ids, top_lp, entropy, tv


@torch.no_grad()
def logprobs(logits, p: Params):
    out = torch.empty(logits[0].shape[0], p.vocab_size, dtype=torch.float32, device=logits[0].device)
    for part in blocks(*out.shape):
        r = _rows(logits, p, part)
        s, ok = r.combine()
        processed = (r.temperature != 1) | r.filtered()
        lp = r.log_softmax(s, False)
        if bool(processed.any()):
            lp = torch.where(processed[:, None], r.log_softmax(s, True), lp)
        out[part] = torch.where(ok[:, None], lp, float("nan"))
    return out


def token_logprobs(logits, p: Params, ids):
    inside = (ids >= 0) & (ids < p.vocab_size)
    lp = logprobs(logits, p).gather(1, ids.clamp(0, p.vocab_size - 1))
    return torch.where(inside, lp, float("nan"))


@torch.no_grad()
def verify(
    logits, p: Params, draft_tokens, draft_lengths, method: str, draft: int, drawn_by: DraftParams, logprobs: bool
):
    """``draft`` is -1 for a deterministic proposer. Rows are handled slot by slot, in the order of the definition."""
    B, S = logits[0].shape[:2]
    dev, V = logits[0].device, p.vocab_size
    every = torch.arange(B, device=dev)
    draft_lengths = draft_lengths.clamp(0, S - 1)
    slots = []
    for i in range(S):
        mask = None if p.token_mask is None else p.token_mask[:, i]
        r = Rows([z[:, i] for z in logits], p, every, mask)
        r.position = r.position + i
        s, ok = r.combine()
        if draft >= 0:
            q_rows = Rows([logits[draft][:, i]], drawn_by.of(p), every, mask)
            q_scores, q_ok = q_rows.combine()
            if method != "coupled":
                ok = ok & (q_ok | (draft_lengths <= i))
        slots.append((r, s, ok, (q_rows, q_scores) if draft >= 0 else None))

    tokens = torch.full((B, S), -1, dtype=torch.int64, device=dev)
    emitted = torch.zeros(B, dtype=torch.int64, device=dev)
    valid = torch.zeros(B, dtype=torch.bool, device=dev)
    lp, raw = (
        torch.full((B, S), float("nan"), dtype=torch.float32, device=dev) if logprobs else None for _ in range(2)
    )
    # a row ends its drafts at the first invalid slot, and is invalid if it gets there
    oks = torch.stack([ok for _, _, ok, _ in slots], 1)  # [B, S]
    ends = torch.where(oks, S, torch.arange(S, device=dev)).amin(1)
    lengths = torch.minimum(draft_lengths, ends)

    masses = [(r.process(s)[1]) for r, s, _, _ in slots]
    totals = [m.sum(1).clamp(min=1) for m in masses]

    def draft_masses(i):
        if draft >= 0:
            q_rows, q_scores = slots[i][3]
            return q_rows.process(q_scores)[1]
        ids = torch.arange(V, device=dev)
        return torch.where(ids == draft_tokens[:, i : i + 1], 1 << MASS_BITS, 0)

    def residual(i, factor):
        """max(0, factor p - q) in units of 2^-58, 0 below one unit; float64 [B, V]."""
        q = draft_masses(i)
        a = factor * (2.0**RESIDUAL_BITS / totals[i].to(torch.float64))
        b = 2.0**RESIDUAL_BITS / q.sum(1).clamp(min=1).to(torch.float64)
        rest = masses[i].to(torch.float64) * a[:, None] - q.to(torch.float64) * b[:, None]
        return torch.where(rest >= 1, rest, 0.0)

    def plain(i):
        r, s, _, _ = slots[i]
        kept, _ = r.process(s)
        return race(kept, r.temperature, r.seed, r.position, STREAM_CODES["sample"], torch.zeros_like(r.seed))

    accepted = torch.zeros(B, dtype=torch.int64, device=dev)
    factor = torch.ones(B, dtype=torch.float64, device=dev)  # of the residual at the slot where the row stops
    if method == "coupled":
        going = torch.ones(B, dtype=torch.bool, device=dev)
        for i in range(S - 1):
            going = going & (i < lengths) & (draft_tokens[:, i] == plain(i))
            accepted += going
    else:
        going, ratio = torch.ones(B, dtype=torch.bool, device=dev), torch.ones(B, dtype=torch.float64, device=dev)
        for i in range(S - 1):
            d = draft_tokens[:, i]
            inside, d = (d >= 0) & (d < V), d.clamp(0, V - 1)[:, None]
            q = draft_masses(i)
            mp = torch.where(inside, masses[i].gather(1, d)[:, 0], 0).to(torch.float64)
            mq = torch.where(inside, q.gather(1, d)[:, 0], 1).to(torch.float64)
            tp, tq = totals[i].to(torch.float64), q.sum(1).clamp(min=1).to(torch.float64)
            u = accept_uniform(slots[i][0].seed, slots[i][0].position, torch.full_like(draft_lengths, i))
            if method == "token":
                going = going & (i < lengths) & ((u * mq) * tp < mp * tq)
                accepted += going
                continue
            # block verification (arXiv 2403.10444, algorithm 2): ratio is its p_i, tau the last i that passes
            step = torch.where(mq > 0, (mp * tq) / (mq * tp), torch.where(mp > 0, float("inf"), 0.0))
            ratio = torch.where(ratio > 0, (ratio * step).clamp(max=1.0), 0.0)
            rest = residual(i + 1, ratio).to(torch.int64).sum(1) if i < S - 2 else torch.zeros_like(accepted)
            rest = rest.to(torch.float64)
            whole = rest + (1.0 - ratio) * 2.0**RESIDUAL_BITS
            passes = torch.where(i + 1 == lengths, u < ratio, (u * whole < rest) | (whole == 0))
            passes = passes & (i < lengths)
            accepted = torch.where(passes, i + 1, accepted)
            factor = torch.where(passes, ratio, factor)

    for i in range(S):
        here = accepted == i
        if not bool(here.any()):
            continue
        r, s, ok, _ = slots[i]
        final = plain(i)
        if method != "coupled" and i < S - 1:
            rest = residual(i, factor)
            some = here & (i < lengths) & (rest > 0).any(1)
            score = torch.where(rest > 0, log(rest.clamp(min=1).to(torch.float32)), NEG_INF)
            drawn = race(
                score,
                torch.ones_like(r.temperature),
                r.seed,
                r.position,
                STREAM_CODES["residual"],
                torch.full_like(r.seed, i),
            )
            final = torch.where(some, drawn, final)
        tokens[:, i] = torch.where(here, torch.where(ok, final, -1), tokens[:, i])
        valid = torch.where(here, ok, valid)
        emitted = torch.where(here, i + ok.to(torch.int64), emitted)
    index = torch.arange(S, device=dev)
    tokens[:, : S - 1] = torch.where(index[: S - 1] < accepted[:, None], draft_tokens, tokens[:, : S - 1])
    if logprobs:
        for i, (r, s, _, _) in enumerate(slots):
            there, ids = i < emitted, tokens[:, i].clamp(min=0)[:, None]
            lp[:, i] = torch.where(there, r.log_softmax(s, True).gather(1, ids)[:, 0], lp[:, i])
            raw[:, i] = torch.where(there, r.log_softmax(s, False).gather(1, ids)[:, 0], raw[:, i])
    return tokens, emitted, valid, lp, raw
