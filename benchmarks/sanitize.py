"""Small cases through every compiled backend of a device, for a tool that watches memory; benchmarks/gpu.sh calls it.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize          # or: python -m benchmarks.sanitize cpu
"""

import contextlib
import sys

from eft_kernels import dispatch, ops
from eft_kernels.testing import BF16, CASES, Case, check_logprobs, check_sample, check_verify
from eft_kernels.triton.config import Cut

from . import cuts as cuda_cuts
from .tune import forced

NAMES = ("one token", "a chunk and one", "two chunks and some", "bf16", "greedy ties", "top-p ties", "everything",
         "bad rows filtered", "strided", "unaligned")
# more chunks than multiprocessors take one each: the CUDA kernel of many rows
MANY = Case("many chunks", rows=80, vocab=(16000,), dtypes=(BF16,))
# how Triton cuts a launch: of each table None, what the work asks for, or several small tiles, as with many rows; CUDA
# launches take the way of many rows with a knob
CUTS = {"few rows": dict(sample=None, stream=None), "many rows": dict(sample=Cut(4, 1), stream=Cut(2, 2))}


def backends(device: str) -> list[str]:
    """Those of the device that are here, without the definition in PyTorch."""
    return [b.name for b in dispatch.TABLE if device in b.devices and dispatch.status(b.name)[0]]


def cuts(name: str) -> list[str]:
    """Those of `CUTS` that make a difference to a backend."""
    return [*CUTS] if name in ("triton", "cuda") else ["few rows"]


def calls(case, name: str, cut: str, device) -> int:
    """Runs a case under one of `CUTS`; how many calls they were. With many rows only what differs."""
    if name == "cuda" and cut == "many rows":
        with cuda_cuts.forced(direct=0, ask=0):
            check_sample(case, name, device=device, logprobs=True)
            for method in ("coupled", "token"):
                check_verify(case, name, method, device=device)
        return 3
    methods = ops.METHODS if cut == "few rows" else ("block",)
    with contextlib.ExitStack() as stack:
        for table, value in CUTS[cut].items():
            if value:
                stack.enter_context(forced(table, value))
        check_sample(case, name, device=device, logprobs=False)
        check_sample(case, name, device=device, logprobs=True)
        check_logprobs(case, name, device=device)
        for method in methods:
            check_verify(case, name, method, device=device)
        if cut == "few rows":
            check_sample(case, name, device=device)
    return 4 + len(methods) + (cut == "few rows")


def main(device: str = "cuda") -> int:
    """Runs the cases; how many calls they were."""
    number = sum(calls(case, name, cut, device) for name in backends(device) for cut in cuts(name)
                 for case in CASES if case.name in NAMES)
    if device != "cpu":
        for name in backends(device):
            check_sample(MANY, name, device=device, logprobs=True)
            number += 1
    print(f"{number} calls on {device}: {', '.join(backends(device)) or 'no backend but the reference'}")
    return number


if __name__ == "__main__":
    main(*sys.argv[1:])
