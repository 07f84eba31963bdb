"""Time of one sampling step on this CPU: `eft.sample` beside PyTorch doing the same from the same three logits.

Nothing is timed before the tokens are right. Contenders take turns within every round, so that a busy machine hurts all
of them alike; a row is the median of the rounds with its 20th and 80th percentile. Inputs rotate over several sets.

| contender | what it does |
|---|---|
| sample | `eft.sample`, the token only |
| sample+lp | `eft.sample` with both log-probabilities |
| floor | the same kernel at temperature 0: combine and take the maximum, no noise, no filter |
| eager | log-softmax of each model, combine, (HF's sort-based top-p,) softmax, multinomial |
| lean | the leanest PyTorch: combine without log-softmax, softmax, (sort,) cumsum, searchsorted of one uniform |
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

import eft_kernels as eft
from eft_kernels.dispatch import backends

CONTENDERS = ("sample", "sample+lp", "floor", "eager", "lean")
WEIGHTS = eft.upscale()
SETS = {1: 8, 8: 4}  # sets of inputs that rotate; 2 for larger batches


def make_logits(rows: int, vocab: int, seed: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """[base, tuned, ref], each [rows, vocab]: Zipf-like peaks over noise of std 3; ref like base, tuned like ref."""
    g = torch.Generator().manual_seed(seed)

    def noise(std):
        return torch.randn(rows, vocab, generator=g) * std

    shared = noise(3.0)
    ranks = min(4096, vocab // 4)
    peaks = 18.0 - 1.3 * torch.arange(1, ranks + 1).log()  # the likeliest tokens, as in text
    places = torch.stack([torch.randperm(vocab, generator=g)[:ranks] for _ in range(rows)])
    shared.scatter_(1, places, peaks.expand(rows, ranks) + torch.randn(rows, ranks, generator=g))
    base, ref = shared + noise(0.5), shared + noise(0.8)
    return [z.to(dtype) for z in (base, ref + noise(0.5), ref)]


def eager(logits, top_p):
    base, tuned, ref = (z.float().log_softmax(-1) for z in logits)
    scores = base + (tuned - ref)
    if top_p < 1:
        ordered, order = torch.sort(scores, descending=False)
        remove = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[..., -1:] = False
        scores = scores.masked_fill(remove.scatter(1, order, remove), -float("inf"))
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


def lean(logits, top_p):
    base, tuned, ref = logits
    mass = torch.sub(tuned.float(), ref).add_(base).softmax(-1)
    order = None
    if top_p < 1:
        mass, order = mass.sort(descending=True)
    mass = mass.cumsum(-1)
    total = mass[:, -1:]
    if top_p < 1:  # the mass of the nucleus, crossing token in
        total = mass.gather(1, torch.searchsorted(mass, total * top_p).clamp_(max=mass.shape[1] - 1))
    token = torch.searchsorted(mass, torch.rand_like(total) * total).clamp_(max=mass.shape[1] - 1)
    return (token if order is None else order.gather(1, token)).squeeze(1)


def calls(rows: int, top_p: float):
    """Each contender as a function of the logits."""
    seeds = eft.row_seeds(1, rows)
    return {
        "sample": lambda z: eft.sample(z, WEIGHTS, top_p=top_p, seed=seeds, logprobs=False).tokens,
        "sample+lp": lambda z: eft.sample(z, WEIGHTS, top_p=top_p, seed=seeds).tokens,
        "floor": lambda z: eft.sample(z, WEIGHTS, temperature=0.0, logprobs=False).tokens,
        "eager": lambda z: eager(z, top_p),
        "lean": lambda z: lean(z, top_p),
    }


def gate(sets, rows: int, top_p: float) -> None:
    """Raises unless the tokens are the definition's (up to 8 rows a set) and do not depend on the batch (all rows)."""
    seeds, first = eft.row_seeds(1, rows), min(rows, 8)
    for z in sets:
        got = eft.sample(z, WEIGHTS, top_p=top_p, seed=seeds)
        want = eft.sample([x[:first] for x in z], WEIGHTS, top_p=top_p, seed=seeds[:first], backend="reference")
        alone = [eft.sample([x[i : i + 1] for x in z], WEIGHTS, top_p=top_p, seed=seeds[i : i + 1]).tokens.item()
                 for i in range(rows)]
        if not got.valid.all() or not torch.equal(got.tokens[:first], want.tokens) or got.tokens.tolist() != alone:
            raise RuntimeError(f"wrong tokens at B={rows}, top_p={top_p}: nothing is timed")


