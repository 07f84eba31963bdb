"""Rows -> README.md and PNG plots in each folder of results. Never measures.

    python -m benchmarks report                                # every folder of benchmarks/results
    python -m benchmarks report benchmarks/results/nvidia-h200

A line of a table holds what one run measured side by side; where several runs measured a shape, the newest counts.
The same rows give the same bytes. `GOALS` are the aims of the project, each computed from the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eft_kernels.bench.rows import (
    HEADS,
    OUR_NAMES,
    STYLE,
    Group,
    cells,
    dense,
    hoist,
    name_of,
    newest,
    over_combine_max,
    percent,
    ratio,
    read,
    timed,
    times,
    untimed,
    us,
)
from eft_kernels.bench.shapes import Shape

RESULTS = Path(__file__).parent / "results"

# --- goals ---------------------------------------------------------------------------------------------------------

CENTRE = dict(vocab=128256, models=3, dtype="bfloat16", logits="peaked")


def best_peer(group: Group) -> float | None:
    """The fastest other sampler beside ours; eager PyTorch has goals of its own."""
    found = [ratio(group, n) for n in group if n not in (*OUR_NAMES, "eager")]
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


ONE, GRAPH = dict(batch=1, threads=1), dict(launch="graph")
GOALS = [
    Goal("faster than eager PyTorch", "cpu", "plain", ONE, against("eager"), 100),
    Goal("faster than eager PyTorch", "cpu", "top_p", ONE, against("eager"), 150),
    Goal("faster than the leanest PyTorch", "cpu", "plain", ONE, against("lean"), 10),
    *(Goal("time over combine + max alone", "cpu", v, ONE, over_combine_max, 2, True) for v in ("plain", "top_p")),
    Goal("share of the read bandwidth", "cpu", "plain", ONE | dict(batch=64), of_read, 0.7, form=percent),
    *(
        Goal("faster than the best other sampler", "cuda", v, GRAPH | dict(batch=b), best_peer, x)
        for v in ("plain", "top_p")
        for b, x in ((1, 5), (64, 2.5), (256, 2))
    ),
    Goal("share of the copy bandwidth", "cuda", "plain", GRAPH | dict(batch=256), of_copy, 0.9, form=percent),
    Goal("share of the copy bandwidth", "cuda", "top_p", GRAPH | dict(batch=256), of_copy, 0.75, form=percent),
    Goal("time of a call", "cuda", "plain", GRAPH | dict(batch=1), microseconds, 5, True, us),
    *(
        Goal("faster than eager PyTorch, every B", "cuda", v, dict(launch=how), against("eager"), x)
        for v, x in (("plain", 15), ("top_p", 30))
        for how in ("graph", "eager")
    ),
]


def speculation(shapes: dict[Shape, Group], name: str = "eft") -> dict[Shape, float]:
    """Our wall clock of plain decoding over that of ``name``, for everything but our own plain decoding."""
    keys = {s: s._replace(variant="", draft_tokens=None) for s in shapes if s.op == "generate"}
    plain = {keys[s]: r["median_us"] for s in keys if s.variant == "plain" and (r := timed(shapes[s], "eft"))}
    return {
        s: plain[k] / row["median_us"]
        for s, k in keys.items()
        if k in plain and (row := timed(shapes[s], name)) and (name, s.variant) != ("eft", "plain")
    }


def goals(shapes: dict[Shape, Group], kind: str) -> list[list[str]]:
    lines = []
    for goal in (g for g in GOALS if g.kind == kind):
        wanted = {**CENTRE, **goal.where, "op": "sample", "variant": goal.variant}
        found = [goal.measure(g) for s, g in shapes.items() if wanted.items() <= s._asdict().items()]
        found = [x for x in found if x is not None]
        x = (max if goal.upper else min)(found) if found else None
        at = ", ".join(f"{dict(batch='B =').get(k, k)} {v}" for k, v in goal.where.items())
        verdict = "-" if x is None else "met" if (x <= goal.bound if goal.upper else x >= goal.bound) else "missed"
        lines.append(
            [
                f"{goal.variant}: {goal.text} ({at})",
                f"{'<=' if goal.upper else '>='} {goal.form(goal.bound)}",
                "no rows" if x is None else goal.form(x),
                verdict,
            ]
        )
    gains = speculation(shapes)
    best = max(gains, key=gains.get, default=None)
    lines.append(
        [
            "generate: speculation over plain decoding, best method and K",
            ">= 2.5x",
            *(
                ("no rows", "-")
                if best is None
                else (
                    f"{times(gains[best])} ({best.variant}, K = {best.draft_tokens}, B = {best.batch})",
                    "met" if gains[best] >= 2.5 else "missed",
                )
            ),
        ]
    )
    return lines


# --- tables --------------------------------------------------------------------------------------------------------


def table(header: list[str], lines: list[list[str]], left: int = 0) -> list[str]:
    """Markdown; the first ``left`` columns left aligned."""
    escaped = [[c.replace("|", "\\|") for c in line] for line in lines]
    return [
        "| " + " | ".join(line) + " |"
        for line in [header, [":--" if i < left else "--:" for i in range(len(header))], *escaped]
    ] + [""]


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
                lines.append(
                    [
                        name_of(name),
                        s.variant,
                        s.draft_tokens or "-",
                        *("-" if getattr(s, c) is None else getattr(s, c) for c in columns),
                        us(row["median_us"]),
                        f"{us(row['p20_us'])}..{us(row['p80_us'])}",
                        "-" if speed is None else f"{speed:.4g}",
                        "-" if share is None else percent(share),
                        times(gains[name][s]) if s in gains[name] else "-",
                    ]
                )
    header = [
        "implementation",
        "method",
        "K",
        *(HEADS.get(c, c) for c in columns),
        "wall clock",
        "p20..p80",
        "tokens/s",
        "accepted",
        "over plain",
    ]
    return shared, *dense(header, lines)


def generate_table(shapes: dict[Shape, Group]) -> list[str]:
    shared, header, lines = generate_cells(shapes)
    return [*([shared + ".", ""] if shared else []), *table(header, lines, left=2)]


def pairs_rows(shapes: dict[Shape, Group]) -> list[dict]:
    """As they were measured."""
    rows = [row for s, g in shapes.items() if s.op == "pairs" for name in g if (row := timed(g, name))]
    return sorted(rows, key=lambda r: (r["date"], r["batch"], r["place"]))


def pairs_goals(shapes: dict[Shape, Group]) -> list[list[str]]:
    """Of speculation on pairs of models, each the worst of the pairs that it is about."""
    best: dict[tuple, dict] = {}
    rows = [r for r in pairs_rows(shapes) if r["implementation"] == "eft" and r["variant"] != "plain"]
    for r in rows:
        pair = (r["logits"], r["dtype"], r["batch"], r["threads"])
        if pair not in best or r["speedup"] > best[pair]["speedup"]:
            best[pair] = r

    def line(text: str, wanted: str, of, found: list[dict], bound: float, upper: bool, form) -> list[str]:
        worst = (max if upper else min)(found, key=of, default=None)
        if worst is None:
            return [text, wanted, "no rows", "-"]
        met = of(worst) <= bound if upper else of(worst) >= bound
        where = f"{worst['logits']}, {worst['dtype']}, {worst['variant']}, B = {worst['batch']}"
        return [text, wanted, f"{form(of(worst))} ({where})", "met" if met else "missed"]

    def gain(r):
        return r["speedup"]

    lines = []
    for batch, bound in ((1, 2.5), (8, 1.6)):
        # as they were made: measured they are a little less
        about = [r for r in best.values() if r["batch"] == batch and r["cost_ratio"] >= 8 and r["agreement"] >= 0.67]
        text = f"pairs: best variant over plain, cost ratio 10 and more, acceptance 0.7 and more, B = {batch}"
        lines.append(line(text, f">= {times(bound)}", gain, about, bound, False, times))
    lines.append(
        line(
            "pairs: predicted speed-up, how far from the measured one",
            "<= 10%",
            lambda r: abs(r["predicted_speedup"] / r["speedup"] - 1),
            rows,
            0.1,
            True,
            percent,
        )
    )
    slow = [r for r in rows if r["forward_us"]["base"]["1"] >= 50e3]
    share = "pairs: time outside the models of a round, where a pass of base takes 50 ms and more"
    lines.append(line(share, "<= 10%", lambda r: r["outside_us"] / r["round_us"], slow, 0.1, True, percent))
    return lines


def pairs_table(shapes: dict[Shape, Group]) -> list[str]:
    def cell(x: float | None, form) -> str:
        return "-" if x is None else form(x)

    lines = []
    for r in pairs_rows(shapes):
        ours, tokens = r["implementation"] == "eft", 1e3 * r["new_tokens"] * r["batch"]
        lines.append(
            [
                r["logits"],
                r["dtype"],
                f"{r['cost_ratio']:.1f}",
                f"{r['agreement']:.2f}",
                str(r["batch"]),
                r["variant"] if ours else name_of(r["implementation"]),
                str(r["draft_tokens"] or "-"),
                cell(r["tokens_per_round"], "{:.2f}".format),
                cell(r["tokens_to_expect"], "{:.2f}".format),
                f"{r['median_us'] / tokens:.2f}",
                cell(r["predicted_us"], lambda t, tokens=tokens: f"{t / tokens:.2f}"),
                times(r["speedup"]),
                cell(r["predicted_speedup"], times),
                cell(r["predicted_speedup"] and r["predicted_speedup"] / r["speedup"], "{:.2f}".format),
                cell(r["outside_us"], us),
                cell(r["outside_us"] and r["outside_us"] / r["round_us"], percent),
            ]
        )
    header = [
        "pair",
        "dtype",
        "cost ratio",
        "acceptance",
        "B",
        "variant",
        "K",
        "tokens a round",
        "expected",
        "ms a token",
        "predicted",
        "over plain",
        "predicted",
        "predicted / measured",
        "outside, a round",
        "share",
    ]
    return table(header, lines, left=2)


def pass_table(shapes: dict[Shape, Group]) -> list[str]:
    """Times of a pass of each model, by the tokens that it reads. They do not depend on the pair's acceptance."""
    found: dict[tuple, dict] = {}
    for r in pairs_rows(shapes):
        found.setdefault((r["logits"].partition(",")[0], r["dtype"], r["batch"]), r["forward_us"])
    lengths = list(next(iter(found.values()))["base"])
    lines = [
        [*map(str, pair), name, *(us(times[n]) if n in times else "-" for n in lengths)]
        for pair, models in found.items()
        for name, times in models.items()
    ]
    return table(["pair", "dtype", "B", "model", *(f"n = {n}" for n in lengths)], lines, left=2)


