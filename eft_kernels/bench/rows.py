"""Rows of measurements: read from JSON lines, grouped by shape, and as the cells of a table.

`STYLE` gives an implementation its name and colour in every table and plot: a new baseline is a row there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .shapes import OURS, Row, Shape

OUR_NAMES = tuple(b.name for b in OURS)
STYLE = {  # implementation: name, colour (Okabe and Ito's, and two of Tol's: colour-blind-safe)
    "eft": ("eft-kernels", "#0072B2"),
    "eft_triton": ("eft-kernels, Triton", "#003F5C"),
    "combine_max": ("combine + max", "#56B4E9"),
    "eager": ("eager PyTorch", "#D55E00"),
    "compiled": ("torch.compile", "#E69F00"),
    "lean": ("lean PyTorch", "#009E73"),
    "flashinfer": ("flashinfer", "#CC79A7"),
    "vllm": ("vLLM", "#882255"),
    "sglang": ("SGLang", "#999933"),
    "assisted": ("HF assisted", "#D55E00"),
    "stateless": ("HF processor", "#009E73"),
}


Group = dict[str, Row]  # implementation: its row
# a shape's fields in the order of tables
ORDER = (
    "op",
    "variant",
    "device_name",
    "launch",
    "threads",
    "models",
    "dtype",
    "logits",
    "draft_tokens",
    "vocab",
    "batch",
)


def shape_of(row: Row) -> Shape:
    """A row calls the device's name ``device``, and "cpu" or "cuda" ``device_kind``."""
    fields = {name: row[name] for name in ORDER if name != "device_name"}
    return Shape(**fields, device_name=row["device"], device=row["device_kind"])


