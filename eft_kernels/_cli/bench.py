"""`eft-kernels bench`: the measurement of eft_kernels/_bench.py as a table on the terminal."""

from __future__ import annotations

import sys

from .term import Refused, table


def run(args) -> int:
    import torch

    from eft_kernels import _bench

    if args.vocab < 1000:
        raise Refused(f"--vocab: got {args.vocab}, allowed is 1000 and more")
    command = " ".join(["eft-kernels", *sys.argv[1:]])
    try:
        threads = args.threads or [torch.get_num_threads()]
        rows = _bench.run(threads, args.batch or [1, 8, 64], args.vocab, args.rounds, command,
                          _bench.progress_on_stderr)
    except RuntimeError as error:
        print(f"eft-kernels bench: {error}", file=sys.stderr)
        return 1
    header, lines = _bench.cells(rows)
    print(table(header, lines))
    print("  " + _bench.about(rows))
    print("  floor: the same kernel without noise and filters; eager: log-softmax, combine, (sort-based top-p,)\n"
          "  multinomial; lean: combine, softmax, (sort,) cumsum, searchsorted")
    if args.json:
        try:
            _bench.write_json(rows, args.json)
        except OSError as error:
            raise Refused(f"--json {args.json}: cannot write it: {error.strerror}") from None
    return 0
