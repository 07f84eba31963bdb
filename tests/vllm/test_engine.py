"""EftForCausalLM in vLLM's engine writes what `eft.hf.generate` writes, request by request."""

from __future__ import annotations

import pytest
from shipped import FAMILY, override, requests_of

from benchmarks.vllm_engine import Engine


@pytest.fixture(scope="module")
def v1():
    with Engine("v1", model=str(FAMILY / "base"), hf_overrides=override()) as engine:
        yield engine


def check(family, requests, outputs, **more):
    for i, (request, output) in enumerate(zip(requests, outputs)):
        assert output["prompt"] == family.ids(request["prompt"])
        assert output["tokens"] == family.generate(request, **more), f"request {i}: {request}"


def test_greedy_v1(v1, family):
    requests = requests_of(20, temperature=0)
    check(family, requests, v1.generate(requests))


@pytest.fixture(scope="module")
def v2():
    with Engine("v2", model=str(FAMILY / "base"), hf_overrides=override()) as engine:
        yield engine


def test_greedy_v2(v2, family):
    requests = requests_of(8, temperature=0)
    check(family, requests, v2.generate(requests))


def test_sampled_v2(v2, family):
    """Seeds, strengths, temperatures and filters of each request's own, in one batch."""
    requests = requests_of(
        20,
        seed=lambda i: 1000 + i,
        temperature=lambda i: (0.8, 0.0, 1.0, 1.3)[i % 4],
        top_p=lambda i: (1.0, 0.9)[i % 2],
        top_k=lambda i: (0, 20, 0)[i % 3],
        min_p=lambda i: (0.0, 0.0, 0.05)[i % 3],
        extra_args=lambda i: [{}, {"eft": {"beta": 1.0 + 0.1 * i}}, {"eft": {"upscale_top_p": 0.9}}][i % 3],
    )
    check(family, requests, v2.generate(requests))
