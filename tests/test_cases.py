"""One case table (eft_kernels/testing.py) x every backend, instruction set and thread count.

A case passes when tokens, validity and acceptance equal the reference's exactly and log-probs agree within 1e-5.
"""

import inspect
import os
import shutil
import sysconfig

import conftest
import pytest
import torch

import eft_kernels as eft
from eft_kernels import arguments, dispatch, ops, parameters, reference, testing
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

METHODS = ops.METHODS
NAMES = [case.name for case in CASES]
SMALL = [case for case in CASES if max(case.vocab) <= 5000]
OPERATIONS = ("sample", "verify", "logprobs", "token_logprobs")


def named(*names):
    found = [case for case in CASES if case.name in names]
    assert len(found) == len(names), names
    return found


def instruction_sets():
    """Those of the C++ backend that this machine runs."""
    if "cpu" not in conftest.COMPILED:
        return []
    cpu, found = dispatch.load("cpu"), []
    for name in ("baseline", "avx2", "avx512"):
        try:
            found.append(cpu.set_isa(name))
        except ValueError:
            pass
    cpu.set_isa(os.environ.get("EFT_KERNELS_CPU_ISA") or None)
    return found


@pytest.fixture(params=instruction_sets())
def isa(request):
    cpu = dispatch.load("cpu")
    assert cpu.set_isa(request.param) == request.param
    yield request.param
    cpu.set_isa(os.environ.get("EFT_KERNELS_CPU_ISA") or None)


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_sample(case, backend):
    check_sample(case, backend)


@pytest.mark.parametrize("logprobs", (True, False), ids=("logprobs", "tokens"))
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_sample_alone(case, logprobs, compiled):
    """Tokens alone, or with their log-probs, are paths of their own: they read each logit once."""
    check_sample(case, compiled, seed=1, logprobs=logprobs)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_logprobs(case, backend):
    check_logprobs(case, backend)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_verify(case, method, compiled):
    check_verify(case, compiled, method, draft=1)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_verify_of_trees(case, compiled):
    check_tree(case, compiled)


@pytest.mark.parametrize("logprobs", (True, False), ids=("logprobs", "tokens"))
@pytest.mark.parametrize("runners_up", (1, 15))
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_runners_up(case, runners_up, logprobs, compiled):
    check_sample(case, compiled, seed=5, logprobs=logprobs, runners_up=runners_up)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_verify_deterministic(case, method, compiled):
    check_verify(case, compiled, method, draft=None, seed=1)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_instruction_sets(case, isa):
    check_sample(case, "cpu", seed=2)
    check_sample(case, "cpu", seed=3, logprobs=False)
    check_logprobs(case, "cpu", seed=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case",
    named(
        "plain",
        "mixed types",
        "a chunk and one",
        "greedy",
        "top-k ties",
        "top-p ties",
        "everything",
        "parameters per row",
        "bad rows filtered",
        "token mask",
        "unaligned",
        "up-scaling filter",
    ),
    ids=lambda case: case.name,
)
def test_instruction_sets_verify(case, method, isa):
    check_verify(case, "cpu", method, seed=2)


@pytest.mark.parametrize(
    "case",
    [
        *named("all filters", "many rows", "large vocabulary"),
        Case("split rows", rows=1, vocab=(70001,), dtypes=(BF16, F16, F32), kwargs=dict(upscale_top_p=0.9, top_p=0.9)),
        Case("split all masked", rows=2, vocab=(20011,), special="all masked"),
    ],
    ids=lambda case: case.name,
)
def test_threads(case, threads, compiled):
    """Rows of 2^14 tokens and more are split over threads when rows are few."""
    check_sample(case, compiled, seed=4)
    check_sample(case, compiled, seed=4, logprobs=False)
    check_sample(case, compiled, seed=4, logprobs=True)
    check_logprobs(case, compiled, seed=4)
    if max(case.vocab) < 25000:
        check_verify(case, compiled, "block", seed=4)


