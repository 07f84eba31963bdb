"""`eft-kernels demo | generate | score | compose | bench | doctor`.

Exit codes: 0 it worked, 1 a row or a check failed or the output cannot be written, 2 bad input (one line on stderr),
130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Callable
from typing import Any

from ..parameters import DRAFTED, METHODS
from . import compose
from .options import REQUEST_OPTIONS, Parser, add_combination, add_models, add_parameters, count, drafts, positive
from .term import Refused, drop_output, ready_streams


def parser() -> Parser:
    root = Parser(
        prog="eft-kernels",
        description="Decode from a large model as if it had been fine-tuned, using two "
        "small ones (emulated fine-tuning, arXiv 2310.12962).",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def command(name: str, summary: str, description: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=description or summary)
        sub.set_defaults(module=name)
        return sub

    p = command(
        "generate",
        "text from prompts",
        "Text as if the base model had been fine-tuned. Prompts come from --prompt, --batch-file or standard "
        "input; a single one is streamed to the terminal.",
    )
    add_models(p, required=False)
    group = p.add_argument_group("models in llama.cpp, instead of these")
    group.add_argument(
        "--gguf", nargs="+", action="once", metavar="FILE", help="GGUF files: base, tuned (one or two), ref"
    )
    group.add_argument("--context", type=positive, metavar="N", help="tokens of a text (default: up to 4096)")
    group.add_argument("--gpu-layers", type=count, metavar="N", help="layers on a GPU (default: llama.cpp's)")
    group = p.add_argument_group("prompts and output")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt (repeat it for several)")
    group.add_argument(
        "--batch-file",
        action="append",
        metavar="FILE",
        help='a prompt a line, or JSON lines: {"prompt": ..., and options of its own: '
        f"{', '.join(REQUEST_OPTIONS)}}} (UTF-8; repeat it for several files)",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="put prompts into the chat template, whose end-of-turn token then ends a text",
    )
    group.add_argument(
        "--eos",
        action="append",
        default=[],
        metavar="ID|TOKEN",
        help="another token that ends a text, beside those of the models and the tokenizer (repeat it for several)",
    )
    group.add_argument("--batch-size", type=positive, metavar="N", help="prompts at a time (default 8)")
    group.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default 64")
    group.add_argument("--stream", action="store_true", help="print as it is written, off a terminal too")
    group.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a prompt: text, token_ids, seed; with speculation what was accepted",
    )
    group = p.add_argument_group("sampling")
    add_parameters(group, DRAFTED)
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    group.add_argument(
        "--seed",
        type=REQUEST_OPTIONS["seed"],
        metavar="N",
        help="same seed, same text (default: drawn; --json tells it)",
    )
    add_combination(p)
    group = p.add_argument_group("speculation (the tuned model drafts)")
    group.add_argument(
        "--draft-tokens",
        type=drafts,
        default=0,
        metavar="K|auto",
        help="drafts after each other in a round (default 0: off); auto: as many, in such a tree, as most tokens a "
        "second are expected of",
    )
    group.add_argument(
        "--draft-width", type=positive, metavar="N", help="children a node of a tree of drafts (default 1: a chain)"
    )
    group.add_argument("--draft-budget", type=positive, metavar="N", help="the most drafts a round of such a tree")
    group.add_argument(
        "--verify",
        choices=METHODS,
        help="coupled (default): the tokens of plain decoding, exactly so in float32; token, block: its distribution",
    )
    group.add_argument(
        "--stats",
        action="store_true",
        help="then print on standard error what was accepted, the seconds in each model, and the speed over plain "
        "decoding",
    )

    p = command("score", "perplexity of a text under base, tuned, ref and the emulated model")
    add_models(p)
    p.add_argument(
        "--text",
        required=True,
        action="append",
        metavar="FILE",
        help="the text (UTF-8; repeat it for several, each with a table of its own)",
    )
    p.add_argument(
        "--truth",
        action="once",
        metavar="MODEL",
        help="the base model after real fine-tuning: also report how much of the gap is recovered",
    )
    p.add_argument("--context", type=positive, metavar="N", help="tokens a window (default: up to 1024)")
    p.add_argument("--stride", type=positive, metavar="N", help="tokens counted a window (default: half the context)")
    p.add_argument("--json", action="store_true")
    add_combination(p)

    compose.add_command(command)
    p = command(
        "demo",
        "the example family: how much is recovered, how fast, what the models write",
        "How much of real fine-tuning the emulation recovers on the small example family, how fast a sampling "
        "step is here, what base, tuned, emulated and really fine-tuned models write, what speculation brings.",
    )
    p.add_argument(
        "--family",
        action="once",
        metavar="DIR",
        help="folder with ref, tuned-a, tuned-b, base, large-a, large-b "
        "(default: examples/family/weights of the checkout)",
    )
    p.add_argument(
        "--heldout",
        action="once",
        metavar="DIR",
        help="folder with a.txt and b.txt (default: heldout beside the family's folder)",
    )
    p.add_argument("--seed", type=REQUEST_OPTIONS["seed"], default=1, metavar="N", help="default 1")
    p.add_argument(
        "--heldout-tokens", type=positive, default=4096, metavar="N", help="held-out tokens a style (default 4096)"
    )
    p.add_argument("--new-tokens", type=positive, default=48, metavar="N", help="tokens a text (default 48)")
    p.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="default 1: more do not help models this small"
    )

    p = command(
        "bench",
        "time of our operations here, beside PyTorch and others",
        "Times our operations beside other implementations, interleaved, and only after the tokens are right: "
        "sampling without filters, with top-p and with log-probs, or what is given instead. An unknown name "
        "lists what there is.",
    )
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    choices: list[tuple[str, Callable[[str], Any], str, str]] = [
        ("op", str, "NAME", "operation"),
        ("batch", positive, "B", "rows"),
        ("vocab", positive, "V", "vocabulary"),
        ("threads", positive, "N", "CPU threads"),
        ("against", str, "NAME", "implementation to measure beside ours"),
    ]
    for name, kind, metavar, text in choices:
        p.add_argument(f"--{name}", type=kind, action="append", metavar=metavar, help=f"{text} (repeat it for several)")
    p.add_argument("--rounds", type=positive, metavar="N", help="timed rounds")
    p.add_argument("--json", action="once", metavar="FILE", help="write the rows there, one JSON object a line")
    group = p.add_argument_group("one run against another (files or folders of such rows)")
    group.add_argument("--compare", nargs=2, metavar=("A", "B"), help="ratios B / A, and whether they are noise")
    group.add_argument(
        "--check",
        nargs="+",
        metavar=("A", "B"),
        help="the same, and exit code 1 when ours is slower in B (without B: A's shapes are measured now)",
    )

    p = command("doctor", "versions, the available backends, and why the others are unavailable")
    p.add_argument("--json", action="store_true")
    return root


def main(argv: list[str] | None = None) -> int:
    name = "eft-kernels"
    try:
        ready_streams()
        args = parser().parse_args(argv)
        name = f"eft-kernels {args.command}"
        code: int = importlib.import_module(f".{args.module}", __name__).run(args)
        sys.stdout.flush()
        return code
    except Refused as error:
        print(f"{error.prog or name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `eft-kernels ... | head`: nobody reads on
        drop_output()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            print(f"{name}: error: {error}", file=sys.stderr)
            return 1
        drop_output()  # a full disk
        print(f"{name}: error: cannot write the output: {error.strerror or error}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
