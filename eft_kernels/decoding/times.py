"""What passes of the models take, by the number of tokens in them."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

RECENT = 9  # passes of one size of which the median counts
ENOUGH = 3  # of them, to be sure of it


class Times:
    """Seconds of something by its size, where not every size was seen."""

    def __init__(self) -> None:
        self.seen: dict[int, deque[float]] = {}

    def add(self, size: int, seconds: float) -> None:
        self.seen.setdefault(size, deque(maxlen=RECENT)).append(seconds)

    def forget(self) -> None:
        """Sizes that were seen too few times to be sure of, but the smallest."""
        sizes = sorted(self.seen)
        self.seen = {n: self.seen[n] for n in sizes if n == sizes[0] or len(self.seen[n]) >= ENOUGH}

    def at(self, size: int) -> float:
        """Seconds at ``size``, of some that were seen: on the line through its neighbours, beyond the largest on that
        through the last two. Passes take longer by ever more, so that the line is the least that may be expected."""
        sizes = sorted(self.seen)
        medians: list[float] = []
        for n in sizes:  # a larger pass does not take less
            medians.append(max([statistics.median(self.seen[n]), *medians[-1:]]))
        i = bisect_left(sizes, size)
        if i < len(sizes) and sizes[i] == size:
            return medians[i]
        if len(sizes) == 1 or i == 0:
            return medians[0]
        i = min(i, len(sizes) - 1)
        slope = (medians[i] - medians[i - 1]) / (sizes[i] - sizes[i - 1])
        return medians[i - 1] + slope * (size - sizes[i - 1])


class Clock:
    """Times the passes of J models, and what rounds take beside them. On a GPU by events, read once a round is over."""

    def __init__(self, models: int):
        self.of_model = [Times() for _ in range(models)]  # by tokens a row
        self.outside = Times()  # by drafts that follow each other
        self.begin(torch.device("cpu"))

    def begin(self, device: torch.device) -> None:
        """A new text, on ``device``."""
        self.device = device
        self.totals = [0.0] * (len(self.of_model) + 1)  # seconds of this text in each model, and outside
        self.plain_rounds: list[float] = []  # seconds of its rounds without drafts
        self.waiting: list[tuple[int, int, Any, Any]] = []
        self.start()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop) / 1e3 if self.device.type == "cuda" else stop - start)

    @contextmanager
    def a_pass(self, model: int, tokens: int) -> Iterator[None]:
        start = self._now()
        yield
        self.waiting.append((model, tokens, start, self._now()))

    def start(self) -> None:
        """A round begins."""
        self.started = self._now()

    def stop(self, depth: int, learn: bool) -> None:
        """It is over, and the host has waited for its tokens: a round of ``depth`` levels of drafts."""
        stopped = self._now()
        if self.device.type == "cuda":
            stopped.synchronize()
        outside = self._between(self.started, stopped)
        for model, tokens, start, stop in self.waiting if learn else ():
            seconds = self._between(start, stop)
            self.of_model[model].add(tokens, seconds)
            self.totals[model] += seconds
            outside -= seconds
        if learn:
            self.outside.add(depth, outside)
            self.totals[-1] += outside
            if not depth:
                self.plain_rounds.append(self._between(self.started, stopped))
        self.waiting = []

    def plain(self) -> float | None:
        """Seconds of a round without drafts, of this text or of those before; None where there were too few."""
        if len(self.plain_rounds) > RECENT:
            return statistics.fmean(self.plain_rounds)
        if len(self.outside.seen.get(0, ())) < ENOUGH or not all(1 in t.seen for t in self.of_model):
            return None
        return sum(t.at(1) for t in self.of_model) + self.outside.at(0)

    def forget(self) -> None:
        """What was seen too few times to be sure of."""
        for times in (*self.of_model, self.outside):
            times.forget()