def read(path: str | Path) -> list[Row]:
    """The rows of a file of JSON lines, or of all those in a folder; ValueError says what is no row, and where."""
    path = Path(path)
    rows: list[Row] = []
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        try:
            text = file.read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8 text") from None
        for number, line in enumerate(text.split("\n") if text else (), 1):
            try:
                row = json.loads(line)
                if row["schema"] != 1 or row["status"] not in ("measured", "absent", "disagrees"):
                    raise ValueError(f"schema {row['schema']}, status {row['status']}")
                shape_of(row), row["implementation"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a row of schema 1 ({type(error).__name__}: {error})") from None
            rows.append(row)
    return rows


def newest(rows: list[Row]) -> dict[Shape, Group]:
    """Shape -> what the newest run that timed our implementation there says of every implementation."""
    runs: dict[Shape, dict[str, Group]] = {}
    for row in sorted(rows, key=lambda r: r["date"]):  # stable: among equal dates the later line counts
        runs.setdefault(shape_of(row), {}).setdefault(row["run"], {})[row["implementation"]] = row

    def best(groups: list[Group]) -> Group:
        return next((g for g in reversed(groups) if timed(g, "eft")), groups[-1])

    def key(s: Shape) -> list[tuple[bool, Any]]:
        return [(v is not None, v) for v in (getattr(s, name) for name in ORDER)]

    return {s: best(list(runs[s].values())) for s in sorted(runs, key=key)}


def timed(group: Group, name: str) -> Row | None:
    row = group.get(name)
    return row if row and row["status"] == "measured" else None


def ratio(group: Group, name: str) -> float | None:
    """How many times our time ``name`` takes."""
    ours, other = timed(group, "eft"), timed(group, name)
    return float(other["median_us"] / ours["median_us"]) if ours and other else None


def us(t: float | None) -> str:
    if t is None:
        return "-"
    units = (("µs", 1.0), ("ms", 1e3))
    unit, each = next((u for u in units if float(f"{t / u[1]:.3g}") < 1000), ("s", 1e6))
    return f"{t / each:.3g} {unit}" if t / each < 999.5 else f"{t / each:.0f} {unit}"


def times(x: float) -> str:
    return f"{x:.2f}x" if x < 1.995 else f"{x:.1f}x" if x < 9.95 else f"{x:.0f}x"


def size(n: int | None) -> str:
    if n is None:
        return "-"
    unit, each = next((u for u in (("B", 1), ("KiB", 2**10)) if n < 1024 * u[1]), ("MiB", 2**20))
    return f"{n / each:.3g} {unit}" if n < 999.5 * each else f"{n / each:.0f} {unit}"


def name_of(implementation: str) -> str:
    return STYLE.get(implementation, (implementation,))[0]


def percent(x: float) -> str:
    return f"{x:.0%}"


def over_combine_max(group: Group) -> float | None:
    r = ratio(group, "combine_max")
    return r and 1 / r


# --- tables --------------------------------------------------------------------------------------------------------


def dense(header: list[str], lines: list[list[object]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which every cell is "-"."""
    keep = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    return [header[i] for i in keep], [[str(line[i]) for i in keep] for line in lines]


WORDS = dict(
    op="{}",
    variant="{}",
    launch="launch {}",
    threads="threads {}",
    models="J = {}",
    dtype="{}",
    logits="{} logits",
    draft_tokens="K = {}",
    vocab="V = {}",
)
HEADS = dict(models="J", draft_tokens="K", vocab="V", batch="B")


def hoist(shapes: list[Shape], skip: tuple[str, ...]) -> tuple[str, list[str]]:
    """What all shapes share, in words, and the fields that need a column."""
    columns: list[str] = []
    shared: list[str] = []
    for field in (f for f in WORDS if f not in skip):
        values = {getattr(s, field) for s in shapes}
        if len(values) > 1:
            columns.append(field)
        elif (value := values.pop()) is not None and not (field == "launch" and shapes[0].threads):
            shared.append(WORDS[field].format(value))
    return ", ".join(shared), [*columns, "batch"]


def cells(shapes: dict[Shape, Group], skip: tuple[str, ...] = ()) -> tuple[str, list[str], list[list[str]]]:
    """Our times beside every other implementation's: what all shapes share, header, lines."""
    others = [
        n
        for n in dict.fromkeys([*STYLE, *(n for g in shapes.values() for n in g)])
        if n not in OUR_NAMES and any(timed(g, n) for g in shapes.values())
    ]
    shared, columns = hoist(list(shapes), skip)
    lines = []
    for s, g in shapes.items():
        own = timed(g, "eft") or {}
        over = over_combine_max(g)

        def cell(name: str, g: Group = g) -> str:
            row = g.get(name)
            if not row or row["status"] != "measured":
                return str(row["status"]) if row else "-"
            r = ratio(g, name)
            return us(row["median_us"]) + (f" ({times(r)})" if r else "")

        share = own.get("fraction")
        lines.append(
            [
                *("-" if (v := getattr(s, c)) is None else v for c in columns),
                us(own.get("median_us")),
                f"{us(own['p20_us'])}..{us(own['p80_us'])}" if own else "-",
                us(own.get("floor_us")),
                "-" if share is None else percent(share),
                "-" if over is None else f"{over:.2f}",
                *map(cell, others),
                own.get("launches") or "-",
                size(own.get("peak_memory")),
            ]
        )
    header = [
        *(HEADS.get(c, c) for c in columns),
        "ours",
        "p20..p80",
        "floor",
        "of floor",
        "/ combine + max",
        *map(name_of, others),
        "launches",
        "peak memory",
    ]
    return shared, *dense(header, lines)


def untimed(shapes: dict[Shape, Group]) -> list[str]:
    """Each implementation that was absent or disagreed: where, and why."""
    missing: dict[tuple[str, str, str], list[str]] = {}
    for s, g in shapes.items():
        for name, row in g.items():
            if row["status"] != "measured":
                missing.setdefault((name_of(name), row["status"], row["why"]), []).append(f"{s.op} {s.variant}")
    return [
        f"{name}, {status} ({', '.join(dict.fromkeys(where))}): {why}"
        for (name, status, why), where in sorted(missing.items(), key=str)
    ]
