"""What SGLang's requests change in the scores: with its own sampler and with ``--sampling-backend eft``."""

from __future__ import annotations

import math
import re

import pytest
import torch
from engine import Engine
from test_engine import as_sglang

from tests.vllm.shipped import PROMPTS, Loop

LIKELY = [5, 11, 13, 14, 16, 262, 263, 264, 265, 266, 270, 280, 300, 310]


class TheirLoop(Loop):
    """One request, token by token, with SGLang's penalties in SGLang's order."""

    def changed(self, scores, new):
        request, s = self.request, scores[0].clone()
        counts = torch.bincount(torch.tensor(new, dtype=torch.int64), minlength=len(s))
        s -= request.get("frequency_penalty", 0.0) * counts
        s -= request.get("presence_penalty", 0.0) * (counts > 0)
        if len(new) < request.get("min_new_tokens", 0):
            s[self.family.tokenizer.eos_token_id] = -math.inf
        penalty = torch.where(counts > 0, request.get("repetition_penalty", 1.0), 1.0)
        s = torch.where(s < 0, s * penalty, s / penalty)
        for i, bias in request.get("logit_bias", {}).items():
            s[int(i)] += bias
        return s[None]

    def scores(self, ids, mask=None):
        return super().scores(ids)  # SGLang masks the combined scores


CHANGES = [
    dict(repetition_penalty=1.4),
    dict(frequency_penalty=2.0, presence_penalty=1.5),
    dict(logit_bias={str(i): 4.0 for i in LIKELY[:4]} | {"300": -100.0}),
    dict(min_new_tokens=20, logit_bias={"2": 40.0}),
    dict(presence_penalty=0.5, frequency_penalty=1.0, repetition_penalty=1.2),
]
OWN = [
    dict(repetition_penalty=1.4, extra_args={"eft": {"beta": 1.4}}),
    dict(
        presence_penalty=2.0,
        logit_bias={str(i): 4.0 for i in LIKELY},
        extra_args={"eft": {"upscale_top_p": 0.8}},
    ),
    dict(repetition_penalty=1.2, top_p=0.8, min_p=0.02, top_k=30, extra_args={"eft": {"alpha": 0.5}}),
]


def seeded(i: int, **more) -> dict:
    return dict(prompt=PROMPTS[i % len(PROMPTS)], max_tokens=24, seed=500 + i) | more


def start(compose, sampler: str, **more):
    options = dict(grammar_backend="xgrammar", chunked_prefill_size=32, **more)
    if sampler == "eft":
        options["sampling_backend"] = "eft"
    engine = Engine(model_path=compose(), **options)
    engine.fused = sampler == "eft"
    return engine


SAMPLERS = ["SGLang's sampler", "eft"]


@pytest.fixture(scope="module", params=SAMPLERS)
def engine(request, compose):
    with start(compose, request.param) as engine:
        yield engine


def run(engine, family, requests, extra=()):
    asked = as_sglang(family, requests)
    for request, more in zip(asked, extra):
        request["extra"] = more
    return engine.generate(asked)


def of_engine(engine, requests) -> list[dict]:
    """Without seeds of its own, SGLang's sampler can be held to greedy texts alone."""
    return requests if engine.fused else [request | {"temperature": 0.0} for request in requests]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_changed_scores(compose, sampler, family):
    """Beside requests that nothing changes; each changes its text."""
    # where steps overlap, SGLang counts a token for its penalties one step late
    with start(compose, sampler, disable_overlap_schedule=True) as engine:
        changes = CHANGES + (OWN if engine.fused else [])
        requests = of_engine(engine, [seeded(i, **change) for i, change in enumerate(changes)])
        plain = of_engine(engine, [seeded(i, extra_args=change.get("extra_args")) for i, change in enumerate(changes)])
        beside = [r for pair in zip(requests, plain) for r in pair]
        got = [output["output_ids"] for output in run(engine, family, beside)]
    for i, request in enumerate(beside):
        assert got[i] == TheirLoop(family, request).run(), f"request {i}: {request}"
    assert [i for i in range(0, len(got), 2) if got[i] == got[i + 1]] == [], "these changed nothing"


def test_logprobs(engine, family):
    requests = of_engine(engine, [seeded(0), seeded(1), seeded(2, top_p=0.5), seeded(3, temperature=0.7)])
    extra = [dict(return_logprob=True, top_logprobs_num=n) for n in (5, 0)] + [{}, dict(return_logprob=True)]
    for request, more, output in zip(requests, extra, run(engine, family, requests, extra)):
        loop = TheirLoop(family, request)
        assert output["output_ids"] == loop.run()
        meta = output["meta_info"]
        if not more:
            assert "output_token_logprobs" not in meta
            continue
        assert not meta["input_token_logprobs"]
        temperature = request.get("temperature", 1.0) or 1.0  # SGLang's are those of the tempered scores
        top = meta.get("output_top_logprobs") or [None] * len(output["output_ids"])
        for token, row, found, likely in zip(output["output_ids"], loop.logprobs, meta["output_token_logprobs"], top):
            row = (row / temperature).log_softmax(-1)
            assert found[1] == token and found[0] == pytest.approx(row[token].item(), abs=2e-4)
            if likely:
                assert [i for _, i, _ in likely] == row.topk(more["top_logprobs_num"]).indices.tolist()


