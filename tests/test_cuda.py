"""The CUDA kernels on the host: the shim of tests/simt runs them, cut in several ways, in several orders of threads."""

import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eft_kernels as eft
from eft_kernels import dispatch, ops, testing
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
    per_row,
)

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

HERE = sys.platform == "linux" and shutil.which(build.CXX[0])
pytestmark = pytest.mark.skipif(not HERE, reason="needs g++ on Linux")

METHODS = ops.METHODS
# compute capability, multiprocessors, shared memory a block, the largest cluster allowed and that there is room for
DEVICES = {
    "latency": (90, 132, 232448, 16, 16),  # many blocks a row; without filters a chunk a warp
    "stream": (90, 1, 232440, 16, 4),  # few blocks a row; a GPU with less than 16 multiprocessors together
    "staged": (80, 1, 100000, 1, 1),  # no clusters, scores in global memory
}


@pytest.fixture(scope="module")
def shim():
    """The shim's module in the place of the extension; the backend takes CPU tensors."""
    caches = (dispatch.load, dispatch.status, dispatch._choose, dispatch._shortcut)
    with pytest.MonkeyPatch.context() as patch:
        library = os.environ.get("EFT_KERNELS_SIMT")  # another one than csrc makes: test_faults_are_seen
        module, handle = build.load(Path(library) if library else build.build())
        patch.setitem(sys.modules, "eft_kernels._cuda", module)
        patch.delitem(sys.modules, "eft_kernels._backends.cuda", raising=False)
        patch.setattr(
            dispatch, "TABLE", tuple(b._replace(devices=("cpu",)) if b.name == "cuda" else b for b in dispatch.TABLE)
        )
        for cache in caches:
            cache.cache_clear()
        assert dispatch.status("cuda") == (True, "SIMT shim")
        module.set_poison(True)
        yield handle
    sys.modules.pop("eft_kernels._backends.cuda", None)
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=DEVICES)
def device(request, shim):
    shim.simt_set_device(*DEVICES[request.param])
    shim.simt_set_seed(sum(map(ord, request.node.name)))
    return request.param


def small(largest=5000, rows=12):
    return [c for c in CASES if max(c.vocab) <= largest and c.rows <= rows]


def name_of(case):
    return f"cuda-{case.name}"


# --- the case table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_sample(case, device):
    """With all there is to return a row's kernel runs; with less, where nothing is filtered, the one launch."""
    check_sample(case, "cuda")
    check_sample(case, "cuda", seed=1, logprobs=True)
    check_sample(case, "cuda", seed=2, logprobs=False)
    check_sample(case, "cuda", seed=3, logprobs=False, runners_up=15)
    check_sample(case, "cuda", seed=4, logprobs=True, runners_up=2)


@pytest.mark.parametrize("extra", [dict(top_logprobs=3), dict(diagnostics=True)], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("plain", "top-k", "top-p", "min-p", "everything")], ids=name_of
)
def test_sample_without_logprobs_but_more(case, extra, device):
    check_sample(case, "cuda", logprobs=False, **extra)


@pytest.mark.parametrize("case", small() + [c for c in CASES if c.special == "hard"], ids=name_of)
def test_logprobs(case, device):
    check_logprobs(case, "cuda")


