"""The implementations beside ours. Each draws from the distribution that ours draws from, from noise of its own.

An implementation is a record of `BASELINES`. ``make(op, variant, problem)`` gives a function of (logits) -> tokens, or
(tokens, log-probs, raw log-probs) where the problem asks for them; verify: (logits, drafts) -> (tokens padded with -1,
how many); logprobs: (logits) -> [B, V]; token_logprobs: (logits, ids) -> [B, n]. What it raises is why it is absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..parameters import OFF, PARAMETERS

Logits = Sequence[torch.Tensor]  # J x [B, V], or [B, K+1, V]
Call = Callable[..., Any]  # of an operation; what it takes and returns is said above


class Problem(NamedTuple):
    """What a call is about, beside its inputs."""

    weights: tuple[float, ...]
    params: dict[str, float]  # sampling parameters that are not off, by our names
    seeds: torch.Tensor  # int64 [rows], of our noise
    logprobs: bool = False
    token_mask: torch.Tensor | None = None  # int32 [rows, V / 32]
    allowed: torch.Tensor | None = None  # the same, bool [rows, V]

    def get(self, name: str) -> float:
        return self.params.get(name, OFF[name])

    @property
    def top_k(self) -> int:
        return int(self.get("top_k"))


class Baseline(NamedTuple):
    name: str
    summary: str
    source: str  # what it mirrors
    ops: dict[str, tuple[str, ...]]
    make: Callable[..., Call]
    absent: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] = ("cpu", "cuda")


SAMPLE = ("plain", "top_k", "top_p", "min_p", "all", "upscale_filter", "masked", "with_logprobs", "top_p_with_logprobs")
VERIFY = ("coupled", "token", "block")
EVERYTHING = dict(sample=SAMPLE, verify=VERIFY, logprobs=("plain",), token_logprobs=("plain",))


# --- eager: what a user of transformers writes ---------------------------------------------------------------------


def warpers(q: Problem) -> list[Any]:
    """transformers' own, in its order."""
    wanted = [(p.warper, x) for p in PARAMETERS if p.warper and (x := q.get(p.name)) != p.off]
    if not wanted:
        return []
    from transformers.generation import logits_process

    return [getattr(logits_process, name)(x) for name, x in wanted]


def eager_scores(logits: Logits, q: Problem) -> torch.Tensor:
    logps = [z.float().log_softmax(-1) for z in logits]
    scores = logps[0] if q.weights[0] == 1 else q.weights[0] * logps[0]
    for lp, w in zip(logps[1:], q.weights[1:]):
        scores = scores + lp if w == 1 else scores - lp if w == -1 else scores + w * lp
    if q.get("upscale_top_p") < 1:
        from transformers.generation.logits_process import TopPLogitsWarper

        warper: Any = TopPLogitsWarper(q.get("upscale_top_p"))  # it does not look at the ids
        outside = warper(None, logps[1]).isinf()
        scores = torch.where(outside, logps[1], scores)
    return scores if q.allowed is None else scores.masked_fill(~q.allowed, -float("inf"))


def eager(op: str, variant: str, q: Problem) -> Call:
    chain = warpers(q)

    def sample(logits: Logits) -> torch.Tensor | tuple[torch.Tensor, ...]:
        raw = scores = eager_scores(logits, q)
        for warper in chain:
            scores = warper(None, scores)
        token = torch.multinomial(scores.softmax(-1), 1)
        if not q.logprobs:
            return token.squeeze(1)
        return tuple(
            x.squeeze(1) for x in (token, scores.log_softmax(-1).gather(1, token), raw.log_softmax(-1).gather(1, token))
        )

    calls: dict[str, Call] = dict(
        sample=sample,
        verify=lambda logits, drafts: rejection(logits, drafts, eager_scores(logits, q)),
        logprobs=lambda logits: eager_scores(logits, q).log_softmax(-1),
        token_logprobs=lambda logits, ids: eager_scores(logits, q).log_softmax(-1).gather(1, ids),
    )
    return calls[op]


