"""Suites of shapes, and those that whole generations (generate.py) are a part of."""

from __future__ import annotations

import functools

import torch

from eft_kernels.bench import inputs
from eft_kernels.bench.shapes import OPS, PEERS, Shape, on, quick, unique, variants

VOCABS = (32000, 128256, 151936, 256000)


def factors(batches, **fixed) -> list[Shape]:
    """The other factors, one at a time."""
    S, both = functools.partial(Shape, against=PEERS, rounds=7, **fixed), ("plain", "top_p")
    out = [S("verify", v, b, draft_tokens=k) for v in OPS["verify"] for k in (1, 8) for b in batches]
    out += [S("sample", "plain", b, models=j) for j in (1, 4) for b in batches]
    out += [S("sample", v, b, dtype=d) for d in ("float16", "float32") for v in both for b in batches]
    out += [S("sample", v, b, logits="flat") for v in both for b in batches]
    return out + [S("sample", v, b, inputs.FAMILY_VOCAB, logits="family") for v in both for b in batches]


def grid(batches, **fixed) -> list[Shape]:
    return [Shape("sample", "plain", b, v, against=PEERS, rounds=5, **fixed) for b in batches for v in VOCABS] + [
        Shape("sample", "plain", 512, 32000, against=PEERS, rounds=5, **fixed)
    ]


def cpu() -> list[Shape]:
    centre = [Shape("sample", v, b, threads=t) for t in (1, 2) for b in (1, 8, 64) for v in ("plain", "top_p")]
    return unique([*centre, *variants((1, 8)), *factors((1, 8)), *grid((1, 8, 64))])


def gpu() -> list[Shape]:
    batches, graph = (1, 64, 256, 8, 512), on("cuda")  # those of goals first: time may run out
    centre = [
        Shape("sample", v, b, **graph | dict(launch=how))
        for how in ("graph", "eager")
        for b in batches
        for v in ("plain", "top_p")
    ]
    return unique([*centre, *variants((1, 64), **graph), *factors((1, 64), **graph), *grid(batches, **graph)])


def everything() -> list[Shape]:
    return cpu() + (gpu() if torch.cuda.is_available() else [])


SUITES = {"quick": quick, "cpu": cpu, "gpu": gpu, "all": everything}
# suites of which whole generations (generate.py) are a part, or all: numbers of drafts, rounds
GENERATIONS = {"generate": (tuple(range(1, 9)), 5), "cpu": ((2, 4), 3), "all": ((2, 4), 3)}
