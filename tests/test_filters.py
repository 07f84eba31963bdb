"""What the filters keep, against transformers' own warpers and float64; log-probs and diagnostics against float64.

Where float32 rounding may decide (a token whose cumulative mass is within 10^-6 of p) either set is right, and only
there. Everything here but the test of ties is without ties: transformers cuts them by order, these kernels keep them.
"""

import pytest
import torch
from transformers.generation import logits_process

import eft_kernels as eft
from eft_kernels.parameters import PARAMETERS

NEG_INF = float("-inf")
EDGE = 1e-6  # of mass


def models(rows=8, V=2000, seed=0, scale=2.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, V, generator=g) * scale
    return [(common + torch.randn(rows, V, generator=g)).to(dtype) for _ in range(3)]


def combined(z, weights=(1.0, 1.0, -1.0)):
    return sum(w * x.double() for w, x in zip(weights, z))


def warp(scores, **values):
    """transformers' own, in its order."""
    for p in PARAMETERS:
        if values.get(p.name, p.off) != p.off:
            scores = getattr(logits_process, p.warper)(values[p.name])(None, scores)
    return scores


GRID = [
    dict(temperature=0.7),
    dict(temperature=2.0),
    dict(top_k=1),
    dict(top_k=50),
    dict(top_k=1999),
    dict(top_k=9999),
    dict(top_p=0.9),
    dict(top_p=0.1),
    dict(top_p=0.999),
    dict(top_p=1e-4),
    dict(min_p=0.1),
    dict(min_p=0.9),
    dict(min_p=1e-4),
    dict(temperature=0.6, top_p=0.8),
    dict(temperature=1.5, top_k=40),
    dict(top_k=30, top_p=0.7),
    dict(temperature=0.8, min_p=0.05),
    dict(temperature=1.3, top_k=100, top_p=0.95, min_p=0.02),
    dict(temperature=0.5, top_k=500, top_p=0.5, min_p=0.001),
    dict(typical_p=0.9),
    dict(typical_p=0.2),
    dict(typical_p=1e-4),
    dict(temperature=1.4, typical_p=0.7),
    dict(top_k=60, typical_p=0.5),
    dict(top_p=0.9, typical_p=0.6),
    dict(temperature=0.8, top_k=300, top_p=0.97, min_p=0.002, typical_p=0.8),
]


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_kept_sets_and_log_probs_are_those_of_transformers(kwargs, backend):
    z = models(seed=len(str(kwargs)))
    got = eft.logprobs(z, eft.upscale(), backend=backend, **kwargs)
    want = warp(combined(z), **kwargs).log_softmax(-1)
    assert kwargs.keys() == {"temperature"} or kwargs.get("top_k") == 9999 or bool((want == NEG_INF).any(1).all())
    kept, differs = want > NEG_INF, (got > NEG_INF) != (want > NEG_INF)
    assert not bool(differs.any()), f"{int(differs.sum())} tokens differ; none lies at a boundary of this grid"
    torch.testing.assert_close(got[kept].double(), want[kept], rtol=0, atol=2e-6 + 4e-6 / kwargs.get("temperature", 1))
    assert bool((got[~kept] == NEG_INF).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_top_p_at_every_level(dtype, backend):
    """200 rows, each with its own p: sets equal but for tokens within 10^-6 of the boundary, which are few."""
    p = torch.linspace(0.005, 0.995, 200)
    g = torch.Generator().manual_seed(3)
    z = (torch.randn(200, 1500, generator=g) * 2 + torch.arange(1500) * 1e-4).to(dtype)
    z = torch.stack([row.float().unique(sorted=False)[:600] for row in z]) if dtype != torch.float32 else z
    got = eft.logprobs([z.to(dtype)], [1.0], top_p=p, backend=backend) > NEG_INF
    prob, order = z.double().softmax(-1).sort(1, descending=True)
    above = prob.cumsum(1) - prob
    want = torch.zeros_like(got).scatter_(1, order, above < p[:, None].double())
    near = torch.zeros_like(got).scatter_(1, order, (above - p[:, None].double()).abs() < EDGE)
    assert not bool(((got != want) & ~near).any())
    assert int((got != want).sum()) <= 2


def test_ties_are_kept(backend):
    """A threshold on the score: everything equal to the last kept token stays, whatever its place."""
    z = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0, 3.0]])
    sets = {
        "top_k": {1: [1, 6], 2: [1, 6], 3: [1, 2, 3, 4, 6], 5: [1, 2, 3, 4, 6], 6: [0, 1, 2, 3, 4, 6], 7: [*range(7)]},
        "top_p": {1e-6: [1, 6], 0.3: [1, 6], 0.55: [1, 6], 0.66: [1, 2, 3, 4, 6]},
        "typical_p": {1e-6: [1, 6], 0.6: [1, 6], 0.7: [1, 2, 3, 4, 6], 0.95: [0, 1, 2, 3, 4, 6]},
        "min_p": {1.0: [1, 6], 0.36: [1, 2, 3, 4, 6], 0.38: [1, 6], 0.13: [0, 1, 2, 3, 4, 6]},
    }
    for name, values in sets.items():
        for value, want in values.items():
            got = eft.logprobs([z], [1.0], backend=backend, **{name: value})[0]
            p = z[0].double().softmax(0)
            assert (got > NEG_INF).nonzero().flatten().tolist() == want, (name, value, p.tolist())


