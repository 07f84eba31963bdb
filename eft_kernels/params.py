"""Sampling parameters: checking what the host can see, and the one form every backend takes.

Each parameter is a Python scalar (it travels as a scalar, no device copy) or a tensor ``[rows]``.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch

from .weights import Weights

# name: (dtype of the tensor form, is the value allowed, what is allowed)
SPECS = {
    "temperature": (torch.float32, lambda v: 0 <= v <= 1e30, "0 to 1e30 (below 1e-5 is greedy)"),
    "top_k": (torch.int64, lambda v: v >= 0, "an integer >= 0 (0 is off)"),
    "top_p": (torch.float32, lambda v: 0 < v <= 1, "in (0, 1] (1 is off)"),
    "min_p": (torch.float32, lambda v: 0 <= v <= 1, "in [0, 1] (0 is off)"),
    "upscale_top_p": (torch.float32, lambda v: 0 < v <= 1, "in (0, 1] (1 is off)"),
    "seed": (torch.int64, lambda v: True, "a 64-bit integer"),
    "position": (torch.int64, lambda v: v >= 0, "an integer >= 0"),
}
MAX_VOCAB = 1 << 22  # the fixed-point masses (2^40 each) of this many tokens cannot overflow 63 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Params(NamedTuple):
    """What a backend receives beside the logits: each value a Python scalar or a tensor [rows]."""

    weights: tuple[float, ...] | torch.Tensor  # J floats, or float32 [J] or [rows, J]
    temperature: float | torch.Tensor
    top_k: int | torch.Tensor
    top_p: float | torch.Tensor
    min_p: float | torch.Tensor
    upscale_top_p: float | torch.Tensor
    seed: int | torch.Tensor
    position: int | torch.Tensor
    token_mask: torch.Tensor | None  # int32 [rows, ceil(V / 32)] (verify: [rows, K+1, ceil(V / 32)]), bit 1 = allowed
    vocab_size: int
    tuned: int

    @property
    def filtered(self) -> bool:
        """Whether any filter may remove or rescore a token (tensors: always maybe)."""
        off = dict(top_k=0, top_p=1.0, min_p=0.0, upscale_top_p=1.0)
        return any(isinstance(v := getattr(self, name), torch.Tensor) or v != value for name, value in off.items())


def scalar_or_rows(name: str, value, rows: int, device: torch.device, check: bool):
    """``value`` as a Python scalar or a contiguous tensor [rows] on ``device``; ValueError names ``name``."""
    dtype, allowed, words = SPECS[name]
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            value = value.reshape(1).expand(rows)
        if value.shape != (rows,):
            raise ValueError(f"{name}: expected a number or a tensor [{rows}], got shape {list(value.shape)}")
        if dtype == torch.int64 and (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"{name}: expected an integer tensor, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name}: is on {value.device}, the logits are on {device}; move it there")
        if check:
            for v in value.tolist():
                if v != v or not allowed(v):
                    raise ValueError(f"{name}: got {v}, allowed is {words}")
        return value.to(dtype).contiguous()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}: expected a number or a tensor [{rows}], got {type(value).__name__}")
    if dtype == torch.int64:
        if int(value) != value:
            raise ValueError(f"{name}: got {value}, allowed is {words}")
        value = int(value)
        if name in ("seed", "position"):
            if not -(1 << 63) <= value < 1 << 64:
                raise ValueError(f"{name}: got {value}, allowed is {words}")
            if value >= 1 << 63:
                value -= 1 << 64
            if name == "seed":
                return value
        value = min(value, (1 << 63) - 1)
    else:
        value = float(value)
    if value != value or not allowed(value):
        raise ValueError(f"{name}: got {value}, allowed is {words}")
    return value


def check_logits(logits, dims: int, vocab_size: int | None) -> tuple[list[torch.Tensor], int]:
    """The logits as a list of tensors with unit last stride, and V; ValueError says which model is wrong and how."""
    if isinstance(logits, torch.Tensor) or not isinstance(logits, (list, tuple)) or not 1 <= len(logits) <= 8:
        got = type(logits).__name__ if not isinstance(logits, (list, tuple)) else f"{len(logits)} tensors"
        raise ValueError(f"logits: expected a list of 1 to 8 tensors, one per model, got {got}")
    shape = "[B, V]" if dims == 2 else "[B, K+1, V]"
    first = logits[0]
    for j, z in enumerate(logits):
        if not isinstance(z, torch.Tensor):
            raise ValueError(f"logits[{j}]: expected a tensor {shape}, got {type(z).__name__}")
        if z.dim() != dims or z.shape[:-1] != first.shape[:-1]:
            raise ValueError(f"logits[{j}]: expected {shape} with the rows of logits[0], got {list(z.shape)} "
                             f"beside {list(first.shape)}")
        if z.dtype not in DTYPES:
            raise ValueError(f"logits[{j}]: expected float32, float16 or bfloat16, got {z.dtype}")
        if z.device != first.device:
            raise ValueError(f"logits[{j}]: is on {z.device}, logits[0] is on {first.device}; move them together")
    shortest = min(z.shape[-1] for z in logits)
    if vocab_size is None:
        vocab_size = shortest
    if not isinstance(vocab_size, int) or not 1 <= vocab_size <= shortest:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed is 1 to {shortest} (the shortest model's logits)")
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed is at most {MAX_VOCAB}")
    return [z if z.stride(-1) == 1 or z.numel() == 0 else z.contiguous() for z in logits], vocab_size


def check_params(logits, weights, rows, vocab_size, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                 upscale_top_p=1.0, seed=0, position=0, token_mask=None, tuned=1, check=False,
                 needs_tuned=False) -> Params:
    """All arguments beside the logits, checked, as `Params`. ``logits`` are already checked."""
    device = logits[0].device
    weights = weights if isinstance(weights, Weights) else Weights(weights)
    if len(weights) != len(logits):
        raise ValueError(f"weights: got {len(weights)} values for {len(logits)} models' logits")
    if weights.values is not None:
        for w in weights.values:
            if not abs(w) < float("inf"):
                raise ValueError(f"weights: got {w}, allowed are finite numbers")
        w = weights.values
    else:
        w = weights.tensor
        if w.device != device:
            raise ValueError(f"weights: is on {w.device}, the logits are on {device}; move it there")
        if weights.per_row and w.shape[0] != rows:
            raise ValueError(f"weights: expected [{rows}, {len(logits)}], got {list(w.shape)}")
        if check and not bool(torch.isfinite(w).all()):
            raise ValueError("weights: got a value that is not finite")
        w = w.contiguous()
    if token_mask is not None:
        want = (*logits[0].shape[:-1], (vocab_size + 31) // 32)
        if not isinstance(token_mask, torch.Tensor) or token_mask.dtype != torch.int32 or token_mask.shape != want:
            got = f"{token_mask.dtype} {list(token_mask.shape)}" if isinstance(token_mask, torch.Tensor) \
                else type(token_mask).__name__
            raise ValueError(f"token_mask: expected an int32 tensor {list(want)} (bit v % 32 of word v // 32 is 1 "
                             f"where token v is allowed), got {got}")
        if token_mask.device != device:
            raise ValueError(f"token_mask: is on {token_mask.device}, the logits are on {device}; move it there")
        token_mask = token_mask.contiguous()
    values = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, upscale_top_p=upscale_top_p,
                  seed=seed, position=position)
    values = {name: scalar_or_rows(name, v, rows, device, check) for name, v in values.items()}
    upscaled = isinstance(values["upscale_top_p"], torch.Tensor) or values["upscale_top_p"] != 1.0
    if (upscaled or needs_tuned) and not 0 <= tuned < len(logits):
        raise ValueError(f"tuned: got {tuned}, allowed is the index of one of the {len(logits)} models")
    return Params(w, *(values[n] for n in ("temperature", "top_k", "top_p", "min_p", "upscale_top_p", "seed",
                                           "position")), token_mask, vocab_size, tuned)
