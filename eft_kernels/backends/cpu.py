"""The C++ backend for CPU tensors: `eft_kernels._cpu`, by address, with the interpreter lock released.

Threads: torch.get_num_threads(). EFT_KERNELS_CPU_ISA=baseline|avx2|avx512 forces an instruction set.
"""

from __future__ import annotations

import os

import torch

from ..params import Params

try:
    from .. import _cpu
except ImportError as error:
    raise ImportError("the C++ extension is not built: no C++ compiler was found at install time, or "
                      "EFT_KERNELS_CPU=0 was set; install g++ and reinstall") from error

_isa = _cpu.set_isa(os.environ.get("EFT_KERNELS_CPU_ISA") or None)
_STREAM = {"sample": 0, "draft": 1}
_METHOD = {"coupled": 0, "token": 1, "block": 2}
_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def status() -> tuple[bool, str]:
    return True, f"{_isa}, {torch.get_num_threads()} threads"


def set_isa(name: str | None) -> str:
    """Force an instruction set (None: the best one here); returns its name. For tests and measurements."""
    global _isa
    _isa = _cpu.set_isa(name)
    return _isa


def _call(logits: list[torch.Tensor], p: Params, slots: int) -> list:
    """The arguments that every operation has, in the order of csrc/bindings/cpu_module.cpp."""
    args = [logits[0].shape[0], slots, p.vocab_size, p.tuned, torch.get_num_threads(), len(logits)]
    for z in logits:
        stride = z.stride()
        args += (z.data_ptr(), stride[0], stride[1] if len(stride) == 3 else 0, _DTYPE[z.dtype])
    w = p.weights
    if isinstance(w, torch.Tensor):
        args += (w.data_ptr(), w.stride(0) if w.dim() == 2 else 0)
    else:
        args += (0, 0, *w)
    for value in p[1:8]:
        args += (value.data_ptr(), 0) if isinstance(value, torch.Tensor) else (0, value)
    args.append(0 if p.token_mask is None else p.token_mask.data_ptr())
    return args


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def sample(logits, p: Params, stream: str, slot: int, logprobs: bool, top_logprobs: int, diagnostics: bool):
    B, n = logits[0].shape[0], top_logprobs
    out = [torch.empty(B, dtype=torch.int64), torch.empty(B, dtype=torch.bool)]
    out += [torch.empty(B), torch.empty(B)] if logprobs else [None, None]
    out += [torch.empty((B, n), dtype=torch.int64), torch.empty((B, n))] if n else [None, None]
    out += [torch.empty(B), torch.empty(B)] if diagnostics else [None, None]
    if B:
        _cpu.sample(*_call(logits, p, 1), _STREAM[stream], slot, n, *map(_address, out))
    return out


def verify(logits, p: Params, draft_tokens, draft_lengths, method: str, draft: int, logprobs: bool):
    B, S = logits[0].shape[:2]
    out = [torch.empty((B, S), dtype=torch.int64), torch.empty(B, dtype=torch.int64), torch.empty(B, dtype=torch.bool)]
    out += [torch.empty((B, S)), torch.empty((B, S))] if logprobs else [None, None]
    if B:
        _cpu.verify(*_call(logits, p, S), draft_tokens.data_ptr(), draft_lengths.data_ptr(), _METHOD[method], draft,
                    *map(_address, out))
    return out


def logprobs(logits, p: Params):
    out = torch.empty(logits[0].shape[0], p.vocab_size)
    if out.numel():
        _cpu.logprobs(*_call(logits, p, 1), 0, 0, out.data_ptr())
    return out


def token_logprobs(logits, p: Params, ids):
    out = torch.empty(ids.shape)
    if out.numel():
        _cpu.logprobs(*_call(logits, p, 1), ids.data_ptr(), ids.shape[1], out.data_ptr())
    return out
