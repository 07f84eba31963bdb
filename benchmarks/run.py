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

import torch

import eft_kernels as eft

from . import device, registry
from .baselines import BASELINES, Baseline
from .registry import OURS, Shape

TURN = 5e-3  # seconds an implementation's turn takes at least
BUDGET = 1.0  # seconds of all its turns at one shape; never fewer than 3 rounds
REJECT = 1e-6  # p-value below which an implementation draws from another distribution
CLOSE = 1e-3  # nats: log-probs of float32 sums in another order


class Refused(Exception):
    """What cannot be measured, saved or added; the message says why."""


class WrongTokens(Exception):
    """Our own operator does not do what the reference does."""


# --- the gates -----------------------------------------------------------------------------------------------------

def as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def gate(s: Shape, sets: list[tuple], ours: Baseline) -> None:
    """Raises `WrongTokens` unless up to 8 rows are the reference's and each row alone equals the row in the batch."""
    q, left = registry.problem(s), 8

    def call(args, at, backend="auto"):
        part = q._replace(seeds=q.seeds[at], token_mask=None if q.token_mask is None else q.token_mask[at])
        args = [[z[at] for z in a] if isinstance(a, list) else a[at] for a in args]
        return as_tuple(ours.make(s.op, s.variant, part, backend=backend)(*args))

    def check(what, got, want, tolerance):
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
    counts, expected = counts.double().cpu(), expected.double().cpu()
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
    q, g = registry.problem(s), torch.Generator().manual_seed(1)
    shared = torch.randn(s.slots, s.vocab, generator=g) * 1.5
    one = [(shared + torch.randn(s.slots, s.vocab, generator=g) * 0.5).to(s.device, getattr(torch, s.dtype))
           for _ in range(s.models)]
    mask = None if q.token_mask is None else q.token_mask[:1].expand(s.slots, -1).contiguous()
    want = eft.logprobs(one, q.weights, token_mask=mask, backend="reference", **q.params)  # [slots, V]
    many = [z.expand(draws, *z.shape).contiguous() for z in one]  # [draws, slots, V]
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
            raw = eft.logprobs(one, q.weights, token_mask=mask, backend="reference")
            for name, got, table in zip(("log-probs", "raw log-probs"), logprobs, (want, raw)):
                if problem := far(name, got, table[0][tokens[:, 0]]):
                    return problem
    for i in range(s.slots):  # a slot's token, where it is reached, has the target's distribution there
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

def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def inputs_for(s: Shape) -> list[tuple]:
    """Sets of arguments to rotate over, together larger than the caches that matter: up to 4 different ones, then
    copies of them elsewhere in memory."""
    first = registry.arguments(s, 0)
    each = sum(z.nbytes for z in first[0])
    n = min(max(2, math.ceil(device.rotation_bytes(s.device) / each)), 1024 if s.device == "cuda" else 64)
    sets = [first, *(registry.arguments(s, seed) for seed in range(1, min(n, 4 if s.batch < 64 else 2)))]
    return sets + [([z.clone() for z in z_], *(a.clone() for a in rest))
                   for z_, *rest in (sets[i % len(sets)] for i in range(n - len(sets)))]


