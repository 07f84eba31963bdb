"""Which `TileConfig` is quickest for each amount of work on this GPU: rows for the Triton backend's config.py.

    python -m tools tune                                   # both tables
    python -m tools tune --table sample --seconds 60 --json FILE

Candidates are compiled ahead by processes beside this one, then timed as `benchmarks run` times: a CUDA graph over
inputs that no cache holds, candidates taking turns. Nothing is timed unless the first candidate gives the reference's
tokens, and every other one the first's. A row of the printed table holds as long as it loses nothing but noise.

Exit codes: 0 it worked, 1 tokens are wrong or nothing could be timed, 2 bad input or no GPU.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import importlib
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import provenance, report
from eft_kernels import dispatch
from eft_kernels._backends.triton import config
from eft_kernels._backends.triton.config import TileConfig
from eft_kernels.bench import device, run, shapes
from eft_kernels.bench.run import WrongTokens, error_line
from eft_kernels.bench.shapes import OURS, Shape
from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused

from . import aot

CHUNK = 256
ROUNDS = 7
NOISE = 0.01  # of a median: less than that is never a difference
ROW = 0.02  # what a further row of the table must save, as a share of the time at some work
FAR = 1.2  # times the best: such a candidate is left out between two works where it is so far behind
NEAR = 8  # times the work: how far apart those may be
SINGLE_TILE_WORK = 16384  # noise for every token takes longer than reading it, beyond this many chunks


class Table(NamedTuple):
    tilings: dict  # of config
    calls: tuple  # (op, variant) timed; their sum counts
    single_tile: bool  # whether tilings of a single tile are candidates


TABLES = {
    "sample": Table(config.SAMPLE, (("sample", "plain"),), True),
    "stream": Table(config.STREAM, (("sample", "top_p"), ("logprobs", "plain")), False),
}


def chunks(vocab: int) -> int:
    return math.ceil(vocab / CHUNK)


class Point(NamedTuple):
    """Rows of logits (bfloat16, three models) over a vocabulary."""

    rows: int
    vocab: int = 128256

    @property
    def work(self) -> int:
        return self.rows * chunks(self.vocab)


# in the order of what tells most, should time run out
POINTS = [Point(rows) for rows in (1, 512, 8, 64, 256, 16, 128, 4, 32, 2)]
POINTS += [Point(rows, vocab) for vocab in (32000, 262144) for rows in (1, 256, 16)]


class Times(NamedTuple):
    """Microseconds of a call."""

    median: float
    p20: float
    p80: float
    repetitions: int


# --- candidates ----------------------------------------------------------------------------------------------------


def power(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()


def clamp(tiling: TileConfig, vocab: int) -> TileConfig:
    """The tiling as a launch on this vocabulary takes it: no more tiles than the row has."""
    tiles = power(math.ceil(chunks(vocab) / tiling.chunks_per_tile))
    return tiling._replace(tiles_per_program=min(tiling.tiles_per_program, tiles))


def programs(tiling: TileConfig, p: Point) -> int:
    return p.rows * math.ceil(chunks(p.vocab) / (tiling.tiles_per_program * tiling.chunks_per_tile))


def candidates(single_tile: bool, p: Point, processors: int = 132) -> list[TileConfig]:
    """Tilings whose programs keep every multiprocessor busy without being 64 to one, and whose tile is 8 tokens
    a thread and more (a single one: 4)."""
    tilings = [
        TileConfig(tiles, tc, warps) for tiles in (1, 2, 4, 8, 16, 32, 64) for tc in (4, 8, 16) for warps in (4, 8)
    ]
    if single_tile and p.work <= SINGLE_TILE_WORK:
        tilings = [TileConfig(1, tc, warps, True) for tc in (2, 4, 8, 16) for warps in (4, 8)] + tilings
    most = max(programs(TileConfig(1, 4), p), 1)
    enough, many = min(most, processors // 3), 64 * processors
    tilings = [c for c in tilings if c == clamp(c, p.vocab)]
    tilings = [c for c in tilings if c.chunks_per_tile * 8 // c.num_warps >= (4 if c.single_tile else 8)]
    return [c for c in tilings if enough <= programs(c, p) <= many] or [max(tilings, key=lambda c: programs(c, p))]


def contenders(tilings: list[TileConfig], p: Point, results: dict) -> list[TileConfig]:
    """The first, and the others but those that were far behind at the next work below and at the next above."""
    works = sorted((q for q in results if p.work / NEAR <= q.work <= p.work * NEAR), key=lambda q: q.work)
    below, above = [q for q in works if q.work <= p.work][-1:], [q for q in works if q.work > p.work][:1]

    def behind(tiling, q):
        here, best = results[q].get(clamp(tiling, q.vocab)), min(t.median for t in results[q].values())
        return here is not None and here.median > FAR * best

    if not (below and above):
        return tilings
    return [c for c in tilings if c == tilings[0] or not (behind(c, below[0]) and behind(c, above[0]))]


# --- the choice ----------------------------------------------------------------------------------------------------


def losses(times: dict[TileConfig, Times]) -> dict[TileConfig, float]:
    """How much slower than the best each tiling is: a share of its time, almost nothing inside the noise."""
    best = min(times.values(), key=lambda t: t.median)
    noise = max(NOISE, (best.p80 - best.p20) / best.median)
    over = {tiling: t.median / best.median - 1 for tiling, t in times.items()}
    return {tiling: max(0.0, x - noise) + x * ROW for tiling, x in over.items()}


def choose(results: dict[Point, dict[TileConfig, Times]]) -> list[tuple[int, TileConfig]]:
    """The table with the least loss over all points, each further row counted as a loss of `ROW`: (limit, tiling)."""
    works = sorted({p.work for p in results})
    points = [[(p, losses(results[p])) for p in results if p.work == w] for w in works]
    tilings = dict.fromkeys(tiling for times in results.values() for tiling in times)

    def loss(tiling, i):  # over the points of works[i]; infinite where it was not measured
        return sum(lost.get(clamp(tiling, p.vocab), math.inf) for p, lost in points[i])

    best = [(0.0, [])]  # of the first i works: loss, rows as (number of works, tiling)
    for i in range(1, len(works) + 1):
        sums, options = dict.fromkeys(tilings, 0.0), []
        for j in reversed(range(i)):
            sums = {tiling: total for tiling, x in sums.items() if (total := x + loss(tiling, j)) < math.inf}
            options += [(best[j][0] + ROW + x, [*best[j][1], (i, tiling)]) for tiling, x in sums.items()]
        best.append(min(options, key=lambda x: x[0]))
    rows = best[-1][1]
    return [(1 << 62 if i == len(works) else (works[i - 1] + works[i]) // 2, tiling) for i, tiling in rows]


def pick(rows: list[tuple[int, TileConfig]], p: Point) -> TileConfig:
    return clamp(next(tiling for limit, tiling in rows if p.work <= limit), p.vocab)


# --- what is printed -----------------------------------------------------------------------------------------------


def source(tiling: TileConfig) -> str:
    """As config.py writes it."""
    arguments = f"{tiling.tiles_per_program}, {tiling.chunks_per_tile}"
    if tiling.num_warps != 4:
        arguments += f", {tiling.num_warps}"
    if tiling.single_tile:
        arguments += ", single_tile=True"
    return f"TileConfig({arguments})"


def entry(name: str, rows: list[tuple[int, TileConfig]]) -> str:
    """An entry of config.SAMPLE or config.STREAM."""
    limits = ["1 << 62" if limit == 1 << 62 else str(limit) for limit, _ in rows]
    lines = [f"        ({limit}, {source(tiling)})," for limit, (_, tiling) in zip(limits, rows)]
    return "\n".join([f'    "{name}": (', *lines, "    ),"])


def medians(results: dict) -> list[str]:
    """A line for each tiling, a column for each point."""
    points = sorted(results, key=lambda p: (p.vocab != Point(1).vocab, p.vocab, p.rows))
    head = ["µs", *(f"{p.rows} x {p.vocab}" for p in points)]
    lines = [
        [source(tiling), *(f"{results[p][tiling].median:.2f}" if tiling in results[p] else "-" for p in points)]
        for tiling in sorted(
            {tiling for times in results.values() for tiling in times}, key=lambda c: (not c.single_tile, c)
        )
    ]
    return report.table(head, lines, left=1)


def choices(results: dict, rows: list, now: Callable[[Point], TileConfig]) -> list[str]:
    """A line for each point: the best, what the new table takes, what config.py takes now."""

    def cell(times, tiling, best):
        return f"{source(tiling)} {times[tiling].median / best:.2f}x" if tiling in times else f"{source(tiling)} ?"

    lines = []
    for p in sorted(results, key=lambda p: p.work):
        times = results[p]
        best = min(times, key=lambda c: times[c].median)
        least = times[best].median
        lines.append(
            [
                str(p.work),
                f"{p.rows} x {p.vocab}",
                f"{source(best)} {least:.2f} µs",
                cell(times, pick(rows, p), least),
                cell(times, now(p), least),
            ]
        )
    return report.table(["rows * chunks", "rows x V", "best", "this table", "config.py now"], lines, left=5)


def render(
    name: str, gpu: str, results: dict, skipped: list[Point], absent: dict, now: Callable[[Point], TileConfig]
) -> str:
    rows = choose(results)
    lines = [
        f"{name.upper()}: medians of " + " + ".join(" ".join(c) for c in TABLES[name].calls),
        "",
        *medians(results),
        *choices(results, rows, now),
    ]
    lines += [f"not measured, no time left: {', '.join(f'{p.rows} x {p.vocab}' for p in skipped)}"] * bool(skipped)
    lines += [f"{source(tiling)} at {p.rows} x {p.vocab}: {why}" for (p, tiling), why in absent.items()]
    return "\n".join(
        [*lines, f"config.{name.upper()} in eft_kernels/_backends/triton/config.py:", "", entry(gpu, rows), ""]
    )


def rows_of(name: str, results: dict, absent: dict, about: dict) -> list[dict]:
    """A JSON row for each point and tiling; ``chosen``: what the new table takes there."""
    table, out = choose(results), []
    for p, times in results.items():
        for tiling, t in times.items():
            out.append(
                dict(
                    table=name,
                    batch=p.rows,
                    vocab=p.vocab,
                    work=p.work,
                    **tiling._asdict(),
                    status="measured",
                    why=None,
                    median_us=t.median,
                    p20_us=t.p20,
                    p80_us=t.p80,
                    repetitions=t.repetitions,
                    chosen=tiling == pick(table, p),
                    **about,
                )
            )
    for (p, tiling), why in absent.items():
        out.append(
            dict(
                table=name,
                batch=p.rows,
                vocab=p.vocab,
                work=p.work,
                **tiling._asdict(),
                status="absent",
                why=why,
                median_us=None,
                p20_us=None,
                p80_us=None,
                repetitions=None,
                chosen=False,
                **about,
            )
        )
    return out


# --- measuring -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(name: str, tiling: TileConfig):
    """Launches of a table's kernels take this tiling, whatever the device and the work."""
    table = TABLES[name].tilings
    was = dict(table)
    table.clear()
    table["default"] = ((1 << 62, tiling),)
    try:
        yield
    finally:
        table.clear()
        table.update(was)


