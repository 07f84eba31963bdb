"""The pictures of a report: time against B, speed-up over B x V, speculation against K. Needs matplotlib.

No global state and no dates: the same rows give the same bytes. An implementation has its colour of `STYLE`
everywhere, and names stand at the ends of the lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eft_kernels.bench.rows import OUR_NAMES, STYLE, Group, name_of, percent, ratio, timed, times, us
from eft_kernels.bench.shapes import Shape

from .report import CENTRE, WHOLE, pairs_rows, speculation

METHODS = {"coupled": ("#08306B", "o"), "token": ("#0072B2", "s"), "block": ("#56B4E9", "^")}
INK, GREY, GRID = "#222222", "#6E6E6E", "#E4E4E4"
DASHED = (0, (4, 3))


def canvas(height: float, title: str, about: str, panels: int = 1, **settings):
    """A figure 8 inches wide with title lines of its own above ``panels`` axes."""
    fig = Figure(figsize=(8, height), dpi=150, facecolor="white")
    axes = fig.subplots(1, panels, squeeze=False, **settings)[0]
    fig.text(0.012, 1 - 0.14 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    fig.text(0.012, 1 - 0.43 / height, about, fontsize=9.5, color="#555555", va="top")
    for ax in axes:
        ax.tick_params(labelsize=9.5, colors=INK, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color("#999999")
        ax.set_axisbelow(True)
    return fig, axes


def config(s: Shape) -> str:
    if s.threads:
        return f"{s.threads} thread{'s' if s.threads > 1 else ''}"
    return {"graph": "CUDA graph", "eager": "eager launch"}.get(s.launch, s.launch)


def about(s: Shape, *fields: str) -> str:
    words = dict(vocab=f"V = {s.vocab}", models=f"{s.models} models", dtype=s.dtype, logits=f"{s.logits} logits")
    return f"{s.device_name}; " + ", ".join(words[f] for f in fields)


def spread(values: list[float], gap: float) -> list[float]:
    """Sorted label heights moved apart by at least ``gap``: close ones stay around their common centre."""
    blocks: list[tuple[float, int]] = []  # sum of wanted starts, count
    for i, v in enumerate(values):
        blocks.append((v - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            (a, n), (b, m) = blocks.pop(), blocks.pop()
            blocks.append((a + b, n + m))
    starts = [total / count for total, count in blocks for _ in range(count)]
    return [start + i * gap for i, start in enumerate(starts)]


def label_lines(ax, ends: list[tuple[float, float, str, str]], right: float, gap: float) -> None:
    """Names at the right edge, tied to the lines' ends: (x, y in data, name, colour)."""
    where = ax.transScale + ax.transLimits
    ends = sorted((where.transform(end[:2])[1], end) for end in ends)
    for height, (_, (x, y, name, colour)) in zip(spread([e[0] for e in ends], gap), ends):
        darker = [0.8 * c for c in to_rgb(colour)]  # thin letters look paler than lines
        ax.annotate(
            name,
            (x, y),
            (right, height),
            textcoords=ax.transAxes,
            color=darker,
            fontsize=10,
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colour, lw=0.7, alpha=0.7, shrinkA=1, shrinkB=4, relpos=(0, 0.5)),
        )


def time_plot(shapes: dict[Shape, Group]) -> Figure:
    """Time against B: ours, the floors, every baseline."""
    first = next(iter(shapes))
    series: dict[str, list[tuple]] = {}
    for s, g in shapes.items():
        for row in (row for name in g if (row := timed(g, name))):
            series.setdefault(row["implementation"], []).append(
                (s.batch, row["median_us"], row["p20_us"], row["p80_us"])
            )
    floor = [(s.batch, own["floor_us"]) for s, g in shapes.items() if (own := timed(g, "eft")) and own["floor_us"]]
    fig, (ax,) = canvas(
        4.8,
        f"{first.op}, {first.variant}: time of a call, {config(first)}",
        about(first, "vocab", "models", "dtype", "logits") + "; bands: 20th to 80th percentile",
    )
    fig.subplots_adjust(left=0.09, right=0.78, top=0.845, bottom=0.115)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ends = []
    for name, points in sorted(series.items()):
        x, y, low, high = zip(*points)
        colour, ours = STYLE.get(name, ("", INK))[1], name == "eft"
        ax.plot(x, y, color=colour, lw=2.6 if ours else 1.6, marker="o", ms=6 if ours else 4, zorder=4 if ours else 3)
        ax.fill_between(x, low, high, color=colour, alpha=0.16, lw=0, zorder=2)
        ends.append((x[-1], y[-1], name_of(name), colour))
    if floor:
        ax.plot(*zip(*floor), color=GREY, lw=1.6, ls=DASHED, zorder=3)
        ends.append((*floor[-1], "bandwidth floor", GREY))
    batches = [s.batch for s in shapes]
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda t, _: us(t)))
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_xlabel("rows B", fontsize=10, color=INK)
    label_lines(ax, ends, 1.05, 0.062)
    return fig