def test_a_split_row_is_invalid_wherever_it_is_bad(threads, backend):
    """One NaN in the last token, in the middle, or +inf in the first, of rows that are split over threads."""
    z = torch.zeros(3, 20011)
    z[0, 0], z[1, -1], z[2, 9999] = float("inf"), float("nan"), float("nan")
    for row in range(3):
        out = ops.sample([z[row : row + 1]], [1.0], seed=1, position=0, backend=backend)
        assert out.tokens.tolist() == [-1] and out.valid.tolist() == [False] and bool(out.logprobs.isnan())


# --- equality in bulk ----------------------------------------------------------------------------------------------

MIXED = dict(
    temperature=per_row(1.0, 0.0, 0.6, 1.0, 1.7, 0.9, 3.0),
    top_k=per_row(0, 0, 5, 0, 100),
    top_p=per_row(1.0, 0.9, 1.0, 0.3, 0.999, 1.0),
    min_p=per_row(0.0, 0.0, 0.02),
    upscale_top_p=per_row(1.0, 1.0, 1.0, 0.8),
)
BULK = [
    Case("bulk", rows=8000, vocab=(523,), dtypes=(BF16, F32, F16), kwargs=MIXED),
    Case("bulk plain", rows=8000, vocab=(523,), dtypes=(BF16,)),
    Case("bulk flat", rows=4000, vocab=(300,), scale=0.1, kwargs=dict(top_p=0.5)),
]


@pytest.mark.parametrize("case", BULK, ids=lambda case: case.name)
def test_no_mismatch_in_bulk(case, compiled):
    check_sample(case, compiled, logprobs=True)
    check_sample(case, compiled, seed=1, logprobs=False, runners_up=4)


@pytest.mark.parametrize("method", METHODS)
def test_no_mismatch_in_bulk_verify(method, compiled):
    check_verify(Case("bulk verify", rows=800, vocab=(300,), dtypes=(BF16,), scale=1.0, kwargs=MIXED), compiled, method)


@pytest.mark.slow
def test_no_mismatch_in_a_million_rows(compiled):
    """2 x 10^6 rows of vocabulary 300, half filtered: tokens of every backend against the reference."""
    rows, mismatches = 1 << 14, 0
    case = Case("million", rows=rows, vocab=(300,), dtypes=(BF16, F32, F16), scale=1.0, kwargs=MIXED)
    for i in range(62):
        logits, weights, kwargs = make(case, seed=i)
        for extra in (kwargs, dict(seed=kwargs["seed"], position=i)):
            got, want = (
                ops.sample(logits, weights, **extra, logprobs=False, backend=name) for name in (compiled, "reference")
            )
            mismatches += int((got.tokens != want.tokens).sum())
            assert bool(want.valid.all())
    print(f"{mismatches} mismatches in {62 * 2 * rows} rows")
    assert mismatches == 0


# --- the table is complete -----------------------------------------------------------------------------------------


def test_every_parameter_is_in_the_table():
    given = {name for case in CASES for name in case.kwargs} | {"weights"}
    specials = {case.special for case in CASES}
    assert any("mask" in s for s in specials)  # token_mask
    assert any(case.bias for case in CASES)  # token_bias
    assert any(case.indexed for case in CASES)  # row_index
    assert set(parameters.Params._fields) - {"token_mask", "token_bias", "row_index"} <= given
    assert {"stream", "slot"} <= given
    assert {d for case in CASES for d in case.dtypes} == set(arguments.DTYPES)


def test_every_special_is_in_the_table():
    """Each thing ``make`` can plant is planted by a case, and each case's special is one that it knows."""
    source = inspect.getsource(testing.make) + inspect.getsource(testing._bias)
    specials = {case.special for case in CASES} - {""}
    assert all(f'"{s}"' in source for s in specials)
    for s in (
        "ties",
        "flat",
        "neg_inf",
        "transposed",
        "strided",
        "offset",
        "nan in model 1",
        "bad",
        "mask",
        "mask one",
        "all masked",
    ):
        assert f'"{s}"' in source and s in specials, s