def test_prompt_logprobs(engine, family):
    """From the start and from the middle, in chunks, beside a request that asks for none; texts stay as they are."""
    long = family.ids(" ".join(PROMPTS))
    requests = of_engine(engine, [seeded(i, prompt=long[3 * i : 3 * i + 45]) for i in range(3)])
    if engine.fused:
        requests[0]["extra_args"] = {"eft": {"beta": 1.5}}
        requests[2]["extra_args"] = {"eft": {"upscale_top_p": 0.8}}
    extra = [dict(return_logprob=True, logprob_start_len=0, top_logprobs_num=3), {}]
    extra.append(dict(return_logprob=True, logprob_start_len=30, token_ids_logprob=[5, 300]))
    outputs = run(engine, family, requests, extra)
    for request, more, output in zip(requests, extra, outputs):
        loop, meta, start = TheirLoop(family, request), output["meta_info"], more.get("logprob_start_len", 0)
        assert output["output_ids"] == loop.run()
        found = meta.get("input_token_logprobs", [])
        assert len(found) == (len(request["prompt"]) - start if more else 0)
        for n, (value, token, _) in enumerate(found, start):
            assert token == request["prompt"][n]
            if n == start:
                assert value is None
                continue
            row = loop.scores(request["prompt"][:n]).log_softmax(-1)[0]
            assert value == pytest.approx(row[token].item(), abs=2e-4)
            if "top_logprobs_num" in more:
                assert [i for _, i, _ in meta["input_top_logprobs"][n - start]] == row.topk(3).indices.tolist()
            else:
                for value, i, _ in meta["input_token_ids_logprobs"][n - start]:
                    assert value == pytest.approx(row[i].item(), abs=2e-4)


def test_grammar(engine, family):
    import xgrammar as xgr

    info = xgr.TokenizerInfo.from_huggingface(family.tokenizer, vocab_size=len(family.tokenizer))
    compiler = xgr.GrammarCompiler(info)
    patterns = ["[a-z ]{4,20}\\.", None, "yes|no|perhaps", "[A-Z]{3}[0-9]{1,4}"]
    requests = of_engine(engine, [seeded(i) for i in range(4)])
    if engine.fused:
        requests[0]["extra_args"] = {"eft": {"beta": 1.3, "upscale_top_p": 0.9}}
    asked = as_sglang(family, requests)
    for request, pattern in zip(asked, patterns):
        if pattern:
            request["regex"] = pattern
    outputs = engine.generate(asked)
    for request, pattern, output in zip(requests, patterns, outputs):
        matcher = xgr.GrammarMatcher(compiler.compile_regex(pattern)) if pattern else None
        assert output["output_ids"] == TheirLoop(family, request).run(matcher), f"{pattern}: {request}"
        assert pattern is None or re.fullmatch(pattern, output["text"])


def test_seeds_of_requests_without_one(engine, family):
    """Two texts of one prompt are two draws."""
    request = seeded(0) | {"seed": None}
    first, second = run(engine, family, [request] * 2)
    assert first["output_ids"] != second["output_ids"]


REFUSED = [
    ({"gamma": 1}, "'gamma', allowed are beta, alpha, upscale_top_p"),
    ({"beta": "much"}, "beta: got 'much', allowed is a finite number"),
    ({"beta": 1, "alpha": 1}, "give one"),
    ([1], "allowed is an object"),
]


@pytest.mark.parametrize("given,words", REFUSED)
def test_bad_strengths_are_refused_alone(engine, family, given, words):
    if not engine.fused:
        words = "allowed is an object" if given == [1] else "a request's own weights need --sampling-backend eft"
    with pytest.raises(RuntimeError, match=words):
        run(engine, family, [seeded(0, extra_args={"eft": given})])
    (request,) = of_engine(engine, [seeded(1)])
    assert run(engine, family, [request])[0]["output_ids"] == TheirLoop(family, request).run()


@pytest.mark.parametrize(
    "sampling,more,words",
    [
        ({}, dict(return_hidden_states=True), "return_hidden_states: they would be those of base"),
        (dict(beam_width=2), {}, "beam_width: beams are not supported"),
    ],
)
def test_what_base_would_answer_alone_is_refused(engine, family, sampling, more, words):
    with pytest.raises(RuntimeError, match=words):
        run(engine, family, [seeded(0, **sampling)], [more])
