"""`eft.sample` on this CPU beside PyTorch, as a Markdown table; eft_kernels/_bench.py says what is timed and how.

    python benchmarks/sample_cpu.py --threads 1 --threads 2 --json rows.jsonl
"""
import argparse
import sys

from eft_kernels import _bench


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", help="CPU threads; repeat it (default: 1)")
    parser.add_argument("--batch", type=int, action="append", help="rows; repeat it (default: 1, 8, 64)")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", metavar="FILE",
                        help="one JSON object a line: median, p20, p80, versions, commit, command")
    args = parser.parse_args()
    command = " ".join(["python", "benchmarks/sample_cpu.py", *sys.argv[1:]])
    rows = _bench.run(args.threads or [1], args.batch or [1, 8, 64], args.vocab, args.rounds, command,
                      _bench.progress_on_stderr)
    print(_bench.markdown(rows))
    if args.json:
        _bench.write_json(rows, args.json)


if __name__ == "__main__":
    main()
