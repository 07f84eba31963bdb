"""Small cases through every compiled backend of a device, for a tool that watches memory; tools/gpu.sh calls it.

compute-sanitizer --tool memcheck python -m tools sanitize          # or: python -m tools sanitize cpu
"""

from __future__ import annotations

import contextlib

from eft_kernels import dispatch, ops
from eft_kernels._backends.triton.config import TileConfig
from eft_kernels.cli.options import Parser
from eft_kernels.testing import BF16, CASES, Case, check_logprobs, check_sample, check_tree, check_verify

from .launch_config import launch_config
from .tune import forced

NAMES = (
    "one token",
    "a chunk and one",
    "two chunks and some",
    "bf16",
    "greedy ties",
    "top-p ties",
    "everything",
    "bad rows filtered",
    "strided",
    "unaligned",
)
# more chunks than multiprocessors take one each: the CUDA kernel of many rows
MANY = Case("many chunks", rows=80, vocab=(16000,), dtypes=(BF16,))
# tiles of the Triton kernels, by table: None is what the work asks for; with many rows several small ones. CUDA
# launches are configured for many rows by `LaunchConfig`.
LAUNCHES = {
    "few rows": dict(sample=None, stream=None),
    "many rows": dict(sample=TileConfig(4, 1), stream=TileConfig(2, 2)),
}


def backends(device: str) -> list[str]:
    """Those of the device that are here, without the definition in PyTorch."""
    return [b.name for b in dispatch.TABLE if device in b.devices and dispatch.status(b.name)[0]]


def launches(name: str) -> list[str]:
    """Those of `LAUNCHES` that make a difference to a backend."""
    return [*LAUNCHES] if name in ("triton", "cuda") else ["few rows"]


def calls(case, name: str, launch: str, device) -> int:
    """Runs a case under one of `LAUNCHES`; how many calls they were. With many rows only what differs."""
    if name == "cuda" and launch == "many rows":
        with launch_config(direct_chunks_per_sm=0, early_exit_blocks_per_sm=0):
            check_sample(case, name, device=device, logprobs=True, runners_up=2)
            for method in ("coupled", "token"):
                check_verify(case, name, method, device=device)
        return 3
    methods = ops.METHODS if launch == "few rows" else ("block",)
    with contextlib.ExitStack() as stack:
        for table, value in LAUNCHES[launch].items():
            if value:
                stack.enter_context(forced(table, value))
        check_sample(case, name, device=device, logprobs=False)
        check_sample(case, name, device=device, logprobs=True)
        check_logprobs(case, name, device=device)
        for method in methods:
            check_verify(case, name, method, device=device)
        if launch == "few rows":
            check_sample(case, name, device=device)
            check_tree(case, name, device=device)
    return 4 + len(methods) + 2 * (launch == "few rows")


def sanitize(device: str) -> int:
    """Runs the cases; how many calls they were."""
    number = sum(
        calls(case, name, launch, device)
        for name in backends(device)
        for launch in launches(name)
        for case in CASES
        if case.name in NAMES
    )
    if device != "cpu":
        for name in backends(device):
            check_sample(MANY, name, device=device, logprobs=True)
            number += 1
    print(f"{number} calls on {device}: {', '.join(backends(device)) or 'no backend but the reference'}")
    return number


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools sanitize", description=__doc__.split("\n\n")[0])
    p.add_argument("device", nargs="?", default="cuda", help="default: cuda")
    sanitize(p.parse_args(argv).device)
    return 0
