"""The best launch configuration of the CUDA kernels on this GPU: each field of `LaunchConfig` in turn, in CUDA graphs.

    python -m tools launch_config            # a table for csrc/cuda/launch_config.h; --json FILE saves the times

Exit codes: 0 measured, 1 a candidate gave other tokens, 2 bad input or no such GPU.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from typing import NamedTuple

import torch

from benchmarks import report
from eft_kernels import dispatch
from eft_kernels.bench import device, run
from eft_kernels.bench.run import WrongTokens
from eft_kernels.bench.shapes import OURS, Shape, ours, problem
from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused

ROUNDS = 7


class TunedField(NamedTuple):
    """A field of `LaunchConfig`: candidates, the variant of an operation that it matters to, and the batches."""

    values: tuple[int, ...]
    variant: str
    batches: tuple[int, ...]
    op: str = "sample"
    others: dict = {}  # noqa: RUF012


FIELDS = {
    "direct_chunks_per_sm": TunedField((0, 8, 16, 32, 64, 128), "plain", (1, 8, 16, 32, 2, 4, 64)),
    "stream_waves": TunedField((1, 2, 3, 4), "plain", (256, 64, 512, 32, 128), others=dict(direct_chunks_per_sm=0)),
    "smem_budget": TunedField(tuple(k << 10 for k in (36, 54, 72, 110, 220)), "top_p", (256, 64, 8, 1, 512)),
    "sample_by_rejection": TunedField((0, 1), "top_p", (256, 64, 8, 1)),
    "use_pdl": TunedField((0, 1), "block", (1, 8, 64), "verify"),
    "early_exit_blocks_per_sm": TunedField((0, 3, 6, 12, 1 << 20), "token", (64, 256, 16, 8), "verify"),
}


@contextlib.contextmanager
def launch_config(**values: int):
    """Launches of the CUDA backend with these fields of `LaunchConfig`."""
    backend = dispatch.load("cuda")
    backend.set_launch_config(backend.LaunchConfig()._replace(**values))
    try:
        yield
    finally:
        backend.set_launch_config(backend.LaunchConfig())


def measure(name: str, batch: int, kind: str = "cuda", launch: str = "graph", vocab: int = 128256) -> dict[int, float]:
    """Median microseconds of every candidate of a field, in turns."""
    field = FIELDS[name]
    s = Shape(
        field.op,
        field.variant,
        batch,
        vocab,
        device=kind,
        launch=launch,
        threads=None,
        draft_tokens=4 if field.op == "verify" else None,
    )
    sets, call = run.inputs_for(s), ours(field.op, field.variant, problem(s), "cuda")
    timers, want = {}, None
    for value in field.values:
        with launch_config(**field.others, **{name: value}):
            if want is None:
                run.gate(s, sets[:1], OURS[0])
            got = call(*sets[0])
            got = got if isinstance(got, tuple) else (got,)
            want = got if want is None else want
            if not all(map(torch.equal, got, want)):
                raise WrongTokens(f"{name} = {value} changes tokens at {s.label()}")
            timers[value] = device.timer(call, sets, kind, launch)
            timers[value](1)
    gc.disable()
    try:
        times = run.interleave(timers, ROUNDS)
    finally:
        gc.enable()
    return {value: statistics.median(t) * 1e6 for value, t in times.items()}


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools launch_config", description=__doc__.split("\n\n")[0])
    p.add_argument("--field", choices=FIELDS, help="only this one")
    p.add_argument("--seconds", type=float, default=60, help="begin nothing after them (default: 60)")
    p.add_argument("--json", metavar="FILE", help="save a row for each candidate and batch")
    args = p.parse_args(argv)
    available, why = dispatch.status("cuda")
    if not (available and torch.cuda.is_available()):
        raise Refused(f"the cuda backend is not available: {why}")
    until, rows = time.monotonic() + args.seconds, []
    for name in [args.field] if args.field else FIELDS:
        field, lines = FIELDS[name], []
        for batch in field.batches:
            if time.monotonic() > until:
                print(f"no time for {name} at B = {batch}", file=sys.stderr)
                continue
            times = measure(name, batch)
            rows += [
                dict(
                    field=name,
                    value=v,
                    op=field.op,
                    variant=field.variant,
                    batch=batch,
                    median_us=t,
                    device=torch.cuda.get_device_name(),
                )
                for v, t in times.items()
            ]
            best = min(times.values())
            lines.append([str(batch), *(f"**{t:.1f}**" if t == best else f"{t:.1f}" for t in times.values())])
        if lines:
            header = [f"B, {field.variant}, us", *(f"{name} = {v}" for v in field.values)]
            print("\n".join(report.table(header, lines, left=0)) + "\n")
    if args.json:
        run.write_rows(rows, args.json)
    return 0
