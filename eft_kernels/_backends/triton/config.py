"""How rows are tiled, by device: tables of (limit, value); the first row whose limit is not below the work counts.

Nothing here changes a token. ``python -m tools tune`` measures the candidates on a GPU and prints a table.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """A program's share of a row."""

    tiles_per_program: int
    chunks_per_tile: int  # of 256 tokens
    num_warps: int = 4
    single_tile: bool = False  # one tile a program, kept in registers


Table = dict[str, tuple[tuple[int, TileConfig], ...]]  # by the device's name

# sample without filters: (rows * chunks, tiling). Not measured: chosen so that about eight programs fall to each of
# 132 multiprocessors, and that noise for every token (about 100 instructions each) stays below a launch's latency.
SAMPLE: Table = {
    "default": (
        (512, TileConfig(1, 4, single_tile=True)),  # one row of 128256 tokens: 126 programs
        (8192, TileConfig(1, 8, single_tile=True)),
        (40000, TileConfig(4, 8)),
        (80000, TileConfig(8, 8)),
        (160000, TileConfig(16, 8)),
        (1 << 62, TileConfig(32, 8)),
    ),
}
# passes that leave statistics, masses or log-probs behind: the same, without noise
STREAM: Table = {
    "default": (
        (512, TileConfig(1, 4)),
        (8192, TileConfig(1, 8)),
        (40000, TileConfig(4, 8)),
        (160000, TileConfig(8, 8)),
        (1 << 62, TileConfig(16, 8)),
    ),
}


@cache
def device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "default"


def tile_config(table: Table, device: torch.device, work: int) -> TileConfig:
    """The tiling of ``work`` = rows * chunks on ``device``."""
    rows = table.get(device_name(device.index) if len(table) > 1 else "default", table["default"])
    return next(tiling for limit, tiling in rows if work <= limit)
