"""Writes what follows from the table of eft_kernels/parameters.py and is text: run it after a change there.

    python tools/parameters.py            # write
    python tools/parameters.py --check    # exit code 1, and the files, where one is not current

csrc/semantics/parameters.h is written whole. In other files, the lines between ``parameters: KIND`` and
``parameters: end`` are, where KIND is a key of `BLOCKS`, and a docstring's lines about every parameter.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# without the package around it, which needs torch, and what this writes
spec = importlib.util.spec_from_file_location("parameters", ROOT / "eft_kernels/parameters.py")
parameters = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parameters)
PARAMETERS, DRAFTED = parameters.PARAMETERS, parameters.DRAFTED

WIDTH = 120  # of a line
HEADER = ROOT / "csrc/semantics/parameters.h"
FILES = [
    ROOT / name
    for name in (
        "eft_kernels/parameters.py",
        "eft_kernels/ops.py",
        "eft_kernels/reference/rows.py",
        "eft_kernels/integrations/hf/generate.py",
        "docs/semantics.md",
    )
]


def spread(before: str, items: list[str], after: str) -> str:
    """``before`` item, item ``after`` on a line, or an item a line where it is too long."""
    line = before + ", ".join(items) + after
    return line if len(line) <= WIDTH else before + "".join(f"\n    {x}," for x in items) + "\n" + after


# --- Python --------------------------------------------------------------------------------------------------------


def fields(rows, optional: bool) -> str:
    kind = " | None = None" if optional else ""
    return "\n".join(f"{p.name}: {p.type.__name__} | torch.Tensor{kind}" for p in rows)


def arguments(rows, prefix: str = "", default=None) -> str:
    return "\n".join(f"{prefix}{p.name}: PerRow = {(default or (lambda p: repr(p.off)))(p)}," for p in rows)


def own_default(p) -> str:
    """hf.generate: None is what transformers' generation config says."""
    return "None" if p.warper else repr(p.off)


def named(rows) -> str:
    return spread("sampling = dict(", [f"{p.name}={p.name}" for p in rows], ")")


def values(rows, to: str, prefix: str = "") -> str:
    return spread(f"{to} = (", [prefix + p.name for p in rows], ")")


def table() -> str:
    rows = ["| parameter | meaning | off | range |", "|---|---|--:|---|"]
    rows += [f"| `{p.name}` | {p.doc} | {p.off:g} | {p.allowed} |" for p in PARAMETERS]
    return "\n".join(rows)


def declared(rows) -> str:
    return "\n".join(f"{p.name}: torch.Tensor" for p in rows)


BLOCKS = {
    "declared": lambda: declared(PARAMETERS),
    "fields": lambda: fields(PARAMETERS, False),
    "draft fields": lambda: fields(DRAFTED, True),
    "arguments": lambda: arguments(PARAMETERS),
    "values": lambda: values(PARAMETERS, "sampling"),
    "arguments of draft": lambda: arguments(DRAFTED),
    "values of draft": lambda: values(DRAFTED, "sampling"),
    "arguments draft_": lambda: arguments(DRAFTED, "draft_", lambda p: "None"),
    "values draft_": lambda: values(DRAFTED, "drawn_by", "draft_"),
    "arguments of hf": lambda: arguments(PARAMETERS, "", own_default),
    "dict": lambda: named(PARAMETERS),
    "table": table,
}
BLOCK = re.compile(
    r"^( *)((?:#|<!--) parameters: (.+?)(?: -->)?)\n(?:.*\n)*?( *(?:#|<!--) parameters: end.*\n)", re.MULTILINE
)


# in a docstring: the lines under one that ends so
DOCSTRING = re.compile(r"^( *)(.*others in this order:)\n(?:\1  .*\n)*(\1  Filters .*\n)", re.MULTILINE)