def rejection(logits: Logits, drafts: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' _speculative_sampling for a batch, without reading from the device; drafts of model 1."""
    B, K = drafts.shape
    target = scores.softmax(-1)  # [B, K+1, V]
    draft = logits[1][:, :K].float().softmax(-1)
    p, q = (x[:, :K].gather(2, drafts[..., None]).squeeze(2) for x in (target, draft))
    accepted = (torch.rand_like(p) * q < p).long().cumprod(1).sum(1, keepdim=True)  # [B, 1]
    row, some = torch.arange(B, device=drafts.device), (accepted < K).float()
    rest = target[row, accepted[:, 0]] - some * draft[row, accepted[:, 0].clamp(max=K - 1)]
    final = torch.multinomial(rest.clamp_(min=0), 1)
    slot = torch.arange(K + 1, device=drafts.device)
    emitted = torch.where(slot < accepted, torch.nn.functional.pad(drafts, (0, 1)), final)
    return torch.where(slot <= accepted, emitted, -1), accepted[:, 0] + 1


# --- lean: as little PyTorch as it takes ---------------------------------------------------------------------------


def combine(logits: Logits, q: Problem) -> torch.Tensor:
    """Scores without any log-softmax, one pass a model."""
    s = logits[0].to(torch.float32, copy=True)
    if q.weights[0] != 1:
        s.mul_(q.weights[0])
    for z, w in zip(logits[1:], q.weights[1:]):
        s.add_(z, alpha=w)
    if q.get("upscale_top_p") < 1:
        totals = [z.float().logsumexp(-1, keepdim=True) for z in logits]
        tuned = logits[1].float() - totals[1]
        s.sub_(sum(w * t for w, t in zip(q.weights, totals)))
        s = torch.where(tuned >= nucleus(tuned, q.get("upscale_top_p")), s, tuned)
    return s if q.allowed is None else s.masked_fill_(~q.allowed, -float("inf"))


def nucleus(scores: torch.Tensor, p: float) -> torch.Tensor:
    """The smallest score in the nucleus of mass p, [B, 1]."""
    ordered = scores.sort(-1, descending=True).values
    return ordered.gather(1, (ordered.softmax(-1).cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1))


def lean_sample(logits: Logits, q: Problem) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Softmax, (sort,) cumsum, searchsorted of one uniform: every filter keeps a prefix of the sorted masses."""
    s = combine(logits, q)
    mass = (s / q.get("temperature") if "temperature" in q.params else s).softmax(-1)
    order, min_p = None, q.get("min_p")
    if q.top_k:
        mass, order = mass.topk(q.top_k)
    elif q.get("top_p") < 1:
        mass, order = mass.sort(descending=True)
    elif min_p:
        mass = mass.where(mass >= min_p * mass.amax(-1, keepdim=True), 0)
    cumulated = mass.cumsum(-1)
    total = cumulated[:, -1:]
    if q.get("top_p") < 1:  # the crossing token is in
        total = cumulated.gather(1, torch.searchsorted(cumulated, total * q.get("top_p")).clamp_(max=mass.shape[1] - 1))
    if min_p and order is not None:
        total = total.minimum(cumulated.gather(1, (mass >= min_p * mass[:, :1]).sum(-1, keepdim=True) - 1))
    place = torch.searchsorted(cumulated, torch.rand_like(total) * total, right=True).clamp_(max=mass.shape[1] - 1)
    token = place if order is None else order.gather(1, place)
    if not q.logprobs:
        return token.squeeze(1)
    raw = s.gather(1, token) - s.logsumexp(-1, keepdim=True)
    return token.squeeze(1), (mass.gather(1, place) / total).log_().squeeze(1), raw.squeeze(1)


def lean_token_logprobs(logits: Logits, ids: torch.Tensor, q: Problem) -> torch.Tensor:
    s = combine(logits, q)
    return s.gather(1, ids) - s.logsumexp(-1, keepdim=True)


def lean(op: str, variant: str, q: Problem, sample: Call = lean_sample) -> Call:
    calls: dict[str, Call] = dict(
        sample=lambda logits: sample(logits, q),
        verify=lambda logits, drafts: rejection(logits, drafts, combine(logits, q)),
        logprobs=lambda logits: combine(logits, q).log_softmax(-1),
        token_logprobs=lambda logits, ids: lean_token_logprobs(logits, ids, q),
    )
    return calls[op]


# --- compiled: one graph -------------------------------------------------------------------------------------------


def race_sample(logits: Logits, q: Problem) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """argmax of score - log Exp(1), filters as thresholds: no cumsum, no multinomial."""
    raw = combine(logits, q)
    s = raw / q.get("temperature")
    if q.top_k:
        s = s.masked_fill(s < s.topk(q.top_k).values[:, -1:], -float("inf"))
    if q.get("top_p") < 1:
        s = s.masked_fill(s < nucleus(s, q.get("top_p")), -float("inf"))
    if q.get("min_p"):
        s = s.masked_fill(s < s.amax(-1, keepdim=True) + torch.tensor(q.get("min_p")).log().item(), -float("inf"))
    token = (s - (-torch.rand_like(s).log()).log()).argmax(-1, keepdim=True)
    if not q.logprobs:
        return token.squeeze(1)
    return tuple(x.squeeze(1) for x in (token, *(y.gather(1, token) - y.logsumexp(-1, keepdim=True) for y in (s, raw))))


def compile_(function: Call) -> Call:
    # inductor writes the number of threads into its code and would find that code again for another number
    return torch.compile(function, dynamic=False, fullgraph=True, options={"cpp.threads": torch.get_num_threads()})


def compiled(op: str, variant: str, q: Problem) -> Call:
    return compile_(lean(op, variant, q, race_sample))


@functools.cache
def no_compiler() -> str | None:
    try:
        compile_(lambda x: x.exp() + 1)(torch.zeros(8, device="cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:
        return f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


# --- serving stacks' samplers, on scores that torch.compile combines -----------------------------------------------


def importable(name: str) -> Callable[[], str | None]:
    def absent() -> str | None:
        try:
            __import__(name)
        except Exception as error:  # a library built for another torch raises all sorts
            return f"import {name}: {type(error).__name__}: {error}"
        return None

    return absent


def scaled(q: Problem) -> Call:
    return compile_(lambda logits: combine(logits, q) / q.get("temperature"))


def probabilities(q: Problem) -> Call:
    return compile_(lambda logits: (combine(logits, q) / q.get("temperature")).softmax(-1))


def flashinfer(op: str, variant: str, q: Problem) -> Call:
    import flashinfer.sampling as f

    if op == "verify":
        both = compile_(
            lambda logits, drafts: (logits[1][:, : drafts.shape[1]].float().softmax(-1), combine(logits, q).softmax(-1))
        )

        def verify(logits: Logits, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            draft, target = both(logits, drafts)
            tokens = f.chain_speculative_sampling(draft, drafts.int(), target)[0]
            return tokens, (tokens >= 0).sum(1)

        return verify
    k, p = q.top_k, q.get("top_p")
    if variant in ("plain", "masked"):
        scores = scaled(q)
        return lambda logits: f.sampling_from_logits(scores(logits))
    probs = probabilities(q)
    calls: dict[str, Call] = dict(
        top_k=lambda logits: f.top_k_sampling_from_probs(probs(logits), k),
        top_p=lambda logits: f.top_p_sampling_from_probs(probs(logits), p),
        min_p=lambda logits: f.min_p_sampling_from_probs(probs(logits), q.get("min_p")),
        all=lambda logits: f.min_p_sampling_from_probs(
            f.top_p_renorm_probs(f.top_k_renorm_probs(probs(logits), k), p), q.get("min_p")
        ),
    )
    return calls[variant]


def vllm(op: str, variant: str, q: Problem) -> Call:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

    scores, device = scaled(q), "cuda"
    k = torch.full((len(q.seeds),), q.top_k, dtype=torch.int32, device=device) if q.top_k else None
    p = torch.full((len(q.seeds),), q.get("top_p"), device=device) if q.get("top_p") < 1 else None
    return lambda logits: random_sample(apply_top_k_top_p(scores(logits), k, p).softmax(-1), {})


def sglang(op: str, variant: str, q: Problem) -> Call:
    import sgl_kernel as f

    probs, k, p = probabilities(q), q.top_k, q.get("top_p")
    calls: dict[str, Call] = dict(
        top_k=lambda logits: f.top_k_top_p_sampling_from_probs(probs(logits), k, 1.0),
        top_p=lambda logits: f.top_p_sampling_from_probs(probs(logits), p),
        min_p=lambda logits: f.min_p_sampling_from_probs(probs(logits), q.get("min_p")),
        all=lambda logits: f.min_p_sampling_from_probs(
            f.top_p_renorm_prob(f.top_k_renorm_prob(probs(logits), k), p), q.get("min_p")
        ),
    )
    return calls[variant]


BASELINES = [
    Baseline(
        "eager",
        "log-softmax of each model, combine, transformers' warpers, softmax, multinomial; verify: "
        "rejection sampling, whichever method ours uses",
        "transformers, GenerationMixin._sample and _speculative_sampling",
        EVERYTHING,
        eager,
    ),
    Baseline(
        "lean",
        "combine without log-softmax, softmax, (sort or top-k,) cumsum, searchsorted",
        "the leanest PyTorch",
        EVERYTHING,
        lean,
    ),
    Baseline(
        "compiled",
        "torch.compile of combine, thresholds and an exponential race in one graph",
        "torch.compile",
        {**EVERYTHING, "verify": ("token",)},
        compiled,
        no_compiler,
    ),
    Baseline(
        "flashinfer",
        "torch.compile's combine, then flashinfer's sampling kernels",
        "flashinfer.sampling",
        dict(sample=("plain", "top_k", "top_p", "min_p", "all", "masked"), verify=("token",)),
        flashinfer,
        importable("flashinfer"),
        ("cuda",),
    ),
    Baseline(
        "vllm",
        "torch.compile's combine, then vLLM's top-k and top-p and its exponential race",
        "vllm.v1.sample.ops.topk_topp_sampler",
        dict(sample=("plain", "top_k", "top_p", "masked")),
        vllm,
        importable("vllm"),
        ("cuda",),
    ),
    Baseline(
        "sglang",
        "torch.compile's combine, then SGLang's sampling kernels",
        "sgl_kernel, sglang.srt.layers.sampler",
        dict(sample=("top_k", "top_p", "min_p", "all")),
        sglang,
        importable("sgl_kernel"),
        ("cuda",),
    ),
]
