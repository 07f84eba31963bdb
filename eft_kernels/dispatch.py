"""The table of backends: which module implements the operations, where it runs, and why it is not here.

A backend is a module that has what `BackendModule` says. Adding one is a row in `TABLE` and that file.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, overload

import torch

from ._backends import extension
from .checks import one_of
from .parameters import DraftParams, Params

MaybeTensor = torch.Tensor | None
# tokens, valid, logprobs, raw_logprobs, top_ids, top_logprobs, entropy, tv, runners_up; None where it was not asked for
Sampled = tuple[
    torch.Tensor,
    torch.Tensor,
    MaybeTensor,
    MaybeTensor,
    MaybeTensor,
    MaybeTensor,
    MaybeTensor,
    MaybeTensor,
    MaybeTensor,
]
# tokens, num_emitted, valid, logprobs, raw_logprobs, path
Verified = tuple[torch.Tensor, torch.Tensor, torch.Tensor, MaybeTensor, MaybeTensor, MaybeTensor]


class BackendModule(Protocol):
    """What the module of a backend has. Arguments were checked by `eft_kernels.arguments`; values of tensors may be
    anything. The meaning is `eft_kernels.reference`'s."""

    __name__: str

    def status(self) -> tuple[bool, str]:
        """(available, what it is or why it is not here)."""

    def sample(
        self,
        logits: Sequence[torch.Tensor],
        p: Params,
        stream: str,
        slot: int,
        logprobs: bool,
        top_logprobs: int,
        diagnostics: bool,
        runners_up: int,
        /,
    ) -> Sampled: ...

    def verify(
        self,
        logits: Sequence[torch.Tensor],
        p: Params,
        draft_tokens: torch.Tensor,
        draft_lengths: torch.Tensor,
        parents: MaybeTensor,
        method: str,
        draft: int,
        drawn_by: DraftParams,
        logprobs: bool,
        /,
    ) -> Verified: ...

    def logprobs(self, logits: Sequence[torch.Tensor], p: Params, scores: bool, /) -> torch.Tensor: ...

    def token_logprobs(self, logits: Sequence[torch.Tensor], p: Params, ids: torch.Tensor, /) -> torch.Tensor: ...


if TYPE_CHECKING:  # where mypy holds the modules to it
    from . import reference
    from ._backends import cpu, cuda, triton

    MODULES: tuple[BackendModule, ...] = (cpu, cuda, triton, reference)


class Backend(NamedTuple):
    name: str
    module: str
    devices: tuple[str, ...]  # () is every device
    summary: str
    optional: str = ""  # an extension: where it was never built, "auto" takes the next backend without a warning


# Triton's interpreter takes CPU tensors
_INTERPRETED = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
# in order of preference for "auto"
TABLE = (
    Backend("cpu", f"{__package__}._backends.cpu", ("cpu",), "C++ with AVX2, AVX-512 or NEON, threads"),
    Backend(
        "cuda", f"{__package__}._backends.cuda", ("cuda",), "CUDA C++, NVIDIA GPUs from compute capability 8.0", "_cuda"
    ),
    Backend("triton", f"{__package__}._backends.triton", ("cuda", "xpu", *_INTERPRETED), "Triton kernels, any GPU"),
    Backend("reference", f"{__package__}.reference", (), "PyTorch, the definition; slow"),
)


@cache
def load(name: str) -> BackendModule:
    return cast(BackendModule, importlib.import_module(next(b.module for b in TABLE if b.name == name)))


@cache
def status(name: str) -> tuple[bool, str]:
    """(available, what it is or why it is not here)."""
    try:
        module = load(name)
    except (ImportError, ValueError) as error:
        return False, str(error)
    return module.status()


def backends() -> dict[str, dict[str, Any]]:
    """The backends, and why those that are unavailable are: ``{name: {available, devices, summary, reason}}``."""
    rows = {}
    for b in TABLE:
        available, reason = status(b.name)
        rows[b.name] = dict(available=available, devices=list(b.devices) or ["any"], summary=b.summary, reason=reason)
    return rows


def not_allowed(reason: str) -> bool:
    """The backend is missing because of an environment variable's value: an error, not a reason to take another."""
    return reason.startswith("EFT_KERNELS_")


@cache
def _choose(name: str, device_type: str) -> BackendModule:
    names = [b.name for b in TABLE]
    if name == "auto":
        name = os.environ.get("EFT_KERNELS_BACKEND") or "auto"
        if name not in (*names, "auto"):
            raise ValueError(f"EFT_KERNELS_BACKEND: got {name!r}, allowed are {', '.join(names)}")
    if name != "auto":
        backend = TABLE[names.index(name)]
        available, reason = status(name)
        if not_allowed(reason):
            raise ValueError(reason)
        if not available:
            raise ValueError(f"backend: {name!r} is not available: {reason}")
        if backend.devices and device_type not in backend.devices:
            raise ValueError(f"backend: {name!r} runs on {', '.join(backend.devices)}, the logits are on {device_type}")
        return load(name)
    for b in TABLE:
        if b.devices and device_type not in b.devices:
            continue
        available, reason = status(b.name)
        if available or not_allowed(reason):
            return load(b.name)
        if b.optional and not extension.built(b.optional):
            continue
        warnings.warn(
            f"eft_kernels: the {b.name} backend is not available ({reason}); using a slower one", stacklevel=3
        )
    raise AssertionError("the reference backend is always available")


def choose(name: str, device: torch.device) -> BackendModule:
    """The module that runs ``name`` ("auto" or a backend) for tensors on ``device``; ValueError says why it cannot."""
    one_of("backend", name, ("auto", *(b.name for b in TABLE)))
    return _choose(name, device.type)


@overload
def shortcut(
    function: Literal["try_sample"], name: str, device_type: str = ...
) -> Callable[..., Sampled | None] | None: ...
@overload
def shortcut(
    function: Literal["try_verify"], name: str, device_type: str = ...
) -> Callable[..., Verified | None] | None: ...
def shortcut(function: str, name: str, device_type: str = "cpu") -> Callable[..., Any] | None:
    """What the backend for such tensors offers to call before arguments are checked (_backends/cpu.py), or None."""
    return _shortcut(function, name, device_type) if type(name) is str else None


@cache
def _shortcut(function: str, name: str, device_type: str) -> Callable[..., Any] | None:
    try:
        return getattr(_choose(name, device_type), function, None)
    except ValueError:
        return None  # choose() will say why