def now(name: str) -> Callable[[Point], TileConfig]:
    """What config.py takes on this device, read before any tiling is forced."""
    where = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return lambda p: clamp(config.tile_config(TABLES[name].tilings, where, p.work), p.vocab)


def wanted(name: str, vocab: int, machine) -> dict[Point, list[TileConfig]]:
    """The tilings for each point over a vocabulary: what config.py takes now, then the candidates."""
    current = now(name)
    return {
        p: list(dict.fromkeys([current(p), *candidates(TABLES[name].single_tile, p, machine.processors)]))
        for p in POINTS
        if p.vocab == vocab
    }


def union(tilings: dict[Point, list[TileConfig]]) -> list[TileConfig]:
    return list(dict.fromkeys(c for part in tilings.values() for c in part))


def measure_points(name: str, machine, until: float, tell=None, clock=time.monotonic) -> tuple[dict, list[Point]]:
    """({point: {tiling: Times}}, points there was no time for). ``machine``: `Gpu`, or what a test has instead."""
    results, skipped = {}, []
    for vocab in dict.fromkeys(p.vocab for p in POINTS):
        tilings = {p: contenders(c, p, results) for p, c in wanted(name, vocab, machine).items()}
        machine.compile(name, vocab, union(tilings))
        for p in tilings:
            if clock() >= until:
                skipped.append(p)
                continue
            if tell:
                tell(f"{name}: {p.rows} x {p.vocab}")
            if times := machine.time(name, p, contenders(tilings[p], p, results), until):
                results[p] = times
            else:
                skipped.append(p)
    return results, skipped