def heat_plot(shapes: dict[Shape, Group], names: list[str]) -> Figure:
    """How many times our time each baseline takes, over B and V: blue where we are faster, orange where slower."""
    first = next(iter(shapes))
    batches, vocabs = sorted({s.batch for s in shapes}), sorted({s.vocab for s in shapes})
    place = {(s.batch, s.vocab): g for s, g in shapes.items()}
    cells = {n: [[ratio(place.get((b, v), {}), n) for v in vocabs] for b in batches] for n in names}
    top = math.log(max(2.0, *(max(r, 1 / r) for c in cells.values() for line in c for r in line if r)))
    colours = LinearSegmentedColormap.from_list("ours", ["#D55E00", "#F6F6F6", "#0072B2"])
    height = 1.75 + 0.36 * len(batches)
    fig, axes = canvas(
        height,
        f"{first.op}, {first.variant}: how many times faster eft-kernels is, {config(first)}",
        about(first, "models", "dtype", "logits"),
        len(names),
        sharey=True,
    )
    fig.subplots_adjust(left=0.075, right=0.985, top=1 - 1.02 / height, bottom=0.52 / height, wspace=0.06)
    for ax, name in zip(axes, names):
        data = [[math.nan if r is None else math.log(r) for r in line] for line in cells[name]]
        ax.imshow(data, cmap=colours, vmin=-top, vmax=top, aspect="auto")
        for i, line in enumerate(cells[name]):
            for j, r in enumerate(line):
                if r:
                    ax.text(
                        j,
                        i,
                        times(r),
                        ha="center",
                        va="center",
                        fontsize=10.5,
                        color="white" if abs(math.log(r)) > 0.6 * top else INK,
                    )
        ax.set_xticks(range(len(vocabs)), [str(v) for v in vocabs])
        ax.set_yticks(range(len(batches)), [str(b) for b in batches])
        ax.set_xticks([k - 0.5 for k in range(1, len(vocabs))], minor=True)
        ax.set_yticks([k - 0.5 for k in range(1, len(batches))], minor=True)
        ax.grid(which="minor", color="white", lw=2)
        ax.set_axisbelow(False)
        ax.tick_params(which="minor", length=0)
        ax.spines[:].set_visible(False)
        ax.set_xlabel("vocabulary V", fontsize=10, color=INK)
        ax.set_title(f"than {name_of(name)}", fontsize=11, color=INK, loc="left", pad=5)
    axes[0].set_ylabel("rows B", fontsize=10, color=INK)
    return fig


def speculation_plot(shapes: dict[Shape, Group]) -> Figure:
    """Acceptance and wall clock relative to plain decoding, against K."""
    gains = speculation(shapes)
    others = {n: found for n in STYLE if n not in OUR_NAMES and (found := speculation(shapes, n))}
    first, ks = next(iter(gains)), sorted({s.draft_tokens for s in gains})
    fig, axes = canvas(
        3.9,
        f"{first.op}: what speculation brings, B = {first.batch}, {config(first)}",
        about(first, "vocab", "models", "dtype"),
        2,
    )
    fig.subplots_adjust(left=0.065, right=0.855, top=0.76, bottom=0.14, wspace=0.5)
    top = 1.12 * max(1.0, *gains.values(), *(y for found in others.values() for y in found.values()))
    panels = [
        ("accepted drafts", lambda s: timed(shapes[s], "eft")["acceptance"], percent),
        ("speed over plain decoding (wall clock)", gains.get, lambda y: f"{y:g}x"),
    ]
    for i, (ax, (title, value, form)) in enumerate(zip(axes, panels)):
        ax.set_ylim(0, top if i else 1.02)
        ends = [(ks[-1], 1.0, "plain", GREY)] if i else []
        if i:
            ax.axhline(1, color=GREY, lw=1.4, ls=DASHED)
            for name, found in others.items():  # one without drafts is a level line
                points = [(k, y) for s, y in found.items() for k in ([s.draft_tokens] if s.draft_tokens else ks)]
                ax.plot(*zip(*points), color=STYLE[name][1], lw=1.6)
                ends.append((*points[-1], name_of(name), STYLE[name][1]))
        for method, (colour, marker) in METHODS.items():
            points = [(s.draft_tokens, y) for s in gains if s.variant == method and (y := value(s)) is not None]
            if points:
                ax.plot(*zip(*points), color=colour, marker=marker, ms=6, lw=2)
                ends.append((*points[-1], method, colour))
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_xlabel("drafts a round K", fontsize=10, color=INK)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _, form=form: form(y)))
        ax.grid(axis="y", color=GRID, lw=0.8)
        ax.set_title(title, fontsize=11, color=INK, loc="left", pad=6)
        label_lines(ax, ends, 1.06, 0.085)
    return fig


