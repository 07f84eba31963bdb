"""Values, layouts and moments that nobody has checked: the right answer, an invalid row or an error, and never a crash.

What could end the process runs in one of its own.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import conftest
import pytest
import torch

import eft_kernels as eft
from eft_kernels import testing
from eft_kernels.testing import unchecked

NAN, INF = float("nan"), float("inf")
ROOT = Path(__file__).parents[1]
ODD = testing.odd_calls()
CPU = "cpu" in conftest.COMPILED
needs_cpu = pytest.mark.skipif(not CPU, reason="the C++ extension is not built")


def alone(code: str, timeout=120, **env):
    """``code`` in a process of its own, which must end well."""
    start = "import torch, eft_kernels as eft\nfrom eft_kernels.testing import unchecked\ntorch.manual_seed(0)\n"
    run = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)],
        cwd=ROOT,
        text=True,
        timeout=timeout,
        capture_output=True,
        env=os.environ | env,
    )
    assert run.returncode == 0, f"{run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    return run.stdout


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ODD, ids=lambda call: call.name)
def test_odd_values(call, compiled):
    testing.check_call(call, compiled)


def test_a_row_with_a_parameter_out_of_range_is_invalid_alone(backend):
    seen = 0
    for call in ODD:
        if "out of range" not in call.name and not call.name.startswith("weight"):
            continue
        out = call.run(backend)
        if call.operation in ("sample", "verify"):
            assert out["valid"].tolist() == [True] + [False] * (out["valid"].shape[0] - 1), call.name
            assert (out["tokens"][1:] == -1).all() and (out["tokens"].flatten()[0] >= 0)
        if call.operation == "verify":
            assert out["num_emitted"][1:].eq(0).all() and out["num_emitted"][0] >= 1
        if out["logprobs"].numel():
            assert out["logprobs"][1:].isnan().all() and not out["logprobs"][0].flatten()[0].isnan()
        seen += 1
    assert seen > 100


def test_top_k_out_of_range_is_off(backend):
    z = [torch.randn(4, 100)]
    out = unchecked("logprobs", z, (1.0,), False, top_k=torch.tensor([-1, -(1 << 63), (1 << 63) - 1, 100])).run(backend)
    torch.testing.assert_close(out["logprobs"], z[0].log_softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", eft.ops.METHODS)
def test_drafts_and_lengths_of_any_value(method, backend):
    """Lengths beyond K are K, below 0 none; a draft outside the vocabulary is never accepted."""
    V, low, high = 50, -(1 << 63), (1 << 63) - 1
    z = torch.zeros(6, 4, V)
    z[..., 7] = 60.0
    drafts = torch.tensor([[7, 7, 7], [7, 7, 7], [7, V, 7], [-1, 7, 7], [low, 7, 7], [7, 7, high]])
    lengths = torch.tensor([high, -1, 5, 3, 4, 3])
    out = unchecked("verify", [z], (1.0,), drafts, lengths, None, method, -1, True, tuned=0).run(backend)
    assert out["num_emitted"].tolist() == [4, 1, 2, 1, 1, 3]
    assert out["valid"].all() and ((out["tokens"] == 7) | (out["tokens"] == -1)).all()


def test_a_normalised_score_that_overflows(backend):
    """To NaN or +inf: the row is invalid. To -inf: the token is excluded."""
    big = 3.3e38
    zero = torch.zeros(1, 4)
    z = [zero, zero, torch.tensor([[big, -big, 0, 0]])]
    call = unchecked("sample", z, (1.0, 1.0, -1.0), "sample", 0, True, 2, False, 0, upscale_top_p=0.3, top_p=0.5)
    out = call.run(backend)
    assert out["tokens"].tolist() == [-1] and not out["valid"].any() and out["logprobs"].isnan().all()
    assert out["top_ids"].tolist() == [[-1, -1]]
    # base scores -big and 0: log-sum-exp 0; with weight 1.5 the first overflows
    z = [torch.tensor([[-big, 0.0, 1.0]]), torch.zeros(1, 3), torch.zeros(1, 3)]
    lp = unchecked("logprobs", z, (1.5, 1.0, -1.5), False, upscale_top_p=0.99).run(backend)["logprobs"]
    assert lp[0, 0] == -INF and lp[0, 1:].isfinite().all()
    z = [torch.full((1, 3), -big), torch.zeros(1, 3), torch.zeros(1, 3)]
    assert not unchecked("sample", z, (1.5, 1.0, -1.5), "sample", 0, True, 0, False, 0).run(backend)["valid"].any()


def test_keys_that_overflow_leave_the_first_token_that_is_kept(backend):
    V, seed, zero = 1 << 17, torch.arange(4), torch.zeros(4, 1, dtype=torch.int64)
    z = torch.full((4, V), torch.finfo(torch.float32).max)
    z[:, ::2], z[:, 5] = -INF, 0.0
    out = unchecked("sample", [z], (1.0,), "sample", 0, False, 0, False, 0, temperature=1e30, seed=seed).run(backend)
    key = z + 1e30 * eft.reference.gumbel(seed[:, None], zero + 2, 0, zero, V)
    assert (key == INF).any(1).all() and (key == INF).sum(1).max() > 1 and out["valid"].all()
    assert out["tokens"].tolist() == [int((row == INF).nonzero()[0]) for row in key]


@pytest.mark.parametrize(
    "weights", [(0.0, 0.0), torch.zeros(2), torch.zeros(3, 2)], ids=("numbers", "tensor", "per row")
)
def test_models_of_weight_0_are_not_read(weights, backend):
    dead = torch.full((3, 40), NAN)
    dead[1], dead[2] = -INF, INF
    lp = eft.logprobs([dead, dead], weights, backend=backend)
    torch.testing.assert_close(lp, torch.full((3, 40), 1 / 40).log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", (0.0, 65000.0, -65000.0, 1e30, -1e30))
def test_diagnostics_are_those_of_float64(offset, backend):
    """Logits that share a large offset."""
    for scale in (1.0, 2.0**-7):
        z = [torch.randn(2, 500, generator=torch.Generator().manual_seed(j)) * 2 + offset * scale for j in range(3)]
        out = eft.sample(z, eft.upscale(), seed=1, position=0, diagnostics=True, backend=backend)
        s = ((z[0] + z[1]) - z[2]).double().log_softmax(1)
        tv = 0.5 * (s.exp() - z[1].double().softmax(1)).abs().sum(1)
        torch.testing.assert_close(out.tv.double(), tv, rtol=0, atol=2e-6)
        entropy = -(s.exp() * s).nan_to_num().sum(1)
        torch.testing.assert_close(out.entropy.double(), entropy, rtol=0, atol=5e-5)


@pytest.mark.parametrize("part", range(8))
def test_random_calls(part, compiled):
    for seed in range(part * 50, part * 50 + 50):
        testing.check_call(testing.random_call(seed), compiled)


def test_random_calls_are_of_every_kind():
    calls = [testing.random_call(seed) for seed in range(300)]
    assert {call.operation for call in calls} == set(eft.ops.SCHEMAS)
    assert {z.dtype for call in calls for z in call.logits} == set(eft.arguments.DTYPES)
    values = [item for call in calls for item in call.params._asdict().items()]
    tensors = {name for name, value in values if isinstance(value, torch.Tensor | eft.TokenBias)}
    assert tensors == set(eft.parameters.Params._fields) - {"vocab_size", "tuned"}
    assert {z.stride(-1) == 1 for call in calls for z in call.logits if z.numel() > 1} == {True, False}
    outs = [call.run("reference") for call in calls]
    valid = torch.cat([out["valid"] for out in outs if "valid" in out])
    assert 0.3 < float(valid.float().mean()) < 0.95


# --- layouts -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "expanded": lambda B: torch.tensor([1.0, 0.5, -1.0]).expand(B, 3),
    "transposed": lambda B: torch.rand(3, B).t(),
    "sliced": lambda B: torch.rand(B, 7)[:, 1:6:2],
    "reversed rows of a wide one": lambda B: torch.rand(2 * B, 3)[::2],
    "[J] with a stride": lambda B: torch.rand(6)[::2],
    "double": lambda B: torch.rand(B, 3, dtype=torch.float64),
    "no rows beyond the call's": lambda B: torch.rand(B + 5, 3)[:B],
}


@pytest.mark.parametrize("slots", (0, 2))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(layout, slots, backend):
    weights = LAYOUTS[layout](1024)
    z = [torch.randn(1024, *[slots] * (slots > 0), 50, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    seed = torch.arange(1024)

    def tokens(weights):
        if slots:
            return eft.verify(
                z, weights, torch.zeros(1024, 1, dtype=torch.int64), seed=seed, position=0, backend=backend
            ).tokens
        return eft.sample(z, weights, seed=seed, position=0, backend=backend).tokens

    assert torch.equal(tokens(weights), tokens(weights.float().contiguous()))


SHAPES = [(1023, 3), (1025, 3), (1, 3), (0, 3), (1024, 0), (1024, 2), (1024, 4), (2,), (4,), (0,), (), (1024, 3, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_another_shape_are_refused(shape, backend):
    z = [torch.randn(1024, 50)] * 3
    slots = [x[:, None].expand(-1, 2, -1) for x in z]
    with pytest.raises(ValueError, match="^weights"):
        eft.sample(z, torch.ones(shape), seed=1, position=0, backend=backend)
    with pytest.raises(ValueError, match="^weights"):
        eft.verify(
            slots, torch.ones(shape), torch.zeros(1024, 1, dtype=torch.int64), seed=1, position=0, backend=backend
        )


Z = [torch.zeros(2, 40)] * 3
ZZ = [torch.zeros(2, 3, 40)] * 3
DRAFTS, LENGTHS = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
DRAW, JUDGE = ("sample", 0, True, 2, True, 1), (DRAFTS, LENGTHS, None, "token", 1, True)
WRONG = [  # what the error says, operation, logits, arguments, parameters
    ("logits", "sample", [torch.zeros(2, 40), torch.zeros(3, 40), torch.zeros(2, 40)], DRAW, {}),
    ("logits", "sample", ZZ, DRAW, {}),
    ("logits", "verify", Z, JUDGE, {}),
    ("logits", "verify", [z[:, :0] for z in ZZ], JUDGE, {}),
    ("logits", "logprobs", [z.double() for z in Z], (False,), {}),
    ("vocab_size", "sample", Z, DRAW, dict(vocab_size=41)),
    ("vocab_size", "logprobs", Z, (False,), dict(vocab_size=0)),
    ("vocab_size", "token_logprobs", Z, (LENGTHS[:, None],), dict(vocab_size=-1)),
    ("weights", "sample", Z, DRAW, dict(weights=(1.0,))),
    ("weights", "sample", Z, DRAW, dict(weights=torch.ones(3, 3))),
    ("temperature", "sample", Z, DRAW, dict(temperature=torch.ones(3))),
    ("temperature", "sample", Z, DRAW, dict(temperature=-1.0)),
    ("top_k", "verify", ZZ, JUDGE, dict(top_k=torch.ones(2))),
    ("top_p", "logprobs", Z, (False,), dict(top_p=torch.ones(2, 1))),
    ("seed", "sample", Z, DRAW, dict(seed=torch.ones(1, dtype=torch.int64))),
    ("token_mask", "sample", Z, DRAW, dict(token_mask=torch.zeros(2, 1, dtype=torch.int32))),
    ("token_mask", "verify", ZZ, JUDGE, dict(token_mask=torch.zeros(2, 2, dtype=torch.int32))),
    ("tuned", "sample", Z, DRAW, dict(tuned=3)),
    ("tuned", "sample", Z, DRAW, dict(tuned=-1)),
    ("tuned", "verify", ZZ, JUDGE, dict(tuned=1 << 32, upscale_top_p=0.5)),
    ("stream", "sample", Z, ("accept", 0, True, 2, True, 0), {}),
    ("slot", "sample", Z, ("sample", 1 << 24, True, 2, True, 0), {}),
    ("slot", "sample", Z, ("sample", -1, True, 2, True, 0), {}),
    ("top_logprobs", "sample", Z, ("sample", 0, True, -2, True, 0), {}),
    ("runners_up", "sample", Z, ("sample", 0, True, 2, True, 16), {}),
    ("runners_up", "sample", Z, ("sample", 0, True, 2, True, -1), {}),
    ("parents", "verify", ZZ, (DRAFTS, LENGTHS, DRAFTS, "token", 1, True), {}),
    ("parents", "verify", ZZ, (DRAFTS, LENGTHS, DRAFTS[:1], "coupled", 1, True), {}),
    ("parents", "verify", ZZ, (DRAFTS, LENGTHS, DRAFTS.float(), "coupled", 1, True), {}),
    ("draft_tokens", "verify", ZZ, (DRAFTS[:, :1], *JUDGE[1:]), {}),
    ("draft_tokens", "verify", ZZ, (DRAFTS.float(), *JUDGE[1:]), {}),
    ("draft_lengths", "verify", ZZ, (DRAFTS, LENGTHS[:1], *JUDGE[2:]), {}),
    ("method", "verify", ZZ, (DRAFTS, LENGTHS, None, "tokens", 1, True), {}),
    ("draft", "verify", ZZ, (DRAFTS, LENGTHS, None, "token", 3, True), {}),
    ("draft", "verify", ZZ, (DRAFTS, LENGTHS, None, "token", -2, True), {}),
    ("ids", "token_logprobs", Z, (torch.zeros(3, 1, dtype=torch.int64),), {}),
    ("ids", "token_logprobs", Z, (LENGTHS,), {}),
    ("ids", "token_logprobs", Z, (torch.zeros(2, 1, 1, dtype=torch.int64),), {}),
]


@pytest.mark.parametrize(
    "words, operation, logits, args, params", WRONG, ids=[f"{row[0]}-{row[1]}-{i}" for i, row in enumerate(WRONG)]
)
def test_an_operator_refuses_what_a_function_would(words, operation, logits, args, params, backend):
    params = dict(params)
    call = unchecked(operation, logits, params.pop("weights", (1.0, 1.0, -1.0)), *args, **dict(vocab_size=40) | params)
    with pytest.raises(ValueError, match=f"^{words}"):
        call.run(backend)


# --- other threads -------------------------------------------------------------------------------------------------


@needs_cpu
def test_a_list_whose_items_are_replaced():
    """While the kernel runs without the interpreter lock; tensors this large are unmapped as soon as they are free."""
    alone("""
        import threading
        torch.set_num_threads(1)
        logits, over = [torch.zeros(40, 128256) for _ in range(3)], threading.Event()

        def replace():
            while not over.is_set():
                for j in range(3):
                    logits[j] = torch.zeros(40, 128256)

        other = threading.Thread(target=replace)
        other.start()
        for seed in range(8):
            assert eft.sample(logits, eft.upscale(), seed=seed, position=0).valid.all()
        over.set()
        other.join()
    """)


@needs_cpu
@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_values_that_change_while_a_kernel_runs(isa):
    """Any token of the vocabulary may come of it, or none; no other memory is touched, and every call ends."""
    if isa == "avx2":
        try:
            eft.dispatch.load("cpu").set_isa(isa)
        except ValueError:
            pytest.skip("this machine has no AVX2")
        eft.dispatch.load("cpu").set_isa(os.environ.get("EFT_KERNELS_CPU_ISA") or None)
    out = alone(
        """
        import itertools, random, threading, time
        from eft_kernels.testing import Call
        torch.set_num_threads(2)
        B, S, V = 3, 4, 20011
        nan, inf = float("nan"), float("inf")
        z = [torch.randn(B, S, V) for _ in range(3)]
        kinds = [z[0].clone(), z[0] * 0, z[0] * 1e38, z[0] * 30]
        kinds += [torch.full_like(z[0], x) for x in (nan, -inf, 3e38, -3e38)]
        mask = torch.randint(-(1 << 31), 1 << 31, (B, S, (V + 31) // 32)).int()
        from eft_kernels.arguments import dtype_of
        from eft_kernels.parameters import PARAMETERS
        params = {p.name: torch.full((B,), p.off, dtype=dtype_of(p)) for p in PARAMETERS}
        params |= dict(seed=torch.arange(B), position=torch.arange(B))
        weights = torch.tensor([[1., 1., -1.]]).repeat(B, 1)
        flat_index, deep_index = torch.arange(B), torch.arange(B * S).view(B, S)
        drafts, lengths, ids = torch.zeros(B, S - 1).long(), torch.full((B,), S - 1), torch.zeros(B, 9).long()
        parents = torch.arange(S - 1).repeat(B, 1)
        floats = torch.tensor([1.0, 0.9, 0.3, 0.0, 0.5, nan, inf, -1.0, 1e-7, 2.0, 1e30])
        numbers = torch.tensor([0, 1, 7, 500, V - 1, V, -1, (1 << 63) - 1, -(1 << 63), 3, 2])
        over = threading.Event()

        def change():
            pick = random.Random(1)
            while not over.is_set():
                x = pick.choice(z)
                if pick.random() < 0.5:
                    x.copy_(pick.choice(kinds))
                else:
                    at = pick.randrange(V - 300)
                    x[..., at : at + pick.choice([1, 32, 256])] = pick.choice([0.0, nan, inf, -inf, 60.0, -60.0, 3e38])
                mask.fill_(pick.choice([0, -1, 1, 0x55555555]))
                for y in (*params.values(), weights, flat_index, deep_index, drafts, lengths, parents, ids):
                    if pick.random() < 0.4:
                        values = floats if y.is_floating_point() else numbers
                        y.copy_(values[torch.randint(0, len(values), y.shape)])
                if pick.random() < 0.5:  # all usual
                    for p in PARAMETERS:
                        params[p.name].fill_(dict(top_p=0.5, upscale_top_p=0.7).get(p.name, p.off))
                    weights.copy_(torch.tensor([1., 1., -1.]))
                    flat_index.copy_(torch.arange(B))
                    deep_index.copy_(torch.arange(B * S).view(B, S))

        other = threading.Thread(target=change)
        other.start()
        end, calls = time.time() + 12, 0
        names, pick = list(params), random.Random(2)
        rows, every = [x[:, 0] for x in z], [x.view(B * S, V) for x in z]
        while time.time() < end:
            some = {name: params[name] for name in names if pick.random() < 0.6}
            w = weights if pick.random() < 0.5 else (1.0, 1.0, -1.0)
            flat = dict(some, token_mask=mask[:, 0].contiguous()) if pick.random() < 0.3 else some
            deep = dict(some, token_mask=mask) if pick.random() < 0.3 else some
            chosen = pick.random() < 0.5  # by row_index
            if chosen:
                flat, deep = dict(flat, row_index=flat_index), dict(deep, row_index=deep_index)
            for call in (unchecked("sample", rows, w, "sample", 0, pick.random() < 0.5, pick.choice([0, 5]),
                                   pick.random() < 0.3, pick.choice([0, 3]), **flat),
                         unchecked("logprobs", rows, w, pick.random() < 0.3, **flat),
                         unchecked("token_logprobs", rows, w, ids, **flat),
                         unchecked("verify", every if chosen else z, w, drafts, lengths, None,
                                   pick.choice(eft.ops.METHODS), pick.choice([-1, 0, 1]), pick.random() < 0.5, **deep),
                         unchecked("verify", every if chosen else z, w, drafts, lengths, parents, "coupled", -1, True,
                                   **deep)):
                out, calls = call.run("cpu"), calls + 1
                tokens = out.get("tokens", torch.zeros(1))
                assert ((tokens >= -1) & (tokens < V)).all(), tokens
        over.set()
        other.join()
        print(calls)
    """,
        EFT_KERNELS_CPU_ISA=isa,
    )
    assert int(out) > 20


# --- no threads, no memory -----------------------------------------------------------------------------------------

DENY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
int deny_threads, deny_memory;
int pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*f)(void*), void* x) {
  int (*next)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = dlsym(RTLD_NEXT, "pthread_create");
  return deny_threads ? EAGAIN : next(t, a, f, x);
}
void* aligned_alloc(size_t alignment, size_t size) {
  void* (*next)(size_t, size_t) = dlsym(RTLD_NEXT, "aligned_alloc");
  return deny_memory ? NULL : next(alignment, size);
}
"""


@pytest.fixture(scope="module")
def deny(tmp_path_factory):
    """A library that, loaded before all others, refuses threads or memory when it is told to."""
    cc = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
    if not sys.platform.startswith("linux") or cc is None:
        pytest.skip("needs Linux and a C compiler")
    source = tmp_path_factory.mktemp("deny") / "deny.c"
    source.write_text(DENY)
    subprocess.run([cc, "-shared", "-fPIC", source, "-o", source.with_suffix(".so"), "-ldl"], check=True)
    return source.with_suffix(".so")


DENIED = """
    import ctypes, os
    deny = ctypes.CDLL(os.environ["DENY"])
    threads, memory = (ctypes.c_int.in_dll(deny, "deny_" + x) for x in ("threads", "memory"))
    torch.set_num_threads(4)
    args = dict(seed=torch.arange(40), position=0, top_p=0.9, temperature=0.8)

    def logits(rows, V):
        return [torch.randn(rows, V) for _ in range(3)]

    def same(z, **kwargs):
        kwargs = {**args, "seed": args["seed"][: z[0].shape[0]], **kwargs}
        got, want = (eft.sample(z, eft.upscale(), backend=name, **kwargs) for name in ("cpu", "reference"))
        assert torch.equal(got.tokens, want.tokens)
"""


@needs_cpu
def test_threads_that_the_system_refuses(deny):
    """Rows are done by the threads that are there, and later by more."""
    alone(
        DENIED
        + """
    few, many = logits(1, 70000), logits(40, 3000)
    want = [eft.sample(z, eft.upscale(), backend="reference", **{**args, "seed": args["seed"][: z[0].shape[0]]}).tokens
            for z in (few, many)]
    threads.value = 1
    for z, tokens in zip((few, many), want):
        for _ in range(3):
            got = eft.sample(z, eft.upscale(), **{**args, "seed": args["seed"][: z[0].shape[0]]}).tokens
            assert torch.equal(got, tokens)
    threads.value = 0
    for z in (few, many):
        same(z)
    assert len(os.listdir("/proc/self/task")) > 2
    """,
        LD_PRELOAD=str(deny),
        DENY=str(deny),
    )


@needs_cpu
def test_memory_that_the_system_refuses(deny):
    """MemoryError, on whichever thread it was; the next call is right."""
    alone(
        DENIED
        + """
    drafts, refused = torch.zeros(3, 2, dtype=torch.int64), set()
    for rows, V in ((1, 70000), (40, 3000), (2, 90000), (40, 5000)):  # ever more than there is
        z = logits(rows, V)
        for n in (1, 4):
            torch.set_num_threads(n)
            memory.value = 1
            for call in (lambda: eft.sample(z, eft.upscale(), **{**args, "seed": 1}),
                         lambda: eft.logprobs(z, eft.upscale(), top_p=0.5),
                         lambda: eft.token_logprobs(z, eft.upscale(), torch.zeros(rows, dtype=torch.int64), top_k=5),
                         lambda: eft.verify([x[:1, None].expand(3, 3, V) for x in z], eft.upscale(), drafts,
                                            method="block", seed=1, position=0)):
                try:
                    call()
                except MemoryError:
                    refused.add((V, n))
            memory.value = 0
        same(z)
        same(z, top_logprobs=3)
    assert {(70000, 1), (70000, 4), (3000, 4), (90000, 1)} <= refused, refused
    """,
        LD_PRELOAD=str(deny),
        DENY=str(deny),
    )


def test_outputs_that_there_is_no_memory_for():
    wide = torch.zeros(1, 1 << 20).expand(1 << 24, 1 << 20)
    with pytest.raises(MemoryError if CPU else RuntimeError):
        eft.logprobs([wide], [1.0], backend="cpu" if CPU else "auto")
    assert eft.logprobs([wide[:1, :7]], [1.0]).shape == (1, 7)


def test_masks_by_the_least_number_of_a_type_exclude(backend):
    """Their products overflow where a strength is above 1: the token is excluded, as by -inf, and no row is invalid."""
    case = next(c for c in testing.CASES if c.name == "masks by the least number")
    for dtype in (torch.float32, torch.bfloat16):
        logits, _, _ = testing.make(case._replace(dtypes=(dtype,)))
        for weights, cancel in (
            (eft.upscale(1.5), False),
            (eft.upscale(torch.linspace(1.1, 3, case.rows)), False),
            ([2.0, -1.5, -1.25], False),
            (eft.upscale(1.0), True),
            (eft.upscale(0.25), True),
            (eft.proxy(1e-3), False),
        ):
            z = [x.clone() for x in logits]
            if cancel:  # masks of base and ref alone
                for x in z:
                    x[:, 4::7] = 0.0
            there = [torch.where(x <= -3.38e38, float("-inf"), x) for x in z]
            assert all(bool((x == float("-inf")).any()) for x in there)
            for options in (dict(), dict(temperature=0.7, top_k=40, top_p=0.9), dict(upscale_top_p=0.8)):
                got = eft.sample(z, weights, seed=7, position=0, backend=backend, **options)
                want = eft.sample(there, weights, seed=7, position=0, backend=backend, **options)
                assert got.valid.all() and torch.equal(got.tokens, want.tokens)
                torch.testing.assert_close(got.logprobs, want.logprobs)
                torch.testing.assert_close(
                    eft.logprobs(z, weights, backend=backend, **options),
                    eft.logprobs(there, weights, backend=backend, **options),
                )