def interleave(timers: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each warm timer, a value a round: the order rotates, and slow ones sit out some rounds. A turn
    of a quick one starts with calls that do not count: they find the caches full of what ran before."""
    inner, plays, times = {}, {}, {name: [] for name in timers}
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


def measure(s: Shape, beside: list[Baseline], checked: dict, rates: dict, about: dict) -> list[dict]:
    """The rows of a shape. ``checked`` remembers gates, ``rates`` bandwidths."""
    empty = dict.fromkeys(("median_us", "p20_us", "p80_us", "repetitions", "bytes", "bandwidth_gbs", "copy_gbs",
                           "floor_us", "fraction", "slots", "slots_us", "launches", "peak_memory", "tokens_per_s",
                           "acceptance", "new_tokens", "backend", "why"))
    base = dict(op=s.op, variant=s.variant, batch=s.batch, vocab=s.vocab, models=s.models, draft_tokens=s.draft_tokens,
                dtype=s.dtype, logits=s.logits, launch=s.launch, threads=s.threads)
    candidates = [b for b in [*(b for b in OURS if s.device in b.devices), *beside] if s.variant in b.ops.get(s.op, ())]
    rows = {b.name: {**empty, **base, **about, "implementation": b.name} for b in candidates}
    torch._dynamo.reset()  # what was compiled for other shapes counts against dynamo's limit
    timers, calls = {}, {}
    try:
        with device.pinned(s.threads):
            if (s.device, s.threads) not in rates:
                rates[s.device, s.threads] = device.bandwidth(s.device, s.threads)
            sets, q = inputs_for(s), registry.problem(s)
            for b in candidates:
                row, own = rows[b.name], b in OURS
                try:
                    if own:
                        row["backend"] = "triton" if b.name == "eft_triton" else device.backend(s.device)
                        if why := b.absent():
                            row.update(status="absent", why=why)
                            continue
                        gate(s, sets[:4], b)
                    else:
                        why = b.absent() if s.device in b.devices else f"it is for {', '.join(b.devices)}"
                        row.update(status="absent", why=why)
                        if why:
                            continue
                        key = (b.name, s.op, s.variant, s.dtype, s.models, s.device, s.threads)
                        if key not in checked:
                            checked[key] = agrees(s, b)
                        row.update(status="disagrees", why=checked[key])
                        if row["why"]:
                            continue
                    calls[b.name] = b.make(s.op, s.variant, q)
                    timer = device.timer(calls[b.name], sets, s.device, s.launch)
                    timer(1)
                    timers[b.name] = timer
                except WrongTokens:
                    raise
                except Exception as error:  # of libraries, compilers and captures: it belongs in the row
                    if own and s.launch == "eager":
                        raise
                    row.update(status="absent", why=first_line(error))
            nbytes, slots = registry.nbytes(s), registry.slots(s)
            bandwidth, copy = rates[s.device, s.threads]
            gc.disable()  # as timeit does
            for name, times in interleave(timers, s.rounds).items():
                p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
                median, row = statistics.median(times) * 1e6, rows[name]
                launches, peak = device.profile(calls[name], sets[0], s.device)
                if row["backend"] == "cpu":  # torch sees neither our kernel nor what it holds itself
                    launches, peak = launches + 1, peak + device.own_scratch()
                floor = nbytes / bandwidth * 1e-3
                row.update(status="measured", why=None, median_us=median, p20_us=p20 * 1e6, p80_us=p80 * 1e6,
                           repetitions=len(times), bytes=nbytes, bandwidth_gbs=bandwidth, copy_gbs=copy, floor_us=floor,
                           fraction=floor / median, slots=slots, launches=launches, peak_memory=peak)
                if s.device == "cuda":
                    row["slots_us"] = device.issue_us(s.batch * s.slots * s.vocab * slots)
    except device.Unavailable as error:
        for row in rows.values():
            row.update(status="absent", why=str(error))
    finally:
        gc.enable()
    return list(rows.values())


def run(shapes: list[Shape], against: list[str] | None = None, command: str = "", tell=None, keep=None,
        seconds: float | None = None) -> list[dict]:
    """The rows of all shapes, beside ``against`` (default: what each shape says); ``tell(done, total, label)`` hears
    of progress, ``keep(rows)`` gets each shape's as soon as they are there. After ``seconds`` no further shape is
    begun. Raises `WrongTokens` on a red gate."""
    tell, until = tell or (lambda *_: None), math.inf if seconds is None else time.monotonic() + seconds
    checked, rates, rows, about = {}, {}, [], {}
    for i, s in enumerate(shapes):
        if time.monotonic() >= until:
            tell(i, len(shapes), f"no time left for {len(shapes) - i} shapes: they are not measured")
            return rows
        tell(i, len(shapes), s.label())
        if s.device not in about:
            about[s.device] = device.environment(command, s.device)
            about[s.device]["run"] = next(iter(about.values()))["run"]
        names = [b.name for b in BASELINES if s.device in b.devices] if s.against is None else s.against
        beside = [b for b in BASELINES if b.name in (names if against is None else against)]
        new = measure(s, beside, checked, rates, about[s.device])
        if keep:
            keep(new)
        rows += new
    tell(len(shapes), len(shapes), "done")
    return rows


# --- saving --------------------------------------------------------------------------------------------------------

def on_stderr(done: int, total: int, label: str) -> None:
    print(f"[{done}/{total}] {label}", file=sys.stderr, flush=True)


def refuse_dirty() -> None:
    """Raises `Refused` where saved rows could not be told from those of the commit."""
    if files := device.changed():
        raise Refused(f"the sources differ from the commit: {', '.join(files)}; commit them, or measure without --json")
    if newer := device.stale_extension():
        raise Refused(f"{newer} is newer than the extension built from it; build it again (make build)")


def write_rows(rows: list[dict], path, mode: str = "w") -> None:
    """One JSON object a line."""
    with open(path, mode, encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def add(path, results=None) -> str:
    """Copies rows, each known to be what its commit measures, into results/<device>/; returns the path there."""
    from . import report
    try:
        rows = report.read(path)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from None
    slugs = {slug(row["device"]) for row in rows}
    if len(slugs) != 1:
        raise Refused(f"{path}: allowed is one device's rows, got {', '.join(sorted(slugs)) or 'none'}")
    known: dict = {}
    for number, row in enumerate(rows, 1):
        commit, source = row["commit"], row["source"]
        if row["dirty"] is False:
            continue
        if commit not in known:
            known[commit] = device.source_of(commit) if commit else None
        if source is None or source != known[commit]:
            why = "no commit is named" if not commit else f"commit {commit} is unknown here" if known[commit] is None \
                else f"its sources are not those of commit {commit}"
            raise Refused(f"{path}:{number}: {why}")
    target = (results or device.ROOT / "benchmarks" / "results") / slugs.pop() / path.name
    if target.exists():
        raise Refused(f"{target} exists; give the file another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(rows, target)
    return str(target)


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
