"""The C++ backend for CPU tensors: `eft_kernels._cpu`, with the interpreter lock released.

Threads: torch.get_num_threads(). EFT_KERNELS_CPU_ISA=baseline|avx2|avx512 forces an instruction set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..dispatch import MaybeTensor, Sampled, Verified
from ..parameters import METHOD_CODES, STREAM_CODES, DraftParams, Params
from . import extension, workspace

Outputs = TypeVar("Outputs")

_cpu = extension.load(
    "_cpu", "C++", "no C++ compiler was found at install time, or EFT_KERNELS_CPU=0 was set; install g++ and reinstall"
)


def _chosen_isa() -> str:
    """The instruction set of EFT_KERNELS_CPU_ISA, else the best one here."""
    name = os.environ.get("EFT_KERNELS_CPU_ISA") or None
    try:
        isa: str = _cpu.set_isa(name)
        return isa
    except ValueError:
        raise ValueError(f"EFT_KERNELS_CPU_ISA: got {name!r}, allowed here are {', '.join(_isas())}") from None


def _isas() -> list[str]:
    names = []
    for name in ("baseline", "avx2", "avx512"):
        try:
            names.append(_cpu.set_isa(name))
        except ValueError:
            pass
    return names


_isa: str = _chosen_isa()


def status() -> tuple[bool, str]:
    return True, f"{_isa}, {torch.get_num_threads()} threads"


def set_isa(name: str | None) -> str:
    """Force an instruction set (None: the best one here); returns its name. For tests and measurements."""
    global _isa
    _isa = _cpu.set_isa(name)
    return _isa


def _run(function: Callable[..., Outputs | None], logits: Sequence[torch.Tensor], p: Params, *args: object) -> Outputs:
    """The tensors of a call whose arguments were checked."""
    *values, bias, vocab_size, tuned, row_index = p
    params = (row_index, *values, workspace.sorted_bias(bias, vocab_size), vocab_size, tuned)
    out = function(torch.get_num_threads(), False, logits, *params, *args)
    if out is None:  # a subclass of torch.Tensor
        logits = [z.detach().as_subclass(torch.Tensor) for z in logits]
        out = function(torch.get_num_threads(), False, logits, *params, *args)
        assert out is not None, "the extension takes other arguments than eft_kernels.arguments makes"
    return out


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
    out: Sampled = _run(_cpu.sample, logits, p, *own)
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
        _cpu.verify,
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


def logprobs(logits: Sequence[torch.Tensor], p: Params, scores: bool) -> torch.Tensor:
    out: tuple[torch.Tensor] = _run(_cpu.logprobs, logits, p, None, bool(scores))
    return out[0]


def token_logprobs(logits: Sequence[torch.Tensor], p: Params, ids: torch.Tensor) -> torch.Tensor:
    out: tuple[torch.Tensor] = _run(_cpu.logprobs, logits, p, ids, False)
    return out[0]


# The same on arguments that nobody has checked: the extension does, in their usual forms, because that takes Python
# longer than the kernel a row. None where one is unusual; then look closer (eft_kernels.arguments), and say what is
# wrong.


def try_sample(logits: Sequence[torch.Tensor], *args: object) -> Sampled | None:
    out: Sampled | None = _cpu.sample(torch.get_num_threads(), True, logits, *args)
    return out


def try_verify(logits: Sequence[torch.Tensor], *args: object) -> Verified | None:
    out: Verified | None = _cpu.verify(torch.get_num_threads(), True, logits, *args)
    return out
