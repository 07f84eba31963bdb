"""Rows: no number without a green gate, then every implementation takes its turn in every round.

The gate of ours: the reference's tokens, and each row alone gives what it gives in the batch. The others draw from
noise of their own: chi-squared of their draws from a small problem against the reference's distribution.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ops
from . import device
from .baselines import BASELINES, Baseline, Call
from .shapes import OURS, Arguments, Row, Shape, arguments, issue_slots, nbytes, problem

Checked = dict[tuple[object, ...], str | None]  # gates that were tried, and how they failed
TURN = 5e-3  # seconds an implementation's turn takes at least
BUDGET = 1.0  # seconds of all its turns at one shape; never fewer than 3 rounds
REJECT = 1e-6  # p-value below which an implementation draws from another distribution
CLOSE = 1e-3  # nats: log-probs of float32 sums in another order


class WrongTokens(Exception):
    """Our own operator does not do what the reference does."""


# --- the gates -----------------------------------------------------------------------------------------------------


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def gate(s: Shape, sets: Sequence[Arguments], ours: Baseline) -> None:
    """Raises `WrongTokens` unless up to 8 rows are the reference's and each row alone equals the row in the batch."""
    q, left = problem(s), 8

    def call(args: Arguments, at: slice, backend: str = "auto") -> tuple[torch.Tensor, ...]:
        part = q._replace(seeds=q.seeds[at], token_mask=None if q.token_mask is None else q.token_mask[at])
        rows = [[z[at] for z in a] if isinstance(a, list) else a[at] for a in args]
        return as_tuple(ours.make(s.op, s.variant, part, backend=backend)(*rows))

    def check(what: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], tolerance: float) -> None:
        for a, b in zip(got, want):
            # sums are cut otherwise for another number of rows: log-probs may be a rounding apart
            if not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance if a.is_floating_point() else 0):
                raise WrongTokens(f"{ours.name} is not {what} at {s.label()}: nothing is timed")

    for args in sets:
        if left <= 0:
            return
        got, first, left = call(args, slice(None)), slice(min(left, s.batch)), left - s.batch
        check("the reference", [x[first] for x in got], call(args, first, "reference"), CLOSE / 10)
        for i in range(s.batch):
            row = slice(i, i + 1)
            check(f"row {i} alone", [x[row] for x in got], call(args, row), 0 if s.device == "cpu" else CLOSE / 10)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Pearson's chi-squared; 0 where a token of probability 0 was drawn. Rare tokens are pooled."""
    counts, expected = counts.double().flatten().cpu(), expected.double().flatten().cpu()
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 10
    pooled = [(torch.cat([x[~rare], x[rare].sum()[None]])) for x in (counts, expected)]
    keep = pooled[1] >= 10
    counts, expected = pooled[0][keep], pooled[1][keep]
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), chi2 / 2))


def agrees(s: Shape, other: Baseline, draws: int = 20000) -> str | None:
    """None, or how the implementation's draws (or log-probs) differ from the reference's distribution at a small
    problem of the shape's kind: 80 tokens, ``draws`` equal rows, 2 drafts."""
    s = s._replace(batch=draws, vocab=80, draft_tokens=s.draft_tokens and 2)
    q, g = problem(s), torch.Generator().manual_seed(1)
    shared = torch.randn(s.positions, s.vocab, generator=g) * 1.5
    one = [
        (shared + torch.randn(s.positions, s.vocab, generator=g) * 0.5).to(s.device, getattr(torch, s.dtype))
        for _ in range(s.models)
    ]
    mask = None if q.token_mask is None else q.token_mask[:1].expand(s.positions, -1).contiguous()
    params: dict[str, Any] = dict(q.params)
    want = ops.logprobs(one, q.weights, token_mask=mask, backend="reference", **params)  # [positions, V]
    many = [z.expand(draws, *z.shape).contiguous() for z in one]  # [draws, positions, V]
    if s.op != "verify":
        many = [z[:, 0] for z in many]
    call = other.make(s.op, s.variant, q)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if s.op == "logprobs":
            return far("log-probs", call(many), want.expand(draws, -1))
        if s.op == "token_logprobs":
            ids = torch.randint(s.vocab, (draws, 1), device=s.device)
            return far("log-probs", call(many, ids), want[0][ids])
        if s.op == "verify":
            drafts = torch.multinomial(one[1][:-1].float().softmax(-1), draws, replacement=True).T.contiguous()
            tokens, emitted = call(many, drafts)
        else:
            tokens, *logprobs = as_tuple(call(many))
            tokens, emitted = tokens[:, None], torch.ones(draws, device=s.device)
            raw = ops.logprobs(one, q.weights, token_mask=mask, backend="reference")
            for name, got, table in zip(("log-probs", "raw log-probs"), logprobs, (want, raw)):
                if what := far(name, got, table[0][tokens[:, 0]]):
                    return what
    for i in range(s.positions):  # a position's token, where it is reached, has the target's distribution there
        drawn = tokens[emitted > i, i].long()
        if drawn.numel() and not 0 <= int(drawn.min()) <= int(drawn.max()) < s.vocab:
            return f"a token outside 0 to {s.vocab - 1} was drawn"
        p = p_value(torch.bincount(drawn, minlength=s.vocab), want[i].exp() * len(drawn))
        if p < REJECT:
            return f"another distribution than the reference's: chi-squared of {len(drawn)} draws has p = {p:.1e}"
    return None


