"""An emulated model in SGLang's engine writes what `eft.hf.generate` writes, request by request."""

from __future__ import annotations

import pytest
from engine import Engine

from tests.vllm.shipped import FAMILY, PROMPTS, override, requests_of

GREEDY = dict(temperature=0)


@pytest.fixture(scope="module")
def engine(compose):
    # a prompt is read in steps of 32 tokens, and 6 requests are less than what waits
    with Engine(model_path=compose(), chunked_prefill_size=32, grammar_backend="xgrammar") as engine:
        yield engine


def check(family, requests, outputs, **more):
    for i, (request, output) in enumerate(zip(requests, outputs)):
        assert output["output_ids"] == family.generate(request, **more), f"request {i}: {request}"


def ids(family, requests) -> list[dict]:
    return [request | {"prompt": family.ids(request["prompt"])} for request in requests]


def test_greedy(engine, family):
    requests = ids(family, requests_of(20, **GREEDY))
    check(family, requests, engine.generate(requests))


def test_long_prompts_and_shared_prefixes(engine, family):
    """Prompts of several chunks, and prompts whose start the prefix cache has."""
    long = family.ids(" ".join(PROMPTS))
    requests = [dict(prompt=long[: 40 + 13 * i], max_tokens=10 + i, **GREEDY) for i in range(6)]
    assert len(requests[-1]["prompt"]) > 3 * 32
    check(family, requests, engine.generate(requests))
    outputs = engine.generate(requests)
    assert all(output["meta_info"]["cached_tokens"] > 30 for output in outputs)
    check(family, requests, outputs)
