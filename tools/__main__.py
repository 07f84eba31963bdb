"""python -m tools {sass, aot, tune, launch_config, sanitize, hub, coupled, trees}

Exit codes: 0 nothing found, 1 findings or wrong tokens, 2 bad input or something that is not here, 130 interrupted.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

from eft_kernels.bench.run import WrongTokens
from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused

COMMANDS = {
    "sass": "what the CUDA kernels compile to",
    "aot": "what the Triton kernels compile to",
    "tune": "the best launch configurations of the Triton kernels, on a GPU",
    "launch_config": "the best launch configurations of the CUDA kernels, on a GPU",
    "sanitize": "small cases through every backend, for compute-sanitizer",
    "hub": "a folder that Hugging Face's `kernels` loads",
    "coupled": "in which precision coupled speculation gives plain decoding's texts",
    "trees": "how many tokens a round trees of drafts gain",
}


def parser() -> Parser:
    root = Parser(prog="python -m tools", description="Tools of those who change the kernels.")
    commands = root.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return root


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m tools"
    try:
        if not argv or argv[0] not in COMMANDS:
            parser().parse_args(argv)  # prints the help, or says what is wrong
        prog = f"{prog} {argv[0]}"
        return importlib.import_module(f"tools.{argv[0]}").main(argv[1:])
    except WrongTokens as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except (Refused, ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
