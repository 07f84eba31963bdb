"""Rows -> README.md and PNG plots in each folder of results. Never measures and never imports torch.

    python -m benchmarks report                                # every folder of benchmarks/results
    python -m benchmarks report benchmarks/results/nvidia-h200

A line of a table holds what one run measured side by side; where several runs measured a shape, the newest counts.
The same rows give the same bytes. `GOALS` are the aims of the project, each computed from the rows; `STYLE` gives an
implementation its name and colour in every table and plot: a new baseline is a row there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
OURS = ("eft", "eft_triton", "combine_max")
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


class Shape(NamedTuple):
    """What identifies a measurement, but for the implementation."""
    op: str
    variant: str
    device: str
    launch: str | None
    threads: int | None
    models: int | None
    dtype: str | None
    logits: str | None
    draft_tokens: int | None
    vocab: int | None
    batch: int | None


Group = dict[str, dict]  # implementation: its row


def read(path: str | Path) -> list[dict]:
    """The rows of a file of JSON lines, or of all those in a folder; ValueError says what is no row, and where."""
    path, rows = Path(path), []
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
                Shape(*(row[name] for name in Shape._fields)), row["implementation"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a row of schema 1 ({type(error).__name__}: {error})") from None
            rows.append(row)
    return rows


def shape(row: dict) -> Shape:
    return Shape(*(row[name] for name in Shape._fields))


def newest(rows: list[dict]) -> dict[Shape, Group]:
    """Shape -> what the newest run that timed our implementation there says of every implementation."""
    runs: dict[Shape, dict[str, Group]] = {}
    for row in sorted(rows, key=lambda r: r["date"]):  # stable: among equal dates the later line counts
        runs.setdefault(shape(row), {}).setdefault(row["run"], {})[row["implementation"]] = row

    def best(groups: list[Group]) -> Group:
        return next((g for g in reversed(groups) if timed(g, "eft")), groups[-1])

    key = {s: tuple((v is not None, v) for v in s) for s in runs}
    return {s: best(list(runs[s].values())) for s in sorted(runs, key=key.get)}


def timed(group: Group, name: str) -> dict | None:
    row = group.get(name)
    return row if row and row["status"] == "measured" else None


def ratio(group: Group, name: str) -> float | None:
    """How many times our time ``name`` takes."""
    ours, other = timed(group, "eft"), timed(group, name)
    return other["median_us"] / ours["median_us"] if ours and other else None


def us(t: float | None) -> str:
    if t is None:
        return "-"
    for unit, size in (("µs", 1.0), ("ms", 1e3), ("s", 1e6)):
        if float(f"{t / size:.3g}") < 1000 or unit == "s":
            return f"{t / size:.3g} {unit}" if t / size < 999.5 else f"{t / size:.0f} {unit}"


def times(x: float) -> str:
    return f"{x:.2f}x" if x < 1.995 else f"{x:.1f}x" if x < 9.95 else f"{x:.0f}x"


def size(n: int | None) -> str:
    if n is None:
        return "-"
    for unit, each in (("B", 1), ("KiB", 2**10), ("MiB", 2**20)):
        if n < 1024 * each or unit == "MiB":
            return f"{n / each:.3g} {unit}" if n < 999.5 * each else f"{n / each:.0f} {unit}"


def name_of(implementation: str) -> str:
    return STYLE.get(implementation, (implementation,))[0]


# --- goals ---------------------------------------------------------------------------------------------------------

CENTRE = dict(vocab=128256, models=3, dtype="bfloat16", logits="peaked")


def best_peer(group: Group) -> float | None:
    """The fastest other sampler beside ours; eager PyTorch has goals of its own."""
    found = [ratio(group, n) for n in group if n not in (*OURS, "eager")]
    return min((r for r in found if r is not None), default=None)


def of_read(group: Group) -> float | None:
    row = timed(group, "eft")
    return row and row["fraction"]


def of_copy(group: Group) -> float | None:
    row = timed(group, "eft")
    return row["bytes"] / row["median_us"] / 1e3 / row["copy_gbs"] if row and row["copy_gbs"] else None


def microseconds(group: Group) -> float | None:
    row = timed(group, "eft")
    return row and row["median_us"]


def against(name: str):
    return lambda group: ratio(group, name)


def over_combine_max(group: Group) -> float | None:
    r = ratio(group, "combine_max")
    return r and 1 / r


class Goal(NamedTuple):
    """``measure`` of the shapes that ``where`` picks, the worst of them, must be on the right side of ``bound``."""
    text: str
    kind: str
    variant: str
    where: dict
    measure: Callable[[Group], float | None]
    bound: float
    upper: bool = False
    form: Callable[[float], str] = times


def percent(x: float) -> str:
    return f"{x:.0%}"


ONE, GRAPH = dict(batch=1, threads=1), dict(launch="graph")
GOALS = [
    Goal("faster than eager PyTorch", "cpu", "plain", ONE, against("eager"), 100),
    Goal("faster than eager PyTorch", "cpu", "top_p", ONE, against("eager"), 150),
    Goal("faster than the leanest PyTorch", "cpu", "plain", ONE, against("lean"), 10),
    *(Goal("time over combine + max alone", "cpu", v, ONE, over_combine_max, 2, True) for v in ("plain", "top_p")),
    Goal("share of the read bandwidth", "cpu", "plain", ONE | dict(batch=64), of_read, 0.7, form=percent),
    *(Goal("faster than the best other sampler", "cuda", v, GRAPH | dict(batch=b), best_peer, x)
      for v in ("plain", "top_p") for b, x in ((1, 5), (64, 2.5), (256, 2))),
    Goal("share of the copy bandwidth", "cuda", "plain", GRAPH | dict(batch=256), of_copy, 0.9, form=percent),
    Goal("share of the copy bandwidth", "cuda", "top_p", GRAPH | dict(batch=256), of_copy, 0.75, form=percent),
    Goal("time of a call", "cuda", "plain", GRAPH | dict(batch=1), microseconds, 5, True, us),
    *(Goal("faster than eager PyTorch, every B", "cuda", v, dict(launch=how), against("eager"), x)
      for v, x in (("plain", 15), ("top_p", 30)) for how in ("graph", "eager")),
]


def speculation(shapes: dict[Shape, Group], name: str = "eft") -> dict[Shape, float]:
    """Our wall clock of plain decoding over that of ``name``, for everything but our own plain decoding."""
    keys = {s: s._replace(variant="", draft_tokens=None) for s in shapes if s.op == "generate"}
    plain = {keys[s]: r["median_us"] for s in keys if s.variant == "plain" and (r := timed(shapes[s], "eft"))}
    return {s: plain[k] / row["median_us"] for s, k in keys.items() if k in plain and (row := timed(shapes[s], name))
            and (name, s.variant) != ("eft", "plain")}


def goals(shapes: dict[Shape, Group], kind: str) -> list[list[str]]:
    lines = []
    for goal in (g for g in GOALS if g.kind == kind):
        wanted = {**CENTRE, **goal.where, "op": "sample", "variant": goal.variant}
        found = [goal.measure(g) for s, g in shapes.items() if wanted.items() <= s._asdict().items()]
        found = [x for x in found if x is not None]
        x = (max if goal.upper else min)(found) if found else None
        at = ", ".join(f"{dict(batch='B =').get(k, k)} {v}" for k, v in goal.where.items())
        verdict = "-" if x is None else "met" if (x <= goal.bound if goal.upper else x >= goal.bound) else "missed"
        lines.append([f"{goal.variant}: {goal.text} ({at})", f"{'<=' if goal.upper else '>='} {goal.form(goal.bound)}",
                      "no rows" if x is None else goal.form(x), verdict])
    gains = speculation(shapes)
    best = max(gains, key=gains.get, default=None)
    lines.append(["generate: speculation over plain decoding, best method and K", ">= 2.5x",
                  *(("no rows", "-") if best is None else (
                      f"{times(gains[best])} ({best.variant}, K = {best.draft_tokens}, B = {best.batch})",
                      "met" if gains[best] >= 2.5 else "missed"))])
    return lines


# --- tables --------------------------------------------------------------------------------------------------------

def dense(header: list[str], lines: list[list]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which every cell is "-"."""
    keep = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
    return [header[i] for i in keep], [[str(line[i]) for i in keep] for line in lines]


