"""An emulated model in SGLang's engine writes what `eft.hf.generate` writes, request by request."""

from __future__ import annotations

import pytest
from engine import Engine

from tests.vllm.shipped import FAMILY, PROMPTS, requests_of


def ids(family, requests) -> list[dict]:
    return [request | {"prompt": family.ids(request["prompt"])} for request in requests]


def check(family, requests, outputs, **more):
    for i, (request, output) in enumerate(zip(requests, outputs)):
        assert output["output_ids"] == family.generate(request, **more), f"request {i}: {request}"


@pytest.fixture(scope="module")
def engine(compose):
    # a prompt is read in steps of 32 tokens; 6 requests run at once
    with Engine(model_path=compose(), chunked_prefill_size=32) as engine:
        yield engine


def test_greedy(engine, family):
    requests = ids(family, requests_of(20, temperature=0))
    check(family, requests, engine.generate(requests))


def test_long_prompts_and_shared_prefixes(engine, family):
    """Prompts of several chunks, and prompts whose start the prefix cache has."""
    long = family.ids(" ".join(PROMPTS + PROMPTS[::-1]))
    requests = [dict(prompt=long[: 40 + 17 * i], max_tokens=10 + i, temperature=0) for i in range(6)]
    assert len(requests[-1]["prompt"]) > 3 * 32
    check(family, requests, engine.generate(requests))
    outputs = engine.generate(requests)
    assert all(output["meta_info"]["cached_tokens"] > 30 for output in outputs)
    check(family, requests, outputs)


def test_weights_stay(engine, family):
    success, message, *_ = engine.call("update_weights_from_disk", str(FAMILY / "base"))
    assert not success and "it would change the weights of base alone" in message
    requests = ids(family, requests_of(2, temperature=0))
    check(family, requests, engine.generate(requests))


@pytest.fixture(scope="module")
def fused(compose):
    # memory for a few requests: others are put back and begin again
    with Engine(model_path=compose(), sampling_backend="eft", max_total_tokens=256) as engine:
        yield engine


def test_sampled(fused, family):
    """Seeds, strengths, temperatures and filters of each request's own, in one batch."""
    requests = requests_of(
        24,
        seed=lambda i: 1000 + i,
        temperature=lambda i: (0.8, 0.0, 1.0, 1.3)[i % 4],
        top_p=lambda i: (1.0, 0.9)[i % 2],
        top_k=lambda i: (0, 20, 0)[i % 3],
        min_p=lambda i: (0.0, 0.0, 0.05)[i % 3],
        extra_args=lambda i: [{}, {"eft": {"beta": 1.0 + 0.1 * i}}, {"eft": {"upscale_top_p": 0.9}}][i % 3],
    )
    check(family, requests, fused.generate(as_sglang(family, requests)))


def test_put_back_requests(fused, family):
    requests = requests_of(12, seed=lambda i: i, temperature=0.9)
    for request in requests:
        request["max_tokens"] = 90
    outputs = fused.generate(as_sglang(family, requests))
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) > 0
    check(family, requests, outputs)


def as_sglang(family, requests) -> list[dict]:
    """Requests of `Family.generate` in SGLang's words."""
    theirs = []
    for request in ids(family, requests):
        request["sampling_seed"] = request.pop("seed")
        request["custom_params"] = request.pop("extra_args", None)
        request["top_k"] = request.get("top_k") or -1
        theirs.append(request)
    return theirs
