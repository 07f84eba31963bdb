"""The Triton kernels in Triton's interpreter, which needs a process of its own: TRITON_INTERPRET=1 before any import.

Without it this file starts that process on a part of the case table; `make interpreted` runs all of it.
"""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

import eft_kernels as eft
from eft_kernels import ops, reference, testing
from eft_kernels.testing import (
    BF16,
    CASES,
    F16,
    F32,
    Case,
    check_logprobs,
    check_sample,
    check_tree,
    check_verify,
    make,
    per_row,
)

triton = pytest.importorskip("triton")
tl = triton.language
from eft_kernels._backends.triton.semantics import chunk_noise, log, mass, token_gumbel, token_words  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WHOLE = bool(os.environ.get("EFT_KERNELS_TRITON_WHOLE", "1" if INTERPRETED else ""))
METHODS = ops.METHODS
# a case for every path: types, exclusions, filters and their bounds, ties, invalid rows, strides, per-row parameters
FAST = (
    "mixed types",
    "a chunk and one",
    "zero weight",
    "weights per row",
    "greedy ties",
    "top-k ties",
    "top-p ties",
    "everything",
    "parameters per row",
    "all masked",
    "bad rows filtered",
    "unaligned",
    "no rows",
    "one seed for all rows",
)
JUDGED = ("a chunk and one", "everything", "all masked", "top-p ties", "one seed for all rows", "drafts drawn per row")
TILINGS = ("latency", "stream")


def chosen(*names, largest=1 << 22, most=1 << 10):
    return [c for c in CASES if max(c.vocab) <= largest and c.rows <= most and (WHOLE or c.name in names)]


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, below")


def name_of(case):
    return f"triton-{case.name}"


@interpreted
def test_torchs_default_dtype_changes_nothing():
    (case,) = [c for c in CASES if c.name == "parameters per row"]
    case = case._replace(rows=2, vocab=(300,))
    logits, weights, kwargs = make(case)
    ids = torch.tensor([[1, 2], [3, 4]])

    def run():
        several = {name: x for name, x in kwargs.items() if name not in ("seed", "position")}
        out = ops.sample(logits, weights, backend="triton", top_logprobs=3, diagnostics=True, runners_up=2, **kwargs)
        return [
            *out,
            ops.logprobs(logits, weights, backend="triton", **several),
            ops.token_logprobs(logits, weights, ids, backend="triton", **several),
        ]

    want = run()
    try:
        torch.set_default_dtype(torch.bfloat16)
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, want):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.fixture
def tiling(request, monkeypatch):
    """The tilings of few rows (one tile a program), or small tiles many a program, as with many rows."""
    from eft_kernels._backends.triton import config

    if request.param == "stream":
        monkeypatch.setattr(config, "SAMPLE", {"default": ((1 << 62, config.TileConfig(4, 1)),)})
        monkeypatch.setattr(config, "STREAM", {"default": ((1 << 62, config.TileConfig(2, 2)),)})
    return request.param


# --- the case table ------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@pytest.mark.parametrize("case", chosen(*FAST), ids=name_of)
def test_sample(case, tiling):
    """With all there is to return the filters' kernels run; with less, where nothing is filtered, the one launch."""
    extra = {} if tiling == "latency" else dict(logprobs=WHOLE)
    check_sample(case, "triton", seed=len(extra), **extra)
    if extra and not case.kwargs:
        check_sample(case, "triton", seed=2, logprobs=False, runners_up=3)


@interpreted
@pytest.mark.parametrize("tiling", TILINGS[1:], indirect=True)
@pytest.mark.parametrize("case", chosen(*JUDGED), ids=name_of)
def test_logprobs(case, tiling):
    check_logprobs(case, "triton")


@interpreted
@pytest.mark.parametrize("tiling", TILINGS[1:], indirect=True)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", chosen(*JUDGED, largest=5000, most=12), ids=name_of)
def test_verify(case, method, tiling):
    check_verify(case, "triton", method)
    if method == "coupled":
        check_tree(case, "triton")


@interpreted
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("case", chosen("a chunk and one", largest=520, most=9), ids=name_of)
def test_verify_of_a_deterministic_proposer(case, method):
    check_verify(case, "triton", method, draft=None, seed=1)