def table(header: list[str], lines: list[list[str]], left: int = 0) -> list[str]:
    """Markdown; the first ``left`` columns left aligned."""
    escaped = [[c.replace("|", "\\|") for c in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in
            [header, [":--" if i < left else "--:" for i in range(len(header))], *escaped]] + [""]


WORDS = dict(op="{}", variant="{}", launch="launch {}", threads="threads {}", models="J = {}", dtype="{}",
             logits="{} logits", draft_tokens="K = {}", vocab="V = {}")
HEADS = dict(models="J", draft_tokens="K", vocab="V", batch="B")


def hoist(shapes: list[Shape], skip: tuple[str, ...]) -> tuple[str, list[str]]:
    """What all shapes share, in words, and the fields that need a column."""
    columns, shared = [], []
    for field in (f for f in WORDS if f not in skip):
        values = {getattr(s, field) for s in shapes}
        if len(values) > 1:
            columns.append(field)
        elif (value := values.pop()) is not None and not (field == "launch" and shapes[0].threads):
            shared.append(WORDS[field].format(value))
    return ", ".join(shared), [*columns, "batch"]


def cells(shapes: dict[Shape, Group], skip: tuple[str, ...] = ()) -> tuple[str, list[str], list[list[str]]]:
    """Our times beside every other implementation's: what all shapes share, header, lines."""
    others = [n for n in dict.fromkeys([*STYLE, *(n for g in shapes.values() for n in g)])
              if n not in OURS and any(timed(g, n) for g in shapes.values())]
    shared, columns = hoist(list(shapes), skip)
    lines = []
    for s, g in shapes.items():
        own = timed(g, "eft") or {}
        over = over_combine_max(g)

        def cell(name, g=g):
            row = g.get(name)
            if not row or row["status"] != "measured":
                return row["status"] if row else "-"
            r = ratio(g, name)
            return us(row["median_us"]) + (f" ({times(r)})" if r else "")

        share = own.get("fraction")
        lines.append([*("-" if (v := getattr(s, c)) is None else v for c in columns), us(own.get("median_us")),
                      f"{us(own['p20_us'])}..{us(own['p80_us'])}" if own else "-", us(own.get("floor_us")),
                      "-" if share is None else percent(share), "-" if over is None else f"{over:.2f}",
                      *map(cell, others), own.get("launches") or "-", size(own.get("peak_memory"))])
    header = [*(HEADS.get(c, c) for c in columns), "ours", "p20..p80", "floor", "of floor", "/ combine + max",
              *map(name_of, others), "launches", "peak memory"]
    return shared, *dense(header, lines)


def op_table(shapes: dict[Shape, Group]) -> list[str]:
    shared, header, lines = cells(shapes, skip=("op", "variant"))
    return [*([shared + ".", ""] if shared else []), *table(["**ours**" if h == "ours" else h for h in header], lines)]


def generate_cells(shapes: dict[Shape, Group]) -> tuple[str, list[str], list[list[str]]]:
    shared, columns = hoist(list(shapes), ("op", "variant", "draft_tokens"))
    gains, lines = {name: speculation(shapes, name) for g in shapes.values() for name in g}, []
    for name in dict.fromkeys([*STYLE, *gains]):
        for s, g in shapes.items():
            if row := timed(g, name):
                share, speed = row["acceptance"], row["tokens_per_s"]
                lines.append([name_of(name), s.variant, s.draft_tokens or "-",
                              *("-" if getattr(s, c) is None else getattr(s, c) for c in columns),
                              us(row["median_us"]), f"{us(row['p20_us'])}..{us(row['p80_us'])}",
                              "-" if speed is None else f"{speed:.4g}", "-" if share is None else percent(share),
                              times(gains[name][s]) if s in gains[name] else "-"])
    header = ["implementation", "method", "K", *(HEADS.get(c, c) for c in columns), "wall clock", "p20..p80",
              "tokens/s", "accepted", "over plain"]
    return shared, *dense(header, lines)


def generate_table(shapes: dict[Shape, Group]) -> list[str]:
    shared, header, lines = generate_cells(shapes)
    return [*([shared + ".", ""] if shared else []), *table(header, lines, left=2)]


def untimed(shapes: dict[Shape, Group]) -> list[str]:
    """Each implementation that was absent or disagreed: where, and why."""
    missing: dict[tuple, list[str]] = {}
    for s, g in shapes.items():
        for name, row in g.items():
            if row["status"] != "measured":
                missing.setdefault((name_of(name), row["status"], row["why"]), []).append(f"{s.op} {s.variant}")
    return [f"{name}, {status} ({', '.join(dict.fromkeys(where))}): {why}"
            for (name, status, why), where in sorted(missing.items(), key=str)]


def environments(rows: list[dict]) -> list[str]:
    """Each run: when, of what, on what, and the command that made it."""
    runs: dict[str, dict] = {row["run"]: row for row in sorted(rows, key=lambda r: r["date"])}
    lines = []
    for run, r in runs.items():
        commit = "no commit" if not r["commit"] else f"commit {r['commit']}{' with changes' if r['dirty'] else ''}"
        parts = [r["device"], f"{r['cores']} cores" if r["cores"] else "", r["isa"],
                 f"driver {r['driver']}" if r["driver"] else "", r["os"],
                 *(f"{n.replace('_', '-')} {r[n]}" for n in ("eft_kernels", "torch", "triton", "transformers", "python")
                   if r[n]), f"backend {r['backend']}" if r["backend"] else "",
                 f"{r['bandwidth_gbs']:.4g} GB/s" if r["bandwidth_gbs"] else ""]
        lines += [f"- `{r['command']}`, {r['date']}, {commit}, run {run}: " + ", ".join(str(p) for p in parts if p)]
    return [*lines, ""]


def markdown(rows: list[dict], figures: list[tuple[str, str]]) -> str:
    """The page of one device; ``figures``: (file, what it shows)."""
    shapes = newest(rows)
    kind, device = rows[-1]["device_kind"], rows[-1]["device"]
    out = [f"# {device}", "", "Written by `python -m benchmarks report` from the rows beside it; not by hand.", "",
           "Times are medians of interleaved rounds. *floor*: the least bytes at the bandwidth measured in the same "
           "run; *of floor*: floor / ours. *combine + max*: our kernel at temperature 0, no noise and no filter. In "
           "brackets: how many times our time an implementation takes.", "", "## Goals", "",
           *table(["goal", "wanted", "measured", "verdict"], goals(shapes, kind), left=1)]
    for file, text in figures:
        out += [f"![{text}]({file})", ""]
    for op, variant in dict.fromkeys((s.op, s.variant if s.op != "generate" else "") for s in shapes):
        part = {s: g for s, g in shapes.items() if s.op == op and variant in ("", s.variant)
                and any(r["status"] == "measured" for r in g.values())}
        if part:
            out += [f"## {op}{variant and ', '}{variant}", "",
                    *(generate_table(part) if op == "generate" else op_table(part))]
    if lines := untimed(shapes):
        out += ["## Not timed", "", *(f"- {line}" for line in lines), ""]
    return "\n".join([*out, "## Runs", "", *environments(rows)])


def render(folder: Path) -> str:
    """Writes README.md and the plots of ``folder``; says what it wrote."""
    rows = read(folder)
    if not rows:
        raise ValueError(f"{folder}: no rows in it (*.jsonl)")
    figures, note = [], ""
    try:
        from .plots import plots
    except ImportError as error:
        note = f"; no plots: {error} (pip install 'eft-kernels[bench]')"
    else:
        for old in folder.glob("*.png"):
            old.unlink()
        for file, text, fig in plots(newest(rows)):
            fig.savefig(folder / file, metadata={"Software": None})
            figures.append((file, text))
    (folder / "README.md").write_text(markdown(rows, figures), encoding="utf-8")
    return f"{folder / 'README.md'}: {len(rows)} rows, {len(figures)} plots{note}"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.split("\n\n")[0])
    p.add_argument("folders", nargs="*", type=Path, metavar="RESULTS_DIR", help="default: benchmarks/results/*")
    folders = p.parse_args(argv).folders or sorted(f for f in RESULTS.glob("*") if f.is_dir())
    try:
        if not folders:
            raise ValueError(f"no folder of results in {RESULTS}")
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder}: not a folder")
            print(render(folder))
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks report: {error}", file=sys.stderr)
        return 2
    return 0
