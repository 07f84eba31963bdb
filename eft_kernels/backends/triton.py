"""The Triton backend: kernels of eft_kernels/triton on any GPU Triton compiles for.

With TRITON_INTERPRET=1 (set before import) the kernels run on CPU tensors in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("triton is not installed (it comes with torch on GPU machines; pip install triton)") from error

from ..params import Params
from ..triton import filter, outputs, race
from ..triton import verify as judge
from ..triton.rows import Models, Sampling, Up
from ..triton.verify import Side

INTERPRETED = triton.knobs.runtime.interpret
NO_STATE = filter.State(*[None] * 7)
OPTIONS = dict(enable_fp_fusion=False)  # tokens depend on it
SEARCH = {} if INTERPRETED or torch.version.hip else dict(maxnreg=128)  # else ptxas spills to fit a fifth block
SLACK = 2e-5  # of a float32 sum of exponentials over a row, relative
CHUNK = 256
STREAM = {"sample": 0, "draft": 1}
METHOD = {"coupled": 0, "token": 1, "block": 2}
NO_UP = Up(None, 1.0, None, None, None, tl.constexpr(-1))


def status() -> tuple[bool, str]:
    if INTERPRETED:
        return True, f"triton {triton.__version__}, interpreted on the CPU"
    if not any(torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == d
               for d in ("cuda", "xpu")):
        return False, "no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    return True, f"triton {triton.__version__}"


def _pair(x, number):
    return (x, number) if isinstance(x, torch.Tensor) else (None, x)


def _number(w: float):
    """A weight of 1 or -1 needs no product: it is part of the compiled kernel."""
    return tl.constexpr(float(w)) if w in (1, -1) else float(w)


def _varies(x, off) -> bool:
    """Some row may have the parameter on."""
    return isinstance(x, torch.Tensor) or x != off


class Call:
    """One call's launch arguments; ``keep`` is a model that is read whatever its weight."""

    def __init__(self, logits, p: Params, keep: int | None = None):
        self.slots = logits[0].shape[1] if logits[0].dim() == 3 else 1
        self.rows, self.device = logits[0].shape[0] * self.slots, logits[0].device
        self.V, self.chunks = p.vocab_size, triton.cdiv(p.vocab_size, CHUNK)
        upscales = _varies(p.upscale_top_p, 1.0)
        tuned, weights = p.tuned, p.weights
        if not isinstance(weights, torch.Tensor):  # a model of weight 0 is not read
            live = [j for j, w in enumerate(weights) if w != 0 or (upscales and j == tuned)] or [0]
            logits, weights = [logits[j] for j in live], tuple(_number(weights[j]) for j in live)
            tuned = live.index(tuned) if tuned in live else -1
        tensor = isinstance(weights, torch.Tensor)
        self.models = Models(
            tuple(logits), tuple(z.stride(0) for z in logits), tuple(z.stride(1) if z.dim() == 3 else 0 for z in logits),
            weights if tensor else None, weights.stride(0) if tensor and weights.dim() == 2 else 0,
            () if tensor else weights, p.token_mask, 0 if p.token_mask is None else p.token_mask.shape[-1], self.V,
            self.slots)
        self.sampling = Sampling(*_pair(p.temperature, 1.0), *_pair(p.top_k, 0), *_pair(p.top_p, 1.0),
                                 *_pair(p.min_p, 0.0), *_pair(p.seed, 0), *_pair(p.position, 0))
        self.filtered = _varies(p.top_k, 0) or _varies(p.top_p, 1.0) or _varies(p.min_p, 0.0)
        self.processed = _varies(p.temperature, 1.0)
        self.up = NO_UP
        if upscales:
            on = _pair(p.upscale_top_p, 1.0)
            self.up = Up(*on, *(self.empty() for _ in range(3)), tl.constexpr(tuned))
            self.upscale()

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty((self.rows, *shape), dtype=dtype, device=self.device)

    def split(self, tiles: int, tc: int) -> dict:
        return dict(SPLITS=triton.cdiv(self.chunks, tiles * tc), TILES=tiles, TC=tc)

    def launch(self, kernel, *args, per_row: int = 1, **options):
        if self.rows:
            kernel[(self.rows * per_row,)](self.models, self.up, *args, **options, **OPTIONS)

    def upscale(self):
        """Fills `Up`."""
        J, split = len(self.models.z), self.split(4, 8)
        top = torch.empty(J, self.rows, self.chunks, device=self.device)
        totals = torch.zeros(J, self.rows, dtype=torch.int64, device=self.device)
        cp = triton.next_power_of_2(self.chunks)
        self.launch(filter.own_stats_kernel, top, self.rows, self.chunks, per_row=split["SPLITS"], **split)
        self.launch(filter.own_mass_kernel, top, totals, self.rows, self.chunks, per_row=split["SPLITS"], CP=cp, **split)
        self.launch(filter.own_row_kernel, top, totals, *self.scratch(), self.rows, self.chunks, CP=cp, TC=8, N=2048,
                    **SEARCH)

    def scratch(self):
        return self.empty(self.chunks, dtype=torch.int32), self.empty(self.V)

    def stats(self, sum: bool, sum_c: bool):
        """Maxima, sums and sums at temperature [rows, chunks]."""
        self.top = self.empty(self.chunks)
        self.sum = self.empty(self.chunks) if sum else None
        self.sum_c = (self.empty(self.chunks) if self.processed or sum is False else self.sum) if sum_c else None
        split = self.split(4, 8)
        self.launch(filter.stats_kernel, self.sampling, self.top, self.sum,
                    None if self.sum_c is self.sum else self.sum_c, self.chunks, per_row=split["SPLITS"], **split)

    def row(self, domain=0, state=None, tokens=None, valid=None, logprobs=None, raw=None):
        self.launch(filter.row_kernel, self.sampling, domain, self.top, self.sum, self.sum_c, *self.scratch(), SLACK,
                    state, tokens, valid, logprobs, raw, self.chunks, CP=triton.next_power_of_2(self.chunks), TC=8,
                    N=2048, FILTERED=self.filtered, **SEARCH)

    def state(self):
        return filter.State(*(self.empty() for _ in range(4)), self.empty(dtype=torch.int64),
                            self.empty(dtype=torch.int64), self.empty(dtype=torch.bool))