# --- calls that nobody has checked ---------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("part", range(8))
def test_odd_values(part):
    calls = testing.odd_calls()
    if not WHOLE:  # of some kinds one operation, in turn
        kinds = [list(group) for _, group in itertools.groupby(calls, lambda call: call.name.rpartition(",")[0])]
        calls = [group[i % len(group)] for i, group in enumerate(kinds[::3])]
    for call in calls[part::8]:
        testing.check_call(call, "triton")


@interpreted
@pytest.mark.parametrize("part", range(4))
def test_random_calls(part):
    for seed in range(part, 200 if WHOLE else 16, 4):
        testing.check_call(testing.random_call(seed), "triton")


@interpreted
@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@pytest.mark.parametrize("weights", [(0.0, 0.0), torch.zeros(3, 2)], ids=("numbers", "per row"))
def test_models_of_weight_0_are_not_read(weights, tiling):
    dead = torch.full((3, 700), float("nan"))
    dead[1], dead[2] = float("-inf"), float("inf")
    for kwargs in ({}, dict(top_p=0.5), dict(logprobs=False)):
        got, want = (
            eft.sample([dead, dead], weights, seed=torch.arange(3), position=0, backend=name, **kwargs)
            for name in ("triton", "reference")
        )
        assert got.valid.all() and torch.equal(got.tokens, want.tokens)


@interpreted
@pytest.mark.parametrize("offset", (0.0, 65000.0, -65000.0, 1e30))
def test_diagnostics_are_those_of_float64(offset):
    z = [torch.randn(2, 500, generator=torch.Generator().manual_seed(j)) * 2 + offset for j in range(3)]
    out = eft.sample(z, eft.upscale(), seed=1, position=0, diagnostics=True, backend="triton")
    p = ((z[0] + z[1]) - z[2]).double().softmax(1)
    tv = 0.5 * (p - z[1].double().softmax(1)).abs().sum(1)
    torch.testing.assert_close(out.tv.double(), tv, rtol=0, atol=2e-6)