def test_every_operation_is_in_every_backend(backend):
    module = dispatch.load(backend)
    for name in OPERATIONS:
        want = list(inspect.signature(getattr(reference, name)).parameters)
        assert list(inspect.signature(getattr(module, name)).parameters) == want, name
    assert set(ops.SCHEMAS) == set(OPERATIONS)


def test_the_planted_rows_are_what_they_say():
    """The inputs are not trivial: bad rows are bad, others valid, and filters remove something."""
    for case in CASES:
        logits, weights, kwargs = make(case)
        out = ops.sample(logits, weights, backend="reference", **kwargs)
        bad = {"bad": 4, "all masked": 1, "bad bias": 2}.get(case.special, 0)
        assert int((~out.valid).sum()) == bad, case.name
    for name in ("top-k", "top-p", "min-p", "typical-p", "all filters", "up-scaling filter", "token bias"):
        logits, weights, kwargs = make(named(name)[0])
        kwargs = {k: v for k, v in kwargs.items() if k not in ("seed", "position")}
        changed = eft.logprobs(logits, weights, backend="reference", **kwargs)
        raw = eft.logprobs(logits, weights, backend="reference")
        assert bool(((changed - raw).abs() > 1e-3).any(1).all()), name


def test_the_cpp_backend_is_here():
    """It is missing only where it was switched off or no compiler exists."""
    wanted = [os.environ.get("CXX"), (sysconfig.get_config_var("CXX") or "").split(" ")[0], "g++", "clang++"]
    if os.environ.get("EFT_KERNELS_CPU") != "0" and any(name and shutil.which(name) for name in wanted):
        assert "cpu" in conftest.BACKENDS, eft.backends()["cpu"]["reason"]


def test_outputs_are_poisoned(backend):
    module = dispatch.load(backend)
    module = getattr(module, "operations", module)
    assert module.torch.empty(3).isnan().all()
    assert module.torch.empty((2, 2), dtype=torch.int64).eq(-77).all()
    assert module.torch.empty(3, dtype=torch.bool).all()
    assert not module.torch.zeros(3).any()


def test_a_wrong_backend_is_seen(monkeypatch, compiled):
    """The comparison itself can fail: a backend that writes nothing, or is off in one token, is reported."""
    module, case = dispatch.load(compiled), named("plain")[0]
    right = module.sample

    def silent(logits, p, *args):
        out = right(logits, p, *args)
        return (module.torch.empty(out[0].shape, dtype=torch.int64), *out[1:])

    def off(logits, p, *args):
        out = right(logits, p, *args)
        out[0][-1] += 1
        return out

    monkeypatch.setattr(dispatch, "shortcut", lambda *args: None)
    for wrong in (silent, off):
        monkeypatch.setattr(module, "sample", wrong)
        with pytest.raises(AssertionError, match="tokens"):
            check_sample(case, compiled)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_nucleus_that_ends_where_only_exact_masses_tell(temperature, compiled):
    """Nearly equal tokens, many unlikely ones, and p after exactly k tokens: the last bits of the total decide whether
    one more is kept."""
    rows, head, tail = 600, 300, 5000
    scores = torch.cat([torch.arange(head) * 1e-7, torch.full((tail,), -8.0)])
    scores = scores[torch.randperm(head + tail, generator=torch.Generator().manual_seed(1))]
    logits = [scores.expand(rows, -1).contiguous()]
    total = (scores.double() / temperature).exp().sum()
    top_p = ((torch.arange(rows) % head + 1) / total).float()
    args = dict(temperature=temperature, top_p=top_p, seed=torch.arange(rows) * 31 + 5, position=0)
    for logprobs in (True, False):
        got = eft.sample(logits, [1.0], logprobs=logprobs, backend=compiled, **args)
        want = eft.sample(logits, [1.0], logprobs=logprobs, backend="reference", **args)
        assert torch.equal(got.tokens, want.tokens)
        if logprobs:
            torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
