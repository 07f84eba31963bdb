"""What the commands print with: colour on terminals only, tables, columns side by side, a progress bar on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

BOLD, DIM, GREEN, YELLOW, CYAN = "1", "2", "32", "33", "36"


class Refused(Exception):
    """Input that cannot be used: one line on stderr and exit code 2."""

    def __init__(self, message: str, prog: str | None = None):
        super().__init__(" ".join(message.split()))
        self.prog = prog


def ready_streams() -> None:
    """Output that no encoding, closed stream or unfinished line can lose: what cannot be encoded is escaped."""
    if sys.stdout is None:
        raise Refused("standard output is closed")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a stream that replaces it may lack it
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Nothing more is written, at the interpreter's end neither."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def json_line(value: object) -> str:
    """JSON on one line, in characters that standard output has."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(value)
    return line


def paint(text: str, *codes: str, stream: TextIO | None = None) -> str:
    stream = stream or sys.stdout
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m"


def width(limit: int = 120) -> int:
    return max(40, min(limit, shutil.get_terminal_size((100, 24)).columns))


def heading(text: str) -> None:
    print(f"\n{paint(text, BOLD)}", flush=True)


def table(header: list[str], rows: list[list[str]], best: int | None = None, stream: TextIO | None = None) -> str:
    """First column left, the others right aligned; row number ``best`` in green."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths))).rstrip()

    return "\n".join(
        [paint(line(header), DIM, stream=stream)]
        + [paint(line(r), GREEN, stream=stream) if i == best else line(r) for i, r in enumerate(rows)]
    )


def beside(titles: list[str], texts: list[str], total: int | None = None) -> str:
    """Texts in columns side by side, or below each other where the terminal is narrow."""
    total = total or width()
    each = (total - 2 - 3 * (len(texts) - 1)) // len(texts)
    if each < 18:
        return "\n".join(
            f"  {paint(t, BOLD)}\n{textwrap.indent(textwrap.fill(x, total - 4), '    ')}" for t, x in zip(titles, texts)
        )
    columns = [[line for part in x.splitlines() for line in textwrap.wrap(part, each) or [""]] for x in texts]
    out = ["  " + paint(" │ ", DIM).join(paint(t[:each].ljust(each), BOLD) for t in titles)]
    for i in range(max(map(len, columns))):
        out.append("  " + paint(" │ ", DIM).join((c[i] if i < len(c) else "").ljust(each) for c in columns).rstrip())
    return "\n".join(out)


class Progress:
    """`with Progress("scoring", 12) as p: p.step()`: a bar on stderr, gone at the end; silent off a terminal."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self.on = label, max(1, total), 0, sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def step(self, label: str | None = None) -> None:
        self.at(self.done + 1, label)

    def at(self, done: int, label: str | None = None) -> None:
        self.done, self.label = done, label or self.label
        self._show()

    def _show(self) -> None:
        if self.on:
            full = min(24, 24 * self.done // self.total)
            print(
                f"\r\x1b[K  [{'#' * full}{'.' * (24 - full)}] {self.label}"[: width() + 4],
                end="",
                file=sys.stderr,
                flush=True,
            )
