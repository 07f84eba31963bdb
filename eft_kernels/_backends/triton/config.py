"""How launches are cut, by device: tables of (limit, value); the first row whose limit is not below the work counts.

Nothing here changes a token. ``python -m tools tune`` measures the candidates on a GPU and prints a table.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Cut(NamedTuple):
    """A program's share of a row: ``tiles`` tiles of ``tc`` chunks of 256 tokens; direct: one tile, in registers."""

    tiles: int
    tc: int
    warps: int = 4
    direct: bool = False


# sample without filters: (rows * chunks, cut). Not measured: chosen so that about eight programs fall to each of 132
# multiprocessors, and that noise drawn for every token (about 100 instructions each) stays below a launch's latency.
SAMPLE = {
    "default": (
        (512, Cut(1, 4, direct=True)),  # one row of 128256 tokens: 126 programs
        (8192, Cut(1, 8, direct=True)),
        (40000, Cut(4, 8)),
        (80000, Cut(8, 8)),
        (160000, Cut(16, 8)),
        (1 << 62, Cut(32, 8)),
    ),
}
# passes that leave statistics, masses or log-probs behind: the same, without noise
STREAM = {
    "default": (
        (512, Cut(1, 4)),
        (8192, Cut(1, 8)),
        (40000, Cut(4, 8)),
        (160000, Cut(8, 8)),
        (1 << 62, Cut(16, 8)),
    ),
}


@cache
def device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "default"


def pick(table: dict, device: torch.device, work: int) -> Cut:
    """The cut of ``work`` = rows * chunks on ``device``."""
    rows = table.get(device_name(device.index) if len(table) > 1 else "default", table["default"])
    return next(cut for limit, cut in rows if work <= limit)