def sample(logits, p: Params, stream: str, slot: int, logprobs: bool, top_logprobs: int, diagnostics: bool):
    call = Call(logits, p)
    B, device = call.rows, call.device
    tokens, valid = call.empty(dtype=torch.int64), call.empty(dtype=torch.bool)
    lp, raw = (call.empty() if logprobs else None for _ in range(2))
    domain = STREAM[stream] << 1 | slot << 3
    more = top_logprobs or diagnostics
    if call.filtered or more:
        call.stats(sum=logprobs or bool(more), sum_c=logprobs or _varies(p.top_p, 1.0))
        state = call.state() if more else None
        call.row(domain, state, tokens, valid, lp, raw)
    else:
        direct = B < 8
        split = call.split(1 if direct else 4, 8)
        splits = split["SPLITS"]
        arrived = torch.zeros(B, dtype=torch.int32, device=device)
        part_key = torch.empty(B * splits, dtype=torch.int64, device=device)
        part = torch.empty(B * splits * 4, device=device) if logprobs else None
        call.launch(race.sample_kernel, call.sampling, domain, tokens, valid, lp, raw, arrived, part_key, part,
                    per_row=splits, PARTS=triton.next_power_of_2(splits), DIRECT=direct, PROCESSED=call.processed,
                    **split)
    top_ids = top_lp = entropy = tv = None
    if top_logprobs:
        top_ids, top_lp = call.empty(top_logprobs, dtype=torch.int64), call.empty(top_logprobs)
        found, buffer = call.empty(call.chunks, dtype=torch.int32), call.empty(call.V, dtype=torch.int64)
        call.launch(outputs.top_kernel, call.top, found, buffer, state, top_ids, top_lp, top_logprobs, call.chunks,
                    CP=triton.next_power_of_2(call.chunks), TC=8, N=2048)
    if diagnostics:
        entropy, tv = call.empty(), call.empty()
        z = logits[p.tuned]
        call.launch(outputs.diagnostics_kernel, state, z, z.stride(0), entropy, tv, call.chunks, TC=8)
    return tokens, valid, lp, raw, top_ids, top_lp, entropy, tv


