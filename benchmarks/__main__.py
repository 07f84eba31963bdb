"""python -m benchmarks {list, run, add, report, compare, pairs, vllm}

Exit codes: 0 it worked, 1 our own tokens are wrong (nothing was timed), 2 bad input or refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from eft_kernels.bench import inputs, run, shapes
from eft_kernels.bench.baselines import BASELINES
from eft_kernels.bench.rows import newest
from eft_kernels.bench.shapes import MIN_VOCAB, OPS, OURS, Shape
from eft_kernels.cli.files import check_writable
from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused

from . import compare, generate, pairs, provenance, report, vllm_speed
from .registry import GENERATIONS, SUITES


def at_least(low: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is an integer from {low} on")
        return int(text)

    return number


def parser(prog: str) -> Parser:
    root = Parser(prog=prog, description="Time, traffic, launches and memory of every operation, beside others'.")
    commands = root.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    commands.add_parser("list", help="suites, operations, implementations (and why one is absent)")
    p = commands.add_parser("run", help="measure; nothing is timed before the tokens are right")
    add_options(p)
    p = commands.add_parser("add", help="copy saved rows into results/<device>, if they are some commit's")
    p.add_argument("file", type=Path)
    commands.add_parser("report", help="tables and plots of results", add_help=False)
    commands.add_parser("compare", help="rows against rows", add_help=False)
    commands.add_parser("pairs", help="speculation on pairs of models, beside what arithmetic says", add_help=False)
    commands.add_parser("vllm", help="tokens a second in vLLM (where it is installed)", add_help=False)
    return root


def add_options(p: argparse.ArgumentParser) -> None:
    """What `run` takes. Each factor given stands in place of the suite's own values of it."""

    def several(name, text, **kwargs):
        p.add_argument(name, action="extend", nargs="+", help=text, **kwargs)

    p.add_argument(
        "--suite",
        choices=sorted({*SUITES, *GENERATIONS}),
        help="default: quick, or with --op or --variant those at B = 1 and 8",
    )
    several("--op", "operations", choices=OPS)
    several("--variant", "variants", choices=list(dict.fromkeys(v for op in OPS.values() for v in op)))
    several("--batch", "rows", type=at_least(1), metavar="B")
    several("--vocab", f"vocabulary, {MIN_VOCAB} and more", type=at_least(MIN_VOCAB), metavar="V")
    several("--models", "models", type=int, choices=inputs.WEIGHTS)
    several("--dtype", "of the logits", choices=shapes.DTYPES)
    several("--logits", "their kind", choices=inputs.KINDS)
    several("--draft-tokens", "of verify and generate", type=at_least(1), metavar="K")
    several("--threads", "pinned CPU threads", type=at_least(1), metavar="N")
    p.add_argument("--device", choices=shapes.DEVICES, help="instead of the suite's")
    p.add_argument(
        "--against",
        action="extend",
        nargs="*",
        choices=[b.name for b in BASELINES],
        metavar="NAME",
        help=f"of {', '.join(b.name for b in BASELINES)} (default: the suite's choice)",
    )
    p.add_argument("--rounds", type=at_least(1), metavar="N", help="instead of the suite's")
    p.add_argument("--seconds", type=at_least(0), metavar="N", help="begin no shape after N seconds (default: all)")
    p.add_argument("--json", metavar="FILE", help="save the rows; refused where the sources are not the commit's")
    p.add_argument("--list", action="store_true", help="print the shapes and measure nothing")


def select(args) -> list[Shape]:
    """The shapes that the options of `run` ask for."""
    if args.suite is None and (args.op or args.variant):
        found = shapes.variants((1, 8), against=shapes.PEERS)
    else:
        found = SUITES[args.suite or "quick"]()
    found = shapes.select(
        found,
        args.op,
        args.variant,
        args.device,
        args.threads,
        args.rounds,
        batch=args.batch,
        vocab=args.vocab,
        models=args.models,
        dtype=args.dtype,
        logits=args.logits,
        draft_tokens=args.draft_tokens,
    )
    if not found:
        raise Refused("no shape is all of that; python -m benchmarks list says what there is")
    return found