def test_top_p_is_renormalised_after_top_k(backend):
    """Of [0.4, 0.3, 0.2, 0.1], top-k 2 leaves [4/7, 3/7]: p = 0.5 then keeps one token, p = 0.6 both."""
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_k, top_p, want in ((2, 0.5, 1), (2, 0.6, 2), (0, 0.5, 2), (0, 0.75, 3), (3, 0.44, 1), (0, 0.39, 1)):
        assert int((eft.logprobs([z], [1.0], top_k=top_k, top_p=top_p, backend=backend) > NEG_INF).sum()) == want


def test_typical_p_may_drop_the_likeliest(backend):
    """Of [0.4, 0.15, 0.15, 0.15, 0.15] the four are nearer to the entropy, 1.50 nats, than the one."""
    z = torch.tensor([[0.4, 0.15, 0.15, 0.15, 0.15]]).log()
    for typical_p, want in ((0.5, [1, 2, 3, 4]), (0.59, [1, 2, 3, 4]), (0.61, [0, 1, 2, 3, 4])):
        kwargs = dict(typical_p=typical_p, backend=backend)
        assert (eft.logprobs([z], [1.0], **kwargs)[0] > NEG_INF).nonzero().flatten().tolist() == want
        tokens = eft.sample([z.expand(300, -1)], [1.0], seed=1, position=0, **kwargs).tokens
        assert tokens.unique().tolist() == want


def test_greedy_is_a_point(backend):
    z = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-1.0, -3.0, -2.0, -1.0]])
    for temperature in (0.0, 9e-6):
        lp = eft.logprobs([z], [1.0], temperature=temperature, top_p=0.5, top_k=3, backend=backend)
        assert lp.tolist() == [[NEG_INF, 0.0, NEG_INF, NEG_INF], [0.0, NEG_INF, NEG_INF, NEG_INF]]
        out = eft.sample([z], [1.0], temperature=temperature, backend=backend)
        assert out.tokens.tolist() == [1, 0] and out.logprobs.tolist() == [0.0, 0.0]


# --- the up-scaling filter -----------------------------------------------------------------------------------------


