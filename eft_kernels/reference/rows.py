"""Rows of logits and their parameters: scores, the interval of scores that filters keep, log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import dtype_of
from ..parameters import FILTERS, GREEDY, LARGE, MASKED, PARAMETERS, TINY, Parameter, Params, TokenBias
from .masses import MASS_BITS, log_total, mass, mass_limit, nucleus, surprise
from .noise import first_max, log, row_seed

NEG_INF = float("-inf")
LOG2E = 1.44269504  # float32(log2 e)


def read_rows(logits: Sequence[torch.Tensor], row_index: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The rows of logits [N, V] that ``row_index`` [R] names, [R, V], and whether it names one (else the first)."""
    there = (row_index >= 0) & (row_index < logits[0].shape[0])
    at = torch.where(there, row_index, 0)
    return [z[at] for z in logits], there


class Rows:
    """Rows with every parameter as a tensor [R]; ``index`` maps rows to the batch when rows are (row, slot) pairs;
    ``there`` is False where `Params.row_index` names no row.

    Values need not have been checked. A row is invalid, that row alone, where a parameter of float32 is outside the
    range of `PARAMETERS` (NaN is) or a weight is not finite; all its parameters are off then. ``top_k`` <= 0 or >= V is
    off; draft lengths are clamped to [0, K]; a draft outside [0, V) is never accepted; an id outside has log-prob NaN;
    seed and position are any 64 bits.
    """

    # parameters: declared
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    upscale_top_p: torch.Tensor
    # parameters: end

    def __init__(
        self,
        logits: list[torch.Tensor],
        p: Params,
        index: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        bias: TokenBias | None = None,
        there: torch.Tensor | None = None,
    ) -> None:
        rows, device = logits[0].shape[0], logits[0].device
        self.logits, self.vocab_size, self.tuned = logits, p.vocab_size, p.tuned
        row = torch.arange(rows, device=device) if index is None else index

        def per_row(value: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            value = torch.as_tensor(value, dtype=dtype, device=device)
            if value.dim() == 0:
                return value.expand(rows)
            return value if index is None else value[index]

        w = torch.as_tensor(p.weights, dtype=torch.float32, device=device)
        w = w.expand(rows, -1) if w.dim() == 1 else w if index is None else w[index]
        self.weights = torch.where(w.isfinite(), w, 0.0)  # [R, J]
        self.in_range = w.isfinite().all(1)
        if there is not None:
            self.in_range = self.in_range & there
        self.set_parameters({q: per_row(getattr(p, q.name), dtype_of(q)) for q in PARAMETERS})
        self.seed = per_row(p.seed, torch.int64) if isinstance(p.seed, torch.Tensor) else row_seed(p.seed, row)
        self.position = per_row(p.position, torch.int64)
        self.bias = bias
        self.allowed = None  # [R, V]
        if mask is not None:
            token = torch.arange(p.vocab_size, device=device)
            self.allowed = (mask[:, token // 32] >> (token % 32).to(torch.int32)) & 1 != 0

    def set_parameters(self, values: dict[Parameter, torch.Tensor]) -> None:
        """Every parameter as an attribute, all off in rows where one is out of range; and what follows from them."""
        in_range = torch.ones_like(self.in_range)
        for q, value in values.items():
            if q.type is float:
                in_range = in_range & (value >= q.low) & (value <= q.high)
        for q, value in values.items():
            setattr(self, q.name, torch.where(in_range, value, q.off))
        self.in_range = self.in_range & in_range
        self.top_k = torch.where((self.top_k < 0) | (self.top_k >= self.vocab_size), 0, self.top_k)
        self.greedy = self.temperature < GREEDY
        self.temperature = torch.where(self.greedy, 0.0, self.temperature)
        self.inverse_temperature = torch.where(self.greedy, 0.0, 1.0 / self.temperature)
        self.c = self.inverse_temperature * LOG2E  # scores times c are exponents of base 2

    def filtered(self) -> torch.Tensor:
        """Whether some token may be left out, [R]."""
        on = torch.stack([getattr(self, q.name) != q.off for q in FILTERS]).any(0)
        return on & ~self.greedy

    # --- scores ----------------------------------------------------------------------------------------------------

    def combine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Emulated scores [R, V] and whether each row is valid.

        -inf is excluded, also where a sum or the up-scaling filter overflows to it. So is a token that a model masks by
        a logit <= `MASKED`, such as torch.finfo.min, where the sum is not below `LARGE` in size: masks that cancel (of
        base and ref alone) are numbers. Any other that comes to NaN or +inf makes the row invalid, and so does having
        no token left.
        """
        rows, V, device = self.logits[0].shape[0], self.vocab_size, self.logits[0].device
        s = torch.zeros(rows, V, dtype=torch.float32, device=device)
        excluded = torch.zeros_like(s, dtype=torch.bool) if self.allowed is None else ~self.allowed
        bad = torch.zeros_like(excluded)
        masked = torch.zeros_like(excluded)
        first = torch.ones(rows, 1, dtype=torch.bool, device=device)
        for j, logits in enumerate(self.logits):
            z, w = logits[:, :V].to(torch.float32), self.weights[:, j : j + 1]
            active = w != 0
            s = torch.where(active, torch.where(first, w * z, s + w * z), s)
            first = first & ~active
            counts = active | (self.upscale_top_p[:, None] < 1) if j == self.tuned else active
            excluded = excluded | (counts & (z == NEG_INF))
            masked = masked | (counts & (z <= MASKED))
            bad = bad | (counts & (z.isnan() | (z == float("inf"))))
        excluded = excluded | (masked & ~(s.abs() < LARGE))
        bad = bad | (~excluded & ~(s < float("inf")))
        if self.allowed is not None:
            bad = bad & self.allowed
        s = torch.where(excluded, NEG_INF, s)
        valid = self.in_range & ~bad.any(1) & (s != NEG_INF).any(1)
        s = self.upscale(torch.where(valid[:, None], s, 0.0))  # any scores do where the row is reported invalid
        s = self.add_bias(s)
        valid = valid & (s < float("inf")).all(1) & (s != NEG_INF).any(1)
        return torch.where(valid[:, None], s, 0.0), valid

    def model_stats(
        self, j: int, excluded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Model j alone over the tokens not excluded: logits, masses, total, the best logit."""
        z = self.logits[j][:, : self.vocab_size].to(torch.float32)
        z = torch.where(excluded, NEG_INF, z)
        best = torch.where(torch.isinf(z.amax(1)), 0.0, z.amax(1))
        masses = torch.where(z == NEG_INF, 0, mass(z, best, torch.full_like(best, LOG2E)))
        return z, masses, masses.sum(1).clamp(min=1), best

    def upscale(self, s: torch.Tensor) -> torch.Tensor:
        """The up-scaling filter (arXiv 2310.12962, section 4.4): outside the tuned model's own nucleus of mass
        ``upscale_top_p`` a token scores log p_tuned, inside it scores sum_j w_j log p_j."""
        on = self.upscale_top_p < 1
        if not bool(on.any()):
            return s
        excluded = s == NEG_INF
        nucleus_shift = torch.zeros_like(self.top_p)  # sum_j w_j log Z_j
        first = torch.ones_like(on)
        for j in range(len(self.logits)):
            w = self.weights[:, j]
            _, _, total, best = self.model_stats(j, excluded)
            term = w * (best + log_total(total))
            nucleus_shift = torch.where(w != 0, torch.where(first, term, nucleus_shift + term), nucleus_shift)
            first = first & (w == 0)
        z, masses, total, best = self.model_stats(self.tuned, excluded)
        tail_shift = best + log_total(total)
        in_nucleus = z >= nucleus(z, masses, mass_limit(self.upscale_top_p, total))[:, None]
        scores = torch.where(in_nucleus, s - nucleus_shift[:, None], z - tail_shift[:, None])
        return torch.where(on[:, None] & ~excluded, scores, s)

    def add_bias(self, s: torch.Tensor) -> torch.Tensor:
        """Scores with ``token_bias`` added where they are not excluded, one entry after the other."""
        if self.bias is None:
            return s
        for ids, values in zip(self.bias.ids.unbind(1), self.bias.values.unbind(1)):
            in_vocab = (ids >= 0) & (ids < self.vocab_size)
            ids = ids.clamp(0, self.vocab_size - 1)[:, None]
            old = s.gather(1, ids)
            new = torch.where(in_vocab[:, None] & (old != NEG_INF), old + values[:, None], old)
            s = s.scatter(1, ids, new)
        return s

    # --- filters ---------------------------------------------------------------------------------------------------

    def masses_in(self, s: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """The masses of the scores from ``floor`` [R] on, 0 elsewhere."""
        return torch.where((s >= floor[:, None]) & (s > NEG_INF), mass(s, s.amax(1), self.c), 0)

    def count_floor(self, s: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """top-k: the k-th largest score."""
        kth = s.sort(1, descending=True).values.gather(1, (self.top_k - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(self.top_k > 0, kth, NEG_INF)

    def mass_floor(self, s: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """top-p: the smallest score of the nucleus, of the mass that is left."""
        masses = self.masses_in(s, floor)
        tau = nucleus(s, masses, mass_limit(self.top_p, masses.sum(1)))
        return torch.where(self.top_p < 1, tau, NEG_INF)

    def share_floor(self, s: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """min-p: the score of ``min_p`` times the best token's probability."""
        least = s.amax(1) + self.temperature * log(self.min_p.clamp(min=TINY))
        return torch.where(self.min_p > 0, least, NEG_INF)

    def typical_interval(self, s: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Locally typical sampling (arXiv 2202.00666): of what is left the scores nearest to their mean, the fewest
        that have the mass ``typical_p``. |s - mean| / T is | -log p - entropy |."""
        best = s.amax(1)
        masses = self.masses_in(s, floor)
        total = masses.sum(1)
        surprises = torch.where(masses > 0, surprise(s, best, self.c), 0).sum(1)
        mean = mean_score(best, self.c, surprises, total)
        distance = (s - mean[:, None]).abs()
        reach = -nucleus(-distance, masses, mass_limit(self.typical_p, total))
        on = self.typical_p < 1
        return torch.where(on, edge(mean, reach), NEG_INF), torch.where(on, -edge(-mean, reach), float("inf"))

    def interval(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest score that are kept, [R] each; each limit looks at what those before it leave.
        Greedy rows keep the best."""
        floor = torch.full_like(self.temperature, NEG_INF)
        ceiling = -floor
        if bool(self.filtered().any()):
            for limit in (self.count_floor, self.mass_floor, self.share_floor):
                floor = torch.maximum(floor, limit(s, floor))
            low, ceiling = self.typical_interval(s, floor)
            floor = torch.maximum(floor, low)
        best = s.amax(1)
        return torch.where(self.greedy, best, floor), torch.where(self.greedy, best, ceiling)

    def process(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores with -inf outside the filters, and the masses of what is left (greedy: one token's)."""
        floor, ceiling = self.interval(s)
        kept = torch.where((s >= floor[:, None]) & (s <= ceiling[:, None]), s, NEG_INF)
        masses = torch.where(kept == NEG_INF, 0, mass(kept, s.amax(1), self.c))
        ids = torch.arange(s.shape[1], device=s.device)
        greedy_mass = torch.where(ids == first_max(s)[:, None], 1 << MASS_BITS, 0)
        return kept, torch.where(self.greedy[:, None], greedy_mass, masses)

    # --- log-probs -------------------------------------------------------------------------------------------------

    def log_softmax(self, s: torch.Tensor, processed: bool) -> torch.Tensor:
        """log p of every token [R, V]: raw emulated, or after temperature and filters."""
        best = s.amax(1)
        if not processed:
            total = torch.where(s == NEG_INF, 0, mass(s, best, torch.full_like(best, LOG2E))).sum(1)
            return (s - best[:, None]) - log_total(total)[:, None]
        kept, masses = self.process(s)
        lp = (kept - best[:, None]) * self.inverse_temperature[:, None] - log_total(masses.sum(1))[:, None]
        lp = torch.where(kept == NEG_INF, NEG_INF, lp)
        return torch.where(self.greedy[:, None], torch.where(masses > 0, lp.new_zeros(()), NEG_INF), lp)


def mean_score(best: torch.Tensor, c: torch.Tensor, surprises: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The mean of scores, by the sums of their `surprise` and their mass; [R] each."""
    bits = surprises.to(torch.float64) / total.clamp(min=1).to(torch.float64)
    return best - bits.to(torch.float32) / c


def edge(center: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """The smallest float32 x with center - x <= reach, all float32; [R] each. Bisection over the order of floats."""
    low = torch.full_like(center, -0x7F800000, dtype=torch.int64)  # -inf
    high = torch.full_like(low, 0x7F800000)
    for _ in range(32):
        middle = low + ((high - low) >> 1)
        bits = torch.where(middle < 0, -middle | -0x80000000, middle)
        inside = center - bits.to(torch.int32).view(torch.float32) <= reach
        low, high = torch.where(inside, low, middle + 1), torch.where(inside, middle, high)
    return torch.where(high < 0, -high | -0x80000000, high).to(torch.int32).view(torch.float32)