def far(what: str, got: torch.Tensor, want: torch.Tensor) -> str | None:
    error = float((got.double() - want.double()).abs().nan_to_num(nan=math.inf).max())
    return None if error < CLOSE else f"{what} are off by up to {error:.1e} nats"


# --- time ----------------------------------------------------------------------------------------------------------


def error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def inputs_for(s: Shape) -> list[Arguments]:
    """Sets of arguments to rotate over, together larger than the caches that matter: up to 4 different ones, then
    copies of them elsewhere in memory."""
    first = arguments(s, 0)
    each = sum(z.nbytes for z in first[0])
    n = min(max(2, math.ceil(device.rotation_bytes(s.device) / each)), 1024 if s.device == "cuda" else 64)
    sets = [first, *(arguments(s, seed) for seed in range(1, min(n, 4 if s.batch < 64 else 2)))]
    return sets + [
        ([z.clone() for z in z_], *(a.clone() for a in rest))
        for z_, *rest in (sets[i % len(sets)] for i in range(n - len(sets)))
    ]


def interleave(timers: dict[str, device.Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each warm timer, a value a round: the order rotates, and slow ones sit out some rounds. A turn
    of a quick one starts with calls that do not count: they find the caches full of what ran before."""
    inner: dict[str, int] = {}  # calls a turn
    plays: dict[str, int] = {}  # rounds
    times: dict[str, list[float]] = {name: [] for name in timers}
    for name, measure in timers.items():
        took = measure(1)
        inner[name] = max(1, math.ceil(TURN / took))
        plays[name] = max(min(3, rounds), min(rounds, int(BUDGET / (took * inner[name]))))
    order = list(timers)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            if i * plays[name] % rounds < plays[name]:
                if inner[name] > 1:
                    timers[name](min(inner[name], 16))
                times[name].append(timers[name](inner[name]))
    return times


# fields of a row that only a measurement fills
MEASURED = (
    "median_us",
    "p20_us",
    "p80_us",
    "repetitions",
    "bytes",
    "bandwidth_gbs",
    "copy_gbs",
    "floor_us",
    "fraction",
    "issue_slots",
    "issue_us",
    "launches",
    "peak_memory",
    "tokens_per_s",
    "acceptance",
    "new_tokens",
    "backend",
    "why",
)


def statistics_of(times: list[float]) -> Row:
    """The fields of a row that its seconds give."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return dict(median_us=statistics.median(times) * 1e6, p20_us=p20 * 1e6, p80_us=p80 * 1e6, repetitions=len(times))


def why_absent(s: Shape, b: Baseline) -> str | None:
    return b.absent() if s.device in b.devices else f"it is for {', '.join(b.devices)}"


def why_wrong(s: Shape, b: Baseline, sets: Sequence[Arguments], checked: Checked) -> str | None:
    """How an implementation's tokens differ; ours raise `WrongTokens`. ``checked`` remembers the others."""
    if b in OURS:
        gate(s, sets[:4], b)
        return None
    key = (b.name, s.op, s.variant, s.dtype, s.models, s.device, s.threads)
    if key not in checked:
        checked[key] = agrees(s, b)
    return checked[key]


def prepare(
    s: Shape, b: Baseline, sets: Sequence[Arguments], checked: Checked
) -> tuple[str, str | None, Call | None, device.Timer | None]:
    """(status, why it is not timed, call, warm timer)."""
    try:
        if why := why_absent(s, b):
            return "absent", why, None, None
        if why := why_wrong(s, b, sets, checked):
            return "disagrees", why, None, None
        call = b.make(s.op, s.variant, problem(s))
        timer = device.timer(call, sets, s.device, s.launch)
        timer(1)
        return "measured", None, call, timer
    except WrongTokens:
        raise
    except Exception as error:  # of libraries, compilers and captures: it belongs in the row
        if b in OURS and s.launch == "eager":
            raise
        return "absent", error_line(error), None, None


def backend_of(b: Baseline, kind: str) -> str | None:
    if b not in OURS:
        return None
    return "triton" if b.name == "eft_triton" else device.backend(kind)


def measure(
    s: Shape,
    beside: Sequence[Baseline],
    checked: Checked,
    rates: dict[tuple[str, int | None], tuple[float, float]],
    about: Row,
) -> list[Row]:
    """The rows of a shape. ``checked`` remembers gates, ``rates`` bandwidths."""
    base = dict(
        op=s.op,
        variant=s.variant,
        batch=s.batch,
        vocab=s.vocab,
        models=s.models,
        draft_tokens=s.draft_tokens,
        dtype=s.dtype,
        logits=s.logits,
        launch=s.launch,
        threads=s.threads,
    )
    candidates = [b for b in [*(b for b in OURS if s.device in b.devices), *beside] if s.variant in b.ops.get(s.op, ())]
    rows: dict[str, Row] = {
        b.name: {**dict.fromkeys(MEASURED), **base, **about, "implementation": b.name} for b in candidates
    }
    torch._dynamo.reset()  # what was compiled for other shapes counts against dynamo's limit
    calls: dict[str, Call] = {}
    timers: dict[str, device.Timer] = {}
    try:
        with device.pinned(s.threads):
            if (s.device, s.threads) not in rates:
                rates[s.device, s.threads] = device.bandwidth(s.device, s.threads)
            sets = inputs_for(s)
            for b in candidates:
                status, why, call, timer = prepare(s, b, sets, checked)
                rows[b.name].update(status=status, why=why, backend=backend_of(b, s.device))
                if call and timer:
                    calls[b.name], timers[b.name] = call, timer
            gc.disable()  # as timeit does
            for name, times in interleave(timers, s.rounds).items():
                rows[name].update(statistics_of(times))
                rows[name].update(costs(s, rows[name], calls[name], sets[0], rates[s.device, s.threads]))
    except device.Unavailable as error:
        for row in rows.values():
            row.update(status="absent", why=str(error))
    finally:
        gc.enable()
    return list(rows.values())


def costs(s: Shape, row: Row, call: Call, args: Arguments, rates: tuple[float, float]) -> Row:
    """What the call moves, issues, launches and holds, and how long the device takes for that."""
    bandwidth, copy = rates
    launches, peak = device.profile(call, args, s.device)
    if row["backend"] == "cpu":  # torch sees neither our kernel nor what it holds itself
        launches, peak = launches + 1, peak + device.own_scratch()
    floor = nbytes(s) / bandwidth * 1e-3
    slots = issue_slots(s)
    issue_us = device.issue_us(s.batch * s.positions * s.vocab * slots) if s.device == "cuda" else None
    return dict(
        bytes=nbytes(s),
        bandwidth_gbs=bandwidth,
        copy_gbs=copy,
        floor_us=floor,
        fraction=floor / row["median_us"],
        issue_slots=slots,
        issue_us=issue_us,
        launches=launches,
        peak_memory=peak,
    )


def run(
    shapes: Sequence[Shape],
    against: Sequence[str] | None = None,
    command: str = "",
    tell: Callable[[int, int, str], None] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
    seconds: float | None = None,
    more: Row | None = None,
) -> list[Row]:
    """The rows of all shapes, beside ``against`` (default: what each shape says); ``tell(done, total, label)`` hears
    of progress, ``keep(rows)`` gets each shape's as soon as they are there. After ``seconds`` no further shape is
    begun. ``more``: fields that every row has, too. Raises `WrongTokens` on a red gate."""
    tell, until = tell or (lambda *_: None), math.inf if seconds is None else time.monotonic() + seconds
    checked: Checked = {}
    rates: dict[tuple[str, int | None], tuple[float, float]] = {}
    about: dict[str, Row] = {}  # by the kind of device
    rows: list[Row] = []
    for i, s in enumerate(shapes):
        if time.monotonic() >= until:
            tell(i, len(shapes), f"no time left for {len(shapes) - i} shapes: they are not measured")
            return rows
        tell(i, len(shapes), s.label())
        if s.device not in about:
            about[s.device] = device.environment(command, s.device) | (more or {})
            about[s.device]["run"] = next(iter(about.values()))["run"]
        names = [b.name for b in BASELINES if s.device in b.devices] if s.against is None else s.against
        beside = [b for b in BASELINES if b.name in (names if against is None else against)]
        new = measure(s, beside, checked, rates, about[s.device])
        if keep:
            keep(new)
        rows += new
    tell(len(shapes), len(shapes), "done")
    return rows


# --- progress and saving -----------------------------------------------------------------------------------


def on_stderr(done: int, total: int, label: str) -> None:
    print(f"[{done}/{total}] {label}", file=sys.stderr, flush=True)


def write_rows(rows: list[Row], path: str | Path, mode: str = "w") -> None:
    """One JSON object a line."""
    with open(path, mode, encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