class Gpu:
    """Compiles and times on the current CUDA device; a context, for its processes."""

    ours, backend = next(b for b in OURS if b.name == "eft_triton"), "triton"

    def __init__(self):
        self.processors = torch.cuda.get_device_properties().multi_processor_count
        self.target = "sm_{}{}".format(*torch.cuda.get_device_capability())
        self.absent, self.gated, self.pool, self.jobs = {}, set(), None, {}

    def __enter__(self):
        if self.target in aot.TARGETS:  # else each candidate is compiled when its turn comes
            self.pool = concurrent.futures.ProcessPoolExecutor(
                max(1, min(14, len(device.cores()) - 2)), multiprocessing.get_context("spawn"), start, (self.target,)
            )
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def shape(self, p: Point, op: str = "sample", variant: str = "plain") -> Shape:
        return Shape(op, variant, p.rows, p.vocab, threads=None, device="cuda", launch="graph")

    def compile(self, name: str, vocab: int, tilings: list[TileConfig]) -> None:
        """Into Triton's cache on disk, in the background, in this order."""
        for key in ((name, vocab, tiling) for tiling in tilings):
            if self.pool and key not in self.jobs:
                self.jobs[key] = self.pool.submit(build, *key)

    def compiled(self, name: str, p: Point, tilings: list[TileConfig], until: float) -> list[TileConfig]:
        """Those of the tilings that compile in time."""
        jobs, out = {tiling: self.jobs.get((name, p.vocab, tiling)) for tiling in tilings}, []
        concurrent.futures.wait([job for job in jobs.values() if job], max(0.0, until - time.monotonic()))
        for tiling, job in jobs.items():
            if job and not job.done():
                self.absent[p, tiling] = "not compiled in time"
            elif job and job.exception():
                self.absent[p, tiling] = error_line(job.exception())
            else:
                out.append(tiling)
        return out

    def time(self, name: str, p: Point, tilings: list[TileConfig], until: float) -> dict[TileConfig, Times]:
        """Of every tiling that compiles in time; raises `WrongTokens`."""
        tilings = self.compiled(name, p, tilings, until)
        sets = run.inputs_for(self.shape(p))
        timers, want = {}, {}
        for tiling in tilings:
            try:
                timers |= self.timers(name, p, tiling, sets, want)
            except WrongTokens:
                raise
            except Exception as error:  # of the compiler, or out of resources
                self.absent[p, tiling] = error_line(error)
        if not timers:
            return {}
        gc.disable()
        try:
            times = run.interleave(timers, ROUNDS)
        finally:
            gc.enable()
        return {
            tiling: added([times[tiling, call] for call in TABLES[name].calls])
            for tiling in dict.fromkeys(tiling for tiling, _ in timers)
        }

    def timers(self, name: str, p: Point, tiling: TileConfig, sets: list, want: dict) -> dict:
        """A warm timer for each call of the table. ``want``: outputs of the point's first tiling, filled by it."""
        out = {}
        with forced(name, tiling):
            for op, variant in TABLES[name].calls:
                s = self.shape(p, op, variant)
                if (name, op) not in self.gated:
                    run.gate(s, sets[:1], self.ours)
                    self.gated.add((name, op))
                call = shapes.ours(op, variant, shapes.problem(s), self.backend)
                check(source(tiling), s, call(*sets[0]), want.setdefault(op, call(*sets[0])))
                timer = device.timer(call, sets, s.device, s.launch)
                timer(1)
                out[tiling, (op, variant)] = timer
        return out