def measure(rows: int, vocab: int, top_p: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each contender, a value a round."""
    sets = [make_logits(rows, vocab, seed) for seed in range(SETS.get(rows, 2))]
    gate(sets, rows, top_p)
    functions, inner, turn = calls(rows, top_p), {}, 0
    for name, f in functions.items():  # warm up, then enough calls for 2 ms a measurement
        f(sets[0])
        took = []
        for _ in range(3):
            start = time.perf_counter()
            f(sets[-1])
            took.append(time.perf_counter() - start)
        inner[name] = max(1, min(200, round(2e-3 / min(took))))
    times = {name: [] for name in functions}
    order = list(functions)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            f, n = functions[name], inner[name]
            start = time.perf_counter()
            for _ in range(n):
                f(sets[turn % len(sets)])
                turn += 1
            times[name].append((time.perf_counter() - start) / n)
    return times


def git_state() -> tuple[str | None, bool | None]:
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*args):
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "_bench.py"):  # installed inside somebody else's repository
            return None, None
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def environment(command: str) -> dict:
    commit, dirty = git_state()
    here, forced = backends(), os.environ.get("EFT_KERNELS_BACKEND", "auto")
    backend = next(n for n, b in here.items() if b["available"] and {"cpu", "any"} & {*b["devices"]}
                   and forced in ("auto", n))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(cpu=cpu_name(), cores=cores, backend=backend, backend_detail=here[backend]["reason"],
                eft_kernels=eft.__version__,
                torch=torch.__version__, python=platform.python_version(), commit=commit, dirty=dirty, command=command,
                date=time.strftime("%Y-%m-%d"))


def run(threads: list[int], batches: list[int], vocab: int, rounds: int, command: str, tell) -> list[dict]:
    """All rows of the benchmark; ``tell(done, total, label)`` hears of progress."""
    before, rows, done = torch.get_num_threads(), [], 0
    todo = [(n, b, p) for n in threads for b in batches for p in (1.0, 0.9)]
    about = environment(command)
    try:
        for n, b, p in todo:
            tell(done, len(todo), f"{n} thread(s), B={b}, top_p={p:g}")
            torch.set_num_threads(n)
            for name, times in measure(b, vocab, p, rounds).items():
                p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
                rows.append(dict(op="sample", contender=name, batch=b, vocab=vocab, dtype="bfloat16", models=3,
                                 top_p=p, threads=n, median_us=statistics.median(times) * 1e6, p20_us=p20 * 1e6,
                                 p80_us=p80 * 1e6, rounds=rounds, **about))
            done += 1
        tell(done, len(todo), "done")
    finally:
        torch.set_num_threads(before)
    return rows


def short(us: float) -> str:
    return f"{us:.1f} us" if us < 100 else f"{us:.0f} us" if us < 1e4 else f"{us / 1e3:.0f} ms"


def cells(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: medians; behind eager and lean how many times as long as `sample` they take."""
    header = ["threads", "B", "top_p", "sample", "p20..p80", "+ logprobs", "floor", "sample / floor", "eager", "lean"]
    lines = []
    for key in dict.fromkeys((r["threads"], r["batch"], r["top_p"]) for r in rows):
        by = {r["contender"]: r for r in rows if (r["threads"], r["batch"], r["top_p"]) == key}
        t = {name: r["median_us"] for name, r in by.items()}
        own = by["sample"]
        lines.append([f"{key[0]}", f"{key[1]}", f"{key[2]:g}" if key[2] < 1 else "off", short(t["sample"]),
                      f"{short(own['p20_us'])}..{short(own['p80_us'])}", short(t["sample+lp"]), short(t["floor"]),
                      f"{t['sample'] / t['floor']:.2f}",
                      *(f"{short(t[name])} ({t[name] / t['sample']:.{0 if name == 'eager' else 1}f}x)"
                        for name in ("eager", "lean"))])
    return header, lines


def about(rows: list[dict]) -> str:
    r = rows[0]
    commit = f"commit {r['commit']}{' with changes' if r['dirty'] else ''}" if r["commit"] else "installed package"
    isa = r["backend_detail"].split(",")[0]
    return (f"V = {r['vocab']}, bfloat16, 3 models, medians of {r['rounds']} interleaved rounds; {r['cpu']}, backend "
            f"{r['backend']} ({isa}), eft-kernels {r['eft_kernels']} ({commit}), torch {r['torch']}")


def markdown(rows: list[dict]) -> str:
    header, lines = cells(rows)
    return "\n".join([f"`{rows[0]['command']}`: {about(rows)}", "", "| " + " | ".join(header) + " |",
                      "|" + "--:|" * len(header), *("| " + " | ".join(line) + " |" for line in lines)])


def write_json(rows: list[dict], path: str) -> None:
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def progress_on_stderr(done: int, total: int, label: str) -> None:
    print(f"[{done}/{total}] {label}", file=sys.stderr, flush=True)
