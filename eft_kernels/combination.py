"""Weights of the product of experts ``s = sum_j w_j z_j``: presets that name the usual choices.

Every function accepts floats, or tensors, lists or NumPy arrays ``[rows]`` for a value per row (per request).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .checks import INTEGERS, Array, dense, from_host, is_array, is_real
from .parameters import MAX_MODELS

Number = float | Sequence[float] | torch.Tensor | Array  # one, or one for each row
CPU = torch.device("cpu")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _per_row(name: str, value: Number) -> float | torch.Tensor:
    """Lists, arrays and integers as tensors of floats; numbers and tensors of floats as they are; ValueError."""
    x = from_host(name, value, CPU, torch.float64)
    if isinstance(x, torch.Tensor):
        if x.dtype in INTEGERS:
            return x.to(torch.float32)  # the negative of an unsigned integer is none
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: got a tensor of {x.dtype}, allowed are integers and float16 to float64")
        return x
    if is_real(x):
        return x
    raise ValueError(f"{name}: expected numbers, got {type(value).__name__}")


def _real_tensor(x: torch.Tensor) -> torch.Tensor:
    """A dense tensor of real numbers; ValueError."""
    x = dense("weights", x)
    if x.is_complex() or x.dtype is torch.bool:
        raise ValueError(f"weights: expected real numbers, got {x.dtype}")
    return x


def _real(value: object) -> float | torch.Tensor:
    """A float, or a float32 tensor with dimensions; ValueError for what is neither."""
    if isinstance(value, torch.Tensor):
        value = _real_tensor(value)
        if value.dim():
            return value.to(torch.float32)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"weights: expected numbers, got {type(value).__name__}")
    try:
        return float(value)
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"weights: {error}") from error


def _columns(values: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """float32 [rows, J] of a value or a tensor [rows] for each model, one of them a tensor; ValueError."""
    rows = [v for v in values if isinstance(v, torch.Tensor)]
    if any(v.dim() != 1 or v.shape != rows[0].shape for v in rows):
        raise ValueError(f"weights: per-row values must share one length, got {[list(v.shape) for v in rows]}")
    n, device = rows[0].shape[0], rows[0].device
    if any(v.device.type != device.type for v in rows):
        raise ValueError(
            f"weights: got values on {', '.join(sorted({str(v.device) for v in rows}))}; move them together"
        )
    return torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).expand(n) for v in values], dim=1)


class Weights:
    """Weights of J models: ``values`` (a tuple of J floats) or ``tensor`` ([J] or [rows, J] float32).

    Iterating, indexing rows and repeating rows work the way the decoding loops need them; ``tensor`` is None
    for plain floats, which then travel as scalars and cost no device copy. A tensor made of lists or arrays is
    ``on_host``: calls move it to the logits' device.
    """

    def __init__(self, values: Sequence[Number] | torch.Tensor | Array, on_host: bool = False) -> None:
        self.values: tuple[float, ...] | None = None
        self.tensor: torch.Tensor | None = None
        self.on_host = on_host
        given: object = values
        if is_array(values) or (
            isinstance(values, (list, tuple)) and values and all(isinstance(v, (list, tuple)) for v in values)
        ):
            given, self.on_host = from_host("weights", values, CPU, torch.float64), True
        elif isinstance(values, (list, tuple)):
            self.on_host |= any(isinstance(v, (list, tuple)) or is_array(v) for v in values)
            given = [from_host("weights", v, CPU, torch.float64) for v in values]
        if isinstance(given, torch.Tensor):
            if given.dim() not in (1, 2):
                raise ValueError(f"weights: expected a tensor [J] or [rows, J], got shape {list(given.shape)}")
            self.tensor = _real_tensor(given).to(torch.float32)
        elif not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise ValueError(f"weights: expected J numbers, a tensor or Weights, got {type(given).__name__}")
        else:
            reals = [_real(v) for v in given]
            floats = [v for v in reals if isinstance(v, float)]
            if len(floats) == len(reals):
                self.values = tuple(floats)
            else:
                self.tensor = _columns(reals)
        if not 1 <= len(self) <= MAX_MODELS:
            raise ValueError(f"weights: expected 1 to {MAX_MODELS} models, got {len(self)}")

    def __len__(self) -> int:
        return len(self.values or ()) if self.tensor is None else self.tensor.shape[-1]

    @property
    def per_row(self) -> bool:
        """True when each row has its own weights (``tensor`` is [rows, J])."""
        return self.tensor is not None and self.tensor.dim() == 2

    def rows(self, index: torch.Tensor | slice) -> Weights:
        """The weights of the rows ``index`` (a tensor of indices, a mask or a slice); unchanged unless per row."""
        if self.tensor is None or not self.per_row:
            return self
        return Weights(self.tensor[index], self.on_host)

    def repeat_interleave(self, n: int) -> Weights:
        """Each row's weights ``n`` times in a row, as generate() expands ``num_return_sequences``."""
        if self.tensor is None or not self.per_row:
            return self
        return Weights(self.tensor.repeat_interleave(n, dim=0), self.on_host)

    def __repr__(self) -> str:
        return f"Weights({list(self.values) if self.values is not None else self.tensor!r})"


AnyWeights = Weights | Sequence[Number] | torch.Tensor | Array  # what `weights` takes


def weights(values: AnyWeights) -> Weights:
    """Any weights: J numbers (or values per row, ``[rows]``), or a tensor, an array or lists ``[J]`` or ``[rows, J]``,
    J = 1..8."""
    return values if isinstance(values, Weights) else Weights(values)


def upscale(beta: Number = 1.0) -> Weights:
    """Up-scaling, for logits [base, tuned, ref]: ``beta * (base - ref) + tuned``.

    ``beta = 1`` is emulated fine-tuning (Mitchell et al., arXiv 2310.12962, eq. 3); ``beta > 1`` amplifies what
    the large model knows more than the small one.
    """
    x = _per_row("beta", beta)
    return Weights([x, 1.0, -x])


def proxy(alpha: Number = 1.0) -> Weights:
    """Proxy-tuning, for logits [base, tuned, ref]: ``base + alpha * (tuned - ref)`` (Liu et al., arXiv 2401.08565)."""
    x = _per_row("alpha", alpha)
    return Weights([1.0, x, -x])


def downscale() -> Weights:
    """Down-scaling, for logits [small base, large tuned, large ref]: ``base + (tuned - ref)``."""
    return Weights([1.0, 1.0, -1.0])


def interpolate(lam: Number = 0.5) -> Weights:
    """Two behaviours mixed at test time, for logits [base, tuned_a, tuned_b, ref]:
    ``base + lam * (tuned_a - ref) + (1 - lam) * (tuned_b - ref)`` (arXiv 2310.12962, section 4.3)."""
    x = _per_row("lam", lam)
    return Weights([1.0, x, 1.0 - x, -1.0])


class Mode(NamedTuple):
    """A preset by its name, for the interfaces where the models have names: base, tuned (one or two) and ref."""

    weights: Callable[..., Weights]
    strength: str | None  # its argument's name
    default: float = 1.0  # of the strength


MODES = {
    "upscale": Mode(upscale, "beta"),
    "proxy": Mode(proxy, "alpha"),
    "downscale": Mode(downscale, None),
    "interpolate": Mode(interpolate, "lam", 0.5),  # the one for two tuned models
}
MODE_OF = {mode.strength: name for name, mode in MODES.items() if mode.strength}
STRENGTHS = {mode.strength: mode.default for mode in MODES.values() if mode.strength}  # and their defaults