def upscaled(z, weights, p, tuned=1, allowed=None):
    """The paper's filter, straightforwardly, float64: (scores [rows, V], tokens at the boundary)."""
    z = [x.double() for x in z]
    excluded = torch.zeros_like(z[0], dtype=torch.bool) if allowed is None else ~allowed
    for j, x in enumerate(z):
        if weights[j] != 0 or j == tuned:
            excluded = excluded | (x == NEG_INF)
    lp = [x.masked_fill(excluded, NEG_INF).log_softmax(-1) for x in z]
    prob, order = lp[tuned].exp().sort(1, descending=True)
    above = prob.cumsum(1) - prob
    inside = torch.zeros_like(excluded).scatter_(1, order, above < p)
    near = torch.zeros_like(excluded).scatter_(1, order, (above - p).abs() < EDGE)
    emulated = sum(w * x.masked_fill(excluded, 0.0) for w, x in zip(weights, lp) if w != 0)
    return torch.where(excluded, NEG_INF, torch.where(inside, emulated, lp[tuned])), near


@pytest.mark.parametrize("p", (0.05, 0.5, 0.9, 0.97))
@pytest.mark.parametrize(
    "weights, tuned",
    [((1.0, 1.0, -1.0), 1), ((1.5, 1.0, -1.5), 1), ((0.7, -0.7, 1.0), 2), ((1.0, 0.0, -0.5), 1)],
    ids=str,
)
def test_upscaling_filter(p, weights, tuned, backend):
    z = models(V=400, seed=7)
    scores, near = upscaled(z, weights, p, tuned)
    assert not bool(near.any())
    got = eft.logprobs(z, list(weights), upscale_top_p=p, tuned=tuned, backend=backend)
    torch.testing.assert_close(got.double(), scores.log_softmax(-1), rtol=0, atol=1e-5)
    plain = eft.logprobs(z, list(weights), backend=backend)
    assert float((got - plain).abs().amax(1).min()) > 0.01  # the filter does something in every row


def test_upscaling_filter_with_exclusions_and_filters(backend):
    """Masked tokens and tokens at -inf are left out of every model's own distribution; then the sampling filters."""
    z = models(seed=8)
    g = torch.Generator().manual_seed(0)
    z[1][torch.rand(z[1].shape, generator=g) < 0.1] = NEG_INF
    z[2][:, 5::11] = NEG_INF
    allowed = torch.rand(8, 2000, generator=g) < 0.7
    scores, near = upscaled(z, (1.0, 1.0, -1.0), 0.8, 1, allowed)
    assert not bool(near.any())
    got = eft.logprobs(
        z,
        eft.upscale(),
        upscale_top_p=0.8,
        temperature=0.9,
        top_k=200,
        top_p=0.95,
        token_mask=packed(allowed),
        backend=backend,
    )
    want = warp(scores, temperature=0.9, top_k=200, top_p=0.95).log_softmax(-1)
    assert torch.equal(got > NEG_INF, want > NEG_INF)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_upscaling_outside_is_the_tuned_model(backend):
    """Outside the nucleus two tokens differ by their tuned log-probs alone; inside by the combination."""
    rows = [0.0, 5.0, 1.0, -4.0], [3.0, 2.0, 0.0, -1.0], [1.0, -2.0, 4.0, 2.0]
    z = [torch.tensor([row]) for row in rows]
    lp = eft.logprobs(z, eft.upscale(), upscale_top_p=0.9, backend=backend)[0]  # tuned: 0.70 0.26 0.035 0.013
    assert float(lp[2] - lp[3]) == pytest.approx(1.0, abs=1e-5)
    assert float(lp[1] - lp[0]) == pytest.approx((5 + 2 + 2) - (0 + 3 - 1), abs=1e-5)


# --- exclusions ----------------------------------------------------------------------------------------------------


