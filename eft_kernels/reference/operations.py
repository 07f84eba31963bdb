"""`sample`, `logprobs` and `token_logprobs` by the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..dispatch import Sampled
from ..parameters import STREAM_CODES, Params, TokenBias
from .masses import log_total
from .noise import after_winner, first_max, keys
from .rows import NEG_INF, Rows, read_rows

NAN = float("nan")


def blocks(rows: int, vocab_size: int) -> list[slice]:
    """Slices of rows that bound the temporaries."""
    step = max(1, (1 << 21) // max(1, vocab_size))
    return [slice(i, min(rows, i + step)) for i in range(0, rows, step)]


def rows_of(logits: Sequence[torch.Tensor], p: Params, part: slice) -> Rows:
    index = torch.arange(*p.lead(logits), device=logits[0].device)[part]
    mask = None if p.token_mask is None else p.token_mask[part]
    bias = None if p.token_bias is None else TokenBias(*(x[part] for x in p.token_bias))
    if p.row_index is None:
        return Rows([z[part] for z in logits], p, index, mask, bias)
    read, there = read_rows(logits, p.row_index[part])
    return Rows(read, p, index, mask, bias, there)


@torch.no_grad()
def sample(
    logits: Sequence[torch.Tensor],
    p: Params,
    stream: str,
    slot: int,
    logprobs: bool,
    top_logprobs: int,
    diagnostics: bool,
    runners_up: int,
) -> Sampled:
    (B,), device = p.lead(logits), logits[0].device

    def full(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    tokens, valid = full((B,), -1, torch.int64), full((B,), False, torch.bool)
    lp, raw, entropy, tv = (full((B,), NAN) for _ in range(4))
    others = full((B, runners_up), -1, torch.int64)
    top_ids, top_lp = full((B, top_logprobs), -1, torch.int64), full((B, top_logprobs), NEG_INF)
    for part in blocks(B, p.vocab_size):
        r = rows_of(logits, p, part)
        s, ok = r.combine()
        kept, _ = r.process(s)
        raced = torch.where(r.greedy[:, None], s, kept) if runners_up else kept
        key = keys(raced, r.temperature, r.seed, r.position, STREAM_CODES[stream], torch.full_like(r.seed, slot))
        chosen = first_max(key)
        others[part] = torch.where(ok[:, None], after_winner(key, runners_up), -1)
        tokens[part], valid[part] = torch.where(ok, chosen, -1), ok
        emulated = r.log_softmax(s, False) if logprobs or top_logprobs or diagnostics else s
        if logprobs:
            lp[part] = torch.where(ok, r.log_softmax(s, True).gather(1, chosen[:, None])[:, 0], NAN)
            raw[part] = torch.where(ok, emulated.gather(1, chosen[:, None])[:, 0], NAN)
        if top_logprobs:
            n = min(top_logprobs, p.vocab_size)
            best = s.sort(dim=1, descending=True, stable=True)  # scores: log-probs are rounded once more
            values, ids = best.values[:, :n], best.indices[:, :n]
            there = ok[:, None] & (values > NEG_INF)
            top_ids[part, :n] = torch.where(there, ids, -1)
            top_lp[part, :n] = torch.where(there, emulated.gather(1, ids), NEG_INF)
        if diagnostics:
            h, distance = diagnose(r, s, emulated)
            entropy[part] = torch.where(ok, h, NAN)
            tv[part] = torch.where(ok, distance, NAN)
    return (
        tokens,
        valid,
        lp if logprobs else None,
        raw if logprobs else None,
        top_ids if top_logprobs else None,
        top_lp if top_logprobs else None,
        entropy if diagnostics else None,
        tv if diagnostics else None,
        others if runners_up else None,
    )


def diagnose(r: Rows, s: torch.Tensor, emulated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of the emulated distribution, and its total variation from the tuned model's over the tokens not excluded
    (NaN where a tuned model of weight 0 holds NaN or +inf); ``emulated``: log-probs [R, V]."""
    prob = emulated.exp()
    entropy = -torch.where(prob > 0, prob * emulated, 0.0).sum(1)
    z, _, total, best = r.model_stats(r.tuned, s == NEG_INF)
    tuned = (z - best[:, None]) - log_total(total)[:, None]
    distance = 0.5 * (prob - tuned.exp()).abs().sum(1)
    return entropy, torch.where((z < float("inf")).all(1), distance, NAN)


@torch.no_grad()
def logprobs(logits: Sequence[torch.Tensor], p: Params, scores: bool = False) -> torch.Tensor:
    """float32 [R, V]: after temperature and filters where a row has them, else emulated; or the emulated ``scores``."""
    out = torch.empty(*p.lead(logits), p.vocab_size, dtype=torch.float32, device=logits[0].device)
    for part in blocks(*out.shape):
        r = rows_of(logits, p, part)
        s, ok = r.combine()
        processed = (r.temperature != 1) | r.filtered()
        lp = s if scores else r.log_softmax(s, False)
        if not scores and bool(processed.any()):
            lp = torch.where(processed[:, None], r.log_softmax(s, True), lp)
        out[part] = torch.where(ok[:, None], lp, NAN)
    return out


def token_logprobs(logits: Sequence[torch.Tensor], p: Params, ids: torch.Tensor) -> torch.Tensor:
    """The same at ids [R, N], NaN for those outside the vocabulary."""
    in_vocab = (ids >= 0) & (ids < p.vocab_size)
    lp = logprobs(logits, p).gather(1, ids.clamp(0, p.vocab_size - 1))
    return torch.where(in_vocab, lp, NAN)
