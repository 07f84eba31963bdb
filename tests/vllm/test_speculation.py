"""Speculation on the V2 runner: with likeliest drafts the texts of plain decoding, with drawn ones its distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from shipped import FAMILY, override, requests_of
from test_engine import check
from test_sampler import CHANGES, Loop, seeded

from benchmarks.vllm_engine import Engine


def drafting(**more) -> dict:
    return {"method": "draft_model", "model": str(FAMILY / "tuned-a"), "num_speculative_tokens": 3, **more}


@pytest.fixture(scope="module")
def likeliest():
    options = dict(hf_overrides=override(), speculative_config=drafting(), max_num_seqs=8)
    with Engine("v2", model=str(FAMILY / "base"), **options) as engine:
        yield engine


def accepted(engine) -> float:
    return engine.metrics["vllm:spec_decode_num_accepted_tokens"]


def test_texts_are_those_of_plain_decoding(likeliest, family):
    requests = requests_of(
        16,
        seed=lambda i: 70 + i,
        temperature=lambda i: (0.0, 0.6, 1.0)[i % 3],
        top_p=lambda i: (1.0, 0.9)[i % 2],
        extra_args=lambda i: [{}, {"eft": {"beta": 1.0 + 0.1 * i}}, {"eft": {"upscale_top_p": 0.9}}][i % 3],
    )
    check(family, requests, likeliest.generate(requests))
    assert accepted(likeliest) > 50


def test_changed_scores_and_grammars(likeliest, family):
    # vLLM refuses these two while it speculates
    changes = [change for change in CHANGES if not {"logit_bias", "min_p"}.intersection(change)]
    requests = [seeded(i, **change) for i, change in enumerate(changes)]
    for i, output in enumerate(likeliest.generate(requests)):
        assert output["tokens"] == Loop(family, requests[i]).run(), requests[i]
    (output,) = likeliest.generate([seeded(2, structured_outputs={"choice": ["yes", "no", "perhaps"]})])
    assert output["text"] in ("yes", "no", "perhaps")


def test_logprobs(likeliest, family):
    requests = [seeded(i, logprobs=2, temperature=0.3) for i in range(3)]
    for request, output in zip(requests, likeliest.generate(requests)):
        loop = Loop(family, request)
        assert output["tokens"] == loop.run()
        for token, row, found in zip(output["tokens"], loop.logprobs, output["logprobs"]):
            assert set(map(int, found)) == {token, *row.topk(2).indices.tolist()}
            for i, value in found.items():
                assert value == pytest.approx(row[int(i)].item(), abs=2e-4)


@pytest.mark.parametrize("rule", ["standard", "block"])
def test_distribution_of_drawn_drafts(family, rule):
    """Chi-squared of texts of three tokens, two of which are verified drafts.

    The target leans away from the model that drafts.
    """
    config = drafting(draft_sample_method="probabilistic", rejection_sample_method=rule)
    options = dict(hf_overrides=override(), speculative_config=config, max_num_seqs=16)
    n, prompt = 400, "And the"
    request = dict(prompt=prompt, max_tokens=3, top_k=3, temperature=1.2, extra_args={"eft": {"alpha": -0.5}})
    with Engine("v2", model=str(FAMILY / "base"), **options) as engine:
        outputs = engine.generate([request | {"seed": i} for i in range(n)])
        assert accepted(engine) > 40
        check_greedy = requests_of(4, temperature=0)
        check(family, check_greedy, engine.generate(check_greedy))
    texts = Counter(tuple(o["tokens"]) for o in outputs)
    expected = probabilities(family, request)
    assert set(texts) <= set(expected)
    bins = [(texts[t], n * p) for t, p in expected.items() if n * p >= 5]
    rest = n - sum(got for got, _ in bins), n - sum(want for _, want in bins)
    statistic = sum((got - want) ** 2 / want for got, want in [*bins, rest] if want > 1)
    freedom = len(bins)
    assert freedom > 10
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (statistic, freedom)


def probabilities(family, request) -> dict:
    """Of each text of three tokens."""
    loop, found = Loop(family, request), {(): 1.0}
    for _ in range(request["max_tokens"]):
        longer = {}
        for text, p in found.items():
            if text and text[-1] == family.tokenizer.eos_token_id:
                longer[text] = p
                continue
            top = (loop.scores(loop.prompt + list(text))[0] / request["temperature"]).topk(request["top_k"])
            for i, q in zip(top.indices.tolist(), torch.softmax(top.values, 0).tolist()):
                longer[(*text, i)] = p * q
        found = longer
    return found
