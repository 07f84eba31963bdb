"""Small cases through every compiled backend of a device, for a tool that watches memory; benchmarks/gpu.sh calls it.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize          # or: python -m benchmarks.sanitize cpu
"""

import sys

from eft_kernels import dispatch, ops
from eft_kernels.testing import CASES, check_logprobs, check_sample, check_verify

NAMES = ("one token", "a chunk and one", "two chunks and some", "greedy ties", "top-p ties", "everything",
         "bad rows filtered", "strided", "unaligned")


def backends(device: str) -> list[str]:
    """Those of the device that are here, without the definition in PyTorch."""
    return [b.name for b in dispatch.TABLE if device in b.devices and dispatch.status(b.name)[0]]


def main(device: str = "cuda") -> int:
    """Runs the cases; how many calls they were."""
    cases, calls = [case for case in CASES if case.name in NAMES], 0
    for name in backends(device):
        for case in cases:
            check_sample(case, name, device=device)
            check_sample(case, name, device=device, logprobs=False)
            check_logprobs(case, name, device=device)
            for method in ops.METHODS:
                check_verify(case, name, method, device=device)
            calls += 4 + len(ops.METHODS)
    print(f"{calls} calls on {device}: {', '.join(backends(device)) or 'no backend but the reference'}")
    return calls


if __name__ == "__main__":
    main(*sys.argv[1:])