def pairs_plot(shapes: dict[Shape, Group]) -> Figure:
    """Measured speed-up of speculation on pairs of models against the predicted one; a dot a pair and variant."""
    rows = [r for r in pairs_rows(shapes) if r["predicted_speedup"] and r["variant"] != "plain"]
    first, batches = next(iter(shapes)), sorted({r["batch"] for r in rows})
    fig, axes = canvas(
        4.4,
        f"pairs: what speculation brings over plain decoding, {config(first)}",
        f"{first.device_name}; dashed: what the arithmetic says, and 10% from it; hollow: bfloat16",
        len(batches),
    )
    fig.subplots_adjust(left=0.075, right=0.985, top=0.8, bottom=0.125, wspace=0.16)
    low = 0.9 * min(min(r["speedup"], r["predicted_speedup"]) for r in rows)
    high = 1.1 * max(max(r["speedup"], r["predicted_speedup"]) for r in rows)
    palette = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", GREY)
    colours = dict(zip(dict.fromkeys(r["variant"] for r in rows), palette))
    for ax, batch in zip(axes, batches):
        for share in (0.9, 1.0, 1.1):
            ax.plot([low, high], [share * low, share * high], color=GREY, lw=1.4 if share == 1 else 0.7, ls=DASHED)
        for variant, colour in colours.items():
            for dtype, face in (("float32", colour), ("bfloat16", "white")):
                of = [r for r in rows if (r["variant"], r["dtype"], r["batch"]) == (variant, dtype, batch)]
                label = variant if of and dtype == max(r["dtype"] for r in rows if r["variant"] == variant) else None
                x, y = [r["predicted_speedup"] for r in of], [r["speedup"] for r in of]
                ax.scatter(x, y, s=34, facecolor=face, edgecolor=colour, lw=1.4, label=label, zorder=3)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}x"))
        ax.grid(color=GRID, lw=0.8)
        ax.set_xlabel("predicted", fontsize=10, color=INK)
        ax.set_title(f"measured, B = {batch}", fontsize=11, color=INK, loc="left", pad=6)
    axes[0].legend(fontsize=9.5, frameon=False, labelcolor=INK)
    return fig


def plots(shapes: dict[Shape, Group]) -> Iterator[tuple[str, str, Figure]]:
    """(file, what it shows, figure) of every picture that the rows can fill."""

    def families(ops, *free):  # shapes that differ in the ``free`` fields alone
        out: dict[Shape, dict] = {}
        for s, g in shapes.items():
            if s.op in ops and (s.op in WHOLE or s.variant in ("plain", "top_p")):
                out.setdefault(s._replace(**dict.fromkeys(free)), {})[s] = g
        return out.items()

    def file(kind, s):
        how = f"threads-{s.threads}" if s.threads else s.launch
        return "-".join(p for p in (kind, s.op, s.variant, how) if p).replace("_", "-")

    for s, part in families(["sample"], "batch"):
        if CENTRE.items() <= s._asdict().items() and len(part) > 1:
            yield f"{file('time', s)}.png", f"Time of {s.op}, {s.variant}, against B, {config(s)}", time_plot(part)
    for s, part in families(["sample"], "batch", "vocab"):
        if {**CENTRE, "vocab": None}.items() <= s._asdict().items():
            counts = {n: sum(ratio(g, n) is not None for g in part.values()) for n in STYLE if n not in OUR_NAMES}
            names = [n for n in counts if counts[n] and 2 * counts[n] > max(counts.values())][:3]
            grid = {t: g for t, g in part.items() if any(ratio(g, n) for n in names)}
            if min(len({t.batch for t in grid}), len({t.vocab for t in grid})) > 1:
                yield (
                    f"{file('heat', s)}.png",
                    f"{s.op}, {s.variant}: how many times faster eft-kernels is, over B and V, {config(s)}",
                    heat_plot(grid, names),
                )
    for s, part in families(["generate"], "variant", "draft_tokens"):
        if speculation(part):
            yield (
                f"{file('speculation', s)}-b{s.batch}.png",
                f"Speculation against K, B = {s.batch}",
                speculation_plot(part),
            )
    for s, part in families(["pairs"], "variant", "draft_tokens", "dtype", "logits", "vocab", "batch"):
        if any(r["predicted_speedup"] and r["variant"] != "plain" for r in pairs_rows(part)):
            s = s._replace(variant="")
            yield (
                f"{file('speed-up', s)}.png",
                "Speculation on pairs of models, measured against predicted",
                pairs_plot(part),
            )