def check(who: str, s: Shape, got, want) -> None:
    """Raises `WrongTokens` unless tokens are equal and log-probs close."""
    for a, b in zip(run.as_tuple(got), run.as_tuple(want)):
        same = (
            torch.allclose(a, b, rtol=0, atol=run.CLOSE / 10, equal_nan=True)
            if a.is_floating_point()
            else torch.equal(a, b)
        )
        if not same:
            raise WrongTokens(f"{who} is not what the first candidate gives at {s.label()}: nothing is timed")


def added(times: list[list[float]]) -> Times:
    """Seconds of several calls, a list a call, as one."""
    parts = [statistics.quantiles(t, n=5, method="inclusive") if len(t) > 1 else t * 4 for t in times]
    return Times(
        sum(statistics.median(t) for t in times) * 1e6,
        sum(q[0] for q in parts) * 1e6,
        sum(q[3] for q in parts) * 1e6,
        min(map(len, times)),
    )


# --- compiling ahead, in processes of their own --------------------------------------------------------------------


def start(target: str) -> list:
    """From here on this process compiles what it would launch, for a GPU it does not touch, from CPU tensors; what it
    compiled."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    module = importlib.import_module(aot.BACKEND)
    dispatch.choose, dispatch.shortcut = lambda *_: module, lambda *_: None
    return aot.launches(target)


def build(name: str, vocab: int, tiling: TileConfig) -> None:
    """Compiles what the table's calls launch with a tiling; the number of rows is no part of it."""
    z = [torch.empty(1, vocab, dtype=torch.bfloat16) for _ in range(3)]
    with forced(name, tiling):
        for op, variant in TABLES[name].calls:
            shapes.ours(op, variant, shapes.problem(Shape(op, variant, vocab=vocab)))(z)


