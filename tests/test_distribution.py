"""The tokens have the distribution that is promised: sampling, its tails, and all of speculation.

Chi-squared tests are narrow (few bins, many draws). Seeds are fixed, so each test is deterministic; its threshold is a
p-value of 10^-4. The end of the file breaks the noise and the rules one by one and sees the same statistics reject.
"""

import math

import pytest
import torch

import eft_kernels as eft
from eft_kernels import reference
from eft_kernels.bench.run import p_value
from eft_kernels.parameters import STREAM_CODES

REJECT = 1e-4


def ks(values, cdf) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance; 2.2 is p = 10^-4."""
    x = cdf(values.double().flatten().sort().values)
    n = len(x)
    i = torch.arange(n, dtype=torch.float64)
    return float(torch.maximum((x - i / n).abs(), ((i + 1) / n - x).abs()).max()) * n**0.5


def exp_cdf(x):
    return -torch.expm1(-x)


def models(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) * scale for _ in range(3)]


def counts_of(tokens, V):
    assert int(tokens.min()) >= 0 and int(tokens.max()) < V
    return torch.bincount(tokens, minlength=V)


# --- one token -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "V, kwargs",
    [
        (2, {}),
        (7, {}),
        (11, dict(temperature=0.6)),
        (12, dict(temperature=1.4, top_p=0.85)),
        (9, dict(top_k=4)),
        (10, dict(min_p=0.2)),
        (12, dict(upscale_top_p=0.6)),
        (12, dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.05)),
    ],
    ids=str,
)
def test_sampling_is_exact(V, kwargs, backend):
    """300,000 draws from a handful of tokens, every filter."""
    N = 300000
    z = models(1, V, seed=V)
    p = reference_probabilities(z, **kwargs)[0]
    out = eft.sample(
        [x.expand(N, V) for x in z],
        eft.upscale(),
        seed=torch.arange(N),
        position=3,
        logprobs=False,
        backend=backend,
        **kwargs,
    )
    assert p_value(counts_of(out.tokens, V), p * N) > REJECT


def reference_probabilities(z, weights=None, **kwargs):
    """float64 [rows, V]; the kept sets themselves are held to transformers' in test_filters.py."""
    lp = eft.logprobs(z, eft.upscale() if weights is None else weights, backend="reference", **kwargs)
    return lp.double().softmax(-1)


@pytest.mark.parametrize("V", (300, 1000))
def test_sampling_is_exact_over_chunks(V, compiled):
    """Several chunks of 256 tokens: 400,000 draws, few per bin, and pooled into 16 bins that straddle the chunks."""
    N = 400000
    z = models(1, V, seed=V, scale=1.5)
    p = reference_probabilities(z)[0]
    out = eft.sample(
        [x.expand(N, V) for x in z],
        eft.upscale(),
        seed=torch.arange(N) + (1 << 40),
        position=0,
        logprobs=False,
        backend=compiled,
    )
    counts = counts_of(out.tokens, V)
    assert p_value(counts, p * N) > REJECT
    bins = torch.arange(V) * 37 % 16
    pool = lambda x: torch.zeros(16, dtype=torch.float64).index_add(0, bins, x.double())  # noqa: E731
    assert p_value(pool(counts), pool(p) * N) > REJECT


def test_flat_rows_are_uniform_over_places(compiled):
    """Every place of a chunk, and a last chunk that is not whole."""
    V, N = 600, 600000
    out = eft.sample(
        [torch.zeros(1, V).expand(N, V)], [1.0], seed=torch.arange(N), position=0, logprobs=False, backend=compiled
    )
    assert p_value(counts_of(out.tokens, V), torch.full((V,), N / V)) > REJECT


