"""The CUDA C++ backend: `eft_kernels._cuda`, on torch's current stream.

Tests put a build of the extension for the host (its attribute ``simt`` is true) in its place; tensors are then on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from ..dispatch import MaybeTensor, Sampled, Verified
from ..parameters import METHOD_CODES, STREAM_CODES, DraftParams, Params
from . import extension, workspace

Outputs = TypeVar("Outputs")

_cuda = extension.load(
    "_cuda",
    "CUDA",
    "no nvcc, or a torch without CUDA, was found at install time, or "
    "EFT_KERNELS_CUDA=0 was set; put nvcc on the PATH and reinstall with EFT_KERNELS_CUDA=1",
)

try:
    from torch._C import _cuda_getCurrentRawStream as _stream
except ImportError:

    def _stream(device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream


_SIMT: bool = _cuda.simt


def status() -> tuple[bool, str]:
    if _SIMT:
        return True, "SIMT shim"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return False, f"{name}: 8.0 is needed"
    why = _cuda.unusable(torch.cuda.current_device())
    return (False, f"{name}: {why}") if why else (True, name)


class LaunchConfig(NamedTuple):
    """How launches are configured, csrc/cuda/launch_config.h; nothing else depends on it."""

    direct_chunks_per_sm: int = 32  # chunks of 256 tokens a multiprocessor up to which a warp takes one
    stream_waves: int = 1  # beyond, times the blocks that run at once
    smem_budget: int = 72 << 10  # bytes of shared memory of a filtered row's block before the row is spread further
    sample_by_rejection: int = 1  # top-k or top-p for the token alone: draw until kept, or (0) find the threshold first
    use_pdl: int = 0  # the later launches of verify may begin before the one before has ended
    early_exit_blocks_per_sm: int = 6  # beyond these, verify skips rows behind a draft known to be rejected


def set_launch_config(config: LaunchConfig) -> None:
    """Configure the launches of this process so; for tests and measurements."""
    _cuda.set_launch_config(*config)


def _launch(
    function: Callable[..., Outputs | None], logits: Sequence[torch.Tensor], p: Params, *args: object
) -> Outputs:
    """The tensors of a call whose arguments were checked; the logits' device is the current one."""
    z = logits[0]
    *values, bias, vocab_size, tuned, row_index = p
    params = (row_index, *values, workspace.sorted_bias(bias, vocab_size), vocab_size, tuned)
    counters = workspace.counters(2 * p.lead(logits).numel(), z.device, None if _SIMT else _stream(z.device.index))
    out = function(counters, False, logits, *params, *args)
    if out is None:  # a subclass of torch.Tensor
        logits = [z.detach().as_subclass(torch.Tensor) for z in logits]
        out = function(counters, False, logits, *params, *args)
        assert out is not None, "the extension takes other arguments than eft_kernels.arguments makes"
    return out


def _run(function: Callable[..., Outputs | None], logits: Sequence[torch.Tensor], p: Params, *args: object) -> Outputs:
    device = logits[0].device
    if _SIMT or device.index == torch.cuda.current_device():
        return _launch(function, logits, p, *args)
    with torch.cuda.device(device):
        return _launch(function, logits, p, *args)


def sample(
    logits: Sequence[torch.Tensor],
    p: Params,
    stream: str,
    slot: int,
    logprobs: bool,
    top_logprobs: int,
    diagnostics: bool,
    runners_up: int,
) -> Sampled:
    own = STREAM_CODES[stream], int(slot), bool(logprobs), int(top_logprobs), bool(diagnostics), int(runners_up)
    out: Sampled = _run(_cuda.sample, logits, p, *own)
    return out


def verify(
    logits: Sequence[torch.Tensor],
    p: Params,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    parents: MaybeTensor,
    method: str,
    draft: int,
    drawn_by: DraftParams,
    logprobs: bool,
) -> Verified:
    out: Verified = _run(
        _cuda.verify,
        logits,
        p,
        draft_tokens,
        draft_lengths,
        parents,
        METHOD_CODES[method],
        None if draft < 0 else int(draft),
        *drawn_by,
        bool(logprobs),
    )
    return out


# The same on arguments that nobody has checked, as in backends/cpu.py. Values of tensors are not looked at.


def _try(
    function: Callable[..., Outputs | None], logits: Sequence[torch.Tensor], row_index: object, *args: object
) -> Outputs | None:
    z = logits[0]
    rows = (row_index.shape if isinstance(row_index, torch.Tensor) else z.shape[:-1]).numel()
    device = z.device
    if _SIMT:
        stream = None
    elif device.index == torch.cuda.current_device():
        stream = _stream(device.index)
    else:
        return None
    return function(workspace.counters(2 * rows, device, stream), True, logits, row_index, *args)


def try_sample(logits: Sequence[torch.Tensor], *args: object) -> Sampled | None:
    return _try(_cuda.sample, logits, *args)


def try_verify(logits: Sequence[torch.Tensor], *args: object) -> Verified | None:
    return _try(_cuda.verify, logits, *args)


def logprobs(logits: Sequence[torch.Tensor], p: Params, scores: bool) -> torch.Tensor:
    out: tuple[torch.Tensor] = _run(_cuda.logprobs, logits, p, None, bool(scores))
    return out[0]


def token_logprobs(logits: Sequence[torch.Tensor], p: Params, ids: torch.Tensor) -> torch.Tensor:
    out: tuple[torch.Tensor] = _run(_cuda.logprobs, logits, p, ids, False)
    return out[0]