def generations(args) -> dict | None:
    """What `generate.measure` is asked for; None where the suite has no generations, or an option picks its shapes."""
    names = ("op", "variant", "vocab", "models", "dtype", "logits", "against")
    given, own = [f"--{name}" for name in names if getattr(args, name) is not None], args.suite == "generate"
    if own and given:
        raise Refused(f"--suite generate: there is no choice of {', '.join(given)}")
    if args.suite not in GENERATIONS or given or not own and (args.batch or args.draft_tokens or args.device):
        return None
    drafts, rounds = GENERATIONS[args.suite]
    gpu = [None] if torch.cuda.is_available() else []
    threads = dict(cpu=[1], generate=gpu or [1], all=[1, *gpu])[args.suite]
    if args.device:
        threads = [1] if args.device == "cpu" else [None]
    return dict(
        threads=args.threads or threads,
        batches=args.batch or [1, 8],
        drafts=args.draft_tokens or drafts,
        rounds=args.rounds or rounds,
    )


def show(rows: list[dict]) -> None:
    found = newest(rows)
    if whole := {s: group for s, group in found.items() if s.op == "generate"}:
        print("\ngenerate: " + "\n".join(report.generate_table(whole)))
    for op, variant in dict.fromkeys((s.op, s.variant) for s in found if s not in whole):
        part = {s: group for s, group in found.items() if (s.op, s.variant) == (op, variant)}
        print(f"\n{op}, {variant}: " + "\n".join(report.op_table(part)))
    for line in dict.fromkeys(f"{r['implementation']}: {r['status']}: {r['why']}" for r in rows if r["why"]):
        print(line)


def measure(args, command: str) -> int:
    whole = generations(args)
    wanted = [] if args.suite == "generate" else select(args)
    if args.list:
        print("\n".join([s.label() for s in wanted] + [f"generate {whole}"] * bool(whole)))
        return 0
    cuda = any(s.device == "cuda" for s in wanted) or whole and None in whole["threads"]
    if cuda and not torch.cuda.is_available():
        raise Refused("no CUDA device is here; --suite cpu or quick measures the CPU")
    if args.json:
        provenance.refuse_dirty()
        check_writable(args.json, "--json")
        Path(args.json).unlink(missing_ok=True)

    def keep(new):  # at once: what stops a long run loses no row that was measured
        if args.json:
            run.write_rows(new, args.json, "a")

    rows = (
        run.run(wanted, args.against, command, run.on_stderr, keep, args.seconds, provenance.of_a_row())
        if wanted
        else []
    )
    if whole:
        run_id = dict(run=rows[0]["run"]) if rows else {}
        written = [row | run_id for row in generate.measure(**whole, tell=run.on_stderr, command=command)]
        keep(written)
        rows += written
    show(rows)
    if not args.json:
        print("not saved (--json FILE saves the rows)")
    return 0


def catalogue() -> str:
    lines = (
        ["suites:"]
        + [
            f"  {name:16} {len(suite())} shapes" + (", whole generations" if name in GENERATIONS else "")
            for name, suite in SUITES.items()
        ]
        + ["  generate         whole generations"]
    )
    lines += ["operations:"] + [f"  {op:16} {', '.join(variants)}" for op, variants in OPS.items()]
    lines += ["implementations:"]
    for b in [*OURS, *BASELINES]:
        why = b.absent()
        lines += [f"  {b.name:16} {b.summary} ({', '.join(b.devices)})" + (f"; absent: {why}" if why else "")]
    return "\n".join(lines)


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks") -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        own = dict(report=report, compare=compare, pairs=pairs, vllm=vllm_speed)
        if argv and argv[0] in own:
            return own[argv[0]].main(argv[1:])
        args = parser(prog).parse_args(argv)
        if args.command == "list":
            print(catalogue())
            return 0
        if args.command == "add":
            print(provenance.add(args.file))
            return 0
        return measure(args, " ".join([prog, *argv]))
    except run.WrongTokens as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except (Refused, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
