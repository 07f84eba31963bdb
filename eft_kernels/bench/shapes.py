"""What can be measured: operations with their variants, the bytes and issue slots they need, shapes, and ourselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import dispatch, ops
from ..combination import weights as weights_of
from . import device as machine
from . import inputs
from .baselines import EVERYTHING, SAMPLE, Baseline, Call, Logits, Problem

Row = dict[str, Any]  # a measurement: one line of JSON
Arguments = tuple[Any, ...]  # of a call: the logits, and what else the operation takes
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes
DEVICES = ("cpu", "cuda")
MIN_VOCAB = 1000

# op: variant: sampling parameters; "masked" allows half of the tokens, "logprobs" asks for the token's log-probs
OPS: dict[str, dict[str, dict[str, float]]] = {
    "sample": {
        "plain": {},
        "top_k": dict(top_k=50),
        "top_p": dict(top_p=0.9),
        "min_p": dict(min_p=0.05),
        "all": dict(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02),
        "upscale_filter": dict(upscale_top_p=0.9),
        "masked": dict(masked=True),
        "with_logprobs": dict(logprobs=True),
        "top_p_with_logprobs": dict(top_p=0.9, logprobs=True),
    },
    "verify": {"coupled": {}, "token": {}, "block": {}},
    "logprobs": {"plain": {}},
    "token_logprobs": {"plain": {}},
}


class Shape(NamedTuple):
    """One measurement of every implementation: what identifies it, then how to make it."""

    op: str = "sample"
    variant: str = "plain"
    batch: int = 1
    vocab: int = 128256
    models: int = 3
    draft_tokens: int | None = None
    dtype: str = "bfloat16"
    logits: str = "peaked"
    threads: int | None = 1
    device: str = "cpu"
    launch: str = "eager"
    device_name: str | None = None  # None: of this machine
    against: tuple[str, ...] | None = None  # implementations beside ours; None: all
    rounds: int = 15

    @property
    def positions(self) -> int:
        """Rows of logits for each row of the batch."""
        return (self.draft_tokens or 0) + 1

    def key(self) -> tuple[object, ...]:
        """What identifies it."""
        return self[:12]

    def label(self) -> str:
        words = [self.op, self.variant, f"B={self.batch}", f"V={self.vocab}", f"J={self.models}"]
        words += [f"K={self.draft_tokens}"] if self.draft_tokens else []
        launch = self.launch if self.device == "cuda" else f"{self.threads} thread(s)"
        return " ".join([*words, self.dtype, self.logits, launch])


def nbytes(s: Shape) -> int:
    """Least bytes to move: every logit read once, the mask's bits, outputs written once."""
    settings = OPS[s.op][s.variant]
    logits = s.models * s.positions * s.vocab * DTYPES[s.dtype]
    mask = 4 * ((s.vocab + 31) // 32) if settings.get("masked") else 0
    if s.op == "sample":  # a token, its validity, two log-probs
        rest = 9 + 8 * bool(settings.get("logprobs"))
    elif s.op == "verify":  # drafts, tokens, how many, validity
        rest = 8 * (s.positions - 1) + 8 * s.positions + 9
    else:
        rest = dict(logprobs=4 * s.vocab, token_logprobs=12)[s.op]
    return s.batch * (logits + mask + rest)


# issue slots: of a thread, for a token (of one row, one position)
EXP = 16  # the polynomial of a mass, its scaling and its sum
RACE = 12  # bound of the chunk, noise of those that may win, comparison; an average over pruned chunks


def issue_slots(s: Shape) -> float:
    """Issue slots a token. For each model its share of a 16-byte load, a conversion, a multiply-add; the maximum; then
    what the variant adds: the race; an exponential for each distribution whose mass is needed; a comparison for each
    threshold, and the passes that find it (top-k 4 counting passes, top-p 2)."""
    q = OPS[s.op][s.variant]
    score = s.models * (DTYPES[s.dtype] / 16 + 2) + 1
    if s.op in ("logprobs", "token_logprobs"):
        return score + EXP
    if s.op == "verify":  # masses of target and draft; block's residual: ratio, difference, sum
        return score + RACE + dict(coupled=0, token=2 * EXP, block=2 * EXP + 4)[s.variant]
    masses = ("top_p" in q) + bool(q.get("logprobs")) + (s.models + 1 if "upscale_top_p" in q else 0)
    passes = 4 * ("top_k" in q) + 2 * ("top_p" in q) + ("min_p" in q) + bool(q.get("masked"))
    return score + RACE + EXP * masses + passes


# --- a shape as a problem, and our own implementations -------------------------------------------------------------


def problem(s: Shape) -> Problem:
    settings = OPS[s.op][s.variant]
    mask = allowed = None
    if settings.get("masked"):
        words = torch.randint(-(1 << 31), 1 << 31, ((s.vocab + 31) // 32,), generator=torch.Generator().manual_seed(5))
        mask = words.to(torch.int32).expand(s.batch, -1).contiguous().to(s.device)
        token = torch.arange(s.vocab, device=s.device)
        allowed = (mask[:, token // 32] >> (token % 32).to(torch.int32)) & 1 != 0
    params = {k: v for k, v in settings.items() if k not in ("masked", "logprobs")}
    return Problem(
        inputs.WEIGHTS[s.models],
        params,
        ops.row_seeds(1, s.batch, s.device),
        bool(settings.get("logprobs")),
        mask,
        allowed,
    )


def arguments(s: Shape, seed: int) -> Arguments:
    """What a call takes: (logits,), with the drafts of `verify` (sampled from model 1) or `token_logprobs`' ids."""
    z = inputs.logits(
        s.logits, s.batch, s.vocab, s.models, s.dtype, seed, s.device, s.positions if s.op == "verify" else None
    )
    if s.op == "verify":
        rows = ops.row_seeds(1, s.batch, s.device)
        drafts = [
            ops.draft(z[1][:, i], slot=i, method=s.variant, seed=rows, position=i).tokens
            for i in range(s.positions - 1)
        ]
        return z, torch.stack(drafts, 1)
    if s.op == "token_logprobs":
        return z, torch.randint(s.vocab, (s.batch, 1), generator=torch.Generator().manual_seed(seed)).to(s.device)
    return (z,)


def ours(op: str, variant: str, q: Problem, backend: str = "auto", **override: float) -> Call:
    """Our operators as a baseline's ``make``."""
    weights = weights_of(q.weights)
    kwargs: dict[str, Any] = dict(q.params, backend=backend, **override)
    if op in ("sample", "verify"):
        kwargs = dict(position=0) | kwargs | dict(logprobs=q.logprobs, token_mask=q.token_mask, seed=q.seeds)

    def sample(logits: Logits) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        out = ops.sample(logits, weights, **kwargs)
        return (out.tokens, out.logprobs, out.raw_logprobs) if q.logprobs else out.tokens

    def verify(logits: Logits, drafts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.verify(logits, weights, drafts, method=variant, **kwargs)[:2]

    calls: dict[str, Call] = dict(
        sample=sample,
        verify=verify,
        logprobs=lambda logits: ops.logprobs(logits, weights, **kwargs),
        token_logprobs=lambda logits, ids: ops.token_logprobs(logits, weights, ids, **kwargs),
    )
    return calls[op]


def combine_max(op: str, variant: str, q: Problem, backend: str = "auto") -> Call:
    plain = q._replace(params={}, logprobs=False, token_mask=None)
    return ours(op, variant, plain, backend, temperature=0.0)


def triton(op: str, variant: str, q: Problem, backend: str = "auto") -> Call:
    return ours(op, variant, q, "triton" if backend == "auto" else backend)


def no_triton() -> str | None:
    available, why = dispatch.status("triton")
    return why if not available else "it is what eft takes here" if machine.backend("cuda") == "triton" else None


OURS = [
    Baseline("eft", "ours", "eft_kernels", EVERYTHING, ours),
    Baseline(
        "eft_triton",
        "our Triton kernels, where the CUDA ones are built",
        "eft_kernels",
        EVERYTHING,
        triton,
        no_triton,
        ("cuda",),
    ),
    Baseline(
        "combine_max",
        "our kernel at temperature 0: combine and maximum, no noise and no filter: the practical floor",
        "eft_kernels",
        dict(sample=SAMPLE),
        combine_max,
    ),
]


# --- shapes to choose from -----------------------------------------------------------------------------------------

PEERS = ("eager", "lean")  # where compiling for each shape would cost more than it tells


def on(device: str) -> dict[str, Any]:
    """The fields of a shape that is measured on a device."""
    return (
        dict(device=device, launch="graph", threads=None)
        if device == "cuda"
        else dict(device=device, launch="eager", threads=1)
    )


def quick(device: str = "cpu") -> list[Shape]:
    return [
        Shape("sample", v, b, against=PEERS, rounds=7, **on(device))
        for b in (1, 8)
        for v in ("plain", "top_p", "with_logprobs")
    ]


def variants(batches: Sequence[int], **fixed: Any) -> list[Shape]:
    """Every operation and variant at bf16, J = 3, V = 128256, peaked."""
    out = [Shape("sample", v, b, **fixed) for v in OPS["sample"] for b in batches]
    out += [Shape("verify", v, b, draft_tokens=4, **fixed) for v in OPS["verify"] for b in batches]
    return out + [Shape(op, "plain", b, **fixed) for op in ("logprobs", "token_logprobs") for b in batches]


def unique(shapes: list[Shape]) -> list[Shape]:
    """The first of those that measure the same, where it was."""
    found: dict[tuple[object, ...], Shape] = {}
    for s in shapes:
        found.setdefault(s.key(), s)
    return list(found.values())


def replaced(shapes: list[Shape], **values: Sequence[object] | None) -> list[Shape]:
    """The shapes with every combination of the values given in place of their own, where there is such a shape."""
    given = {name: v for name, v in values.items() if v}
    out = []
    for s in shapes:
        for choice in itertools.product(*given.values()):
            new: dict[str, Any] = dict(zip(given, choice))
            if s.op != "verify":
                new.pop("draft_tokens", None)
            if new.get("logits") == "family":
                new.setdefault("vocab", inputs.FAMILY_VOCAB)
            out.append(s._replace(**new))
    return unique([s for s in out if s.logits != "family" or s.vocab == inputs.FAMILY_VOCAB])


def select(
    shapes: list[Shape],
    ops: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    device: str | None = None,
    threads: Sequence[int] | None = None,
    rounds: int | None = None,
    **factors: Sequence[object] | None,
) -> list[Shape]:
    """Those of ``shapes`` that are wanted, with every combination of the values given in place of their own."""
    shapes = [s for s in shapes if s.op in (ops or OPS) and s.variant in (variants or OPS[s.op])]
    if device:
        shapes = unique([s._replace(**on(device)) for s in shapes])
    shapes = replaced(shapes, **factors)
    if threads:
        shapes = replaced([s for s in shapes if s.device == "cpu"], threads=threads)
    if factors.get("draft_tokens"):
        shapes = [s for s in shapes if s.op == "verify"]
    if rounds:
        shapes = [s._replace(rounds=rounds) for s in shapes]
    # verify and the up-scaling filter need a tuned model
    return [s for s in shapes if s.models > 1 or s.op != "verify" and s.variant != "upscale_filter"]
