"""Kernels with one fault each. test_aot.py runs this file: `python planted_kernels.py sm_90` prints their rows."""

import json
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tools import aot


class Logits(NamedTuple):
    z: tuple
    stride: tuple


@triton.jit
def planted_kernel(m, out, V, TC: tl.constexpr, SHIFT: tl.constexpr, FMA: tl.constexpr, WORK: tl.constexpr):
    best = tl.full([TC, 256], float("-inf"), tl.float32)
    for first in range(0, V, TC * 256):
        token = first + tl.arange(0, TC)[:, None] * 256 + tl.arange(0, 256)[None, :]
        for j in tl.static_range(len(m.z)):
            x = tl.load(m.z[j] + token + SHIFT).to(tl.float32)
            x = tl.fma(x, 3.0, 0.25) if FMA else x * 3.0 + 0.25
            for _ in tl.static_range(WORK):
                x = x * 3.0 + 0.25
            best = tl.maximum(best, x)
    tl.store(out + tl.arange(0, TC), tl.max(best, 1))


@triton.jit
def unknown_kernel(out):
    tl.store(out, 1.0)


def call(TC=8, SHIFT=0, FMA=False, WORK=0, warps=4, fuse=False, **options):
    z, out = torch.empty(1, 1 << 16, dtype=torch.bfloat16), torch.empty(TC)
    planted_kernel[(1,)](
        Logits((z,) * 3, (1 << 16,) * 3),
        out,
        1 << 16,
        TC,
        SHIFT,
        FMA,
        WORK,
        num_warps=warps,
        enable_fp_fusion=fuse,
        **options,
    )


def fails():
    raise RuntimeError("said so")


if __name__ == "__main__":
    target = sys.argv[1]
    few = dict(waves_per_eu=8) if target.startswith("gfx") else dict(maxnreg=32)
    aot.KERNELS["planted_kernel"] = aot.Kernel()
    print(
        json.dumps(
            aot.compile_all(
                target,
                dict(
                    good=call,
                    fusion=lambda: call(fuse=True),
                    fma=lambda: call(FMA=True),
                    shifted=lambda: call(SHIFT=1),
                    works=lambda: call(WORK=6),
                    spills=lambda: call(TC=32, warps=1, **few),
                    fails=fails,
                    unknown=lambda: unknown_kernel[(1,)](torch.empty(1), enable_fp_fusion=False),
                ),
            )
        )
    )
