"""The arithmetic every backend shares: Philox and its counters, logarithm, exponential, masses, the chunk's bound."""

import itertools

import conftest
import pytest
import torch

from eft_kernels import reference

MASK = 0xFFFFFFFF
# Random123 1.14, kat_vectors, philox 4x32 10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def tensors(values):
    return tuple(torch.tensor([v]) for v in values)


def signed(x):
    return x - (1 << 64) if x >= 1 << 63 else x


@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_philox_known_answers(counter, key, want):
    got = reference.philox(tensors(key), tensors(counter))
    assert tuple(int(x) for x in got) == want


@pytest.mark.skipif("cpu" not in conftest.BACKENDS, reason="the C++ backend is not built")
@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_philox_known_answers_cpp(counter, key, want):
    """The C++ words take a seed, a position and a domain; the known counters are those of some use."""
    from eft_kernels import _cpu

    seed, position = signed(key[0] | key[1] << 32), signed(counter[0] | counter[1] << 32)
    kind, stream, slot = counter[3] & 1, counter[3] >> 1 & 3, counter[3] >> 3
    assert _cpu.philox(seed, position, stream, slot, kind, counter[2]) == want


@pytest.mark.skipif("cpu" not in conftest.BACKENDS, reason="the C++ backend is not built")
def test_words_are_the_same_in_cpp():
    from eft_kernels import _cpu

    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        seed, position = (int(torch.randint(-(1 << 63), (1 << 63) - 1, (), generator=g)) for _ in range(2))
        stream, slot, kind, index = (int(torch.randint(0, n, (), generator=g)) for n in (4, 1 << 24, 2, 1 << 20))
        got = reference.words(
            torch.tensor([seed]), torch.tensor([position]), stream, torch.tensor([slot]), kind, torch.tensor([index])
        )
        assert tuple(int(x) for x in got) == _cpu.philox(seed, position, stream, slot, kind, index)


def test_counters_are_disjoint(monkeypatch):
    """No two uses share a (key, counter): every stream, slot, kind, index, position and seed gives its own."""
    seen = {}
    monkeypatch.setattr(reference.noise, "philox", lambda key, counter: (*key, *counter))
    uses = itertools.product(
        (0, 1, -1, 1 << 32),
        (0, 1, 1 << 32, (1 << 63) - 1),
        range(4),
        (0, 1, 7, (1 << 24) - 1),
        (reference.KIND_CHUNK, reference.KIND_TOKEN),
        (0, 1, 499, (1 << 20) - 1),
    )
    for use in uses:
        seed, position, stream, slot, kind, index = use
        raw = reference.words(
            torch.tensor([seed]), torch.tensor([position]), stream, torch.tensor([slot]), kind, torch.tensor([index])
        )
        counter = tuple(int(torch.as_tensor(x)) for x in raw)
        assert all(0 <= word <= MASK for word in counter)
        assert seen.setdefault(counter, use) == use
    assert len(seen) == 4 * 4 * 4 * 4 * 2 * 4


def test_log_is_accurate_everywhere():
    """Relative error below 2^-22 over all positive normal float32 (sampled in every binade), absolute near 1."""
    exponent = torch.arange(1, 255)[:, None]
    g = torch.Generator().manual_seed(0)
    mantissa = torch.cat(
        [torch.arange(0, 64), (1 << 23) - 1 - torch.arange(0, 64), torch.randint(0, 1 << 23, (4000,), generator=g)]
    )
    x = ((exponent << 23) | mantissa[None]).to(torch.int32).view(torch.float32)
    got, want = reference.log(x).double(), x.double().log()
    error = (got - want).abs()
    assert float((error / want.abs().clamp(min=1e-30))[want != 0].max()) < 2.0**-22
    assert float(error[want == 0].max()) == 0


def test_exponential_is_accurate_in_both_tails():
    """-log1p(-u) to a relative 2^-21 for u from 2^-57 to 1 - 2^-24, positive and increasing."""
    small = torch.logspace(-57, -1, 20001, base=2.0, dtype=torch.float64).float()
    large = 1.0 - torch.logspace(-24, -1, 20001, base=2.0, dtype=torch.float64).float()
    u = torch.cat([small, large]).clamp(max=1.0 - 2.0**-24)
    got, want = reference.exponential(u).double(), -torch.log1p(-u.double())
    assert float(((got - want) / want).abs().max()) < 2.0**-21
    assert float(got.min()) > 0
    assert float(got.max()) == pytest.approx(24 * 0.6931471805599453, rel=1e-6)


def test_uniform_never_reaches_its_ends():
    words = torch.tensor([0, 1, 255, 256, MASK - 200, MASK - 1, MASK])
    u = reference.uniform(words)
    assert float(u.min()) == 2.0**-33 and float(u.max()) == 1.0 - 2.0**-24
    assert torch.isfinite(reference.exponential(u)).all()


