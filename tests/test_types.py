"""Calls as the documentation shows them: they run here, and mypy (`make lint`) holds them to the annotations."""

from __future__ import annotations

import numpy
import torch

import eft_kernels as eft

B, V = 2, 40


def logits() -> list[torch.Tensor]:
    return list(torch.randn(3, B, V, generator=torch.Generator().manual_seed(0)))


def test_a_parameter_is_a_number_a_tensor_a_list_or_an_array() -> None:
    z, w = logits(), eft.upscale()
    want = eft.sample(z, w, temperature=0.5, top_k=5, seed=1, position=2).tokens
    same = [
        eft.sample(z, w, temperature=[0.5] * B, top_k=[5] * B, seed=1, position=2),
        eft.sample(
            logits(),
            eft.upscale(),
            temperature=torch.full((B,), 0.5),
            top_k=torch.full((B,), 5),
            seed=1,
            position=[2, 2],
        ),
        eft.sample(
            logits(),
            eft.upscale(),
            temperature=numpy.full(B, 0.5),
            top_k=numpy.full(B, 5),
            seed=1,
            position=numpy.full(B, 2),
        ),
        eft.sample(
            logits(),
            eft.upscale(),
            temperature=numpy.float32(0.5),
            top_k=numpy.int64(5),
            seed=numpy.int64(1),
            position=2,
        ),
        eft.sample(z, w, temperature=0.5, top_k=5, typical_p=None, seed=1, position=2),
    ]
    assert all(torch.equal(out.tokens, want) for out in same)


def test_weights_are_numbers_values_per_row_tensors_and_arrays() -> None:
    want = eft.combine(logits(), eft.upscale(2.0))
    rows = [[2.0, 1.0, -2.0]] * B
    same = [
        eft.combine(logits(), [2, 1.0, -2.0]),
        eft.combine(logits(), eft.upscale([2.0] * B)),
        eft.combine(logits(), eft.upscale(numpy.full(B, 2.0))),
        eft.combine(logits(), eft.upscale(torch.full((B,), 2.0))),
        eft.combine(logits(), eft.weights([[2.0, 2.0], 1.0, torch.tensor([-2.0, -2.0])])),
        eft.combine(logits(), rows),
        eft.combine(logits(), numpy.array(rows)),
        eft.combine(logits(), torch.tensor(rows)),
    ]
    assert all(torch.equal(scores, want) for scores in same)


def test_penalties_per_row() -> None:
    prompt, output = torch.zeros(B, 3, dtype=torch.int64), torch.ones(B, 2, dtype=torch.int64)
    want = eft.penalties(prompt, output, presence=0.5)
    for presence in ([0.5] * B, numpy.full(B, 0.5), torch.full((B,), 0.5)):
        assert torch.equal(eft.penalties(prompt, output, presence=presence).values, want.values)