def described(indent: str) -> str:
    """A docstring's lines about every parameter."""
    wrap = dict(width=WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
    return "".join(textwrap.fill(f"{p.name}: {p.doc}.", **wrap) + "\n" for p in PARAMETERS)


def written(text: str) -> str:
    """``text`` with its blocks anew."""

    def block(m: re.Match) -> str:
        lines = BLOCKS[m[3]]().split("\n")
        return f"{m[1]}{m[2]}\n" + "".join(m[1] + line + "\n" for line in lines) + m[4]

    text = BLOCK.sub(block, text)
    return DOCSTRING.sub(lambda m: f"{m[1]}{m[2]}\n{described(m[1] + '  ')}{m[3]}", text)


# --- C++ -----------------------------------------------------------------------------------------------------------

METHOD_NAMES = dict(coupled="kCoupled", token="kTokenwise", block="kBlock")  # kToken is a kind of noise


def literal(x, kind: type) -> str:
    if kind is int:
        return {parameters.INT64[0]: "INT64_MIN", parameters.INT64[1]: "INT64_MAX"}.get(x, str(x))
    text = repr(float(x))
    return (text if len(text) < 10 else re.sub(r"\.?0*p", "p", float(x).hex())) + "f"


def rows_of(name: str, rows) -> str:
    ends = [
        f"  X({'int64_t' if p.type is int else 'float'}, {p.name}, "
        f"{', '.join(literal(x, p.type) for x in (p.off, p.low, p.high))})"
        for p in rows
    ]
    return f"#define {name}(X) \\\n" + " \\\n".join(ends) + "\n"


def enum(name: str, kind: str, codes: dict) -> str:
    return f"enum {name}{kind} {{ {', '.join(f'{k} = {v}' for k, v in codes.items())} }};\n"


def header() -> str:
    constants = dict(
        kMaxModels=("int", parameters.MAX_MODELS),
        kMaxVocab=("int64_t", parameters.MAX_VOCAB),
        kMaxSlot=("int64_t", parameters.MAX_SLOT),
        kMaxRunnersUp=("int", parameters.MAX_RUNNERS_UP),
        kMassBits=("int", parameters.MASS_BITS),
        kTiny=("float", parameters.TINY),
        kGreedy=("float", parameters.GREEDY),
        kMasked=("float", parameters.MASKED),
        kLarge=("float", parameters.LARGE),
    )
    of = {stage: [p for p in PARAMETERS if p.stage == stage] for stage in ("filter", "combine")}
    return (
        "// Written by tools/parameters.py from eft_kernels/parameters.py, which says what these are.\n"
        "// clang-format off\n#pragma once\n#include <cstdint>\n\n"
        "// X(type, name, off, low, high) of every sampling parameter, in the order of the operators' arguments\n"
        + rows_of("EFT_PARAMETERS", PARAMETERS)
        + "// of those that leave tokens out\n"
        + rows_of("EFT_FILTERS", of["filter"])
        + "// of those that drafts have, too\n"
        + rows_of("EFT_DRAFTED", DRAFTED)
        + "// and of those that they have not\n"
        + rows_of("EFT_COMBINING", of["combine"])
        + "\nnamespace eft {\n\n"
        + "".join(
            f"constexpr {kind} {name} = {literal(x, float if kind == 'float' else int)};\n"
            for name, (kind, x) in constants.items()
        )
        + "\n"
        + enum("Method", "", {METHOD_NAMES[m]: code for m, code in parameters.METHOD_CODES.items()})
        + enum("Stream", " : uint32_t", {f"k{s.title()}": code for s, code in parameters.STREAM_CODES.items()})
        + "\n}  // namespace eft\n"
    )


def current() -> dict[Path, str]:
    """What every file should hold."""
    return {HEADER: header()} | {path: written(path.read_text(encoding="utf-8")) for path in FILES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [path for path, text in current().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not current' if check else 'written'}")
        if not check:
            path.write_text(current()[path], encoding="utf-8")
    return bool(stale) and check


if __name__ == "__main__":
    sys.exit(main())
