"""Two runs against each other.

Rows match when op, variant, implementation, shape, dtype, logits, launch, threads and device are equal. A time is known
to within its p20..p80 only. So the ratio B / A has an interval too, p20_B / p80_A to p80_B / p20_A, and a row is
*faster* or *slower* only when 1 lies outside it, which is when the two p20..p80 do not overlap; else it is the *same*.

A machine that is slower today is no regression. Where both runs timed the same baseline on the same shape, our time is
therefore also compared in units of that baseline's (the two were interleaved, so what slowed one slowed the other), and
the baseline's own p20..p80 widens the interval. Of several common baselines the least noisy one is taken; the table
shows this ratio. Ours is faster or slower only when it is so in both senses: in microseconds, or else a baseline that
was disturbed in one run would make a regression of ours; and in the baseline's time, or else a slower machine would.
A row of fewer than 3 repetitions says nothing of its noise: it is *unclear*, and no baseline.
"""

from __future__ import annotations

from typing import NamedTuple

from .rows import ORDER, OUR_NAMES, Group, name_of, newest, timed, us
from .shapes import Row, Shape

ENOUGH = 3  # repetitions from which p20..p80 says something of the noise


class Line(NamedTuple):
    shape: Shape
    implementation: str
    before: float  # microseconds
    after: float
    baseline: str | None  # whose time both are divided by
    ratio: float
    low: float
    high: float
    verdict: str


ONE: Row = dict(median_us=1.0, p20_us=1.0, p80_us=1.0)
Interval = tuple[float, float, float]  # a value, the least and the greatest that it may be


def ratio(a: Row, b: Row, base_a: Row | None = None, base_b: Row | None = None) -> Interval:
    """b's time / a's, in units of the baselines' times if there are any."""

    def time(row: Row) -> Interval:
        return row["median_us"], row["p20_us"], row["p80_us"]

    def divide(x: Interval, y: Interval) -> Interval:
        return x[0] / y[0], x[1] / y[2], x[2] / y[1]

    return divide(divide(time(b), time(base_b or ONE)), divide(time(a), time(base_a or ONE)))


def line(shape: Shape, name: str, before: Group, after: Group) -> Line:
    def known(n: str) -> bool:  # whether the noise of both rows was measured
        return all(timed(g, n) and g[n]["repetitions"] >= ENOUGH for g in (before, after))

    def noise(n: str) -> float:
        return float(before[n]["p80_us"] / before[n]["p20_us"] * after[n]["p80_us"] / after[n]["p20_us"])

    others = [n for n in before if n not in OUR_NAMES and known(n)] if name in OUR_NAMES else []
    baseline = min(others, key=noise, default=None)
    alone = relative = ratio(before[name], after[name])
    if baseline:
        relative = ratio(before[name], after[name], before[baseline], after[baseline])
    verdict = (
        "unclear"
        if not known(name)
        else "faster"
        if max(alone[2], relative[2]) < 1
        else "slower"
        if min(alone[1], relative[1]) > 1
        else "same"
    )
    return Line(shape, name, before[name]["median_us"], after[name]["median_us"], baseline, *relative, verdict)


def compare(before: list[Row], after: list[Row]) -> list[Line]:
    """A line for every implementation and shape that both runs timed; ours first."""
    old, new = newest(before), newest(after)
    both = [(s, n) for s in old if s in new for n in old[s] if timed(old[s], n) and timed(new[s], n)]
    return sorted((line(s, n, old[s], new[s]) for s, n in both), key=lambda x: x.implementation not in OUR_NAMES)


def cells(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for people; a shape names what is not the same everywhere."""
    fields = [f for f in ORDER[2:] if len({getattr(x.shape, f) for x in lines}) > 1]
    signs = dict(models="J=", draft_tokens="K=", vocab="V=", batch="B=", threads="threads=")

    def words(s: Shape) -> str:
        return " ".join(
            [s.op, s.variant, *(f"{signs.get(f, '')}{v}" for f in fields if (v := getattr(s, f)) is not None)]
        )

    return (
        ["shape", "implementation", "A", "B", "B / A", "noise", "relative to", "verdict"],
        [
            [
                words(x.shape),
                name_of(x.implementation),
                us(x.before),
                us(x.after),
                f"{x.ratio:.2f}",
                f"{x.low:.2f}..{x.high:.2f}",
                name_of(x.baseline) if x.baseline else "-",
                x.verdict,
            ]
            for x in lines
        ],
    )


def slower(lines: list[Line]) -> list[Line]:
    return [x for x in lines if x.implementation in OUR_NAMES and x.verdict == "slower"]


def summary(lines: list[Line]) -> str:
    own = [x.verdict for x in lines if x.implementation in OUR_NAMES]
    return f"{len(own)} times of ours: " + ", ".join(f"{own.count(v)} {v}" for v in dict.fromkeys(own))
