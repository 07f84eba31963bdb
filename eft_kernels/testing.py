"""The case table every backend is held to, and the comparison with the reference. Used by tests and benchmarks.

A backend passes a case when its tokens, validity, and acceptance equal the reference's exactly and its log-probs agree
within `TOLERANCE`. Adding a backend adds nothing here; adding a parameter adds a row. `random_call` makes calls that no
table thinks of: any shape, stride, type and value, past the checks of values.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from . import ops, reference
from .arguments import dtype_of
from .combination import AnyWeights, Weights, interpolate, upscale
from .parameters import DRAFTED, INT64, METHODS, OFF, PARAMETERS, PER_ROW, DraftParams, Parameter, Params, TokenBias

TOLERANCE = 1e-5  # nats: float32 log-sum-exp against the fixed-point one
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INF = float("inf")
Device = torch.device | str
PerRow = Callable[[int], torch.Tensor]  # of the number of rows
Made = tuple[list[torch.Tensor], Weights, dict[str, Any]]  # logits, weights, the other arguments


class Case(NamedTuple):
    """Shapes, types and parameters of one call; ``make`` turns it into tensors."""

    name: str
    rows: int = 4
    vocab: tuple[int, ...] = (1000,)  # per model, or one for all
    dtypes: tuple[torch.dtype, ...] = (F32,)  # per model, or one for all
    weights: Weights | Sequence[float] | Callable[[int], AnyWeights] | None = None  # default: upscale()
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    scale: float = 3.0
    special: str = ""  # what is planted in the logits: ties, flat, hard, neg_inf, least, nan, bad, mask, strided, ...
    slots: int = 4  # K + 1, of verify
    bias: int = 0  # entries of token_bias a row
    draft: dict[str, Any] = {}  # noqa: RUF012  # of verify: what the drafts are drawn by where it is not the target's
    indexed: bool = False  # rows are read by an index, verify's by offsets


def per_row(*values: float, dtype: torch.dtype | None = None) -> PerRow:
    """A parameter that differs from row to row: the values, repeated over the rows."""
    return lambda rows: torch.tensor([values[i % len(values)] for i in range(rows)], dtype=dtype)


CASES = [
    Case("plain"),
    Case("one row", rows=1, vocab=(50257,)),
    Case("bf16", dtypes=(BF16,), vocab=(32000,)),
    Case("fp16", dtypes=(F16,), vocab=(32001,)),
    Case("mixed types", dtypes=(BF16, F32, F16)),
    Case("mixed lengths", vocab=(1007, 1000, 1024), dtypes=(BF16,)),
    Case("vocab size", vocab=(1000,), kwargs=dict(vocab_size=777)),
    Case("one token", vocab=(1,)),
    Case("two tokens", vocab=(2,)),
    Case("less than a chunk", vocab=(255,)),
    Case("a chunk", vocab=(256,)),
    Case("a chunk and one", vocab=(257,), dtypes=(BF16,)),
    Case("two chunks and some", vocab=(519,), rows=9),
    Case("one model", weights=[1.0]),
    Case("one model halved", weights=[0.5], dtypes=(F16,)),
    Case("two models", weights=[1.5, -0.5], dtypes=(BF16,)),
    Case("interpolation", weights=interpolate(0.3), dtypes=(BF16,)),
    Case("eight models", weights=[1.0, 0.25, -0.25, 0.5, -0.5, 0.125, -0.125, 0.3], dtypes=(BF16,)),
    Case("zero weight", weights=[1.0, 0.0, -0.5], special="nan in model 1"),
    Case("all weights zero", weights=[0.0, 0.0, 0.0]),
    Case("weights [J]", weights=lambda rows: torch.tensor([1.0, 0.5, -0.5])),
    Case("weights per row", weights=lambda rows: upscale(torch.linspace(0, 2, rows)), rows=7),
    Case("greedy", kwargs=dict(temperature=0.0)),
    Case("greedy ties", kwargs=dict(temperature=0.0), special="ties"),
    Case("cold", kwargs=dict(temperature=0.05)),
    Case("hot", kwargs=dict(temperature=5.0)),
    Case("top-k 1", kwargs=dict(top_k=1)),
    Case("top-k", kwargs=dict(top_k=50), vocab=(32000,)),
    Case("top-k ties", kwargs=dict(top_k=7), special="ties"),
    Case("top-k beyond V", kwargs=dict(top_k=5000)),
    Case("top-k deep", kwargs=dict(top_k=700), vocab=(5000,)),
    Case("top-k deeper", kwargs=dict(top_k=4000), vocab=(5000,)),
    Case("top-p", kwargs=dict(top_p=0.9), vocab=(32000,), dtypes=(BF16,)),
    Case("top-p small", kwargs=dict(top_p=1e-6)),
    Case("top-p large", kwargs=dict(top_p=0.99999)),
    Case("top-p flat", kwargs=dict(top_p=0.5), special="flat"),
    Case("top-p ties", kwargs=dict(top_p=0.7), special="ties"),
    Case("min-p", kwargs=dict(min_p=0.05)),
    Case("min-p 1", kwargs=dict(min_p=1.0)),
    Case("typical-p", kwargs=dict(typical_p=0.9), vocab=(32000,), dtypes=(BF16,)),
    Case("typical-p without the best", kwargs=dict(typical_p=0.2), vocab=(5000,), scale=1.0),
    Case("typical-p small", kwargs=dict(typical_p=1e-6, temperature=0.7)),
    Case("typical-p peaked", kwargs=dict(typical_p=0.95), scale=30.0),
    Case("typical-p flat", kwargs=dict(typical_p=0.5), special="flat"),
    Case("typical-p ties", kwargs=dict(typical_p=0.6, temperature=1.5), special="ties"),
    Case(
        "typical-p hard to find",
        rows=70,
        vocab=(2000,),
        weights=[1.0],
        special="hard",
        kwargs=dict(typical_p=per_row(1e-6, 0.05, 0.3, 0.7, 0.95, 0.9999, 0.999999)),
    ),
    Case(
        "typical-p of what is left",
        rows=12,
        vocab=(3000,),
        dtypes=(BF16,),
        kwargs=dict(
            temperature=per_row(1.0, 0.7, 2.0, 0.0),
            top_k=per_row(0, 50, 700),
            top_p=per_row(1.0, 0.95),
            min_p=per_row(0.0, 0.0, 0.0, 0.0, 0.01),
            typical_p=per_row(0.9, 0.3, 1.0, 0.6, 0.99),
            upscale_top_p=per_row(1.0, 1.0, 0.8),
        ),
        draft=dict(typical_p=per_row(1.0, 0.5, 0.9)),
        special="mask",
    ),
    Case("all filters", kwargs=dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02), vocab=(32000,), dtypes=(BF16,)),
    Case(
        "top-k hard to find",
        rows=170,
        vocab=(2000,),
        weights=[1.0],
        special="hard",
        kwargs=dict(top_k=per_row(1, 2, 5, 8, 9, 100, 128, 129, 256, 257, 300, 301, 560, 601, 700, 1989, 1999)),
    ),
    Case(
        "top-p hard to find",
        rows=110,
        vocab=(2000,),
        weights=[1.0],
        special="hard",
        kwargs=dict(top_p=per_row(1e-6, 0.01, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.999999)),
    ),
    Case(
        "all hard to find",
        rows=90,
        vocab=(2000,),
        weights=[1.0],
        special="hard",
        kwargs=dict(
            top_k=per_row(3, 20, 90, 128, 290, 600, 1500),
            top_p=per_row(0.3, 0.999, 0.9),
            min_p=per_row(0.0, 0.01, 0.0, 0.5),
        ),
    ),
    Case("up-scaling filter", kwargs=dict(upscale_top_p=0.9)),
    Case("up-scaling filter tight", kwargs=dict(upscale_top_p=0.1, top_p=0.9), dtypes=(BF16,)),
    Case("up-scaling filter masked", kwargs=dict(upscale_top_p=0.5), special="mask"),
    Case("up-scaling filter -inf", kwargs=dict(upscale_top_p=0.7, tuned=2), special="neg_inf"),
    Case(
        "everything",
        kwargs=dict(temperature=1.3, top_k=300, top_p=0.9, min_p=0.001, upscale_top_p=0.8),
        dtypes=(BF16, F16, F32),
        special="mask",
        vocab=(2000, 2003, 2001),
    ),
    Case(
        "parameters per row",
        rows=12,
        vocab=(3000,),
        dtypes=(BF16,),
        kwargs=dict(
            temperature=per_row(0.0, 0.7, 1.0, 1.5),
            top_k=per_row(0, 5, 100),
            top_p=per_row(1.0, 0.9, 0.5, 0.99, 0.1),
            min_p=per_row(0.0, 0.1),
            upscale_top_p=per_row(1.0, 0.9, 0.5),
        ),
    ),
    Case("flat", special="flat", vocab=(5000,)),
    Case("ties", special="ties"),
    Case("peaked", scale=30.0),
    Case("-inf", special="neg_inf"),
    Case("masks by the least number", weights=upscale(1.5), special="least", dtypes=(BF16, F32, BF16)),
    Case("masks by the least number alone", special="least", dtypes=(BF16,)),
    Case(
        "masks by the least number filtered",
        weights=lambda rows: upscale(torch.linspace(1.1, 2, rows)),
        special="least",
        dtypes=(F32,),
        kwargs=dict(top_p=0.9, upscale_top_p=0.8),
    ),
    Case("token mask", special="mask", vocab=(1001,), dtypes=(BF16,)),
    Case("token mask nearly empty", special="mask one", vocab=(3000,)),
    Case("token bias", bias=60, vocab=(3000,), dtypes=(BF16,)),
    Case("token bias of few", bias=3, vocab=(32000,), dtypes=(BF16,), rows=3),
    Case("token bias filtered", bias=90, kwargs=dict(top_k=50, top_p=0.9, typical_p=0.8, temperature=0.7)),
    Case("token bias greedy", bias=40, kwargs=dict(temperature=0.0), vocab=(257,)),
    Case(
        "token bias and the rest",
        rows=6,
        bias=50,
        kwargs=dict(upscale_top_p=per_row(0.8, 1.0), top_p=per_row(0.9, 1.0, 0.5), min_p=per_row(0.0, 0.01)),
        draft=dict(temperature=0.6),
        special="mask",
        vocab=(2000, 2003, 2001),
        dtypes=(BF16, F16, F32),
    ),
    Case("token bias bans nearly all", bias=300, vocab=(257,), special="ban"),
    Case("bad token bias", rows=8, bias=30, vocab=(700,), special="bad bias"),
    Case("all masked", special="all masked", rows=3),
    Case("bad rows", special="bad", rows=8),
    Case("bad rows filtered", special="bad", rows=8, kwargs=dict(top_p=0.9, upscale_top_p=0.9)),
    Case("strided", special="strided", dtypes=(BF16,)),
    Case("transposed", special="transposed"),
    Case("unaligned", special="offset", dtypes=(BF16,), vocab=(515,)),
    Case("no rows", rows=0),
    Case("far position", kwargs=dict(position=per_row(0, (1 << 40) + 5, (1 << 63) - 20))),
    Case("seed extremes", kwargs=dict(seed=per_row(0, -1, (1 << 63) - 1, -(1 << 63)))),
    Case("one seed for all rows", kwargs=dict(seed=-12345), rows=9),
    Case(
        "drafts tempered only",
        kwargs=dict(temperature=0.8, top_k=40, top_p=0.9),
        draft=dict(temperature=1.3, top_k=0, top_p=1.0),
        scale=1.0,
    ),
    Case(
        "drafts filtered", draft=dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05), vocab=(3000,), dtypes=(BF16,)
    ),
    Case("greedy drafts", kwargs=dict(temperature=0.9), draft=dict(temperature=0.0), special="ties"),
    Case("drafts for a greedy target", kwargs=dict(temperature=0.0), draft=dict(temperature=1.0, min_p=0.1)),
    Case(
        "drafts drawn per row",
        rows=12,
        vocab=(700,),
        dtypes=(BF16, F32, F16),
        kwargs=dict(temperature=per_row(0.0, 0.7, 1.0), upscale_top_p=per_row(1.0, 0.8)),
        draft=dict(
            temperature=per_row(1.0, 0.0, 0.6, 1.7),
            top_k=per_row(0, 5, 50),
            top_p=per_row(1.0, 0.9),
            min_p=per_row(0.0, 0.1, 0.0),
        ),
    ),
    Case("indexed rows", indexed=True, rows=5, dtypes=(BF16, F32, F16)),
    Case("indexed rows filtered", indexed=True, rows=9, vocab=(700,), dtypes=(BF16,), kwargs=dict(top_p=0.9, top_k=60)),
    Case(
        "indexed rows and the rest",
        indexed=True,
        rows=6,
        bias=20,
        weights=lambda rows: upscale(torch.linspace(0, 2, rows)),
        kwargs=dict(upscale_top_p=per_row(0.8, 1.0), top_p=per_row(0.9, 1.0, 0.5)),
        draft=dict(temperature=0.6),
        special="mask",
        vocab=(2000, 2003, 2001),
    ),
    Case("indexed bad rows", indexed=True, special="bad", rows=8),
    Case("no indexed rows", indexed=True, rows=0),
    Case("draft stream", kwargs=dict(stream="draft", slot=3)),
    Case("many rows", rows=70, vocab=(300,)),
    Case("large vocabulary", rows=2, vocab=(151936, 152064, 152064), dtypes=(BF16,), kwargs=dict(top_p=0.95)),
]


def _hard(rows: int, vocab: int, g: torch.Generator) -> torch.Tensor:
    """[rows, V], thresholds hard to find: ties, neighbouring floats, ranges from a rounding to nearly all floats."""
    steps, ones = torch.arange(vocab - 10), torch.ones(300)
    below = torch.nextafter(ones, ones * 0)
    kinds: list[tuple[Iterable[torch.Tensor], float]] = [  # some scores, and what the others are
        ([], 0.5),
        ([ones, below], -9.0),
        ([torch.tensor([4000.0]), ones, below], -9.0),
        ([steps * -1e-7], -50.0),
        ([steps * -2e-45], -1e-40),
        ([torch.tensor([3e38, 1e30, 0.0, -1e30, -3e38])], -1e20),
        ([torch.tensor([30.0])], -30.0),
        ([steps[:40] * 0.25], float("-inf")),
        ([steps // 280 * -0.5], -9.0),
        ([steps * -0.004], -9.0),
    ]
    z = torch.empty(rows, vocab)
    for row in range(rows):
        parts, rest = kinds[row % len(kinds)]
        values = torch.cat([torch.empty(0), *parts])
        z[row] = rest
        z[row, torch.randperm(vocab, generator=g)[: len(values)]] = values
    return z


def _bias(case: Case, lead: tuple[int, ...], vocab: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and values [*lead, N]: equal ids, padding, ids beyond the vocabulary, bans."""
    ids = torch.randint(0, vocab, (*lead, case.bias), generator=g)
    values = torch.randn(ids.shape, generator=g) * 3
    kind = torch.rand(ids.shape, generator=g)
    ids = torch.where(kind < 0.1, ids[..., :1], ids)
    ids = torch.where(kind > 0.9, torch.where(kind > 0.95, -1, vocab + 5), ids)
    values = torch.where((kind > 0.4) & (kind < 0.5), float("-inf"), values)
    if case.special == "ban":
        values = torch.where(ids % 7 < 5, float("-inf"), values)
        ids[0] = torch.arange(case.bias) % vocab
        values[0] = torch.where(ids[0] % vocab == 3, 0.0, float("-inf"))
    if case.special == "bad bias":
        for row, value in enumerate(("nan", "inf", "nan", "-inf")):
            values[row, ..., 7] = float(value)
            ids[row, ..., 7] = vocab + 1 if row == 2 else 5  # padding may hold anything
        values[1, ..., 9], ids[1, ..., 9] = float("-inf"), 5  # +inf - inf
    return ids, values


