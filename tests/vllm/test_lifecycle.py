"""Requests that join, leave, are aborted and preempted at random: each text is that of its request alone."""

from __future__ import annotations

import random

import pytest
from shipped import FAMILY, PROMPTS, override

from benchmarks.vllm_engine import Engine


@pytest.mark.parametrize("runner,count", [("v1", 300), ("v2", 200)])
def test_random_lifecycle(family, runner, count):
    draw = random.Random(7)
    requests, arrivals, aborts = [], [], []
    for i in range(count):
        prompt = family.ids(PROMPTS[draw.randrange(len(PROMPTS))])
        # prefixes in common, some longer than what a step takes at once
        request = dict(prompt=prompt * draw.choice([1, 1, 1, 8, 20]), max_tokens=draw.randrange(1, 40))
        request["temperature"] = 0.0
        if runner == "v2":
            request |= dict(seed=i, temperature=draw.choice([0.0, 0.7, 1.0]), top_p=draw.choice([1.0, 0.9]))
            request["extra_args"] = {"eft": draw.choice([{}, {"beta": draw.uniform(0.5, 2)}])}
        requests.append(request)
        arrivals.append(draw.randrange(count))
        aborts.append(arrivals[i] + draw.randrange(1, 30) if draw.random() < 0.15 else -1)
    options = dict(max_num_seqs=8, max_num_batched_tokens=64, block_size=32, num_gpu_blocks_override=12)
    with Engine(runner, model=str(FAMILY / "base"), hf_overrides=override(), **options) as engine:
        outputs = engine.generate(requests, arrivals=arrivals, aborts=aborts)
        metrics = engine.metrics
    assert metrics["vllm:num_preemptions"] > 5
    assert metrics["vllm:prefix_cache_hits"] > 100
    finished = [i for i, output in enumerate(outputs) if output["tokens"] is not None]
    assert all(aborts[i] >= 0 for i in range(count) if i not in finished)
    assert 0 < len(finished) < count
    for i in finished:
        assert outputs[i]["tokens"] == family.generate(requests[i]), f"request {i}: {requests[i]}"
