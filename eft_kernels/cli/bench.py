"""`eft-kernels bench`: our operations beside others on the terminal, and one run against another."""

from __future__ import annotations

import argparse
import sys

import torch

from ..bench import compare, device, shapes
from ..bench import rows as results
from ..bench import run as runs
from ..bench.baselines import BASELINES
from ..bench.shapes import MIN_VOCAB, OPS, PEERS, Row, Shape
from .files import check_writable
from .term import DIM, Progress, Refused, paint, table

CHOICES = ("device", "op", "batch", "vocab", "threads", "against")
WIDE = ("floor", "launches", "peak memory")  # columns that only the report shows


def run(args: argparse.Namespace) -> int:
    files, given = args.compare or args.check, [f"--{n}" for n in CHOICES if getattr(args, n)]
    if args.compare and args.check:
        raise Refused("pass one of --compare and --check")
    if files and len(files) > 2:
        raise Refused(f"--check: got {len(files)} files, allowed is A or A B")
    if files and given:
        raise Refused(f"{', '.join(given)}: the files of --compare and --check say what is compared")
    if files and len(files) == 2 and (args.json or args.rounds):
        raise Refused("--json, --rounds: nothing is measured where two files are compared")
    if not files:
        print_rows(measure(chosen(args), args))
        return 0
    before = read(files[0])
    after = read(files[1]) if len(files) == 2 else measure(same_as(before, files[0], args.rounds), args)
    lines = compare.compare(before, after)
    if not lines:
        raise Refused(f"{' and '.join(files)}: no measurement in common")
    print(table(*compare.cells(lines)))
    print("  " + compare.summary(lines))
    return int(bool(args.check and compare.slower(lines)))


def read(path: str) -> list[Row]:
    try:
        return results.read(path)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from None


def chosen(args: argparse.Namespace) -> list[Shape]:
    """The shapes that the options ask for."""
    kind = args.device or device.default_kind()
    if kind == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: no CUDA device is here")
    for name, allowed in dict(op=list(OPS), against=[b.name for b in BASELINES]).items():
        for value in getattr(args, name) or []:
            if value not in allowed:
                raise Refused(f"--{name}: got {value!r}, allowed is {', '.join(allowed)}")
    for vocab in args.vocab or []:
        if vocab < MIN_VOCAB:
            raise Refused(f"--vocab: got {vocab}, allowed is {MIN_VOCAB} and more")
    for threads in args.threads or []:
        if threads > len(device.cores()):
            raise Refused(f"--threads: got {threads}, allowed is 1 to {len(device.cores())}, the cores of this process")
    if args.threads and kind == "cuda":
        raise Refused("--threads: of a CPU; pass --device cpu")
    found = shapes.variants((1, 8), against=PEERS, **shapes.on(kind)) if args.op else shapes.quick(kind)
    return shapes.select(found, args.op, threads=args.threads, rounds=args.rounds, batch=args.batch, vocab=args.vocab)


def same_as(rows: list[Row], path: str, rounds: int | None) -> list[Shape]:
    """What ``rows`` measured of our operators on a device like this one, against the same baselines; no generations."""
    here = {kind: device.environment("", kind)["device"] for kind in {"cpu", device.default_kind()}}
    again = []
    for s, group in results.newest(rows).items():
        own = results.timed(group, "eft")
        if own and here.get(s.device) == s.device_name and s.variant in OPS.get(s.op, ()):
            against = tuple(n for n in group if n not in results.OUR_NAMES and results.timed(group, n))
            again.append(s._replace(device_name=None, against=against, rounds=rounds or own["repetitions"]))
    if not again:
        raise Refused(f"{path}: no measurement of ours on this device ({', '.join(sorted(here.values()))}) in it")
    return again


def measure(wanted: list[Shape], args: argparse.Namespace) -> list[Row]:
    if args.json:
        check_writable(args.json, "--json")
    try:
        with Progress("measuring", len(wanted)) as progress:

            def on_terminal(done: int, total: int, label: str) -> None:
                progress.at(done, label)

            tell = on_terminal if progress.on else runs.on_stderr
            rows = runs.run(wanted, args.against, " ".join(["eft-kernels", *sys.argv[1:]]), tell)
    except runs.WrongTokens as error:
        print(f"eft-kernels bench: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if args.json:
        runs.write_rows(rows, args.json)
    return rows


def print_rows(rows: list[Row]) -> None:
    measured, r = results.newest(rows), rows[0]
    shared, header, lines = results.cells(measured)
    keep = [i for i, name in enumerate(header) if name not in WIDE]
    print(table([header[i] for i in keep], [[line[i] for i in keep] for line in lines]))
    print("  " + paint(shared, DIM))
    rates = dict.fromkeys(f"{x['bandwidth_gbs']:.3g} GB/s" for x in rows if x["bandwidth_gbs"])
    about = [r["device"], f"backend {r['backend']}", *rates, f"eft-kernels {r['eft_kernels']}", f"torch {r['torch']}"]
    print("  " + paint(", ".join(about), DIM))
    if rates:
        print(
            "  of floor: what reading the logits once takes at that bandwidth, over our time; combine + max: the\n"
            "  same kernel without noise and filters; in brackets how many times our time an implementation takes"
        )
    for line in results.untimed(measured):
        print(f"  {line}")