def make(case: Case, seed: int = 0, slots: int | None = None, device: Device = "cpu") -> Made:
    """(logits, weights, kwargs), the same on every device: [rows, V] logits, or [rows, slots, V] with ``slots``."""
    g = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, case.name)))
    given = case.weights(case.rows) if callable(case.weights) else case.weights
    given = upscale() if given is None else given
    weights = given if isinstance(given, Weights) else Weights(given)
    if weights.tensor is not None:
        weights = Weights(weights.tensor.to(device))
    models = len(weights)
    vocab = case.vocab * models if len(case.vocab) == 1 else case.vocab
    dtypes = case.dtypes * models if len(case.dtypes) == 1 else case.dtypes
    lead = (case.rows,) if slots is None else (case.rows, slots)
    shared = torch.randn(*lead, max(vocab), generator=g) * case.scale
    logits: list[torch.Tensor] = []
    for v, dtype in zip(vocab, dtypes):
        z = shared[..., :v] + torch.randn(*lead, v, generator=g)
        if case.special == "flat":
            z = torch.zeros_like(z)
        if case.special == "hard":
            z = _hard(z[..., 0].numel(), v, g).view(z.shape)
        if case.special == "ties":
            z = z.round()
        if case.special == "neg_inf":
            z = torch.where(torch.rand(z.shape, generator=g) < 0.2, float("-inf"), z)
        if case.special == "least":  # by which models a token is masked
            for k, masking in enumerate(((0, 1, 2), (0,), (1,), (2,), (0, 2))):
                if len(logits) in masking:
                    z[..., k::7] = torch.finfo(dtype).min
        z = z.to(dtype).to(device)  # before its layout is made: a move would undo that
        if case.special == "transposed":
            z = z.transpose(-1, -2).contiguous().transpose(-1, -2)
        if case.special == "strided":
            wide = torch.full((*lead, v + 37), float("nan"), dtype=dtype, device=device)
            wide[..., :v] = z
            z = wide[..., :v]
        if case.special == "offset":
            flat = torch.empty(z.numel() + 3, dtype=dtype, device=device)
            flat[3:] = z.flatten()
            z = flat[3:].view(z.shape)
        logits.append(z)
    if case.special == "nan in model 1":
        logits[1][..., ::3] = float("nan")
    if case.special == "bad":
        planted = [("nan", 0), ("inf", 1), ("-inf", 0), ("nan", 2), ("-inf", 2)]
        for row, (value, model) in enumerate(planted):
            z = logits[model][row].view(-1, logits[model].shape[-1])
            z[-1, :: 1 if value == "-inf" and row == 2 else 97] = float(value)
    kwargs = {k: v(case.rows).to(device) if callable(v) else v for k, v in case.kwargs.items()}
    words = ((kwargs.get("vocab_size") or min(vocab)) + 31) // 32
    if case.special in ("mask", "mask one", "all masked"):
        mask = torch.randint(-(1 << 31), 1 << 31, (*lead, words), generator=g)
        if case.special == "mask one":
            mask = torch.zeros_like(mask)
            mask[..., words // 2] = 1 << 7
            mask[..., 1] = 3
        if case.special == "all masked":
            mask[0] = 0
        kwargs["token_mask"] = mask.to(torch.int32).to(device)
    if case.bias:
        kwargs["token_bias"] = TokenBias(*(x.to(device) for x in _bias(case, lead, min(vocab), g)))
    kwargs.setdefault("seed", torch.arange(case.rows, device=device) * 7919 + seed)
    kwargs.setdefault("position", seed)
    return logits, weights, kwargs


def scattered(logits: list[torch.Tensor], seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits [rows, V] among others, [N, V], and which row each is."""
    rows, device = len(logits[0]), logits[0].device
    at = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(seed))[:rows].to(device)
    return [z.new_full((rows + 3, z.shape[1]), float("nan")).index_copy(0, at, z) for z in logits], at


def ragged(
    logits: list[torch.Tensor], lengths: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Logits [rows, slots, V] without the slots beyond each row's lengths [rows], [N, V]; the arguments for them."""
    there = torch.arange(logits[0].shape[1], device=lengths.device) <= lengths[:, None]
    kwargs = dict(kwargs, offsets=torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0)))
    if "token_mask" in kwargs:
        kwargs["token_mask"] = kwargs["token_mask"][there]
    if "token_bias" in kwargs:
        kwargs["token_bias"] = TokenBias(*(x[there] for x in kwargs["token_bias"]))
    return [z[there] for z in logits], kwargs


