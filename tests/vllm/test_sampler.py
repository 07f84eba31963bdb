"""What changes scores is never ignored on the V2 runner: held against a loop that applies it by its definition."""

from __future__ import annotations

import re

import pytest
from shipped import FAMILY, PROMPTS, Loop, override

from benchmarks.vllm_engine import Engine

LIKELY = [5, 11, 13, 14, 16, 262, 263, 264, 265, 266, 270, 280, 300, 310]  # ids, to ban and to allow


CHANGES = [
    dict(repetition_penalty=1.4),
    dict(frequency_penalty=2.0, presence_penalty=1.5),
    dict(logit_bias={str(i): 4.0 for i in LIKELY[:4]} | {"300": -100.0}),
    dict(allowed_token_ids=LIKELY),
    dict(bad_words=["the", "and", "of"]),
    dict(min_tokens=20, logit_bias={"2": 40.0}),
    dict(repetition_penalty=1.4, extra_args={"eft": {"beta": 1.4}}),
    dict(presence_penalty=0.5, extra_args={"eft": {"upscale_top_p": 0.8}}),
    dict(logit_bias={"266": 3.0}, temperature=0.0),
    dict(repetition_penalty=1.2, top_p=0.8, min_p=0.02, top_k=30, extra_args={"eft": {"alpha": 0.5}}),
]


@pytest.fixture(scope="module")
def v2():
    with Engine("v2", model=str(FAMILY / "base"), hf_overrides=override(), max_num_seqs=8) as engine:
        yield engine


def seeded(i: int, **more) -> dict:
    return dict(prompt=PROMPTS[i % len(PROMPTS)], max_tokens=24, seed=500 + i) | more


def test_changed_scores(v2, family):
    """Alone in their batches and beside requests that nothing changes; each changes its text."""
    requests = [seeded(i, **change) for i, change in enumerate(CHANGES)]
    plain = [seeded(i, extra_args=change.get("extra_args")) for i, change in enumerate(CHANGES)]
    beside = [r for pair in zip(requests, plain) for r in pair]
    got = [o["tokens"] for o in v2.generate(beside)]
    wanted = [Loop(family, r).run() for r in beside]
    for i, request in enumerate(beside):
        assert got[i] == wanted[i], f"request {i}: {request}"
    assert [i for i in range(0, len(got), 2) if got[i] == got[i + 1]] == [], "these changed nothing"
    assert [o["tokens"] for o in v2.generate(requests)] == got[::2]


def test_logprobs(v2, family):
    requests = [
        seeded(0, logprobs=5, top_p=0.5),
        seeded(1),
        seeded(2, logprobs=0, extra_args={"eft": {"beta": 1.5}}),
        seeded(3, logprobs=3, repetition_penalty=1.3),
        seeded(4, logprobs=4, extra_args={"eft": {"upscale_top_p": 0.8}}),
    ]
    for request, output in zip(requests, v2.generate(requests)):
        loop = Loop(family, request)
        assert output["tokens"] == loop.run()
        if "logprobs" not in request:
            assert output["logprobs"] is None
            continue
        for token, row, found in zip(output["tokens"], loop.logprobs, output["logprobs"]):
            top = row.topk(request["logprobs"]).indices.tolist() if request["logprobs"] else []
            assert set(map(int, found)) == {token, *top}
            for i, value in found.items():
                assert value == pytest.approx(row[int(i)].item(), abs=2e-4)


def test_prompt_logprobs(v2, family):
    request = dict(prompt=PROMPTS[6], max_tokens=2, temperature=0, prompt_logprobs=0)
    (output,) = v2.generate([request])
    ids, loop = family.ids(PROMPTS[6]), Loop(family, request)
    for n in range(1, len(ids)):
        row = loop.scores(ids[:n]).log_softmax(-1)[0]
        assert output["prompt_logprobs"][n][str(ids[n])] == pytest.approx(row[ids[n]].item(), abs=2e-4)


@pytest.mark.parametrize("strength", [{}, {"beta": 0.0}, {"beta": 1.3, "upscale_top_p": 0.9}])
def test_grammar(v2, family, strength):
    """xgrammar's mask, also where base, into whose logits vLLM writes it, has weight 0."""
    import xgrammar as xgr

    info = xgr.TokenizerInfo.from_huggingface(family.tokenizer, vocab_size=len(family.tokenizer))
    compiler = xgr.GrammarCompiler(info)
    requests = [
        seeded(0, structured_outputs={"regex": "[a-z ]{4,20}\\."}),
        seeded(1),
        seeded(2, structured_outputs={"choice": ["yes", "no", "perhaps"]}, logprobs=2),
        seeded(3, structured_outputs={"regex": "[A-Z]{3}[0-9]+"}, repetition_penalty=1.5),
    ]
    for request in requests:
        request["extra_args"] = {"eft": strength}
    outputs = v2.generate(requests)
    assert re.fullmatch("[a-z ]{4,20}\\.", outputs[0]["text"])
    assert outputs[2]["text"] in ("yes", "no", "perhaps")
    for i, request in enumerate(requests):
        kind = request.get("structured_outputs")
        matcher = None
        if kind:
            pattern = kind.get("regex") or "|".join(kind["choice"])
            matcher = xgr.GrammarMatcher(compiler.compile_regex(pattern))
        assert outputs[i]["tokens"] == Loop(family, request).run(matcher), f"request {i}: {request}"


REFUSED = [
    ({"gamma": 1}, "'gamma', allowed are beta, alpha, upscale_top_p"),
    ({"lam": 0.5}, "'lam', allowed are"),
    ({"beta": "much"}, "beta: got 'much', allowed is a finite number"),
    ({"beta": 1, "alpha": 1}, "give one"),
    ({"upscale_top_p": 0}, "allowed is a number in"),
    ([1], "allowed is an object"),
    ("{not json", "allowed is an object"),
]


@pytest.mark.parametrize("given,words", REFUSED)
def test_bad_requests_are_refused_alone(v2, family, given, words):
    with pytest.raises(RuntimeError, match=words.replace("{", "\\{")):
        v2.generate([seeded(0, extra_args={"eft": given})])
    assert v2.generate([seeded(1)])[0]["tokens"] == Loop(family, seeded(1)).run()


def test_prompt_logprobs_of_own_weights_are_refused(v2):
    with pytest.raises(RuntimeError, match="prompt_logprobs: a prompt is scored with the weights of the model's"):
        v2.generate([seeded(0, prompt_logprobs=1, extra_args={"eft": {"beta": 2.0}})])
