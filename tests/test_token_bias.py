"""`token_bias`, and the penalties that are made into one, against transformers' processors, float64 and by hand."""

import math

import pytest
import torch
from transformers.generation import logits_process

import eft_kernels as eft
from eft_kernels import testing
from eft_kernels._backends.workspace import sorted_bias

NEG_INF = float("-inf")
WEIGHTS = (1.0, 1.0, -1.0)


def models(rows=4, V=1000, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, V, generator=g) * 2 for _ in range(3)]


def histories(rows=4, V=1000, seed=1):
    """Prompts and outputs [rows, n], with repeated tokens and padding."""
    g = torch.Generator().manual_seed(seed)
    prompt, output = torch.randint(0, 40, (rows, 30), generator=g), torch.randint(20, 60, (rows, 50), generator=g)
    prompt[0, :9], output[1, 40:], output[2] = -1, -1, -1
    return prompt, output


def combined(z):
    return z[0] + z[1] - z[2]


def emulated(z, bias, backend="reference", **kwargs):
    return eft.logprobs(z, list(WEIGHTS), token_bias=bias, backend=backend, **kwargs)


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-5)


def test_it_is_added_to_the_emulated_scores(backend):
    z = models()
    ids = torch.tensor([[5, 999, 5, -1], [0, 1, 2, 3], [1000, 7, 1 << 40, -(1 << 63)], [255, 256, 511, 512]])
    values = torch.tensor(
        [[1.0, -2.0, 0.5, 9.0], [1.0, NEG_INF, 3.0, -4.0], [9.0, -1.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]]
    )
    s = combined(z)
    for row in range(4):
        for i, x in zip(ids[row].tolist(), values[row].tolist()):
            if 0 <= i < 1000:
                s[row, i] += x
    close(emulated(z, (ids, values), backend), s.log_softmax(-1))
    out = eft.sample(z, list(WEIGHTS), token_bias=(ids, values), seed=3, position=0, temperature=0.5, backend=backend)
    close(out.raw_logprobs, s.log_softmax(-1).gather(1, out.tokens[:, None])[:, 0])
    big = torch.full((4, 1), 80.0)
    forced = eft.sample(z, list(WEIGHTS), token_bias=(torch.tensor([[7], [8], [999], [0]]), big), seed=1, position=0)
    assert forced.tokens.tolist() == [7, 8, 999, 0]


def test_it_comes_after_the_upscaling_filter(backend):
    z = models()
    bias = (torch.arange(200).expand(4, -1), torch.linspace(-3, 3, 200).expand(4, -1))
    want = emulated(z, None, backend, upscale_top_p=0.8)
    want[:, :200] += bias[1]
    close(emulated(z, bias, backend, upscale_top_p=0.8), want.log_softmax(-1))


def test_one_row_stands_for_all_and_an_empty_bias_for_none(backend):
    z = models()
    ids, values = torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(
        emulated(z, (ids, values), backend), emulated(z, (ids.expand(4, -1), values.expand(4, -1)), backend)
    )
    assert torch.equal(emulated(z, (ids[:, :0], values[:, :0]), backend), emulated(z, None, backend))
    assert torch.equal(emulated(z, ([[3, 4]], [[1.0, -1.0]]), backend), emulated(z, (ids, values), backend))


