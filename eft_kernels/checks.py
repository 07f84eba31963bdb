"""Arguments of any kind as plain tensors and numbers; ValueError names the one that cannot be."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

import torch
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)


class Array(Protocol):
    """An array or a scalar of NumPy, which need not be installed."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


def readable(x: torch.Tensor) -> bool:
    """The values of ``x`` can be looked at: it is no stand-in of a tracer."""
    return not torch.compiler.is_compiling() and x.device.type != "meta" and not is_fake(x)


def shown(value: object) -> str:
    """What an error says that it got; tensors by their shape, for their values may be gone."""
    if not isinstance(value, torch.Tensor):
        return repr(value)[:200]
    return "a nested tensor" if value.is_nested else f"a tensor {list(value.shape)}"


def is_real(value: object) -> TypeGuard[float]:
    """A number of Python or NumPy, no bool. (What typeshed says of numbers.Real can be compared with no float.)"""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """An integer of Python or NumPy, no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def index(name: str, value: object, low: float, high: float, words: str) -> int:
    """``value`` as an int from ``low`` to ``high``; ValueError with ``words`` for what is allowed."""
    if not is_integer(value) or not low <= value <= high:
        raise ValueError(f"{name}: got {shown(value)}, allowed is {words}")
    return int(value)


def one_of(name: str, value: object, names: Collection[str]) -> str:
    """``value``, one of ``names``; ValueError."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: got {shown(value)}, allowed are {', '.join(names)}")
    return value


def flag(name: str, value: object) -> bool:
    """``value``, a bool of Python's or NumPy's or one of 0 and 1, as a bool; ValueError."""
    if (isinstance(value, numbers.Integral) and value in (0, 1)) or type(value).__name__ == "bool_":
        return bool(value)
    raise ValueError(f"{name}: got {shown(value)}, allowed are True and False")


def stands_for_others(x: torch.Tensor) -> bool:
    """Operators on ``x`` are up to its class (a DTensor, a fake tensor)."""
    return type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def dense(name: str, x: torch.Tensor) -> torch.Tensor:
    """``x`` with its values in memory of its own, as they are; ValueError where it has none, or too little."""
    if torch.compiler.is_compiling():
        return x
    with torch._C.DisableTorchFunctionSubclass():
        if x.is_nested or x.layout is not torch.strided or x.is_quantized:
            layout = str(x.layout).split(".")[-1].strip("_")
            kind = "nested" if x.is_nested else "quantized" if x.is_quantized else layout
            raise ValueError(f"{name}: expected a dense tensor, got a {kind} one")
        if is_batchedtensor(x):
            raise ValueError(f"{name}: is batched by torch.vmap, which is not supported; pass the batch as rows")
        if type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter:
            if stands_for_others(x):
                if not is_fake(x) and not name.startswith("logits"):
                    raise ValueError(f"{name}: expected a plain tensor, got a {type(x).__name__}")
                return x
            x = x.detach().as_subclass(torch.Tensor)
        if x.is_neg():
            x = x.resolve_neg()
        if x.numel() and x.device.type != "meta" and not is_functorch_wrapped_tensor(x):
            last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
            need, held = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
            if held < need:
                raise ValueError(f"{name}: needs {need} bytes, its storage was resized to {held}")
    return x


def is_array(value: object) -> TypeGuard[NDArray[Any]]:
    """A NumPy array (its scalars are numbers)."""
    if isinstance(value, (int, float, torch.Tensor)) or isinstance(value, numbers.Number):
        return False
    return hasattr(value, "__array_interface__") and hasattr(value, "astype")


def from_host(name: str, value: T, device: torch.device, dtype: torch.dtype | None = None) -> T | torch.Tensor:
    """Nested lists of numbers, or a NumPy array, as a tensor on ``device``; anything else as it is."""
    try:
        if isinstance(value, (list, tuple)):
            return torch.tensor(value, dtype=dtype, device=device)
        if is_array(value):
            x = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
            return x.to(device=device, dtype=dtype or x.dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers or a tensor, got {type(value).__name__}: {error}") from error
    return value