# --- the command ---------------------------------------------------------------------------------------------------


def refusal() -> str | None:
    """Why nothing can be measured here, in a line."""
    if not torch.cuda.is_available():
        return "no CUDA device is here, and a tiling is measured on the GPU it is for"
    available, why = dispatch.status("triton")
    return None if available else f"the triton backend is not available: {why}"


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools tune", description=__doc__.split("\n\n")[0])
    p.add_argument("--table", choices=TABLES, help="of eft_kernels/_backends/triton/config.py (default: both)")
    p.add_argument("--seconds", type=float, default=90, help="about how long, for all (default: 90)")
    p.add_argument("--json", metavar="FILE", help="save a row for each candidate and work")
    args = p.parse_args(argv)
    names = [args.table] if args.table else list(TABLES)
    if why := refusal():
        raise Refused(why)
    if args.json:
        open(args.json, "w").close()
    with Gpu() as machine:
        return tune(names, machine, args.seconds, args.json, " ".join(["python -m tools tune", *argv]))


def tune(
    names: list[str], machine, seconds: float, path: str | None = None, command: str = "", about: dict | None = None
) -> int:
    """Measures, prints and saves the tables ``names``; they share the time."""
    start = time.monotonic()
    about = device.environment(command, "cuda") | provenance.of_a_row() if about is None else about
    for name in names:  # while the first is timed, the next compiles
        machine.compile(name, POINTS[0].vocab, union(wanted(name, POINTS[0].vocab, machine)))
    for i, name in enumerate(names, 1):
        machine.absent.clear()
        results, skipped = measure_points(
            name, machine, start + seconds * i / len(names), lambda text: print(text, file=sys.stderr, flush=True)
        )
        if not results:
            for (p, tiling), why in machine.absent.items():
                print(f"{source(tiling)} at {p.rows} x {p.vocab}: {why}", file=sys.stderr)
            print(f"{name}: nothing could be timed", file=sys.stderr)
            return 1
        print(render(name, about["device"], results, skipped, machine.absent, now(name)), flush=True)
        if path:
            run.write_rows(rows_of(name, results, machine.absent, about), path, "a")
    return 0