def _close(
    name: str,
    got: torch.Tensor | None,
    want: torch.Tensor | None,
    case: str,
    rtol: float = 0,
    atol: float = TOLERANCE,
) -> None:
    if got is None or want is None:
        assert got is want, f"{case}: {name}"
        return
    torch.testing.assert_close(
        got.cpu(), want.cpu(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{case}: {name}: {m}"
    )


def _equal(name: str, got: torch.Tensor, want: torch.Tensor, case: str) -> None:
    assert torch.equal(got.cpu(), want.cpu()), f"{case}: {name}: got {got.tolist()}, the reference has {want.tolist()}"


def check_sample(case: Case, backend: str, seed: int = 0, device: Device = "cpu", **extra: Any) -> ops.SampleOutput:
    """`sample` on ``backend`` and ``device`` against the reference on the CPU, with everything it can return."""
    logits, weights, kwargs = make(case, seed)
    models = len(logits)
    extra = extra or dict(top_logprobs=5, diagnostics=models > 1, runners_up=3)
    z, w, there = make(case, seed, device=device)
    if case.indexed:
        z, there["row_index"] = scattered(z, seed)
    got = ops.sample(z, w, backend=backend, **there, **extra)
    want = ops.sample(logits, weights, backend="reference", **kwargs, **extra)
    _equal("tokens", got.tokens, want.tokens, case.name)
    _equal("valid", got.valid, want.valid, case.name)
    for name in ("logprobs", "raw_logprobs", "top_logprobs", "entropy", "tv"):
        a, b = getattr(got, name), getattr(want, name)
        # sums over V terms, each within TOLERANCE of its log
        _close(name, *((a / 20, b / 20) if name in ("entropy", "tv") and b is not None else (a, b)), case.name)
    if want.top_ids is not None:
        assert got.top_ids is not None
        _equal("top_ids", got.top_ids, want.top_ids, case.name)
    if want.runners_up is not None:
        assert got.runners_up is not None
        _equal("runners_up", got.runners_up, want.runners_up, case.name)
    return got


def draft_params(case: Case, device: Device = "cpu") -> dict[str, Any]:
    """`verify`'s draft_* of a case."""
    return {f"draft_{k}": v(case.rows).to(device) if callable(v) else v for k, v in case.draft.items()}


def draft_tokens(
    logits: Sequence[torch.Tensor], kwargs: dict[str, Any], method: str, draft: int | None, slots: int
) -> torch.Tensor:
    """Drafts of model ``draft`` as `verify` expects them (None: of model 0 greedily, a deterministic proposer)."""
    kwargs = {k: v for k, v in kwargs.items() if k in (*DraftParams._fields, "seed", "position", "vocab_size")}
    vocab_size = kwargs.pop("vocab_size", None) or min(z.shape[-1] for z in logits)
    position, tokens = kwargs.pop("position"), []
    for i in range(slots - 1):
        z = logits[draft or 0][:, i, :vocab_size]
        if draft is None:
            kwargs["temperature"] = 0.0
        out = ops.draft(z, slot=i, method=method, position=position + i, backend="reference", **kwargs)
        tokens.append(out.tokens.clamp(min=0))
    return torch.stack(tokens, 1) if tokens else torch.empty(logits[0].shape[0], 0, dtype=torch.int64)


def check_verify(
    case: Case, backend: str, method: str, draft: int | None = 1, seed: int = 0, device: Device = "cpu"
) -> ops.VerifyOutput:
    """`verify` on ``backend`` and ``device`` against the reference on the CPU, with ragged draft lengths."""
    slots = case.slots
    (logits, weights, kwargs), (z, w, there) = (make(case, seed, slots, d) for d in ("cpu", device))
    for options in (kwargs, there):
        for name in ("stream", "slot"):
            options.pop(name, None)
        if isinstance(options["position"], torch.Tensor):
            options["position"] = options["position"].clamp(max=(1 << 63) - 20)
    draft = draft if draft is None else min(draft, len(logits) - 1)
    declared = case if method != "coupled" and draft is not None else Case("")
    own = draft_params(declared)
    drafts = draft_tokens(logits, kwargs | {k.removeprefix("draft_"): v for k, v in own.items()}, method, draft, slots)
    kwargs, there = kwargs | own, there | draft_params(declared, device)
    lengths = (torch.arange(case.rows) * 3 + seed) % slots
    lengths[: case.rows // 2] = slots - 1
    args: dict[str, Any] = dict(method=method, draft=draft, logprobs=True)
    if case.indexed:
        z, there = ragged(z, lengths.to(device), there)
    given = None if case.indexed else lengths.to(device)
    got = ops.verify(z, w, drafts.to(device), given, backend=backend, **args, **there)
    want = ops.verify(logits, weights, drafts, lengths, backend="reference", **args, **kwargs)
    name = f"{case.name}, {method}, draft {draft}"
    _equal("num_emitted", got.num_emitted, want.num_emitted, name)
    _equal("tokens", got.tokens, want.tokens, name)
    _equal("valid", got.valid, want.valid, name)
    _close("logprobs", got.logprobs, want.logprobs, name)
    _close("raw_logprobs", got.raw_logprobs, want.raw_logprobs, name)
    return got


def check_tree(case: Case, backend: str, seed: int = 0, device: Device = "cpu") -> ops.VerifyOutput:
    """`verify` of trees of drafts, many of them the target's own, against the reference on the CPU."""
    slots, rows = case.slots + 3, case.rows
    (logits, weights, kwargs), (z, w, there) = (make(case, seed, slots, d) for d in ("cpu", device))
    for options in (kwargs, there):
        for name in ("stream", "slot"):
            options.pop(name, None)
        if isinstance(options["position"], torch.Tensor):
            options["position"] = options["position"].clamp(max=(1 << 63) - 20)
    g = torch.Generator().manual_seed(seed + 17)
    # a slot's parent is often the slot before it
    parents = torch.stack([i - (torch.rand(rows, generator=g) ** 3 * (i + 1)).long() for i in range(slots - 1)], 1)
    depth = reference.verification.depths(parents)
    vocab_size = kwargs.get("vocab_size") or min(v.shape[-1] for v in logits)
    drafts = torch.randint(0, vocab_size, (rows, slots - 1), generator=g)
    own = []  # what each slot draws
    for i in range(slots):
        at: dict[str, Any] = dict(kwargs, position=kwargs["position"] + depth[:, i])
        if "token_mask" in at:
            at["token_mask"] = at["token_mask"][:, i : i + 1]
        if "token_bias" in at:
            at["token_bias"] = TokenBias(*(x[:, i : i + 1] for x in at["token_bias"]))
        z_i, none = [x[:, i : i + 1] for x in logits], drafts[:, :0]
        own.append(ops.verify(z_i, weights, none, method="coupled", draft=None, backend="reference", **at).tokens)
    taken = torch.cat(own, 1).gather(1, parents).clamp(min=0)
    drafts = torch.where(torch.rand(drafts.shape, generator=g) < 0.8, taken, drafts)
    lengths = (torch.arange(rows) * 3 + seed) % slots
    lengths[: rows // 2] = slots - 1
    args: dict[str, Any] = dict(method="coupled", draft=None, logprobs=True)
    if case.indexed:
        z, there = ragged(z, lengths.to(device), there)
    given = None if case.indexed else lengths.to(device)
    got = ops.verify(z, w, drafts.to(device), given, parents=parents.to(device), backend=backend, **args, **there)
    want = ops.verify(logits, weights, drafts, lengths, parents=parents, backend="reference", **args, **kwargs)
    name = f"{case.name}, tree"
    assert got.path is not None and want.path is not None
    _equal("path", got.path, want.path, name)
    _equal("num_emitted", got.num_emitted, want.num_emitted, name)
    _equal("tokens", got.tokens, want.tokens, name)
    _equal("valid", got.valid, want.valid, name)
    _close("logprobs", got.logprobs, want.logprobs, name)
    _close("raw_logprobs", got.raw_logprobs, want.raw_logprobs, name)
    return got


def check_logprobs(case: Case, backend: str, seed: int = 0, device: Device = "cpu") -> torch.Tensor:
    """`logprobs`, `token_logprobs` and `combine` on ``backend`` and ``device`` against the reference on the CPU."""
    (logits, weights, kwargs), (z, w, there) = (make(case, seed, device=d) for d in ("cpu", device))
    for options in (kwargs, there):
        for name in ("seed", "position", "stream", "slot"):
            options.pop(name, None)
    if case.indexed:
        z, there["row_index"] = scattered(z, seed)
    want = ops.logprobs(logits, weights, backend="reference", **kwargs)
    _close("logprobs", ops.logprobs(z, w, backend=backend, **there), want, case.name)
    ids = torch.randint(0, want.shape[1], (case.rows, 5), generator=torch.Generator().manual_seed(seed))
    got = ops.token_logprobs(z, w, ids.to(device), backend=backend, **there)
    _close("token_logprobs", got, want.gather(1, ids), case.name)
    names = ("upscale_top_p", "vocab_size", "token_mask", "token_bias", "tuned", "row_index")
    kwargs, there = ({k: v for k, v in given.items() if k in names} for given in (kwargs, there))
    scores = ops.combine(z, w, backend=backend, **there).cpu()
    wanted = ops.combine(logits, weights, backend="reference", **kwargs)
    _equal("combine, rows", scores.isnan(), wanted.isnan(), case.name)
    _equal("combine", scores.nan_to_num(0.0, INF, -INF), wanted.nan_to_num(0.0, INF, -INF), case.name)
    return got


# --- calls that nobody has checked ---------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of ``torch.ops.eft_kernels.<operation>``, which looks at no tensor's values."""

    name: str
    operation: str
    logits: list[torch.Tensor]
    params: Params
    args: tuple[Any, ...] = ()  # what the operator takes beside these

    def to(self, device: Device) -> Call:
        """The call with its tensors on ``device``."""

        def move(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return x.to(device)
            return type(x)(*map(move, x)) if isinstance(x, (Params, DraftParams)) else x

        return self._replace(
            logits=[move(z) for z in self.logits], params=move(self.params), args=tuple(map(move, self.args))
        )

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        out = getattr(torch.ops.eft_kernels, self.operation)(
            self.logits, *ops._flatten(self.params, *self.args), backend
        )
        if isinstance(out, torch.Tensor):
            return {"logprobs": out}
        return dict(zip((ops.SampleOutput if self.operation == "sample" else ops.VerifyOutput)._fields, out))


def unchecked(
    operation: str,
    logits: list[torch.Tensor],
    weights: tuple[float, ...] | torch.Tensor = (1.0, 1.0, -1.0),
    *args: Any,
    name: str = "",
    drawn_by: DraftParams | None = None,
    **params: Any,
) -> Call:
    """A `Call` with these parameters, the others off; drawn_by: of verify's drafts, where they have a distribution."""
    if operation == "verify":
        *_, parents, method, draft, logprobs = args
        drawn_by = None if method == "coupled" or draft < 0 else drawn_by
        args = (*args[:5], drawn_by or DraftParams(), logprobs)
    off: dict[str, Any] = dict(
        OFF,
        seed=1,
        position=2,
        token_mask=None,
        token_bias=None,
        vocab_size=min(z.shape[-1] for z in logits),
        tuned=min(1, len(logits) - 1),
    )
    return Call(name or operation, operation, logits, Params(weights, **off | params), args)


def out_of_range(p: Parameter) -> tuple[float, ...]:
    """Values that the checks refuse; of an integer also those that are off because of the vocabulary."""
    if p.type is int:
        return tuple(x for x in (-1, *INT64) if not 0 <= x < p.high)
    nan, inf = float("nan"), float("inf")
    return (nan, inf, -inf, p.low - 1, 2 * p.high, *((p.low / 2, 0.0) if p.low > 0 else ()))


def odd_calls() -> list[Call]:
    """Values that the checks would have refused, and those that overflow, a row each; row 0 is as it should be."""
    nan, inf, (low, high) = float("nan"), float("inf"), INT64
    values = {p: (p.tried[1], *out_of_range(p)) for p in PARAMETERS if p.type is float}
    draw, V = ("sample", 0, True, 3, True, 2), 300
    calls: list[Call] = []

    def add(
        name: str,
        logits: list[torch.Tensor],
        weights: tuple[float, ...] | torch.Tensor = (1.0, 1.0, -1.0),
        rows: int = 0,
        drafts: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        parents: torch.Tensor | None = None,
        only: str = "",
        **params: Any,
    ) -> None:
        """The call of every operation."""
        rows = rows or logits[0].shape[0]
        index = params.pop("row_index", None)
        logits = [z.expand(rows, -1) for z in logits]
        size = logits[0].shape[1]
        ids = torch.tensor([0, size - 1, -1, size, low, high]).expand(rows, -1)
        drafts = torch.full((rows, 3), size - 1) if drafts is None else drafts
        lengths = torch.full((rows,), 3) if lengths is None else lengths
        slots = logits if index is not None else [z[:, None].expand(-1, 4, -1) for z in logits]
        of_verify = params if index is None else params | dict(row_index=index[:, None].expand(-1, 4).contiguous())
        params = params | dict(row_index=index)
        made = [
            unchecked("sample", logits, weights, *draw, name=f"{name}, sample", **params),
            unchecked("sample", logits, weights, "draft", 1, False, 0, False, 0, name=f"{name}, token", **params),
            unchecked("logprobs", logits, weights, False, name=f"{name}, logprobs", **params),
            unchecked("logprobs", logits, weights, True, name=f"{name}, scores", **params),
            unchecked("token_logprobs", logits, weights, ids, name=f"{name}, ids", **params),
        ]
        judged = [(None, *x) for x in itertools.product(METHODS, (len(logits) // 2, -1))]
        tree = torch.tensor([0, 0, 2]).expand(rows, -1).contiguous() if parents is None else parents
        for parents, method, draft in (*judged, (tree, "coupled", -1)):
            made.append(
                unchecked(
                    "verify",
                    slots,
                    weights,
                    drafts,
                    lengths,
                    parents,
                    method,
                    draft,
                    True,
                    name=f"{name}, {method} {draft}{'' if parents is None else ', tree'}",
                    **of_verify,
                )
            )
        calls.extend(call for call in made if only in call.operation)

    usual = [torch.randn(1, V, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    given: dict[str, Any]
    for p, odd in values.items():
        given = {p.name: torch.tensor(odd)}
        add(f"{p.name} out of range", usual, rows=len(odd), **given)
        given = dict(top_p=0.5, top_k=9) | given
        add(f"{p.name} out of range, filtered", usual, rows=len(odd), **given)
    beyond = {PER_ROW["top_k"]: (0, -1, low, high, V)}
    for p, odd in beyond.items():
        given = {p.name: torch.tensor(odd)}
        add(f"{p.name} below 0 and beyond V", usual, rows=len(odd), **given)
    for p, odd in (values | beyond).items():
        if p in DRAFTED:
            drawn_by = DraftParams(**{p.name: torch.tensor(odd)})
            add(f"drafts drawn with any {p.name}", usual, rows=len(odd), only="verify", drawn_by=drawn_by)
    add(
        "any seed and position",
        usual,
        rows=4,
        seed=torch.tensor([1, low, high, -1]),
        position=torch.tensor([2, low, high, -1]),
    )
    index = torch.tensor([2, -1, 5, low, high])
    add("any row of the logits", [z.expand(5, -1) * torch.arange(1, 6)[:, None] for z in usual], row_index=index)
    for weights in ((0.0, 0.0, 0.0), torch.tensor([1.0, 0.5, -0.5])):
        add("any row of the logits, filtered", usual, weights, rows=5, row_index=index, top_p=0.5, upscale_top_p=0.9)
    for w in (nan, inf, -inf):
        add(f"weight {w}", usual, torch.tensor([[1.0, 1.0, -1.0], [1.0, w, -1.0], [w, 0.0, 0.0]]), rows=3)
    add(
        "drafts and lengths of any value",
        usual,
        rows=6,
        only="verify",
        lengths=torch.tensor([3, 4, high, -1, low, 3]),
        drafts=torch.tensor([[1, 2, 3], [-1, 2, 3], [V, 0, 0], [low, 1, 2], [high, high, high], [0, V, -1]]),
        parents=torch.tensor([[0, 0, 1], [1, 2, 3], [-1, 0, 1], [low, high, 0], [high, high, high], [0, 2, 1]]),
    )
    # scores, or normalised scores, that overflow: to NaN, to +inf, to -inf for some tokens, for all but one, for all
    big, zero = 3.3e38, torch.zeros(1, 4)
    for name, base in (
        ("NaN", [big, -big, 0, 0]),
        ("-inf", [-big, 0, 1, 2]),
        ("+inf", [big, big, 0, 0]),
        ("nothing", [-big] * 4),
    ):
        for mass in (1.0, 0.3, 0.9):
            for beta in (1.0, 1.02, 1.5):
                add(
                    f"overflow to {name}, weight {beta}, {mass}",
                    [torch.tensor([base]), zero, -torch.tensor([base])],
                    (beta, 1.0, -beta),
                    upscale_top_p=mass,
                    top_p=0.5,
                )
    add("zeros, zeros, overflow", [zero, zero, torch.tensor([[big, -big, 0, 0]])], upscale_top_p=0.3, top_p=0.5)
    # keys that overflow, of seeds that draw enough noise for it
    seeds = torch.arange(800)[:, None]
    noise = reference.gumbel(seeds, 0 * seeds + 2, 0, 0 * seeds, V).amax(1)
    seeds = torch.cat([torch.arange(1), (noise > 10.2).nonzero()[:5, 0]])
    most = torch.finfo(F32).max
    for z in (most, -most):
        x = torch.full((len(seeds), V), z)
        x[0, ::7] = float("-inf")
        add(f"keys of {z}", [x], (1.0,), temperature=1e30, seed=seeds)
        add(f"keys of {z}, filtered", [x], (1.0,), temperature=1e30, seed=seeds, top_p=0.5)
    # models of weight 0 are not read
    dead = torch.full((3, V), nan)
    dead[1], dead[2] = float("-inf"), float("inf")
    for weights in ((0.0, 0.0, -0.0), torch.zeros(3), torch.zeros(3, 3)):
        add("all weights 0", [dead, usual[1].expand(3, -1), dead], weights)
        add("all weights 0, filtered", [dead, usual[1].expand(3, -1), dead], weights, top_p=0.5, upscale_top_p=0.9)
    add("tuned of weight 0", [usual[0].expand(3, -1), dead, usual[2].expand(3, -1)], (1.0, 0.0, -1.0))
    return calls


def check_call(call: Call, backend: str, want: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """``call`` on ``backend`` against the reference (or what it gave: ``want``)."""
    got, want = call.run(backend), want or call.run("reference")
    for name in got:
        if got[name].is_floating_point():
            scale = 20 if name in ("entropy", "tv") else 1  # as in `check_sample`
            _close(name, got[name], want[name], call.name, rtol=1e-5, atol=scale * TOLERANCE)
        else:
            _equal(name, got[name], want[name], call.name)
    return got


def _random_values(pick: random.Random, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Logits: usual ones, ties, far apart, extremes, and some that are not finite."""
    most, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    z = torch.randn(shape, generator=g)
    kind = pick.choice(["usual"] * 6 + ["ties", "flat", "peaked", "offset", "huge", "extremes", "subnormal", "mixed"])
    if kind == "usual":
        z = z * 3
    elif kind == "ties":
        z = z.round()
    elif kind == "flat":
        z = z * 0 + pick.choice([0.0, -0.0, 1.0, -most])
    elif kind == "peaked":
        z = z * 40
    elif kind == "offset":
        z = z + pick.choice([1000.0, 65000.0, -65000.0])
    elif kind == "huge":
        z = z * pick.choice([1e4, 1e30, 1e38])
    elif kind == "extremes":
        values = torch.tensor([most, -most, 0.9 * most, -0.9 * most, 0.0, 1.0, tiny])
        z = values[torch.randint(0, len(values), tuple(shape), generator=g)]
    elif kind == "subnormal":
        z = z * tiny
    else:
        z = torch.where(torch.rand(shape, generator=g) < 0.1, z * most, z)
    z = z.clamp(-most, most).to(dtype)
    for value, often in ((float("-inf"), 0.25), (float("nan"), 0.03), (float("inf"), 0.03)):
        if pick.random() < often:
            z[torch.rand(shape, generator=g) < pick.choice([0.002, 0.3])] = value
    return z


def _random_layout(pick: random.Random, z: torch.Tensor) -> torch.Tensor:
    """The same values with other strides, at another address."""
    kind = pick.choice(["contiguous"] * 4 + ["wide", "offset", "transposed", "expanded"])
    if kind == "wide":
        wide = torch.full((*z.shape[:-1], z.shape[-1] + pick.randint(1, 9)), float("nan"), dtype=z.dtype)
        wide[..., : z.shape[-1]] = z
        return wide[..., : z.shape[-1]]
    if kind == "offset":
        flat = torch.empty(z.numel() + 7, dtype=z.dtype)[pick.randint(1, 7) :][: z.numel()]
        return flat.copy_(z.flatten()).view(z.shape)
    if kind == "transposed":
        return z.transpose(0, 1).contiguous().transpose(0, 1)
    return z[:1].expand(z.shape) if kind == "expanded" else z


def random_call(seed: int, largest: int = 1000) -> Call:
    """The call of this number; any operation, shapes up to [5, 4, ``largest``], parameters in and out of range."""
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    operation = pick.choice(["sample", "sample", "verify", "verify", "logprobs", "token_logprobs"])
    rows, models = pick.choice([0, 1, 1, 2, 3, 5]), pick.choice([1, 2, 3, 3, 3, 4, 8])
    V = min(largest, pick.choice([1, 2, 31, 33, 255, 256, 257, 300, 519, 777, 1000]))
    lead: tuple[int, ...] = (rows, pick.randint(1, 4)) if operation == "verify" else (rows,)
    dtypes = [pick.choice((F32, F16, BF16))] * models
    if pick.random() < 0.3:
        dtypes = [pick.choice((F32, F16, BF16)) for _ in range(models)]
    lengths = [V + pick.choice([0, 0, 0, 1, 24]) for _ in range(models)]
    index, source = None, lead  # of the logits
    if pick.random() < 0.2:
        source = (pick.choice([1, 2, 7]),)
        index = torch.randint(-1 if pick.random() < 0.3 else 0, source[0], lead, generator=g)
        index[torch.rand(lead, generator=g) < 0.05] = pick.choice([INT64[0], INT64[1], 0])
    logits = [_random_layout(pick, _random_values(pick, (*source, v), d, g)) for v, d in zip(lengths, dtypes)]

    def per_row(p: Parameter) -> float | torch.Tensor:
        """A number, mostly off, or a tensor with values out of range among them."""
        usual, odd = (p.tried[0], *p.tried), out_of_range(p) + ((V, V + 1) if p.type is int else ())
        if pick.random() < 0.4:
            return pick.choice(usual)
        odd = odd if pick.random() < 0.3 else ()
        return torch.tensor([pick.choice((*usual, *usual, *odd)) for _ in range(rows)], dtype=dtype_of(p))

    nan, inf, (low, high) = float("nan"), float("inf"), INT64
    values = [0.0, 1.0, -1.0, 0.5, 2.0, 1e-3]
    weights: tuple[float, ...] | torch.Tensor = tuple(pick.choice(values) for _ in range(models))
    if pick.random() < 0.4:
        weights = (*(1.0,) * (models - 1), -1.0)
    if pick.random() < 0.4:
        odd = (nan, inf, -inf, 3e38, 1e-40) if pick.random() < 0.3 else ()
        shape = pick.choice([(models,), (rows, models)])
        flat = [pick.choice((*values, *values, *odd)) for _ in range(torch.Size(shape).numel())]
        weights = torch.tensor(flat).view(shape)
    mask = None
    if pick.random() < 0.3:
        mask = torch.randint(-(1 << 31), 1 << 31, (*lead, (V + 31) // 32), generator=g).to(torch.int32)
        mask *= torch.rand(mask.shape, generator=g) < pick.choice([0.1, 0.9])

    params: dict[str, Any] = {name: per_row(p) for name, p in PER_ROW.items()}
    params |= dict(
        row_index=index, token_mask=mask, vocab_size=pick.choice([V, V, (V + 1) // 2]), tuned=pick.randrange(models)
    )
    if mask is not None:
        params["vocab_size"] = V
    if pick.random() < 0.3:
        n = pick.choice([0, 1, 5, 300])
        ids = torch.randint(-2, V + 3, (*lead, n), generator=g)
        ids[torch.rand(ids.shape, generator=g) < 0.1] = pick.choice([low, high, 0])
        params["token_bias"] = TokenBias(ids, _random_values(pick, (*lead, n), F32, g)) if n else None
    args: tuple[Any, ...] = ()
    if operation == "sample":
        args = (
            pick.choice(ops.STREAM_NAMES),
            pick.choice([0, 3, (1 << 24) - 1]),
            pick.random() < 0.6,
            pick.choice([0, 0, 3, V + 2]),
            pick.random() < 0.3,
            pick.choice([0, 0, 1, 3, 15]),
        )
    elif operation == "logprobs":
        args = (pick.random() < 0.4,)
    elif operation == "token_logprobs":
        args = (torch.randint(-2, V + 2, (rows, 3), generator=g),)
    elif operation == "verify":
        drafts = torch.randint(-1, V + 1, (rows, lead[1] - 1), generator=g)
        if pick.random() < 0.6:  # likely ones
            likely = torch.nan_to_num(logits[0][..., :V].float()).argmax(-1)
            drafts = (likely if index is None else likely[index.clamp(0, source[0] - 1)])[:, : lead[1] - 1]
        drafts[torch.rand(drafts.shape, generator=g) < pick.choice([0.0, 0.2])] = pick.choice([low, high, -1, V])
        counts = torch.randint(-1, lead[1] + 2, (rows,), generator=g)
        counts[torch.rand(rows, generator=g) < 0.1] = pick.choice([low, high])
        method, parents = pick.choice(METHODS), None
        if method == "coupled" and pick.random() < 0.5:
            parents = (torch.rand(drafts.shape, generator=g) * torch.arange(1, lead[1])).long()
            parents[torch.rand(drafts.shape, generator=g) < pick.choice([0.0, 0.1])] = pick.choice([low, high, -1, 3])
        args = (drafts, counts, parents, method, pick.randint(-1, models - 1), pick.random() < 0.7)
        drawn_by: dict[str, Any] = {p.name: per_row(p) for p in DRAFTED if pick.random() < 0.4}
        params["drawn_by"] = DraftParams(**drawn_by)
    return unchecked(operation, logits, weights, *args, name=f"random_call({seed})", **params)