def pairs_section(shapes: dict[Shape, Group]) -> list[str]:
    return [*pairs_table(shapes), "A pass over n tokens of each row, alone:", "", *pass_table(shapes)]


def environments(rows: list[dict]) -> list[str]:
    """Each run: when, of what, on what, and the command that made it."""
    runs: dict[str, dict] = {row["run"]: row for row in sorted(rows, key=lambda r: r["date"])}
    lines = []
    for run, r in runs.items():
        commit = "no commit" if not r["commit"] else f"commit {r['commit']}{' with changes' if r['dirty'] else ''}"
        parts = [
            r["device"],
            f"{r['cores']} cores" if r["cores"] else "",
            r["isa"],
            f"driver {r['driver']}" if r["driver"] else "",
            r["os"],
            *(
                f"{n.replace('_', '-')} {r[n]}"
                for n in ("eft_kernels", "torch", "triton", "transformers", "python")
                if r[n]
            ),
            f"backend {r['backend']}" if r["backend"] else "",
            f"{r['bandwidth_gbs']:.4g} GB/s" if r["bandwidth_gbs"] else "",
        ]
        lines += [f"- `{r['command']}`, {r['date']}, {commit}, run {run}: " + ", ".join(str(p) for p in parts if p)]
    return [*lines, ""]


