"""`eft-kernels bench`: the benchmarks on the terminal, and one run against another.

They are benchmarks/ of the checkout, or eft_kernels._benchmarks of an installed package.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from .term import DIM, Progress, Refused, paint, table

PACKAGE = "eft_kernels._benchmarks"
CHOICES = ("suite", "op", "batch", "vocab", "threads", "against")
WIDE = ("floor", "launches", "peak memory")  # left to the report


def load(name: str):
    """A module of the benchmarks that belong to this very package: an editable install may know those of another."""
    if PACKAGE not in sys.modules:
        here = Path(__file__).resolve().parents[1]
        places = [here / "_benchmarks", here.parent / "benchmarks"]
        place = next((p for p in places if (p / "__init__.py").is_file()), None)
        if place is None:
            raise Refused(f"no benchmarks: neither {places[0]} nor {places[1]} is here; install eft-kernels again")
        spec = importlib.util.spec_from_file_location(PACKAGE, place / "__init__.py",
                                                      submodule_search_locations=[str(place)])
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.{name}")


def run(args) -> int:
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
        print_rows(measure(*chosen(args), args))
        return 0
    compare, before = load("compare"), read(files[0])
    after = read(files[1]) if len(files) == 2 else measure(same_as(before, files[0], args.rounds), None, args)
    lines = compare.compare(before, after)
    if not lines:
        raise Refused(f"{' and '.join(files)}: no measurement in common")
    header, cells = compare.cells(lines)
    print(table(header, cells))
    print("  " + compare.summary(lines))
    return int(bool(args.check and compare.slower(lines)))


def read(path: str) -> list[dict]:
    try:
        return load("report").read(path)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from None


def chosen(args) -> tuple[list, dict | None]:
    """The shapes and the whole generations that the options ask for."""
    main, registry, device = load("__main__"), load("registry"), load("device")
    allowed = dict(suite=dict.fromkeys([*registry.SUITES, *main.GENERATIONS]), op=registry.OPS,
                   against=[b.name for b in load("baselines").BASELINES])
    for name, names in allowed.items():
        value = getattr(args, name) or []
        for one in [value] if isinstance(value, str) else value:
            if one not in names:
                raise Refused(f"--{name}: got {one!r}, allowed is {', '.join(names)}")
    for vocab in args.vocab or []:
        if vocab < main.MIN_VOCAB:
            raise Refused(f"--vocab: got {vocab}, allowed is {main.MIN_VOCAB} and more")
    for threads in args.threads or []:
        if threads > len(device.cores()):
            raise Refused(f"--threads: got {threads}, allowed is 1 to {len(device.cores())}, the cores of this process")
    rest = dict.fromkeys(("variant", "models", "dtype", "logits", "draft_tokens", "device"))
    options = argparse.Namespace(**rest, rounds=args.rounds, **{n: getattr(args, n) for n in CHOICES})
    try:
        shapes = [] if args.suite == "generate" else main.select(options)
        generations = main.generations(options)
    except load("run").Refused as error:
        raise Refused(str(error)) from None
    if device.default_kind() == "cpu" and any(s.device == "cuda" for s in shapes):
        raise Refused(f"--suite {args.suite}: no CUDA device is here; quick and cpu measure the CPU")
    return shapes, generations


def same_as(rows: list[dict], path: str, rounds: int | None) -> list:
    """What ``rows`` measured of our operators on a device like this one, against the same baselines; no generations."""
    registry, report, device = load("registry"), load("report"), load("device")
    here = {kind: device.environment("", kind)["device"] for kind in {"cpu", device.default_kind()}}
    shapes = []
    for s, group in report.newest(rows).items():
        own = report.timed(group, "eft")
        if own and here.get(own["device_kind"]) == s.device and s.variant in registry.OPS.get(s.op, ()):
            values = {**s._asdict(), "device": own["device_kind"], "rounds": rounds or own["repetitions"]}
            against = tuple(n for n in group if n not in report.OURS and report.timed(group, n))
            shapes.append(registry.Shape(**values, against=against))
    if not shapes:
        raise Refused(f"{path}: no measurement of ours on this device ({', '.join(sorted(here.values()))}) in it")
    return shapes


def measure(shapes: list, generations: dict | None, args) -> list[dict]:
    runs, saved = load("run"), args.json and Path(args.json)
    command = " ".join(["eft-kernels", *sys.argv[1:]])
    try:
        if saved:
            runs.refuse_dirty()
            if not os.access(saved.resolve().parent, os.W_OK) or saved.is_dir():
                raise Refused(f"--json {saved}: cannot write it")
        with Progress("measuring", len(shapes) or 1) as progress:
            tell = (lambda done, total, label: progress.at(done, label)) if progress.on else runs.on_stderr
            rows = runs.run(shapes, args.against, command, tell)
            if generations:
                more = load("generate").measure(**generations, command=command, tell=runs.on_stderr if not progress.on
                                                else lambda done, total, label: progress.at(progress.total, label))
                rows += [row | {"run": (rows or more)[0]["run"]} for row in more]
        if saved:
            runs.write_rows(rows, saved)
        return rows
    except runs.WrongTokens as error:
        print(f"eft-kernels bench: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (runs.Refused, OSError) as error:
        raise Refused(str(error)) from None


def print_rows(rows: list[dict]) -> None:
    report, r = load("report"), rows[0]
    shapes = report.newest(rows)
    for cells, part in ((report.cells, {s: g for s, g in shapes.items() if s.op != "generate"}),
                        (report.generate_cells, {s: g for s, g in shapes.items() if s.op == "generate"})):
        if part:
            shared, header, lines = cells(part)
            keep = [i for i, name in enumerate(header) if name not in WIDE]
            print(table([header[i] for i in keep], [[line[i] for i in keep] for line in lines]))
            print("  " + paint(shared, DIM))
    rates = dict.fromkeys(f"{x['bandwidth_gbs']:.3g} GB/s" for x in rows if x["bandwidth_gbs"])
    about = [r["device"], f"backend {r['backend']}", *rates, f"eft-kernels {r['eft_kernels']}",
             f"torch {r['torch']}", f"commit {r['commit'][:12]}{' with changes' if r['dirty'] else ''}"
             if r["commit"] else "installed package"]
    print("  " + paint(", ".join(about), DIM))
    if rates:
        print("  of floor: what reading the logits once takes at that bandwidth, over our time; combine + max: the\n"
              "  same kernel without noise and filters; in brackets how many times our time an implementation takes")
    for line in report.untimed(shapes):
        print(f"  {line}")