# --- paths of their own --------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("tiles, tc, direct", [(1, 2, True), (1, 8, True), (1, 2, False), (2, 4, False), (8, 1, False)])
def test_no_tiling_changes_a_token(monkeypatch, tiles, tc, direct):
    """A vocabulary of a dozen chunks, whatever the split; the winners are not all in one place."""
    from eft_kernels._backends.triton import config

    case = Case("triton tilings", rows=6, vocab=(2800,), dtypes=(BF16, F32, F16), scale=1.0)
    monkeypatch.setattr(config, "SAMPLE", {"default": ((1 << 62, config.TileConfig(tiles, tc, single_tile=direct)),)})
    assert len(set((check_sample(case, "triton", logprobs=True).tokens // 1024).tolist())) > 1


@interpreted
@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@pytest.mark.parametrize("kwargs", [{}, dict(top_p=0.9), dict(upscale_top_p=0.8)], ids=("triton-plain", "top-p", "up"))
def test_a_row_is_checked_wherever_it_is_bad(tiling, kwargs):
    """NaN, +inf and -inf in whole tiles and in the last one, in a model with negative weight and in others."""
    logits = [torch.randn(12, 1700, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    places = itertools.product((0, 2), (3, 1699), (float("nan"), float("inf"), float("-inf")))
    for row, (model, token, bad) in enumerate(places):
        logits[model][row, token] = bad
    got, want = (
        eft.sample(logits, eft.upscale(), seed=5, position=0, backend=name, **kwargs)
        for name in ("triton", "reference")
    )
    assert got.valid.tolist() == want.valid.tolist() == [False, False, True] * 4
    assert torch.equal(got.tokens, want.tokens)


@interpreted
def test_a_doubtful_nucleus_is_summed_exactly(monkeypatch):
    """With all doubt there can be, every total is an exact sum; the path is taken, and the tokens are the same."""
    backend = importlib.import_module("eft_kernels._backends.triton")
    case = Case("triton doubt", rows=6, vocab=(1500,), kwargs=dict(top_p=per_row(0.9, 0.5)))
    monkeypatch.setattr(backend, "SLACK", 0.5)
    calls, exact = [], backend.filter.mass_of_row
    monkeypatch.setattr(backend.filter, "mass_of_row", lambda *args: calls.append(1) or exact(*args))
    check_sample(case, "triton", logprobs=False)
    assert calls


@interpreted
def test_counters_are_left_zero():
    backend = importlib.import_module("eft_kernels._backends.triton")
    check_sample(Case("triton counters", rows=5, vocab=(5000,)), "triton", logprobs=False)
    counters = backend.counters(5, torch.device("cpu"))
    assert counters.shape[0] >= 5 and not counters.any()


@interpreted
def test_no_mismatch_in_bulk():
    mixed = dict(
        temperature=per_row(1.0, 0.0, 0.6, 1.7),
        top_k=per_row(0, 0, 5),
        top_p=per_row(1.0, 0.9, 1.0, 0.3, 0.999),
        upscale_top_p=per_row(1.0, 1.0, 0.8),
    )
    rows = 200 if WHOLE else 40
    check_sample(
        Case("triton bulk", rows=rows, vocab=(523,), dtypes=(BF16, F32, F16), kwargs=mixed), "triton", logprobs=False
    )
    check_sample(Case("triton bulk plain", rows=rows, vocab=(523,), dtypes=(BF16,)), "triton", logprobs=False)


@triton.jit
def arithmetic(x, s, seed, position, logs, masses, e, place, gumbel, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(logs + i, log(tl.load(x + i)))
    tl.store(masses + i, mass(tl.load(s + i), 0.0, 1.44269504))
    key, at = tl.load(seed), tl.load(position)
    domain = tl.cast((1 << 1) | (2 << 3), tl.uint32)
    chunk_e, chunk_place = chunk_noise(key, at, domain, i)
    tl.store(e + i, chunk_e)
    tl.store(place + i, chunk_place)
    first, where = chunk_noise(key, at, domain, tl.arange(0, 1))
    j = tl.arange(0, 256)
    g = token_gumbel(first, token_words(key, at, domain, 0, 256))
    tl.store(gumbel + j, tl.where(j == where, -log(first), g))


@interpreted
def test_the_arithmetic_is_the_definitions():
    """Logarithm, masses, noise: bit for bit, over their ranges."""
    g, n = torch.Generator().manual_seed(0), 4096
    x = torch.exp(torch.rand(n, generator=g) * 170 - 85)
    s = -torch.rand(n, generator=g) * 40
    seed, position = torch.tensor([-3]), torch.tensor([(1 << 40) + 1])
    logs, masses, e, place, gumbel = (torch.empty(n) for _ in range(5))
    masses, place = masses.long(), place.int()
    arithmetic[(1,)](x, s, seed, position, logs, masses, e, place, gumbel, N=n)
    assert torch.equal(logs, reference.log(x))
    zero, c = torch.zeros(1), torch.tensor([reference.LOG2E])
    assert torch.equal(masses, reference.mass(s[None], zero, c)[0])
    want_e, want_place = reference.chunk_noise(seed, position, 1, torch.tensor([2]), torch.arange(n))
    assert torch.equal(e, want_e) and torch.equal(place.long(), want_place)
    want = reference.gumbel(seed[:, None], position[:, None], 1, torch.tensor([[2]]), 256)
    assert torch.equal(gumbel[:256], want[0])


# --- outside the interpreter ---------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="started by this very test")
def test_in_the_interpreter():
    workers = ["-n", "2"] if importlib.util.find_spec("xdist") else []
    env = os.environ | {"TRITON_INTERPRET": "1", "EFT_KERNELS_TRITON_WHOLE": ""}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", *workers],
        text=True,
        env=env,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "xfailed" not in run.stdout
    print(run.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(INTERPRETED or torch.accelerator.is_available(), reason="Triton has a device")
def test_asking_for_triton_on_a_cpu_explains_itself():
    logits, weights, kwargs = make(Case("plain"))
    with pytest.raises(ValueError, match="backend: 'triton' is not available: no GPU.*TRITON_INTERPRET=1"):
        eft.sample(logits, weights, backend="triton", **kwargs)
    assert eft.sample(logits, weights, **kwargs).valid.all()


def test_without_triton_the_package_says_what_is_missing():
    code = (
        "import sys; sys.modules['triton'] = None; import eft_kernels as eft; b = eft.backends()['triton'];"
        "print(b['available'], b['reason'])"
    )
    out = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    assert out.startswith("False triton is not installed"), out