def test_positions_are_as_good_as_seeds(compiled):
    """One seed, 400,000 positions: the way a decoding row uses it. Neighbours are independent."""
    V, N = 6, 400000
    z = models(1, V, seed=1)
    p = reference_probabilities(z)[0]
    out = eft.sample(
        [x.expand(N, V) for x in z],
        eft.upscale(),
        seed=torch.full((N,), 1234),
        position=torch.arange(N),
        logprobs=False,
        backend=compiled,
    )
    assert p_value(counts_of(out.tokens, V), p * N) > REJECT
    pairs = out.tokens[0::2] * V + out.tokens[1::2]
    assert p_value(counts_of(pairs, V * V), p[:, None] * p * (N // 2)) > REJECT


def test_rows_of_one_seed_are_as_good_as_seeds(compiled):
    """One seed for 400,000 rows: each draws its own noise. Neighbours are independent, and so are near seeds."""
    V, N = 6, 400000
    z = models(1, V, seed=2)
    p = reference_probabilities(z)[0]
    a, b = (
        eft.sample(
            [x.expand(N, V) for x in z], eft.upscale(), seed=seed, position=3, logprobs=False, backend=compiled
        ).tokens
        for seed in (1234, 1235)
    )
    assert p_value(counts_of(a, V), p * N) > REJECT
    for pairs in (a[0::2] * V + a[1::2], a[1::2] * V + b[::2]):
        assert p_value(counts_of(pairs, V * V), p[:, None] * p * (N // 2)) > REJECT


def test_tail_of_the_gumbel(compiled):
    """One token 18 nats above 32767 others: each has probability 1.5 10^-8, all together 5 10^-4. Noise that cannot
    exceed 16 (24 random bits) would almost never choose one."""
    V, N, gap = 32768, 200000, 18.0
    z = torch.zeros(1, V)
    z[0, 777] = gap
    out = eft.sample([z.expand(N, V)], [1.0], seed=torch.arange(N), position=0, logprobs=False, backend=compiled)
    p = (V - 1) / (V - 1 + math.exp(gap))
    hits = int((out.tokens != 777).sum())
    assert abs(hits - N * p) < 3.9 * (N * p) ** 0.5, (hits, N * p)
    assert len(out.tokens[out.tokens != 777].unique()) == hits or hits > 300  # not one favoured token


def test_rare_tokens(compiled):
    """Tokens of probability 10^-5 and 10^-6: their totals, and token by token the Poisson counts of each group."""
    V, N = 5000, 1000000
    p = torch.full((V,), 0.0, dtype=torch.float64)
    groups = {1e-5: slice(100, 1100), 1e-6: slice(2000, 4000)}
    for value, part in groups.items():
        p[part] = value
    p[0] = 1 - p.sum()
    z = torch.where(p > 0, p.log(), float("-inf")).float()[None]
    out = eft.sample(
        [z.expand(N, V)], [1.0], seed=torch.arange(N) * 31 + 7, position=0, logprobs=False, backend=compiled
    )
    counts = counts_of(out.tokens, V)
    assert int(counts[p == 0].sum()) == 0
    for value, part in groups.items():
        c, mean = counts[part], N * value
        n = len(c)
        assert abs(int(c.sum()) - n * mean) < 3.9 * (n * mean) ** 0.5, (value, int(c.sum()))
        k = torch.arange(25, dtype=torch.float64)
        poisson = torch.exp(k * math.log(mean) - mean - torch.lgamma(k + 1)) * n
        assert p_value(counts_of(c, 25)[:25], poisson) > REJECT


# --- the noise -----------------------------------------------------------------------------------------------------


def noise(seeds=200, V=1000, stream="sample", slot=0, position=0, first=0):
    seed = torch.arange(first, first + seeds)[:, None]
    return reference.gumbel(
        seed, torch.full_like(seed, position), STREAM_CODES[stream], torch.full_like(seed, slot), V
    ).double()


def test_noise_is_exponential():
    """E = exp(-g): all tokens, those at a chunk's place, those elsewhere; chunk minima times 256; places uniform."""
    seeds, V = 3000, 512
    e = torch.exp(-noise(seeds, V))
    assert ks(e, exp_cdf) < 2.2
    for token in (0, 3, 255, 256, 511):
        assert ks(e[:, token], exp_cdf) < 2.2
    minima = e.view(seeds, 2, 256).min(2)
    assert ks(minima.values * 256, exp_cdf) < 2.2
    assert p_value(torch.bincount(minima.indices.flatten() // 16, minlength=16), torch.full((16,), seeds / 8)) > REJECT
    assert p_value(torch.bincount(minima.indices.flatten() % 16, minlength=16), torch.full((16,), seeds / 8)) > REJECT
    spacing = e.view(seeds, 2, 256) - minima.values[..., None]  # memoryless: what is above the minimum is Exp(1) again
    assert ks(spacing[spacing > 1e-9], exp_cdf) < 2.2


def test_noise_within_a_chunk_is_independent():
    """Sums of tokens of one chunk are Gamma distributed, and pairs are uncorrelated, also in the tails."""
    e = torch.exp(-noise(6000, 256))
    for group in ((0, 1, 2, 3), (0, 64, 128, 192), (5, 6, 250, 251)):
        gamma = lambda x: torch.special.gammainc(torch.tensor(4.0).double(), x)  # noqa: E731
        assert ks(e[:, list(group)].sum(1), gamma) < 2.2
    u = exp_cdf(e)
    centred = (u - 0.5) * 12**0.5
    r = (centred.T @ centred) / len(e)
    off = r[~torch.eye(256, dtype=torch.bool)] * len(e) ** 0.5
    assert float(off.abs().max()) < 5.2  # 32640 pairs
    assert abs(float(off.var()) - 1) < 0.05
    both = ((u[:, ::2] < 0.05) & (u[:, 1::2] < 0.05)).double().sum()
    want = 6000 * 128 * 0.0025
    assert abs(float(both) - want) < 3.9 * want**0.5


@pytest.mark.parametrize(
    "other",
    [
        dict(stream="draft"),
        dict(stream="residual"),
        dict(stream="accept"),
        dict(slot=1),
        dict(slot=8),
        dict(position=1),
        dict(position=1 << 32),
        dict(first=1),
        dict(first=1 << 32),
    ],
    ids=str,
)
def test_uses_of_the_noise_are_independent(other):
    """Another stream, slot, position or seed shares nothing: no equal value beyond chance, no correlation."""
    one, two = noise(), noise(**other)
    if other == dict(first=1):
        assert torch.equal(one[1:], two[:-1])  # the same seeds again: a function of the seed, not of the row
    assert int((one == two).sum()) < 20
    u, v = (exp_cdf(torch.exp(-x)).flatten() - 0.5 for x in (one, two))
    assert abs(float((u * v).sum())) / float((u * u).sum() * (v * v).sum()) ** 0.5 < 4 / len(u) ** 0.5


def test_noise_of_tokens_a_chunk_apart_differs():
    g = noise(200, 4096)
    for shift in (1, 4, 256, 1024):
        u = exp_cdf(torch.exp(-g)) - 0.5
        r = (u[:, shift:] * u[:, :-shift]).mean() * 12
        assert abs(float(r)) < 4 / (200 * (4096 - shift)) ** 0.5


# --- speculation ---------------------------------------------------------------------------------------------------


def simulate(
    method, K, logits, weights, N, backend, draft=1, ragged=False, length=2, seed=11, wrong="", own=None, **kwargs
):
    """Decodes ``length`` tokens of N rows in rounds of K drafts, from order-1 models: tables [V + 1, V], the logits
    after each token (V: at the start). Returns the tokens [N, length] and the accepted drafts per round.

    Rounds go on until each row has its tokens, so a round begins inside positions that an earlier one drafted: noise
    that rounds share would show. ``own``: what drafts are drawn by where it is not the target's. ``wrong`` breaks one
    rule.
    """
    V = logits[0].shape[1]
    seeds = torch.arange(N) * 7919 + seed
    out = torch.zeros(N, length + K + 1, dtype=torch.int64)
    done, last, active = torch.zeros(N, dtype=torch.int64), torch.full((N,), V), torch.arange(N)
    accepted = rounds = 0
    while len(active):
        s, position, current, drafts, seen = seeds[active], done[active], last[active], [], [last[active]]
        for j in range(K):
            if draft is None:
                token = logits[0][current].argmax(1)
            else:
                token = eft.draft(
                    logits[draft][current],
                    slot=0 if wrong == "slot" else j,
                    method=method,
                    seed=s,
                    position=position + j,
                    backend=backend,
                    **kwargs | (own or {}),
                ).tokens
            drafts.append(token)
            current = token
            seen.append(current)
        state = torch.stack(seen, 1)  # [n, K + 1]
        lengths = (s // 7919 + position) % (K + 1) if ragged else None
        scored = [z[state] for z in logits]
        declared = {f"draft_{k}": v for k, v in (own or {}).items() if wrong != "undeclared"}
        v = eft.verify(
            scored,
            weights,
            torch.stack(drafts, 1),
            lengths,
            method=method,
            draft=draft,
            seed=s,
            position=position,
            backend=backend,
            **kwargs,
            **declared,
        )
        assert bool(v.valid.all())
        tokens, n = v.tokens.clone(), v.num_emitted
        if wrong == "residual":  # after a rejection, the target's own token instead of the residual's
            at = (n - 1).clamp(max=K - 1)
            rows = torch.arange(len(active))
            plain = eft.sample(
                [z[rows, at] for z in scored],
                weights,
                seed=s,
                position=position + at,
                backend=backend,
                logprobs=False,
                **kwargs,
            ).tokens
            tokens[rows, at] = torch.where(n - 1 < K, plain, tokens[rows, at])
        there = torch.arange(K + 1) < n[:, None]
        out[active[:, None].expand_as(there)[there], (position[:, None] + torch.arange(K + 1))[there]] = tokens[there]
        last[active], done[active] = tokens.gather(1, n[:, None] - 1)[:, 0], position + n
        accepted, rounds = accepted + int((n - 1).sum()), rounds + len(active)
        active = torch.arange(N)[done < length]
    return out[:, :length], accepted / rounds


def joint(logits, weights, length, **kwargs):
    """float64 probabilities of every sequence, [V, ..., V] flattened."""
    p = reference_probabilities(logits, weights, **kwargs)  # [V + 1, V]
    V = p.shape[1]
    total = p[V]
    for _ in range(length - 1):
        total = total[..., None] * p[:V]
    return total.flatten()


def codes(tokens, V):
    code = torch.zeros(len(tokens), dtype=torch.int64)
    for i in range(tokens.shape[1]):
        code = code * V + tokens[:, i]
    return code


def tables(name):
    """(logits [V + 1, V] of each model, weights, simulate's other arguments)"""
    V = 4
    z = models(V + 1, V, seed=5, scale=1.2)
    if name == "adversarial":  # the draft wants the opposite of the target
        return [z[0], -z[0]], [1.0, 0.0], {}
    return (
        z,
        eft.upscale(),
        {
            "emulated": {},
            "ragged": dict(ragged=True),
            "deterministic": dict(draft=None),
            "deterministic, filtered": dict(draft=None, temperature=0.8, top_k=3),
            "filtered": dict(temperature=0.7, top_p=0.8),
            "ragged, filtered": dict(ragged=True, top_k=3, min_p=0.1),
            "up-scaling filter": dict(upscale_top_p=0.6),
            "drafts tempered only": dict(temperature=0.7, top_p=0.8, own=dict(temperature=1.4, top_p=1.0)),
            "drafts filtered": dict(own=dict(temperature=0.6, top_k=2, min_p=0.1)),
            "greedy drafts": dict(temperature=1.2, own=dict(temperature=0.0)),
        }[name],
    )


def judge(method, K, name, N, backend, length=2, **more):
    logits, weights, kwargs = tables(name)
    V = logits[0].shape[1]
    tokens, accepted = simulate(method, K, logits, weights, N, backend, length=length, **kwargs, **more)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("draft", "ragged", "own")}
    want = joint(logits, weights, length, **kwargs) * N
    return p_value(torch.bincount(codes(tokens, V), minlength=V**length), want), accepted


@pytest.mark.parametrize("name", ("emulated", "adversarial", "ragged", "deterministic", "filtered"))
@pytest.mark.parametrize("K", (1, 2, 3, 8))
@pytest.mark.parametrize("method", ("coupled", "token", "block"))
def test_joint_of_two_tokens(method, K, name, compiled):
    """40,000 rows (K = 8: 20,000); all 16 pairs of tokens by enumeration."""
    p, accepted = judge(method, K, name, 40000 if K < 8 else 20000, compiled)
    assert p > REJECT
    assert 0.005 < accepted < K  # drafts are accepted, and rejected


@pytest.mark.parametrize("name", ("drafts tempered only", "drafts filtered", "greedy drafts"))
@pytest.mark.parametrize("K", (1, 3))
@pytest.mark.parametrize("method", ("token", "block"))
def test_joint_with_declared_drafts(method, K, name, backend):
    """Drafts drawn by other temperatures and filters than the target's, and declared."""
    assert judge(method, K, name, 40000 if backend != "reference" else 10000, backend)[0] > REJECT


@pytest.mark.parametrize("name", ("emulated", "adversarial", "deterministic, filtered", "ragged, filtered"))
@pytest.mark.parametrize("method", ("token", "block"))
def test_joint_of_four_tokens(method, name, compiled):
    """Four tokens over several rounds of three drafts: 256 sequences, 60,000 rows."""
    p, _ = judge(method, 3, name, 60000, compiled, length=4)
    assert p > REJECT


@pytest.mark.parametrize("method", ("coupled", "token", "block"))
@pytest.mark.parametrize("name", ("emulated", "adversarial", "up-scaling filter"))
def test_joint_of_the_definition(method, name):
    """The reference alone, K = 2. (With the up-scaling filter the draft's distribution stays the plain one.)"""
    logits, weights, kwargs = tables(name)
    if name == "up-scaling filter":
        draft_logits = logits[1]
        N, V = 40000, 4
        state = torch.full((N, 1), V)
        seeds = torch.arange(N)
        d = eft.draft(draft_logits[state[:, 0]], slot=0, method=method, seed=seeds, position=0, backend="reference")
        state = torch.cat([state, d.tokens[:, None]], 1)
        v = eft.verify(
            [z[state] for z in logits],
            weights,
            d.tokens[:, None],
            method=method,
            seed=seeds,
            position=0,
            backend="reference",
            **kwargs,
        )
        p = reference_probabilities(logits, weights, **kwargs)[V]
        assert p_value(torch.bincount(v.tokens[:, 0], minlength=V), p * N) > REJECT
        return
    assert judge(method, 2, name, 40000, "reference")[0] > REJECT


@pytest.mark.parametrize("K", (2, 4, 8))
def test_block_accepts_at_least_as_much_as_token(K, compiled):
    """Mean accepted drafts per round over the same rows; strictly more where drafts are often rejected."""
    V, N = 8, 40000
    z = models(V + 1, V, seed=9, scale=0.8)
    rate = {m: simulate(m, K, z, eft.upscale(), N, compiled, length=1)[1] for m in ("token", "block", "coupled")}
    error = K / N**0.5
    assert rate["block"] > rate["token"] + error
    assert rate["token"] > rate["coupled"] + error


@pytest.mark.parametrize("K", (1, 2, 3, 8))
def test_coupled_is_plain_decoding(K, compiled):
    """Token for token, for every K, ragged or not."""
    logits, weights, _ = tables("emulated")
    N, V = 5000, 4
    for ragged in (False, True):
        got, _ = simulate("coupled", K, logits, weights, N, compiled, ragged=ragged, length=6)
        last = torch.full((N,), V)
        for i in range(6):
            last = eft.sample(
                [z[last] for z in logits],
                weights,
                seed=torch.arange(N) * 7919 + 11,
                position=i,
                backend=compiled,
                logprobs=False,
            ).tokens
            assert torch.equal(got[:, i], last)


@pytest.mark.parametrize("method", ("coupled", "token", "block"))
def test_greedy_is_the_limit(method, compiled):
    """Temperature 0: all methods give the target's argmax path; the token path at temperature 1e-4 is nearly so."""
    logits, weights, _ = tables("emulated")
    scores = sum(w * z for w, z in zip(weights.values, logits))
    got, _ = simulate(method, 3, logits, weights, 500, compiled, length=6, temperature=0.0)
    last = 4
    for i in range(6):
        last = int(scores[last].argmax())
        assert bool((got[:, i] == last).all())
    cold, _ = simulate(method, 3, logits, weights, 500, compiled, length=6, temperature=1e-4)
    assert float((cold == got).double().mean()) > 0.99


def test_a_point_draft_equal_to_the_target_is_always_accepted(compiled):
    """draft = the only model: target and draft agree, and no draft is ever rejected."""
    V, N, K = 6, 3000, 4
    z = torch.randn(V + 1, V, generator=torch.Generator().manual_seed(3))
    for method in ("coupled", "token", "block"):
        _, accepted = simulate(method, K, [z], [1.0], N, compiled, draft=0, length=1)
        assert accepted == K


# --- invariance ----------------------------------------------------------------------------------------------------

MIXED = dict(
    temperature=torch.tensor([1.0, 0.7, 0.0, 1.3]),
    top_p=torch.tensor([1.0, 0.9, 1.0, 0.5]),
    top_k=torch.tensor([0, 40, 0, 7]),
    min_p=torch.tensor([0.0, 0.0, 0.1, 0.02]),
    upscale_top_p=torch.tensor([1.0, 1.0, 0.9, 0.8]),
)


def batch(rows=24, V=900, slots=None):
    shape = (rows, V) if slots is None else (rows, slots, V)
    common = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2
    z = [common + x for x in models(*shape, seed=2, scale=0.4)]
    kwargs = {k: v.repeat(rows // 4) for k, v in MIXED.items()}
    return z, dict(kwargs, seed=torch.arange(rows) * 104729, position=torch.arange(rows) % 5)


def pick(kwargs, index):
    return {k: v[index] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def same(a, b):
    for x, y in zip(a, b):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_order_and_company_of_rows_do_not_matter(backend):
    z, kwargs = batch()
    kwargs["runners_up"] = 3
    W = eft.upscale(torch.linspace(0.5, 1.5, 24))
    whole = eft.sample(z, W, backend=backend, **kwargs)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = eft.sample([x[order] for x in z], W.rows(order), backend=backend, **pick(kwargs, order))
    same((x if x is None else x[order] for x in whole), moved)
    for i in range(24):
        alone = eft.sample(
            [x[i : i + 1] for x in z], W.rows(slice(i, i + 1)), backend=backend, **pick(kwargs, slice(i, i + 1))
        )
        same((x if x is None else x[i : i + 1] for x in whole), alone)


@pytest.mark.parametrize("method", ("coupled", "token", "block"))
def test_order_and_company_of_rows_do_not_matter_to_verify(method, backend):
    z, kwargs = batch(V=70, slots=4)
    drafts = torch.stack(
        [
            eft.sample(
                [z[1][:, j]],
                [1.0],
                backend=backend,
                logprobs=False,
                stream="draft",
                slot=j,
                **{**kwargs, "position": kwargs["position"] + j, "upscale_top_p": 1.0},
            ).tokens
            for j in range(3)
        ],
        1,
    )
    lengths = torch.arange(24) % 4
    whole = eft.verify(z, eft.upscale(), drafts, lengths, method=method, backend=backend, logprobs=True, **kwargs)
    assert len(whole.num_emitted.unique()) > 2
    for i in range(24):
        one = slice(i, i + 1)
        alone = eft.verify(
            [x[one] for x in z],
            eft.upscale(),
            drafts[one],
            lengths[one],
            method=method,
            backend=backend,
            logprobs=True,
            **pick(kwargs, one),
        )
        same((x if x is None else x[one] for x in whole), alone)
        # drafts beyond the length do not count, whatever they are
        junk = torch.where(torch.arange(3) < lengths[i], drafts[one], 1 << 40)
        alone = eft.verify(
            [x[one] for x in z],
            eft.upscale(),
            junk,
            lengths[one],
            method=method,
            backend=backend,
            logprobs=True,
            **pick(kwargs, one),
        )
        same((x if x is None else x[one] for x in whole), alone)
        # nor do slots beyond it
        K = int(lengths[i])
        short = eft.verify(
            [x[one, : K + 1] for x in z],
            eft.upscale(),
            drafts[one, :K],
            method=method,
            backend=backend,
            logprobs=True,
            **pick(kwargs, one),
        )
        same([whole.num_emitted[one], whole.valid[one]], [short.num_emitted, short.valid])
        assert torch.equal(whole.tokens[one, : K + 1], short.tokens)


def test_strides_do_not_matter(backend):
    z, kwargs = batch()
    want = eft.sample(z, eft.upscale(), backend=backend, **kwargs)
    wide = [torch.full((48, 1200), float("nan")) for _ in z]
    for w, x in zip(wide, z):
        w[::2, 5:905] = x
    same(want, eft.sample([w[::2, 5:905] for w in wide], eft.upscale(), backend=backend, **kwargs))
    one = [x[:1].expand(24, -1) for x in z]
    same(
        eft.sample([x.contiguous() for x in one], eft.upscale(), backend=backend, **kwargs),
        eft.sample(one, eft.upscale(), backend=backend, **kwargs),
    )


@pytest.mark.parametrize("more", (1, 100, 1148))
def test_padding_of_the_vocabulary_does_not_matter(more, backend):
    """Columns at -inf, a tail cut off by vocab_size, and models of different lengths: the same tokens."""
    z, kwargs = batch()
    want = eft.sample(z, eft.upscale(), backend=backend, **kwargs)
    minus = [torch.cat([x, torch.full((24, more), float("-inf"))], 1) for x in z]
    got = eft.sample(minus, eft.upscale(), backend=backend, **kwargs)
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-6)
    junk = [torch.cat([x, torch.full((24, more), 50.0)], 1) for x in z]
    same(want, eft.sample(junk, eft.upscale(), backend=backend, vocab_size=900, **kwargs))
    same(want, eft.sample([junk[0], z[1], junk[2]], eft.upscale(), backend=backend, **kwargs))


@pytest.mark.parametrize("rows", (1, 3, 9))
def test_threads_do_not_matter(rows, compiled):
    """Rows of 40,000 tokens, split over threads where rows are few; log-probs to the last bit."""
    z, kwargs = batch(V=40000)
    z, kwargs = [x[:rows] for x in z], pick(kwargs, slice(0, rows))
    before, outs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(eft.sample(z, eft.upscale(), backend=compiled, top_logprobs=4, diagnostics=True, **kwargs))
    finally:
        torch.set_num_threads(before)
    same(outs[0], outs[1])
    same(outs[0], outs[2])


def test_scalars_and_tensors_are_the_same(backend):
    z, _ = batch()
    scalars = dict(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, upscale_top_p=0.9, seed=-5, position=1 << 33)
    want = eft.sample(z, [1.5, 1.0, -1.5], backend=backend, **scalars)
    rows = {
        k: torch.tensor([v] * 24, dtype=torch.int64 if isinstance(v, int) else torch.float32)
        for k, v in scalars.items()
    } | dict(seed=eft.row_seeds(-5, 24))
    same(want, eft.sample(z, torch.tensor([[1.5, 1.0, -1.5]] * 24), backend=backend, **rows))
    zero_d = {k: v[0] for k, v in rows.items()}  # of the seeds the first one, which stands for all
    same(want, eft.sample(z, torch.tensor([1.5, 1.0, -1.5]), backend=backend, **zero_d))
    assert torch.equal(
        want.tokens, eft.sample(z, eft.upscale(1.5), backend=backend, **{**scalars, "seed": (1 << 64) - 5}).tokens
    )


# --- these tests can fail ------------------------------------------------------------------------------------------


def sampling_p(N, V=300):
    z = models(1, V, seed=V, scale=1.5)
    p = reference_probabilities(z)[0]
    out = eft.sample(
        [x.expand(N, V) for x in z],
        eft.upscale(),
        seed=torch.arange(N),
        position=0,
        logprobs=False,
        backend="reference",
    )
    return p_value(counts_of(out.tokens, V), p * N)


def test_broken_noise_is_rejected(monkeypatch):
    """The wrong sign, half of the places, one place, a chunk's minimum of the wrong scale, half the bits."""
    assert sampling_p(10000) > REJECT
    gumbel, chunk_noise, words = reference.gumbel, reference.chunk_noise, reference.words
    with monkeypatch.context() as m:
        m.setattr(reference.noise, "gumbel", lambda *a: -gumbel(*a))
        assert sampling_p(10000) < 1e-9
    for wrong in (lambda e, place: (e, place // 2), lambda e, place: (e, 0 * place), lambda e, place: (e * 2, place)):
        with monkeypatch.context() as m:
            m.setattr(reference.noise, "chunk_noise", lambda *a, wrong=wrong: wrong(*chunk_noise(*a)))
            assert sampling_p(10000) < 1e-9
    with monkeypatch.context() as m:  # one word for the four tokens of a quad
        m.setattr(reference.noise, "words", lambda *a: (words(*a)[0],) * 4 if a[4] == 1 else words(*a))
        u = exp_cdf(torch.exp(-noise(500, 256)))
        assert float(((u[:, 0] - 0.5) * (u[:, 1] - 0.5)).mean()) * 12 > 0.5


@pytest.mark.parametrize("method", ("token", "block"))
@pytest.mark.parametrize("share", ("residual", "accept"))
def test_reused_noise_is_rejected(method, share, monkeypatch):
    """Residuals that race with the draft's noise, and acceptance that looks at it."""
    if share == "residual":
        monkeypatch.setitem(STREAM_CODES, "residual", STREAM_CODES["draft"])
    else:

        def shared(seed, position, slot):
            stream = STREAM_CODES["draft"]
            word = reference.words(seed, position, stream, slot, reference.KIND_TOKEN, 0 * seed)[0]
            return reference.uniform(word).double()

        monkeypatch.setattr(reference.verification, "accept_uniform", shared)
    assert judge(method, 2, "emulated", 40000, "reference")[0] < 1e-9


@pytest.mark.parametrize("name", ("drafts tempered only", "drafts filtered", "greedy drafts"))
@pytest.mark.parametrize("method", ("token", "block"))
def test_drafts_judged_by_another_rule_are_rejected(method, name, compiled):
    """What the drafts were drawn by is not declared: `test_joint_with_declared_drafts` would see it."""
    assert judge(method, 2, name, 40000, compiled, wrong="undeclared")[0] < 1e-9


@pytest.mark.parametrize("method", ("token", "block"))
def test_a_wrong_residual_is_rejected(method, compiled):
    assert judge(method, 2, "emulated", 40000, compiled, wrong="residual")[0] < 1e-9


def test_rounds_that_share_noise_are_rejected(compiled):
    """`block` rejects drafts because of later ones, so a position drafted again needs its slot's own noise."""
    assert judge("block", 3, "emulated", 100000, compiled, length=4, wrong="slot")[0] < 1e-9


def test_the_statistic_itself():
    """p-values of fair draws are spread over (0, 1); a 1% shift of 400,000 draws is seen."""
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    draws = [torch.bincount(torch.multinomial(p, 100000, True, generator=g), minlength=4) for _ in range(40)]
    values = [p_value(d, p * 100000) for d in draws]
    assert 0.2 < sum(values) / 40 < 0.8 and min(values) > REJECT
    shifted = torch.tensor([0.41, 0.29, 0.2, 0.1])
    assert p_value(torch.bincount(torch.multinomial(shifted, 400000, True, generator=g)), p * 400000) < REJECT
    assert p_value(torch.tensor([5, 1]), torch.tensor([6.0, 0.0])) == 0, "a token of probability 0 was drawn"
    assert not p_value(torch.tensor([5, 1]), torch.tensor([5.0, 1.0])) > REJECT, "one cell tells nothing"
