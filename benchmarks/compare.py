"""Two runs against each other: `python -m benchmarks compare A B [--check]`; files or folders of JSON lines.

Exit codes: 0; 1 with --check when a row of ours is slower; 2 when nothing is in common, or a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys

from eft_kernels.bench.compare import cells, compare, slower, summary
from eft_kernels.bench.rows import read


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("before", metavar="A")
    p.add_argument("after", metavar="B")
    p.add_argument("--check", action="store_true", help="exit code 1 when a row of ours is slower beyond the noise")
    args = p.parse_args(argv)
    try:
        lines = compare(read(args.before), read(args.after))
        if not lines:
            raise ValueError(f"{args.before} and {args.after} have no measurement in common")
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks compare: {error}", file=sys.stderr)
        return 2
    header, rows = cells(lines)
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for r in [header, *rows]:
        print("  ".join(c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))).rstrip())
    print(summary(lines))
    return int(args.check and bool(slower(lines)))