def test_every_operation_takes_it(backend):
    """`verify` a bias for each slot; drafts under the same bias."""
    B, K, V = 3, 2, 300
    z = [torch.stack([x] * (K + 1), 1) for x in models(B, V)]
    g = torch.Generator().manual_seed(0)
    ids, values = torch.randint(0, V, (B, K + 1, 20), generator=g), torch.randn(B, K + 1, 20, generator=g) * 4
    noise = dict(seed=torch.arange(B), backend=backend)
    for method in ("coupled", "token", "block"):
        drafts = [
            eft.draft(z[1][:, i], slot=i, method=method, position=i, token_bias=(ids[:, i], values[:, i]), **noise)
            for i in range(K)
        ]
        out = eft.verify(z, eft.upscale(), drafts, method=method, position=0, token_bias=(ids, values), **noise)
        assert bool(out.valid.all())
        if method == "coupled":  # the target's own samples
            for i in range(K + 1):
                alone = eft.sample(
                    [x[:, i] for x in z], eft.upscale(), position=i, token_bias=(ids[:, i], values[:, i]), **noise
                )
                there = out.num_emitted > i
                assert torch.equal(out.tokens[there, i], alone.tokens[there])
        else:
            with pytest.raises(ValueError, match=r"draft_tokens\[0\]: was drawn with token_bias another"):
                eft.verify(z, eft.upscale(), drafts, method=method, position=0, token_bias=(ids, values + 1), **noise)
            with pytest.raises(ValueError, match=r"draft_tokens\[0\]: was drawn with token_bias another"):
                eft.verify(z, eft.upscale(), drafts, method=method, position=0, **noise)
    flat = [x[:, 0] for x in z]
    bias = ids[:, 0], values[:, 0]
    lp = eft.logprobs(flat, eft.upscale(), token_bias=bias, backend=backend)
    close(eft.token_logprobs(flat, eft.upscale(), ids[:, 0], token_bias=bias, backend=backend), lp.gather(1, ids[:, 0]))


