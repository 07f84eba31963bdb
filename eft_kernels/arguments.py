"""The arguments of a call: checking what the host can see, and the one form every backend takes.

Each sampling parameter is a Python scalar (it travels as a scalar, no device copy) or a tensor ``[rows]``. Lists and
NumPy arrays become tensors on the logits' device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .checks import INTEGERS, dense, from_host, index, is_array, is_integer, is_real, readable, shown
from .combination import AnyWeights, Weights
from .parameters import MAX_MODELS, MAX_VOCAB, PARAMETERS, PER_ROW, Parameter, Params, TokenBias

MAX_WEIGHT = 2.0**128 - 2.0**103  # from here on a number rounds to an infinite float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parameter_of(name: str) -> Parameter:
    """The parameter of this name, or of what the drafts were drawn by."""
    return PER_ROW[name.removeprefix("draft_")]


def dtype_of(p: Parameter) -> torch.dtype:
    """Of the tensor form."""
    return torch.int64 if p.type is int else torch.float32


def scalar(name: str, value: object, rows: int) -> float:
    """``value`` as a Python number in range, integers as signed 64 bits; ValueError names ``name``."""
    p = parameter_of(name)
    integer = p.type is int
    if not is_real(value):
        raise ValueError(f"{name}: expected a number or a tensor [{rows}], got {type(value).__name__}")
    if not p.low <= value <= p.high or (integer and value % 1):
        raise ValueError(f"{name}: got {value}, allowed is {p.allowed}")
    if not integer:
        return float(value)
    n = int(value)
    if p.stage == "filter":
        return max(n, 0)  # -1 is off, too
    return n - (1 << 64) if n >= 1 << 63 else n


def scalar_or_rows(name: str, value: object, rows: int, device: torch.device, check: bool) -> float | torch.Tensor:
    """``value`` as a Python scalar or a contiguous tensor [rows] on ``device``; ValueError names ``name``."""
    p = parameter_of(name)
    dtype = dtype_of(p)
    if is_array(value):
        value = value.tolist()  # of no dimensions: a number
    if isinstance(value, (list, tuple)):
        if len(value) != rows:
            raise ValueError(f"{name}: expected a number or a tensor [{rows}], got shape [{len(value)}]")
        if value and all(isinstance(x, torch.Tensor) and x.dim() == 0 for x in value):
            return scalar_or_rows(name, torch.stack([x.to(value[0].dtype) for x in value]), rows, device, check)
        value = [scalar(name, x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x, rows) for x in value]
        return torch.tensor(value, dtype=dtype, device=device)
    if not isinstance(value, torch.Tensor):
        return scalar(name, value, rows)
    value = dense(name, value)
    if value.is_complex() or value.dtype is torch.bool:
        raise ValueError(
            f"{name}: expected {'an integer' if dtype is torch.int64 else 'a real'} tensor, got {value.dtype}"
        )
    if value.dim() == 0:
        value = value.reshape(1).expand(rows)
    if value.shape != (rows,):
        raise ValueError(f"{name}: expected a number or a tensor [{rows}], got shape {list(value.shape)}")
    if dtype is torch.int64 and value.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected an integer tensor, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, the logits are on {device}; move it there")
    given, value = value, value.to(dtype).contiguous()  # compared as its own type, int8 would wrap the bounds
    if check and name != "seed" and readable(value) and not bool(((value >= p.low) & (value <= p.high)).all()):
        raise ValueError(f"{name}: got {given.tolist()}, allowed is {p.allowed}")
    return value


def check_logits(logits: object, dims: int, vocab_size: object) -> tuple[list[torch.Tensor], int]:
    """The logits as a list of tensors with unit last stride, and V; ValueError says which model is wrong and how."""
    if isinstance(logits, torch.Tensor) or not isinstance(logits, (list, tuple)) or not 1 <= len(logits) <= MAX_MODELS:
        got = type(logits).__name__ if not isinstance(logits, (list, tuple)) else f"{len(logits)} tensors"
        raise ValueError(f"logits: expected a list of 1 to {MAX_MODELS} tensors, one per model, got {got}")
    out: list[torch.Tensor] = []
    shortest = 0
    for j, z in enumerate(logits):
        x = dense(f"logits[{j}]", z) if isinstance(z, torch.Tensor) else None
        if x is not None and dims == 2 and x.dim() == 3 and x.shape[1] == 1:
            x = x[:, 0]  # a model's logits at its newest token
        if x is None or x.dim() != dims or (out and x.shape[:-1] != out[0].shape[:-1]):
            shape = "[B, V]" if dims == 2 else "[B, K+1, V]"
            raise ValueError(
                f"logits[{j}]: expected a tensor {shape}, every model with the same rows, got "
                + (type(z).__name__ if x is None else str(list(x.shape)))
                + (f" beside {list(out[0].shape)}" if j else "")
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"logits[{j}]: expected float32, float16 or bfloat16, got {x.dtype}")
        if out and x.device != out[0].device:
            raise ValueError(f"logits[{j}]: is on {x.device}, logits[0] is on {out[0].device}; move them together")
        shortest = min(shortest, x.shape[-1]) if out else x.shape[-1]
        out.append(x if x.stride(-1) == 1 else x.contiguous())
    if vocab_size is None:
        vocab_size = shortest
    if not is_integer(vocab_size) or not 1 <= vocab_size <= shortest:
        raise ValueError(
            f"vocab_size: got {shown(vocab_size)}, allowed is 1 to {shortest} (the shortest model's logits)"
        )
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed is at most {MAX_VOCAB}")
    return out, int(vocab_size)


def check_row_index(index: object, dims: int, logits: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``index``, rows of the logits [N, V], as contiguous int64 of so many dimensions; ValueError. None is none."""
    if index is None:
        return None
    device = logits[0].device
    index = from_host("row_index", index, device)
    got = shown(index)
    if isinstance(index, torch.Tensor):
        index = dense("row_index", index)
        got = f"{index.dtype} {list(index.shape)}"
    if not isinstance(index, torch.Tensor) or index.dtype not in INTEGERS or index.dim() != dims:
        shape = "[B]" if dims == 1 else "[B, K+1]"
        raise ValueError(f"row_index: expected an int64 tensor {shape} of rows of the logits, got {got}")
    if index.device != device:
        raise ValueError(f"row_index: is on {index.device}, the logits are on {device}; move it there")
    if index.numel() and not len(logits[0]):
        raise ValueError("row_index: the logits have no rows")
    return index.to(torch.int64).contiguous()