def test_chunk_noise_is_fine_in_its_tail(monkeypatch):
    """Where the first word is small a second one refines it: the smallest E is Exp(1) / 256 down to 2^-57."""

    def words(first, second):
        monkeypatch.setattr(
            reference.noise,
            "words",
            lambda *a: (torch.tensor([first]), torch.tensor([second]), torch.tensor([0x1234]), torch.tensor([0])),
        )
        zero = torch.zeros(1, dtype=torch.int64)
        e, place = reference.chunk_noise(zero, zero, 0, zero, zero)
        assert int(place) == 0x34
        return float(e) * 256

    assert words(0, 0) == pytest.approx(2.0**-57, rel=1e-6)
    assert words(0, MASK) == pytest.approx(2.0**-32, rel=1e-6)
    assert words(255, MASK) == pytest.approx(2.0**-24, rel=1e-6)
    assert words(256, 0) == pytest.approx(256.5 * 2.0**-32, rel=1e-6)
    assert words(MASK, 0) == pytest.approx(24 * 0.6931471805599453, rel=1e-6)
    edges = [words(r, s) for r in (0, 1, 2, 254, 255) for s in (0, MASK)] + [words(256, 0)]
    assert edges == sorted(edges)


def test_no_token_beats_its_chunk():
    """g_v <= g of the chunk for every token, equality at its place: the bound that pruning relies on."""
    seed = torch.arange(300)[:, None] * 7919
    zero = torch.zeros_like(seed)
    V = 1000
    g = reference.gumbel(seed, zero, 0, zero, V)
    e, place = reference.chunk_noise(seed, zero, 0, zero, torch.arange(4))
    top = -reference.log(e)
    for c in range(4):
        part = g[:, c * 256 : (c + 1) * 256]
        assert bool((part <= top[:, c : c + 1]).all())
        here = place[:, c] < part.shape[1]
        at_place = part[here].gather(1, place[here, c : c + 1])[:, 0]
        assert torch.equal(at_place, top[here, c])
        assert int(here.sum()) > 200


def test_mass_is_accurate():
    """2^40 at the best; a relative 2^-22 of exp2 above 2^-20, and truncation below: never more than the exact value
    by that, never less by more than one unit."""
    s = -torch.linspace(0, 45, 100001)[None]
    best, c = torch.zeros(1), torch.ones(1)
    got = reference.mass(s, best, c).double()
    want = torch.exp2(s.double()) * 2.0**40
    assert int(got[0, 0]) == 1 << 40
    assert bool((got - want <= want * 2.0**-22).all())
    assert bool((want - got <= want * 2.0**-22 + 1).all())
    assert bool((reference.mass(torch.tensor([[-41.01, -60.0, -1e30, float("-inf")]]), best, c) == 0).all())
    assert float(reference.mass(torch.tensor([[-39.5]]), best, c)) == 1.0


def test_mass_never_increases_as_scores_fall():
    """Monotone to rounding of the polynomial: a lower score never has more mass by more than 2^-22 of it."""
    s = -torch.linspace(0, 41, 400001)[None]
    m = reference.mass(s, torch.zeros(1), torch.ones(1)).double()[0]
    assert float(((m[1:] - m[:-1]) / m[:-1].clamp(min=1)).max()) <= 2.0**-22


def test_mass_sums_do_not_depend_on_order():
    """The float32 sums of the same numbers do, which is why masses are integers."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(1, 50000, generator=g) * 4
    best, c = s.amax(1), torch.tensor([reference.LOG2E])
    sums, floats = set(), set()
    for i in range(20):
        order = torch.randperm(50000, generator=torch.Generator().manual_seed(i))
        sums.add(int(reference.mass(s[:, order], best, c).sum()))
        floats.add(float((s[0, order] - best).exp().view(500, 100).sum(0).sum()))
    assert len(sums) == 1
    assert len(floats) > 1


def test_log_total_is_log_softmax():
    g = torch.Generator().manual_seed(1)
    s = torch.randn(20, 4000, generator=g) * 3
    best = s.amax(1)
    total = reference.mass(s, best, torch.full((20,), reference.LOG2E)).sum(1)
    want = torch.logsumexp(s.double(), 1) - best.double()
    assert float((reference.log_total(total) - want).abs().max()) < 1e-6
    assert float(reference.log_total(torch.tensor([1 << 40]))) == 0.0


@pytest.mark.parametrize("p, want", [(1.0, 1 << 40), (0.5, 1 << 39), (1e-30, 1)])
def test_mass_limit(p, want):
    """At least one unit, so that the best token always stays."""
    assert int(reference.mass_limit(torch.tensor([p]), torch.tensor([1 << 40]))) == want


def test_nucleus_keeps_the_crossing_token_and_its_ties():
    s = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    m = torch.tensor([[50, 10, 15, 15, 10]])
    for limit, want in ((1, 3.0), (50, 3.0), (51, 2.0), (80, 2.0), (81, 1.0), (90, 1.0), (91, 0.0), (1000, 0.0)):
        assert float(reference.nucleus(s, m, torch.tensor([limit]))) == want


def test_accept_uniform_is_uniform():
    """Mean, variance and range of 10^5 draws; 64 bits, so never 0 or 1."""
    seed = torch.arange(100000)
    u = reference.accept_uniform(seed, torch.zeros_like(seed), torch.zeros_like(seed))
    assert u.dtype == torch.float64 and 0 < float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 1e5) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 4 * (1 / 180 / 1e5) ** 0.5
