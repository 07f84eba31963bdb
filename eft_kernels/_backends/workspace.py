"""Memory that GPU kernels keep between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..parameters import TokenBias

CHUNK = 256
ARENA = 1 << 16  # counters a device has for captured graphs
_counters: dict[tuple[torch.device, object], torch.Tensor] = {}
_arenas: list[torch.Tensor] = []  # graphs hold pointers into them


def counters(rows: int, device: torch.device, stream: object = None) -> torch.Tensor:
    """int32 zeros [at least ``rows``] that nothing else uses while the launch runs; the kernel leaves them zero.

    One buffer a ``stream`` (the current one, anything that tells it from the device's others). A graph may be replayed
    beside anything, so every launch it captures keeps counters of its own, from memory that was zeroed before.
    """
    size = -(-rows // 4) * 4  # aligned, or Triton compiles anew
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = device, stream
    if not capturing:
        arena = _counters.get((device, "arena"))
        if device.type == "cuda" and (arena is None or arena.shape[0] < ARENA // 2):
            _arenas.append(torch.zeros(ARENA, dtype=torch.int32, device=device))
            _counters[device, "arena"] = _arenas[-1]
        if key not in _counters or _counters[key].shape[0] < rows:
            _counters[key] = torch.zeros(max(1024, 1 << (rows - 1).bit_length()), dtype=torch.int32, device=device)
        return _counters[key]
    arena = _counters.get((device, "arena"))
    if arena is None or arena.shape[0] < size:
        return torch.zeros(rows, dtype=torch.int32, device=device)  # part of the graph
    _counters[device, "arena"] = arena[size:]
    return arena[:size]


class SortedBias(NamedTuple):
    """`TokenBias` as kernels look it up: the entries of chunk c are those from starts[c] to starts[c + 1]."""

    starts: torch.Tensor  # int32 [..., chunks + 1]
    ids: torch.Tensor  # int32 [..., N], rising; those outside the vocabulary come last, as one beyond it
    values: torch.Tensor  # float32 [..., N]


def sorted_bias(bias: TokenBias | None, vocab_size: int) -> SortedBias | None:
    if bias is None:
        return None
    chunks = -(-vocab_size // CHUNK)
    beyond = chunks * CHUNK
    ids = torch.where((bias.ids >= 0) & (bias.ids < vocab_size), bias.ids, beyond)
    ids, order = ids.sort(dim=-1, stable=True)
    first = torch.arange(0, beyond + 1, CHUNK, device=ids.device).expand(*ids.shape[:-1], -1).contiguous()
    starts = torch.searchsorted(ids, first, out_int32=True)
    return SortedBias(starts, ids.to(torch.int32), bias.values.gather(-1, order))