def check_mask(mask: object, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """``mask`` as contiguous int32 words of this shape; leading sizes of 1 are repeated, further words dropped."""
    mask = from_host("token_mask", mask, device)
    got = type(mask).__name__
    if isinstance(mask, torch.Tensor):
        mask = dense("token_mask", mask)
        got = f"{mask.dtype} {list(mask.shape)}"
        if mask.dtype is torch.uint32:
            mask = mask.view(torch.int32)
        if mask.dim() == len(shape) + 1 == 3 and mask.shape[1] == 1:
            mask = mask[:, 0]
    if (
        not isinstance(mask, torch.Tensor)
        or mask.dtype is not torch.int32
        or mask.dim() != len(shape)
        or mask.shape[-1] < shape[-1]
        or any(n not in (1, want) for n, want in zip(mask.shape[:-1], shape))
    ):
        raise ValueError(
            f"token_mask: expected an int32 tensor {list(shape)} (bit v % 32 of word v // 32 is 1 where "
            f"token v is allowed; sizes of 1 are repeated), got {got}"
        )
    if mask.device != device:
        raise ValueError(f"token_mask: is on {mask.device}, the logits are on {device}; move it there")
    return mask[..., : shape[-1]].expand(shape).contiguous()


def check_bias(bias: object, lead: Sequence[int], device: torch.device) -> TokenBias | None:
    """``bias`` as int64 ids and float32 values, both contiguous [*lead, N]; leading sizes of 1 are repeated."""
    if not isinstance(bias, (tuple, list)) or len(bias) != 2:
        got = f"{len(bias)} values" if isinstance(bias, (tuple, list)) else shown(bias)
        raise ValueError(f"token_bias: expected a pair of tensors, ids and values, got {got}")
    named = {"token_bias[0]": bias[0], "token_bias[1]": bias[1]}
    tensors = []
    for name, x in named.items():
        x = from_host(name, x, device)
        is_ids, got = name == "token_bias[0]", type(x).__name__
        wanted = False
        if isinstance(x, torch.Tensor):
            x = dense(name, x)
            got = f"{x.dtype} {list(x.shape)}"
            wanted = x.dtype in INTEGERS if is_ids else x.dtype.is_floating_point
            wanted &= x.dim() == len(lead) + 1 and all(n in (1, want) for n, want in zip(x.shape, lead))
        if not wanted:
            shape = ", ".join([*map(str, lead), "N"])
            kind = "ids, an integer" if is_ids else "values, a float"
            raise ValueError(f"{name}: expected {kind} tensor [{shape}] (sizes of 1 are repeated), got {got}")
        if x.device != device:
            raise ValueError(f"{name}: is on {x.device}, the logits are on {device}; move it there")
        tensors.append(x)
    ids, values = tensors
    if ids.shape[-1] != values.shape[-1]:
        raise ValueError(f"token_bias: got {ids.shape[-1]} ids and {values.shape[-1]} values a row")
    ids = ids.to(torch.int64).expand(*lead, -1).contiguous()
    values = values.to(torch.float32).expand(*lead, -1).contiguous()
    return TokenBias(ids, values) if ids.shape[-1] else None


def check_weights(
    weights: AnyWeights, models: int, rows: int, device: torch.device, check: bool
) -> tuple[float, ...] | torch.Tensor:
    """Weights of so many models as a tuple of floats, or a float32 tensor [J] or [rows, J]; ValueError."""
    weights = weights if isinstance(weights, Weights) else Weights(weights)
    if len(weights) != models:
        raise ValueError(f"weights: got {len(weights)} values for {models} models' logits")
    if weights.values is not None:
        for value in weights.values:
            if not abs(value) < MAX_WEIGHT:
                raise ValueError(f"weights: got {value}, allowed are finite float32 numbers")
        return weights.values
    w = weights.tensor
    assert w is not None  # where there are no values
    w = w.to(device) if weights.on_host else w
    if w.device != device:
        raise ValueError(f"weights: is on {w.device}, the logits are on {device}; move it there")
    if weights.per_row and w.shape[0] != rows:
        raise ValueError(f"weights: expected [{rows}, {models}], got {list(w.shape)}")
    if check and readable(w) and not bool(torch.isfinite(w).all()):
        raise ValueError("weights: got a value that is not finite")
    return w.contiguous()


def check_params(
    logits: Sequence[torch.Tensor],
    weights: AnyWeights,
    rows: int,
    vocab_size: int,
    sampling: Mapping[str, object],
    *,
    seed: object = 0,
    position: object = 0,
    token_mask: object = None,
    token_bias: object = None,
    tuned: object = 1,
    row_index: torch.Tensor | None = None,
    check: bool = False,
    needs_tuned: bool = False,
) -> Params:
    """All arguments beside the logits, checked, as `Params`. ``logits`` are already checked; what ``sampling`` lacks or
    has None for is off."""
    device = logits[0].device
    w = check_weights(weights, len(logits), rows, device, check)
    lead = logits[0].shape[:-1] if row_index is None else row_index.shape
    if check and row_index is not None and row_index.numel() and readable(row_index):
        low, high = int(row_index.min()), int(row_index.max())
        if low < 0 or high >= len(logits[0]):
            raise ValueError(f"row_index: got a row outside 0 to {len(logits[0]) - 1}, the logits'")
    mask = None if token_mask is None else check_mask(token_mask, (*lead, (vocab_size + 31) // 32), device)
    bias = None if token_bias is None else check_bias(token_bias, lead, device)
    given = {**sampling, "seed": seed, "position": position}
    values: dict[str, Any] = {  # of the types that the table says
        name: scalar_or_rows(name, p.off if given.get(name) is None else given[name], rows, device, check)
        for name, p in PER_ROW.items()
    }
    combines = any(
        isinstance(values[p.name], torch.Tensor) or values[p.name] != p.off for p in PARAMETERS if p.stage == "combine"
    )
    model = index(
        "tuned",
        tuned,
        0,
        len(logits) - 1 if needs_tuned or combines else MAX_MODELS - 1,
        f"the index of one of the {len(logits)} models",
    )
    return Params(
        w, **values, token_mask=mask, token_bias=bias, vocab_size=vocab_size, tuned=model, row_index=row_index
    )