def _states(logits, p: Params):
    """A `Call` and the state of its rows."""
    call = Call(logits, p)
    call.stats(sum=True, sum_c=True)
    state = call.state()
    call.row(state=state)
    return call, state


def logprobs(logits, p: Params):
    call, state = _states(logits, p)
    out, split = call.empty(call.V), call.split(4, 8)
    call.launch(outputs.logprobs_kernel, call.sampling, state, out, per_row=split["SPLITS"], **split)
    return out


def token_logprobs(logits, p: Params, ids):
    call, state = _states(logits, p)
    out = torch.empty(ids.shape, device=ids.device)
    call.launch(outputs.ids_kernel, call.sampling, state, ids, ids.shape[1], None, out, None, N=128)
    return out


def verify(logits, p: Params, draft_tokens, draft_lengths, method: str, draft: int, logprobs: bool):
    B, S = logits[0].shape[:2]
    device, judges, blocks = logits[0].device, method != "coupled", method == "block"
    call = Call(logits, p)
    call.stats(sum=logprobs, sum_c=logprobs or _varies(p.top_p, 1.0))
    state = call.state()
    own, own_valid = (None, None) if judges else (call.empty(dtype=torch.int64), call.empty(dtype=torch.bool))
    call.row(STREAM["sample"] << 1, state, own, own_valid)
    split = call.split(4, 8)
    target, other = Side(call.models, call.up, state), Side(call.models, NO_UP, NO_STATE)
    if judges:
        call.launch(judge.mass_kernel, call.sampling, state, per_row=split["SPLITS"], **split)
        if draft >= 0:
            q = Call([logits[draft]], p._replace(weights=(1.0,), upscale_top_p=1.0, tuned=0))
            q.stats(sum=False, sum_c=_varies(p.top_p, 1.0))
            other = Side(q.models, NO_UP, q.state())
            q.row(state=other.state)
            q.launch(judge.mass_kernel, q.sampling, other.state, per_row=split["SPLITS"], **split)
    tokens, valid = call.empty(dtype=torch.int64).view(B, S), torch.empty(B, dtype=torch.bool, device=device)
    emitted = torch.empty(B, dtype=torch.int64, device=device)
    lp, raw = (call.empty().view(B, S) if logprobs else None for _ in range(2))
    accepted = torch.empty(B, dtype=torch.int32, device=device)
    factor = torch.empty(B, dtype=torch.float64, device=device)
    ratios = torch.empty(B, S, dtype=torch.float64, device=device) if blocks else None
    if not B:
        return tokens, emitted, valid, lp, raw
    options = dict(METHOD=METHOD[method], **OPTIONS)
    judge.accept_kernel[(B,)](target, other, call.sampling, draft_tokens, draft_lengths, own, accepted, factor, ratios,
                              S, call.V, num_warps=1, **options)
    if blocks:
        rest = torch.zeros(B, S, dtype=torch.int64, device=device)
        judge.rest_kernel[(B * S * split["SPLITS"],)](target, other, call.sampling, draft_tokens, accepted, ratios, rest,
                                                      S, **split, **OPTIONS)
        judge.block_kernel[(B,)](call.sampling, accepted, factor, ratios, rest, S, num_warps=1, **OPTIONS)
    judge.last_kernel[(B,)](target, other, call.sampling, call.top, draft_tokens, draft_lengths, own, accepted, factor,
                            tokens, emitted, valid, S, call.chunks, CP=triton.next_power_of_2(call.chunks),
                            SP=triton.next_power_of_2(S), **options)
    if logprobs:
        call.launch(outputs.ids_kernel, call.sampling, state, tokens, 1, emitted, lp, raw, N=1, num_warps=1)
    return tokens, emitted, valid, lp, raw