REFUSED = {
    "no pair": (torch.zeros(4, 2), r"token_bias: expected a pair"),
    "three": ((1, 2, 3), r"token_bias: expected a pair"),
    "numbers": ((3, 4.0), r"token_bias\[0\]: expected ids, an integer tensor \[4, N\]"),
    "float ids": ((torch.zeros(4, 2), torch.zeros(4, 2)), r"token_bias\[0\]: .*got torch.float32 \[4, 2\]"),
    "integer values": ((torch.zeros(4, 2).long(), torch.zeros(4, 2).long()), r"token_bias\[1\]: .*a float tensor"),
    "rows": ((torch.zeros(3, 2).long(), torch.zeros(3, 2)), r"token_bias\[0\]: .*\[3, 2\]"),
    "dimensions": ((torch.zeros(2).long(), torch.zeros(2)), r"token_bias\[0\]: .*\[2\]"),
    "sizes": ((torch.zeros(4, 2).long(), torch.zeros(4, 3)), r"token_bias: got 2 ids and 3 values"),
    "elsewhere": ((torch.zeros(4, 2).long(), torch.zeros(4, 2, device="meta")), r"token_bias\[1\]: is on meta"),
    "sorted, as kernels take it": (
        sorted_bias(eft.TokenBias(torch.zeros(4, 2).long(), torch.zeros(4, 2)), 1000),
        r"token_bias: expected a pair",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, backend):
    bias, message = REFUSED[name]
    for call in (eft.logprobs, lambda *a, **k: eft.sample(*a, seed=1, position=0, **k)):
        with pytest.raises(ValueError, match=message):
            call(models(), eft.upscale(), token_bias=bias, backend=backend)


def test_sorting():
    """Equal ids keep their order; what is outside the vocabulary is beyond the last chunk."""
    ids = torch.tensor([[300, 5, -1, 299, 5, 256, 1 << 40]])
    starts, found, values = sorted_bias(eft.TokenBias(ids, torch.arange(7.0)[None]), 300)
    assert starts.tolist() == [[0, 2, 4]] and found.tolist() == [[5, 5, 256, 299, 512, 512, 512]]
    assert values.tolist() == [[1, 4, 5, 3, 0, 2, 6]]


# --- penalties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", (1.3, 0.7))
def test_repetition_is_that_of_transformers(rate):
    z, (prompt, output) = models(), histories()
    bias = eft.penalties(prompt, output, repetition=rate, logits=z, weights=WEIGHTS)
    for row in range(4):
        seen = torch.cat([prompt[row], output[row]])
        processor = logits_process.RepetitionPenaltyLogitsProcessor(rate)
        want = processor(seen[seen >= 0][None], combined(z)[row : row + 1].clone()).log_softmax(-1)
        close(emulated([x[row : row + 1] for x in z], [x[row : row + 1] for x in bias]), want)


def test_presence_and_frequency():
    """OpenAI's: mu_v - c_v frequency - (c_v > 0) presence, c_v the count in the output."""
    z, (prompt, output) = models(), histories()
    presence, frequency = torch.tensor([0.5, 0.0, 1.0, -0.3]), [0.25, 0.7, 2.0, 0.0]
    want = combined(z)
    for row in range(4):
        count = torch.bincount(output[row][output[row] >= 0], minlength=1000)
        want[row] -= frequency[row] * count + presence[row] * (count > 0)
    bias = eft.penalties(prompt, output, presence=presence, frequency=frequency)
    close(emulated(z, bias), want.log_softmax(-1))
    alone = eft.penalties(None, output, presence=presence, frequency=frequency)
    close(emulated(z, alone), want.log_softmax(-1))
    used = bias.ids[2][bias.values[2] != 0]
    assert not bool((used >= 0).any()), "no output, no penalty"


def test_logit_bias_and_bans():
    z, (prompt, _) = models(), histories()
    bias = eft.penalties(prompt, None, logit_bias={7: 2.5, 9: NEG_INF})
    want = combined(z)
    want[:, 7] += 2.5
    want[:, 9] = NEG_INF
    close(emulated(z, bias), want.log_softmax(-1))


def test_penalties_per_row_and_together():
    """Rows of one call are rows of calls of their own; the parts add up."""
    z, (prompt, output) = models(), histories()
    kwargs = dict(presence=[0.1, 0.2, 0.3, 0.4], frequency=0.5, repetition=torch.tensor([1.2, 1.0, 0.9, 2.0]))
    bias = eft.penalties(prompt, output, logits=z, weights=eft.upscale(torch.tensor([1.0, 0.5, 2.0, 1.0])), **kwargs)
    for row, beta in enumerate((1.0, 0.5, 2.0, 1.0)):
        mine = {k: v[row] if not isinstance(v, float) else v for k, v in kwargs.items()}
        part = [x[row : row + 1] for x in z]
        one = eft.penalties(
            prompt[row : row + 1], output[row : row + 1], logits=part, weights=eft.upscale(beta), **mine
        )
        assert torch.equal(one.ids[0], bias.ids[row])
        torch.testing.assert_close(one.values[0], bias.values[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(prompt=None, output=None), "prompt: got None"),
        (dict(prompt=torch.zeros(2, 3), output=None), r"prompt: expected an int64 tensor \[B, n\]"),
        (dict(prompt=torch.zeros(2, 3).long(), output=torch.zeros(3, 3).long()), "output: expected 2 rows"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, repetition=1.1), "repetition: needs logits"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, repetition=0.0), "repetition: got 0.0"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, repetition=torch.tensor([1.0, -1.0])), "repetition: got a"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, presence=float("nan")), "presence: expected a"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, presence=[1.0, 2.0, 3.0]), "presence: expected a"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, frequency="2"), "frequency: expected a float32 number"),
        (dict(prompt=torch.zeros(2, 3).long(), output=None, logit_bias={"a": 1.0}), "logit_bias: expected a mapping"),
        (
            dict(prompt=torch.zeros(2, 3).long(), output=None, repetition=2.0, logits=models(), weights=WEIGHTS),
            "logits: expected 2 rows",
        ),
    ],
)
def test_penalties_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        eft.penalties(**kwargs)


def test_no_history_costs_nothing():
    """The first step: empty outputs, padding alone."""
    for output in (torch.empty(2, 0, dtype=torch.int64), torch.full((2, 5), -1)):
        bias = eft.penalties(None, output, presence=1.0, frequency=1.0)
        assert not bool((bias.ids >= 0).any())


def test_rows_with_a_bad_bias_are_alone(compiled):
    case = next(case for case in testing.CASES if case.name == "bad token bias")
    out = testing.check_sample(case, compiled)
    assert out.valid.tolist() == [False, False, True, True, True, True, True, True]
    assert math.isnan(float(out.logprobs[0]))