def packed(allowed):
    """bool [..., V] as xgrammar's int32 [..., ceil(V / 32)]: bit v % 32 of word v // 32."""
    V = allowed.shape[-1]
    bits = torch.nn.functional.pad(allowed, (0, -V % 32)).unflatten(-1, (-1, 32)).long()
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("V", (31, 32, 33, 300, 1000))
def test_token_mask_layout(V, backend):
    z = models(V=V)
    allowed = torch.rand(8, V, generator=torch.Generator().manual_seed(1)) < 0.4
    allowed[:, V // 2] = True
    got = eft.logprobs(z, eft.upscale(), token_mask=packed(allowed), backend=backend)
    want = combined(z).masked_fill(~allowed, NEG_INF).log_softmax(-1)
    assert torch.equal(got > NEG_INF, allowed)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    for v in (0, V // 2, V - 1):  # one token alone
        one = torch.zeros(8, V, dtype=torch.bool)
        one[:, v] = True
        assert packed(one)[0, v // 32].item() & 0xFFFFFFFF == 1 << v % 32
        out = eft.sample(z, eft.upscale(), token_mask=packed(one), backend=backend)
        assert out.tokens.tolist() == [v] * 8 and float(out.logprobs.abs().max()) < 1e-6


def test_mask_bits_beyond_the_vocabulary_do_not_count(backend):
    z = models(V=40)
    mask = packed(torch.zeros(8, 40, dtype=torch.bool))
    mask[:, 1] = -1 << 8  # tokens 40..63, which do not exist
    assert not bool(eft.sample(z, eft.upscale(), token_mask=mask, backend=backend).valid.any())


@pytest.mark.parametrize("model", (0, 1, 2))
def test_minus_infinity_in_any_model_excludes(model, backend):
    """Never inf - inf: the token is out, whichever model says so; a model of weight 0 says nothing."""
    z = models()
    z[model][:, 3::7] = NEG_INF
    got = eft.logprobs(z, eft.upscale(), backend=backend)
    out = torch.zeros(8, 2000, dtype=torch.bool)
    out[:, 3::7] = True
    assert torch.equal(got == NEG_INF, out)
    want = combined([x.masked_fill(out, 0.0) for x in z]).masked_fill(out, NEG_INF).log_softmax(-1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    weights = [1.0, 1.0, -1.0]
    weights[model] = 0.0
    assert bool((eft.logprobs(z, weights, backend=backend) > NEG_INF).all())
    for i in range(20):
        tokens = eft.sample(z, eft.upscale(), temperature=8.0, seed=i, position=0, backend=backend).tokens
        assert not bool(out.gather(1, tokens[:, None]).any())


def test_bad_rows_are_alone(backend):
    """NaN, +inf, nothing left: token -1, not valid, log-probs NaN; the rows beside them are untouched."""
    z = models(rows=6, V=700)
    clean = eft.sample(z, eft.upscale(), seed=9, position=0, backend=backend)
    z[0][1, 699], z[2][2, 0] = float("nan"), float("inf")
    z[1][3] = NEG_INF
    z[0][4, 5], z[2][4, 5] = float("nan"), NEG_INF  # NaN wins over an exclusion
    out = eft.sample(z, eft.upscale(), seed=9, position=0, top_logprobs=2, diagnostics=True, backend=backend)
    bad = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(out.valid, ~bad) and bool((out.tokens[bad] == -1).all())
    assert torch.equal(out.tokens[~bad], clean.tokens[~bad])
    for x in (out.logprobs, out.raw_logprobs, out.entropy, out.tv):
        assert torch.equal(x.isnan(), bad)
    assert bool((out.top_ids[bad] == -1).all()) and bool((out.top_ids[~bad] >= 0).all())
    lp = eft.logprobs(z, eft.upscale(), backend=backend)
    assert torch.equal(lp.isnan().all(1), bad) and torch.equal(lp.isnan().any(1), bad)
    # a mask over the bad token saves the row
    allowed = torch.ones(6, 700, dtype=torch.bool)
    allowed[1, 699] = False
    assert bool(eft.sample(z, eft.upscale(), token_mask=packed(allowed), backend=backend).valid[1])


# --- log-probs and diagnostics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_error_budget(dtype, backend):
    """|kernel - float64| <= |naive in the input's type - float64| + 2e-6: never worse than what it replaces."""
    z = models(dtype=dtype, seed=4)
    exact = combined(z).log_softmax(-1)
    naive = (z[0].log_softmax(-1) + (z[1].log_softmax(-1) - z[2].log_softmax(-1))).log_softmax(-1).double()
    got = eft.logprobs(z, eft.upscale(), backend=backend).double()
    assert float((got - exact).abs().max()) <= float((naive - exact).abs().max()) + 2e-6
    assert float((got - exact).abs().max()) < 1e-5
    if dtype != torch.float32:
        assert float((got - exact).abs().max()) < 0.01 * float((naive - exact).abs().max())
    ids = torch.randint(0, 2000, (8, 6), generator=torch.Generator().manual_seed(0))
    several = eft.token_logprobs(z, eft.upscale(), ids, backend=backend)
    assert float((several - exact.gather(1, ids)).abs().max()) < 1e-5
    one = eft.token_logprobs(z, eft.upscale(), ids[:, 0], backend=backend)
    assert one.shape == (8,) and torch.equal(one, several[:, 0])


def test_sample_reports_its_own_log_probs(backend):
    """logprobs under the processed distribution, raw_logprobs under the emulated one: the entries of `logprobs`."""
    z = models(seed=5)
    kwargs = dict(temperature=0.8, top_k=100, top_p=0.9, upscale_top_p=0.95)
    out = eft.sample(z, eft.upscale(), seed=2, position=0, backend=backend, **kwargs)
    ids = out.tokens[:, None]
    for got, want in (
        (out.logprobs, eft.logprobs(z, eft.upscale(), backend=backend, **kwargs)),
        (out.raw_logprobs, eft.logprobs(z, eft.upscale(), upscale_top_p=0.95, backend=backend)),
    ):
        torch.testing.assert_close(got, want.gather(1, ids)[:, 0], rtol=0, atol=1e-5)


def test_top_n_entropy_and_total_variation(backend):
    z = models(seed=6)
    exact, tuned = combined(z).log_softmax(-1), z[1].double().log_softmax(-1)
    out = eft.sample(z, eft.upscale(), seed=2, position=0, top_logprobs=7, diagnostics=True, backend=backend)
    top = exact.topk(7, 1)
    assert torch.equal(out.top_ids, top.indices)
    torch.testing.assert_close(out.top_logprobs.double(), top.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), -(exact.exp() * exact).sum(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.tv.double(), 0.5 * (exact.exp() - tuned.exp()).abs().sum(1), rtol=0, atol=1e-5)
    same = eft.sample([z[1], z[1], z[1]], eft.upscale(), seed=2, position=0, diagnostics=True, backend=backend)
    assert float(same.tv.abs().max()) < 1e-6


def test_presets_are_their_formulas(backend):
    """Float64, from each model's own log-softmax as the papers write them."""
    a = models(rows=4, V=300, seed=1)
    b = models(rows=4, V=300, seed=2)[0]
    lp = [x.double().log_softmax(-1) for x in (*a, b)]
    cases = [
        (a, eft.upscale(), lp[0] + lp[1] - lp[2]),
        (a, eft.upscale(1.7), 1.7 * (lp[0] - lp[2]) + lp[1]),
        (a, eft.proxy(0.6), lp[0] + 0.6 * (lp[1] - lp[2])),
        (a, eft.downscale(), lp[0] + lp[1] - lp[2]),
        ([*a, b], eft.interpolate(0.3), lp[0] + 0.3 * (lp[1] - lp[3]) + 0.7 * (lp[2] - lp[3])),
        (
            [*a, b],
            eft.interpolate(torch.tensor([0.0, 0.25, 0.5, 1.0])),
            lp[0] + (w := torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None].double()) * lp[1] + (1 - w) * lp[2] - lp[3],
        ),
        (a, eft.weights([0.1, -2.0, 0.5]), 0.1 * lp[0] - 2 * lp[1] + 0.5 * lp[2]),
    ]
    for z, weights, scores in cases:
        got = eft.logprobs(z, weights, backend=backend).double()
        torch.testing.assert_close(got, scores.log_softmax(-1), rtol=0, atol=1e-5)