JUDGED = (
    "everything",
    "bad rows filtered",
    "a chunk and one",
    "parameters per row",
    "all masked",
    "unaligned",
    "drafts drawn per row",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", small(), ids=name_of)
def test_verify(case, method, shim):
    """The whole table on one device, a part of it on the others."""
    for name, device in DEVICES.items():
        if name == "latency" or case.name in JUDGED:
            shim.simt_set_device(*device)
            check_verify(case, "cuda", method)
            if method == "coupled":
                check_tree(case, "cuda")


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("a chunk and one", "top-p ties", "greedy")], ids=name_of
)
def test_verify_of_a_deterministic_proposer(case, method, device):
    check_verify(case, "cuda", method, draft=None, seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_verify_of_many_drafts(method, device):
    """More than are judged at once, most of them accepted; and none."""
    case = Case("cuda many drafts", rows=4, vocab=(300,), dtypes=(BF16,), weights=[1.0], slots=40)
    assert check_verify(case, "cuda", method, draft=0).num_emitted.max() == 40
    check_verify(Case("cuda many drafts", rows=6, vocab=(300,), scale=6.0, slots=20), "cuda", method)
    check_verify(Case("cuda no drafts", rows=3, vocab=(300,), slots=1), "cuda", method)
    logits, none = [torch.randn(3, 1, 300)], torch.empty(3, 0, dtype=torch.int64)
    assert none.data_ptr() == 0
    got, want = (
        eft.verify(logits, [1.0], none, method=method, draft=None, seed=4, position=0, backend=name)
        for name in ("cuda", "reference")
    )
    assert torch.equal(got.tokens, want.tokens) and got.valid.all()


# --- calls that nobody has checked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_odd_values(part, shim):
    for i, call in enumerate(testing.odd_calls()):
        if i % 4 == part:
            shim.simt_set_device(*list(DEVICES.values())[i % 3])
            testing.check_call(call, "cuda")


@pytest.mark.parametrize("part", range(4))
def test_random_calls(part, shim):
    for seed in range(part * 40, part * 40 + 40):
        shim.simt_set_device(*list(DEVICES.values())[seed % 3])
        testing.check_call(testing.random_call(seed), "cuda")


@pytest.mark.parametrize("offset", (0.0, 65000.0, 1e30))
def test_diagnostics_are_those_of_float64(offset, device):
    z = [torch.randn(2, 500, generator=torch.Generator().manual_seed(j)) * 2 + offset for j in range(3)]
    out = eft.sample(z, eft.upscale(), seed=1, position=0, diagnostics=True, backend="cuda")
    p = ((z[0] + z[1]) - z[2]).double().softmax(1)
    tv = 0.5 * (p - z[1].double().softmax(1)).abs().sum(1)
    torch.testing.assert_close(out.tv.double(), tv, rtol=0, atol=2e-6)


# --- paths of their own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", (1, 2, 3, 8, 40, 132))
def test_no_cut_changes_a_token(shim, multiprocessors):
    """A vocabulary of some dozen chunks, whatever the split; the winners are not all in one place."""
    case = Case("cuda cuts", rows=6, vocab=(9100,), dtypes=(BF16,), scale=1.0)
    for cluster in (1, 2, 16):
        shim.simt_set_device(90, multiprocessors, 232448, cluster, cluster)
        for extra in (dict(logprobs=True), dict(top_logprobs=3)):
            assert len(set((check_sample(case, "cuda", **extra).tokens // 1024).tolist())) > 1


def test_no_order_of_threads_changes_a_token(shim):
    mixed = dict(temperature=per_row(1.0, 0.0, 0.6), top_p=per_row(1.0, 0.9, 0.3), upscale_top_p=per_row(1.0, 0.8))
    shim.simt_set_device(90, 16, 232448, 4, 4)
    for seed in range(10):
        shim.simt_set_seed(seed)
        check_sample(Case("cuda order", rows=4, vocab=(3000,), dtypes=(BF16,)), "cuda", logprobs=True)
        check_sample(Case("cuda order", rows=6, vocab=(3000,), kwargs=mixed), "cuda", logprobs=True)
        check_verify(Case("cuda order", rows=3, vocab=(700,)), "cuda", METHODS[seed % 3])


@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@pytest.mark.parametrize("offset", range(8))
def test_rows_begin_anywhere(device, dtype, offset):
    """Vectors of rows that are not aligned are taken from two aligned ones; every model of another offset."""
    flat = [torch.randn(3 * 1311 + 16, generator=torch.Generator().manual_seed(j)).to(dtype) for j in range(3)]
    logits = [z[(offset + j) % 8 :][: 3 * 1311].view(3, 1311) for j, z in enumerate(flat)]
    for kwargs in ({}, dict(top_p=0.9)):
        got, want = (
            eft.sample(logits, eft.upscale(), seed=5, position=0, backend=name, **kwargs)
            for name in ("cuda", "reference")
        )
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.raw_logprobs, want.raw_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, dict(top_p=0.9), dict(upscale_top_p=0.8)], ids=("cuda-plain", "top-p", "up"))
def test_a_row_is_checked_wherever_it_is_bad(device, kwargs):
    """NaN, +inf and -inf in whole chunks and in the last one, in a model with negative weight and in others."""
    logits = [torch.randn(12, 1700, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    places = itertools.product((0, 2), (3, 1699), (float("nan"), float("inf"), float("-inf")))
    for row, (model, token, bad) in enumerate(places):
        logits[model][row, token] = bad
    got, want = (
        eft.sample(logits, eft.upscale(), seed=5, position=0, backend=name, **kwargs) for name in ("cuda", "reference")
    )
    assert got.valid.tolist() == want.valid.tolist() == [False, False, True] * 4
    assert torch.equal(got.tokens, want.tokens)


def test_a_doubtful_nucleus_is_summed_exactly(device):
    """p is the mass of the better half of the tokens to within a rounding or two: float32 sums cannot tell."""
    logits = [torch.cat([torch.zeros(40, 512), -torch.ones(40, 512)], 1)]
    mass = torch.tensor([512.0 / (512 + 512 * 0.36787944)])
    top_p = (mass.view(torch.int32) + torch.arange(-20, 20, dtype=torch.int32)).view(torch.float32)
    got, want = (eft.logprobs(logits, [1.0], top_p=top_p, backend=name) for name in ("cuda", "reference"))
    kept = (want > float("-inf")).sum(1)
    assert set(kept.tolist()) == {512, 1024}
    assert torch.equal((got > float("-inf")).sum(1), kept)
    for seed in range(3):  # without log-probs the threshold is not looked for
        got, want = (
            eft.sample(
                logits, [1.0], top_p=top_p, seed=torch.arange(40) + seed, position=0, logprobs=False, backend=name
            )
            for name in ("cuda", "reference")
        )
        assert torch.equal(got.tokens, want.tokens)


def test_a_nucleus_with_a_sum_in_doubt_is_summed_exactly(device):
    """What is far below the nucleus is summed in float32; here it decides between one token and two."""
    logits = [torch.full((80, 4096), -8.0)]
    logits[0][:, 7], logits[0][:, 2000] = 0, -1
    share = torch.tensor([1 / (1 + 0.36787944 + 4094 * 3.3546263e-4)])
    top_p = (share.view(torch.int32) + torch.arange(-40, 40, dtype=torch.int32)).view(torch.float32)
    got, want = (eft.logprobs(logits, [1.0], top_p=top_p, backend=name) for name in ("cuda", "reference"))
    kept = (want > float("-inf")).sum(1)
    assert set(kept.tolist()) == {1, 2}
    assert torch.equal((got > float("-inf")).sum(1), kept)


# kind of logits: variant: barriers of a row's cluster; the numbers of benchmarks/findings/cuda.md
BARRIERS = {
    "peaked": dict(min_p=4, top_p=6, top_k=6, many=7, both=6, token_of_top_p=4, token_of_both=6, upscaled=9, top_20=6),
    "flat": dict(min_p=4, top_p=8, top_k=6, many=7, both=6, token_of_top_p=4, token_of_both=6, upscaled=11, top_20=6),
}


@pytest.mark.parametrize("kind", BARRIERS)
def test_thresholds_take_few_barriers(shim, kind):
    """What the blocks of a row, 16 here, wait for each other."""
    from eft_kernels.bench import inputs

    both = dict(top_k=50, top_p=0.95)
    variants = dict(
        min_p=dict(min_p=0.05),
        top_p=dict(top_p=0.9),
        top_k=dict(top_k=50),
        many=dict(top_k=2000),
        both=both,
        token_of_top_p=dict(top_p=0.9, logprobs=False),
        token_of_both=dict(both, logprobs=False),
        upscaled=dict(upscale_top_p=0.9),
        top_20=dict(top_logprobs=20),
    )
    shim.simt_set_device(*DEVICES["latency"])
    logits = inputs.logits(kind, 1, 128256, 3, "bfloat16", 0)
    took = {}
    for name, kwargs in variants.items():
        before = shim.simt_barriers(1)
        assert eft.sample(logits, eft.upscale(), seed=0, position=0, backend="cuda", **kwargs).valid.all()
        took[name] = shim.simt_barriers(1) - before
    assert took == BARRIERS[kind]


@pytest.mark.parametrize("kind", ("normal", "ties", "one level", "few"))
def test_the_likeliest_tokens(kind, device):
    """Few of many chunks at once, one after the other where they are more, or more tie than there is room for."""
    x = torch.randn(3, 9100, generator=torch.Generator().manual_seed(1))
    x = {"normal": x, "ties": x.round(), "one level": x * 0, "few": x.where(x > 2.9, float("-inf"))}[kind]
    for n in (1, 5, 30, 130):
        got, want = (
            eft.sample([x], [1.0], seed=1, position=0, top_logprobs=n, backend=name) for name in ("cuda", "reference")
        )
        assert torch.equal(got.top_ids, want.top_ids)
        torch.testing.assert_close(got.top_logprobs, want.top_logprobs, rtol=0, atol=1e-5)


def test_usual_arguments_are_read_by_the_extension(shim, monkeypatch):
    """As on the CPU: what is unusual is looked at more closely in Python."""

    def closer(*_):
        raise LookupError

    monkeypatch.setattr(ops, "check_logits", closer)
    logits = [torch.randn(2, 300) for _ in range(3)]
    slots = [z[:, None].expand(2, 2, 300).contiguous() for z in logits]
    drafts = torch.zeros(2, 1, dtype=torch.int64)
    assert eft.sample(logits, eft.upscale(), seed=1, position=0, backend="cuda").valid.all()
    assert eft.verify(slots, eft.upscale(), drafts, seed=1, position=0, backend="cuda").valid.all()
    for kwargs in (dict(temperature=-1.0), dict(top_k="x"), dict(check=True), dict(seed=None)):
        with pytest.raises(LookupError):
            eft.sample(logits, eft.upscale(), backend="cuda", **dict(seed=1, position=0) | kwargs)


def test_counters_are_left_zero(device):
    check_sample(Case("cuda counters", rows=5, vocab=(5000,)), "cuda", logprobs=False)
    for method in METHODS:
        for slots in (1, 2, 5):
            check_verify(Case("cuda counters", rows=5, vocab=(700,), slots=slots), "cuda", method)
    workspace = importlib.import_module("eft_kernels._backends.workspace")
    counters = workspace.counters(25, torch.device("cpu"))
    assert counters.shape[0] >= 25 and not counters.any()


@pytest.mark.parametrize("method", METHODS)
def test_verify_looks_only_where_it_must(method, shim):
    """Rows beyond the last draft are left alone, and behind a draft that was rejected, should that be known by then."""
    from tools import launch_config as tuning

    shim.simt_set_device(90, 1, 232448, 4, 4)
    rows, slots = 6, 8
    logits = [torch.randn(rows, slots, 3000, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    drafts = torch.full((rows, slots - 1), 5)
    logits[0][..., 5] = -50  # never accepted

    def barriers(ask, lengths):
        with tuning.launch_config(early_exit_blocks_per_sm=ask, smem_budget=0):
            before, launched = shim.simt_barriers(0), shim.simt_launches()
            got, want = (
                eft.verify(logits, eft.upscale(), drafts, lengths, method=method, seed=3, position=0, backend=name)
                for name in ("cuda", "reference")
            )
            assert shim.simt_launches() - launched == dict(coupled=1, token=2, block=3)[method]
        assert torch.equal(got.tokens, want.tokens) and (got.num_emitted == 1).all()
        return shim.simt_barriers(0) - before

    never, all_of_it = 1 << 20, torch.full((rows,), slots - 1)
    whole = barriers(never, all_of_it)
    assert barriers(never, torch.zeros(rows, dtype=torch.int64)) < whole / 4
    if method != "block":  # the shim's blocks come in any order, half of them too early
        assert barriers(0, all_of_it) < 0.9 * whole


def test_no_mismatch_in_bulk(device):
    mixed = dict(
        temperature=per_row(1.0, 0.0, 0.6, 1.7),
        top_k=per_row(0, 0, 5),
        top_p=per_row(1.0, 0.9, 1.0, 0.3, 0.999),
        upscale_top_p=per_row(1.0, 1.0, 0.8),
    )
    check_sample(
        Case("cuda bulk", rows=300, vocab=(523,), dtypes=(BF16, F32, F16), kwargs=mixed), "cuda", logprobs=False
    )
    check_sample(Case("cuda bulk plain", rows=300, vocab=(523,), dtypes=(BF16,)), "cuda", logprobs=False)


def test_cuts_change_no_token_and_are_set_back(shim):
    """The knobs that `python -m tools launch_config` turns on a GPU."""
    from tools import launch_config as tuning

    shim.simt_set_device(90, 3, 232448, 16, 16)
    backend = dispatch.load("cuda")
    written = dict(re.findall(r"int (\w+) = ([^;]+);", (build.ROOT / "csrc/cuda/launch_config.h").read_text()))
    assert {name: eval(value) for name, value in written.items()} == backend.LaunchConfig()._asdict()
    for name in tuning.FIELDS:
        assert set(tuning.measure(name, 2, "cpu", "eager", 3000)) == set(tuning.FIELDS[name].values)
    for direct in (0, 100):
        with tuning.launch_config(direct_chunks_per_sm=direct):
            check_sample(Case("cuda cuts", rows=3, vocab=(300,), dtypes=(BF16,)), "cuda", logprobs=True)
    with tuning.launch_config(sample_by_rejection=0):
        for case in CASES:
            if case.special == "hard" or case.name in ("top-k", "top-p", "bad rows filtered", "parameters per row"):
                check_sample(case, "cuda", logprobs=False)
    for bad in ((1, 2), (1, 0, 1, 1, 1, 1), (-1, 1, 1, 1, 1, 1), ("a", 1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="six integers"):
            backend._cuda.set_launch_config(*bad)


def test_the_way_of_many_rows_on_small_cases(device):
    """As the memory checkers on a GPU look at it."""
    from tools import sanitize

    assert sanitize.launches("cuda") == ["few rows", "many rows"]
    for case in CASES:
        if case.name in sanitize.NAMES:
            assert sanitize.calls(case, "cuda", "many rows", "cpu") == 3


# --- faults --------------------------------------------------------------------------------------------------------

# file: a text that is replaced, by what
FAULTS = {
    "a barrier before the winners are read": (
        "row/race.cuh",
        "winners[warp_id()] = w;\n  __syncthreads();",
        "winners[warp_id()] = w;",
    ),
    "a barrier of the cluster": ("block/cluster.cuh", "      cluster_sync();\n", "      __syncthreads();\n"),
    "a store beyond the block's scores": (
        "row/row.cu",
        "(chunk - part.first) * kChunkSize + lane_id() * kPerLane, s);\n  };",
        "(chunk - part.first + 1) * kChunkSize + lane_id() * kPerLane, s);\n  };",
    ),
    "the last block comes too early": (
        "row/sample.cu",
        "static_cast<unsigned>(splits - 1)",
        "static_cast<unsigned>(splits - 2)",
    ),
    "counters are not set back": (
        "row/sample.cu",
        "counters[b] = counters[call.rows + b] = 0;",
        "counters[call.rows + b] = 0;",
    ),
    "the lead is not set back": ("row/sample.cu", "counters[b] = counters[call.rows + b] = 0;", "counters[b] = 0;"),
    "another token's noise": ("row/race.cuh", "token & 1 ? w.r[1] : w.r[0]", "token & 1 ? w.r[0] : w.r[1]"),
    "a bound too low": (
        "row/race.cuh",
        "pack(high + params.temperature * g,",
        "pack(high + params.temperature * g - 3,",
    ),
    "-inf in models that cancel": (
        "row/score.cuh",
        "return low > -kLarge && high < kLarge ? high : NAN;",
        "return high;",
    ),
    "vectors that are not aligned": ("row/score.cuh", "if (off & 4) x[0] = x[1],", "if (off & 2) x[0] = x[1],"),
    "no exact sum where it is in doubt": ("row/filter.cuh", "step == kNucleus && kept.needs_exact_total", "false"),
    "the first winner, kept or not": (
        "row/filter.cuh",
        "if (!params.use_k && !params.use_p)",
        "return true;",
    ),
    "a carry is lost": ("row/filter.cuh", "(before + low < before ? 1 : 0)", "(before > low ? 0 : 0)"),
    "bins are cleared before all have read them": (
        "row/filter.cuh",
        "group.sync();  // bins have been read\n        if",
        "if",
    ),
    "the last bin has an end": ("row/filter.cuh", "if (first + unit <= kFarthest) low", "low"),
    "neighbouring floats are one": (
        "row/filter.cuh",
        "static_cast<uint32_t>(ordered(best)) - static_cast<uint32_t>(ordered(x));",
        "(static_cast<uint32_t>(ordered(best)) - static_cast<uint32_t>(ordered(x))) & ~255u;",
    ),
    "fewer of the best chunks": ("row/filter.cuh", "-kInf, 0, k, 1, {0, 0}", "-kInf, 0, (k + 1) / 2, 1, {0, 0}"),
    "more scores than there is room for": ("row/filter.cuh", "if (!direct || first->left <= kFew) break;", "break;"),
    "the nucleus of the k best": ("row/filter.cuh", "mass_limit(search.p, k.upto);", "mass_limit(search.p, k.above);"),
    "equal scores have one rank": (
        "row/outputs.cuh",
        "rank += search.keys[j] > key;",
        "rank += search.keys[j] >> 32 > key >> 32;",
    ),
    "masses by another model's best": (
        "row/upscale.cuh",
        "mass(z[k], stats.best[j], kLog2e)",
        "mass(z[k], stats.best[0], kLog2e)",
    ),
    "the tuned model's nucleus": (
        "row/upscale.cuh",
        "{static_cast<double>(mass), 0}, row.vocab);",
        "{static_cast<double>(mass / 2), 0}, row.vocab);",
    ),
    "a residual without the draft": (
        "verify/verify.cu",
        "const int64_t m = draft ? mass_at",
        "const int64_t m = draft ? 0 * mass_at",
    ),
    "a residual's bound too low": (
        "verify/verify.cu",
        "log(static_cast<float>(most)) + kMargin",
        "log(static_cast<float>(most)) - 2",
    ),
    "a pair is judged when one has come": (
        "verify/accept.cuh",
        "arrive_acq_rel(counters + slot) == 1",
        "arrive_acq_rel(counters + slot) < 2",
    ),
    "a row stops at another draft": ("verify/accept.cuh", "(call.slots - slot));", "(call.slots - slot - 1));"),
    "rows are skipped that are needed": ("row/row.cu", "first_rejected(drafts, b, call.slots) < slot;", "true;"),
    "the last slot comes too early": (
        "verify/accept.cuh",
        "arrive_acq_rel(counters) + 1 == slots",
        "arrive_acq_rel(counters) + 2 == slots",
    ),
    "verify's counters are not set back": ("verify/accept.cuh", "d.counters[r] = 0;", ";"),
    "runners-up under the lead of the race before": ("row/row.cu", "shared.leads[turn ^ 1] = 0;", ";"),
    "runners-up of a block under the row's lead": (
        "row/sample.cu",
        "lead = kMore ? &shared.lead",
        "lead = false ? nullptr",
    ),
    "runners-up of other splits are not looked at": ("row/sample.cu", "splits * (more + 1)", "splits"),
    "a tree's noise by slot": ("row/row.cu", "tree_of(drafts, b, call.slots).depth(slot)", "slot"),
    "the last of equal paths": ("../semantics/accept.h", "if (depths[i] > longest)", "if (depths[i] >= longest)"),
    "a sum that matters": ("verify/verify.cu", "return u <= ratio * 1.000001 &&", "return u <= ratio * 0.5 &&"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    """Each makes some test above fail: a wrong result, or the shim's complaint."""
    name, old, new = FAULTS[fault]
    library = build.build(replace={name: (old, new)})
    here = Path(__file__)
    pytest_here = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", here, "-k", "not fault"]
    run = subprocess.run(
        pytest_here, env=os.environ | {"EFT_KERNELS_SIMT": str(library)}, text=True, capture_output=True
    )
    assert run.returncode == 1 and "FAILED" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]
    print("\n" + fault + ":", next(x for x in run.stdout.splitlines() if x.startswith("FAILED"))[:160])