WHOLE = {"generate": generate_table, "pairs": pairs_section}  # operations with one section for all variants


def markdown(rows: list[dict], figures: list[tuple[str, str]]) -> str:
    """The page of one device; ``figures``: (file, what it shows)."""
    shapes = newest(rows)
    kind, device = rows[-1]["device_kind"], rows[-1]["device"]
    out = [
        f"# {device}",
        "",
        "Written by `python -m benchmarks report` from the rows beside it; not by hand.",
        "",
        "Times are medians of interleaved rounds. *floor*: the least bytes at the bandwidth measured in the same "
        "run; *of floor*: floor / ours. *combine + max*: our kernel at temperature 0, no noise and no filter. In "
        "brackets: how many times our time an implementation takes.",
        "",
        "## Goals",
        "",
        *table(
            ["goal", "wanted", "measured", "verdict"],
            goals(shapes, kind) + (pairs_goals(shapes) if pairs_rows(shapes) else []),
            left=1,
        ),
    ]
    for file, text in figures:
        out += [f"![{text}]({file})", ""]
    for op, variant in dict.fromkeys((s.op, "" if s.op in WHOLE else s.variant) for s in shapes):
        part = {
            s: g
            for s, g in shapes.items()
            if s.op == op and variant in ("", s.variant) and any(r["status"] == "measured" for r in g.values())
        }
        if part:
            out += [
                f"## {op}{variant and ', '}{variant}",
                "",
                *WHOLE.get(op, op_table)(part),
            ]
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
