"""The operators and the public functions: registration, compilation, every bad argument, threads and processes."""

import inspect
import os
import subprocess
import sys
import threading
import time

import conftest
import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import eft_kernels as eft
from eft_kernels import dispatch, ops
from eft_kernels.arguments import dtype_of
from eft_kernels.parameters import NAMES, PARAMETERS, PER_ROW

V, B, K = 40, 3, 2


def models(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(dtype) for _ in range(3)]


def mask(*lead, V=V):
    g = torch.Generator().manual_seed(1)
    return torch.randint(-(1 << 31), 1 << 31, (*lead, (V + 31) // 32), generator=g).to(torch.int32)


TENSORS = dict(
    temperature=torch.tensor([1.0, 0.0, 0.5]),
    top_k=torch.tensor([0, 5, 9]),
    top_p=torch.tensor([1.0, 0.9, 0.5]),
    min_p=torch.tensor([0.0, 0.1, 0.0]),
    upscale_top_p=torch.tensor([1.0, 0.9, 0.8]),
)
NOISE = dict(seed=torch.tensor([1, 2, 3]), position=torch.tensor([0, 5, 1 << 40]))


# --- registration --------------------------------------------------------------------------------------------------


def op_arguments(name, backend):
    """Several sets of arguments of ``torch.ops.eft_kernels.<name>``."""
    seen, call, shortcut = [], ops._call, dispatch.shortcut

    def record(name, logits, p, *args, backend):
        seen.append((logits, *ops._flatten(p, *args), backend))
        return call(name, logits, p, *args, backend=backend)

    ops._call, dispatch.shortcut = record, lambda *args: None
    try:
        for dtype in (torch.float32, torch.bfloat16):
            z, zz = models(B, V, dtype=dtype), models(B, K + 1, V, dtype=dtype)
            for kwargs in ({}, dict(temperature=0.7, top_p=0.9), dict(TENSORS, token_mask=mask(B))):
                kwargs = dict(kwargs, backend=backend)
                if name == "sample":
                    eft.sample(z, eft.upscale(), **NOISE, **kwargs)
                    eft.sample(
                        z,
                        torch.ones(B, 3),
                        seed=1,
                        position=0,
                        stream="draft",
                        slot=2,
                        logprobs=False,
                        top_logprobs=4,
                        diagnostics=True,
                        **kwargs,
                    )
                elif name == "verify":
                    if "token_mask" in kwargs:
                        kwargs["token_mask"] = mask(B, K + 1)
                    drafts = torch.tensor([[1, 2], [3, 4], [5, 6]])
                    eft.verify(zz, eft.upscale(), drafts, method="block", logprobs=True, **NOISE, **kwargs)
                    eft.verify(
                        zz, eft.upscale(), drafts, torch.tensor([2, 1, 0]), draft=None, seed=3, position=0, **kwargs
                    )
                    eft.verify(
                        zz,
                        eft.upscale(),
                        drafts,
                        draft_temperature=0.5,
                        draft_top_k=TENSORS["top_k"],
                        draft_min_p=0.1,
                        **NOISE,
                        **kwargs,
                    )
                elif name == "logprobs":
                    eft.logprobs(z, eft.upscale(), **kwargs)
                else:
                    eft.token_logprobs(z, eft.upscale(), torch.tensor([[1, 2], [3, 4], [0, 39]]), **kwargs)
    finally:
        ops._call, dispatch.shortcut = call, shortcut
    assert len(seen) >= 6
    return seen


@pytest.mark.skipif(not eft.backends()["cpu"]["available"], reason="the C++ extension is not built")
def test_shortcut_takes_the_usual_and_agrees(monkeypatch):
    """The usual calls go past the checks in Python, give the same, and nothing unusual passes."""
    z, zz, drafts = models(B, V), models(B, K + 1, V), torch.tensor([[1, 2], [3, 4], [5, 6]])
    seen = []

    def both(function, *args, **kwargs):
        monkeypatch.setattr(ops, "_call", lambda *args, **kwargs: pytest.fail("the shortcut did not take it"))
        quick = function(*args, **kwargs)
        monkeypatch.undo()
        monkeypatch.setattr(dispatch, "shortcut", lambda *args: None)
        slow = function(*args, **kwargs)
        monkeypatch.undo()
        for name, x, y in zip(quick._fields, quick, slow):
            assert (x is None) == (y is None), name
            if x is not None:
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        seen.append(quick)

    for kwargs in (
        dict(seed=1),
        dict(seed=-1, position=7, temperature=1, top_p=1),
        dict(TENSORS, **NOISE),
        dict(seed=2, top_logprobs=3, diagnostics=True),
        dict(seed=3, token_mask=mask(B), vocab_size=33 + 7),
        dict(seed=4, stream="draft", slot=2, logprobs=False),
    ):
        kwargs = dict(position=0) | kwargs
        both(eft.sample, z, eft.upscale(), **kwargs)
        both(eft.sample, tuple(z), torch.ones(B, 3), **kwargs)
    for kwargs in (
        dict(draft_lengths=torch.tensor([2, 0, 1])),
        dict(method="coupled", draft=None, logprobs=True),
        dict(draft_temperature=0.5, draft_top_k=9),
        dict(method="block", draft_top_p=TENSORS["top_p"]),
    ):
        both(eft.verify, zz, eft.upscale(), drafts, seed=5, position=0, **kwargs)
    both(eft.sample, [torch.nn.Parameter(x) for x in z], eft.upscale(), seed=1, position=0)
    both(eft.sample, [x.requires_grad_() for x in z], eft.upscale(), seed=1, position=0)
    assert torch.equal(seen[0].tokens, seen[-1].tokens)


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_opcheck(name, backend):
    """Schema (no hidden mutation or aliasing), fake against real outputs, dispatch with dynamic shapes (not where an
    output is padded with NaN: opcheck compares without equal_nan)."""
    for args in op_arguments(name, backend):
        padded = name == "verify" and args[-2]
        torch.library.opcheck(
            getattr(torch.ops.eft_kernels, name).default,
            args,
            test_utils=("test_schema", "test_faketensor", *(() if padded else ("test_aot_dispatch_dynamic",))),
        )


def test_every_operator_is_registered():
    for name in ops.SCHEMAS:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.eft_kernels, name).default.tags


def test_gradients_are_refused_or_absent():
    """Sampling has no gradient: logits that require one are accepted, and nothing pretends to be differentiable."""
    z = [x.requires_grad_() for x in models(B, V)]
    with torch.no_grad():
        assert bool(eft.sample(z, eft.upscale(), seed=1, position=0).valid.all())


# --- torch.compile -------------------------------------------------------------------------------------------------


def sample_tensors(z, seed, position, temperature, top_p):
    out = eft.sample(
        [x * 1.0 for x in z],
        eft.upscale(),
        seed=seed,
        position=position,
        temperature=temperature,
        top_p=top_p,
        top_logprobs=3,
        diagnostics=True,
    )
    return out.tokens + 0, out.logprobs, out.raw_logprobs, out.top_ids, out.top_logprobs, out.entropy, out.tv


def sample_scalars(z, seed):
    out = eft.sample(z, [1.0, 0.5, -0.5], seed=seed, position=4, temperature=0.8, top_k=5, top_p=0.9, min_p=0.01)
    return out.tokens, out.valid, out.logprobs


def verify_block(z, drafts, seed):
    out = eft.verify(z, eft.upscale(1.5), drafts, method="block", seed=seed, position=7, top_p=0.9, logprobs=True)
    return out.tokens, out.num_emitted, out.logprobs


def score(z, ids):
    return eft.logprobs(z, eft.upscale()), eft.token_logprobs(z, eft.upscale(), ids, temperature=0.5)


@pytest.mark.parametrize(
    "function, args",
    [
        (sample_tensors, lambda: (models(B, V), *NOISE.values(), TENSORS["temperature"], TENSORS["top_p"])),
        (sample_scalars, lambda: (models(B, V, dtype=torch.bfloat16), NOISE["seed"])),
        (verify_block, lambda: (models(B, K + 1, V), torch.tensor([[1, 2], [3, 4], [5, 6]]), NOISE["seed"])),
        (score, lambda: (models(B, V), torch.tensor([1, 2, 3]))),
    ],
    ids=("sample", "sample scalars", "verify", "logprobs"),
)
def test_compile_fullgraph(function, args):
    """Traced whole by Dynamo and AOTAutograd, functionalised, equal to eager."""
    torch._dynamo.reset()
    args = args()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    for x, y in zip(got, function(*args)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_compile_with_inductor():
    """The default compiler calls the operator from the code that it writes; no kernel of its own is needed here."""
    torch._dynamo.reset()
    args = models(B, V, dtype=torch.bfloat16), NOISE["seed"]
    for x, y in zip(torch.compile(sample_scalars, fullgraph=True)(*args), sample_scalars(*args)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_compile_with_other_batches():
    """Dynamic shapes: one graph serves every batch."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, seed: eft.sample(z, eft.upscale(), seed=seed, position=0).tokens,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for rows in (2, 5, 9):
        z, seed = models(rows, V), torch.arange(rows)
        assert torch.equal(compiled(z, seed), eft.sample(z, eft.upscale(), seed=seed, position=0).tokens)


# --- bad arguments -------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
RANGES = [
    ("temperature", (-0.1, NAN, INF, 1e31)),
    ("top_k", (-2, 1.5, NAN, INF)),
    ("top_p", (0.0, -0.5, 1.01, NAN, INF)),
    ("min_p", (-0.01, 1.01, NAN)),
    ("upscale_top_p", (0.0, 1.5, NAN)),
    ("seed", (0.5, 1 << 64, -(1 << 63) - 1, NAN)),
    ("position", (-1, 0.5, 1 << 64, INF)),
]


def sample(z=None, w=None, **kwargs):
    return eft.sample(models(B, V) if z is None else z, eft.upscale() if w is None else w, **kwargs)


def verify(z=None, w=None, drafts=None, lengths=None, **kwargs):
    drafts = torch.zeros(B, K, dtype=torch.int64) if drafts is None else drafts
    return eft.verify(
        models(B, K + 1, V) if z is None else z, eft.upscale() if w is None else w, drafts, lengths, **kwargs
    )


def logprobs(z=None, w=None, **kwargs):
    return eft.logprobs(models(B, V) if z is None else z, eft.upscale() if w is None else w, **kwargs)


def token_logprobs(z=None, w=None, ids=None, **kwargs):
    ids = torch.zeros(B, dtype=torch.int64) if ids is None else ids
    return eft.token_logprobs(models(B, V) if z is None else z, eft.upscale() if w is None else w, ids, **kwargs)


def refused(call, name, *words, **kwargs):
    """ValueError that starts with the argument's name and says each of ``words``; also where a seed is given, and so a
    backend may look before the checks in Python do."""
    seeds = [{}]
    if call in (sample, verify):
        seeds = [dict(position=0)] if "seed" in kwargs else [{}, dict(seed=1, position=0)]
    for seed in seeds:
        with pytest.raises(ValueError) as error:
            call(**seed | kwargs)
        text = str(error.value)
        assert text.startswith(name), text
        for word in words:
            assert word in text, (word, text)


@pytest.mark.parametrize("call", (sample, verify, logprobs, token_logprobs), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name, values", RANGES, ids=[name for name, _ in RANGES])
def test_values_out_of_range(name, values, call):
    if name in ("seed", "position") and call in (logprobs, token_logprobs):
        assert name not in inspect.signature(getattr(eft, call.__name__)).parameters
        return
    for value in values:
        words = ("got", "allowed is")
        refused(call, name, *words, **{name: value})
        dtype = dtype_of(PER_ROW[name])
        if not (dtype == torch.int64 and (value != int(value) if abs(value) < INF else True)) and abs(value) < 1 << 62:
            refused(call, name, *words, **{name: torch.tensor([1, value, 1], dtype=dtype)})


@pytest.mark.parametrize("call", (sample, verify), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", sorted(PER_ROW))
def test_parameters_of_wrong_shape_type_or_device(name, call):
    dtype = dtype_of(PER_ROW[name])
    one = torch.ones(B, dtype=dtype)
    refused(call, name, "[3]", "[4]", **{name: torch.ones(B + 1, dtype=dtype)})
    refused(call, name, "[3]", "[3, 1]", **{name: one[:, None]})
    refused(call, name, "meta", "cpu", **{name: one.to("meta")})
    refused(call, name, "number", "str", **{name: "1"})
    refused(call, name, "number", "list", **{name: [[1], [1], [1]]})
    refused(call, name, "[3]", "[2]", **{name: [1, 1]})
    refused(call, name, "number", "str", **{name: ["1", 1, 1]})
    refused(call, name, "number", "bool", **{name: numpy.ones(B, dtype=bool)})
    refused(call, name, "bool", **{name: torch.ones(B, dtype=torch.bool)})
    refused(call, name, "number", "bool", **{name: True})
    if dtype == torch.int64:
        refused(call, name, "integer", "float32", **{name: torch.ones(B)})
        refused(call, name, "integer", "bool", **{name: torch.ones(B, dtype=torch.bool)})


def long(*values):
    return torch.tensor(values)


BAD = [
    # what is called, the argument, what its message says, the call's arguments
    (sample, "logits", ("list of 1 to 8", "Tensor"), dict(z=torch.zeros(B, V))),
    (sample, "logits", ("list of 1 to 8", "0 tensors"), dict(z=[])),
    (sample, "logits", ("list of 1 to 8", "9 tensors"), dict(z=[torch.zeros(B, V)] * 9, w=[1.0] * 8)),
    (sample, "logits[1]", ("expected a tensor [B, V]", "str"), dict(z=[torch.zeros(B, V), "x"], w=[1.0, 1.0])),
    (sample, "logits[0]", ("[B, V]", "got [40]"), dict(z=[torch.zeros(V)], w=[1.0])),
    (sample, "logits[0]", ("[B, V]", "[3, 3, 40]"), dict(z=[torch.zeros(B, 3, V)], w=[1.0])),
    (sample, "logits[1]", ("[2, 40]", "[3, 40]"), dict(z=[torch.zeros(B, V), torch.zeros(2, V)], w=[1.0, 1.0])),
    (sample, "logits[0]", ("float32, float16 or bfloat16", "float64"), dict(z=[torch.zeros(B, V).double()], w=[1.0])),
    (sample, "logits[1]", ("int64",), dict(z=[torch.zeros(B, V), torch.zeros(B, V).long()], w=[1.0, 1.0])),
    (sample, "logits[1]", ("meta", "cpu"), dict(z=[torch.zeros(B, V), torch.zeros(B, V, device="meta")], w=[1.0, 1.0])),
    (sample, "vocab_size", ("got 41", "1 to 40"), dict(vocab_size=41)),
    (sample, "vocab_size", ("got 0", "1 to 40"), dict(vocab_size=0)),
    (sample, "vocab_size", ("got 0", "shortest"), dict(z=[torch.zeros(B, 0)], w=[1.0])),
    (sample, "vocab_size", ("got 2.5",), dict(vocab_size=2.5)),
    (sample, "vocab_size", ("at most 4194304",), dict(z=[torch.zeros(1, (1 << 22) + 1).bfloat16()], w=[1.0])),
    (sample, "weights", ("got 2 values for 3",), dict(w=[1.0, 1.0])),
    (sample, "weights", ("1 to 8", "got 0"), dict(w=[])),
    (sample, "weights", ("1 to 8", "got 9"), dict(w=[1.0] * 9)),
    (sample, "weights", ("nan", "finite"), dict(w=[1.0, NAN, 1.0])),
    (sample, "weights", ("inf", "finite"), dict(w=[1.0, -INF, 1.0])),
    (sample, "weights", ("finite",), dict(w=torch.tensor([1.0, NAN, 1.0]))),
    (sample, "weights", ("finite",), dict(w=torch.full((B, 3), INF))),
    (sample, "weights", ("[3, 3]", "[2, 3]"), dict(w=torch.ones(2, 3))),
    (sample, "weights", ("[J] or [rows, J]",), dict(w=torch.ones(B, 3, 1))),
    (sample, "weights", ("meta", "cpu"), dict(w=torch.ones(3, device="meta"))),
    (sample, "weights", ("share one length",), dict(w=[torch.ones(2), torch.ones(3), 1.0])),
    (sample, "weights", ("numbers", "str"), dict(w=[1.0, "x", 1.0])),
    (sample, "weights", (), dict(w=1.0)),
    (sample, "token_mask", ("int32", "[3, 2]", "[3, 1]"), dict(token_mask=mask(B)[:, :1])),
    (sample, "token_mask", ("int32", "int64"), dict(token_mask=mask(B).long())),
    (sample, "token_mask", ("int32", "bool"), dict(token_mask=torch.ones(B, V, dtype=torch.bool))),
    (sample, "token_mask", ("int32", "[3, 2]", "int64 [1]"), dict(token_mask=[1])),
    (sample, "token_mask", ("meta",), dict(token_mask=mask(B).to("meta"))),
    (sample, "stream", ("'accept'", "sample, draft"), dict(stream="accept")),
    (sample, "slot", ("-1", "2^24 - 1"), dict(slot=-1)),
    (sample, "slot", ("16777216",), dict(slot=1 << 24)),
    (sample, "slot", ("1.5",), dict(slot=1.5)),
    (sample, "top_logprobs", ("-1", "0 to 4194304"), dict(top_logprobs=-1)),
    (sample, "top_logprobs", ("4194305", "0 to 4194304"), dict(top_logprobs=(1 << 22) + 1)),
    (sample, "top_logprobs", ("9223372036854775808", "0 to 4194304"), dict(top_logprobs=1 << 63)),
    (sample, "top_logprobs", ("True",), dict(top_logprobs=True)),
    (sample, "tuned", ("got 3", "3 models"), dict(tuned=3, upscale_top_p=0.9)),
    (sample, "tuned", ("got -1",), dict(tuned=-1, diagnostics=True)),
    (sample, "tuned", (), dict(tuned="x", diagnostics=True)),
    (sample, "backend", ("'gpu'", "auto, cpu, cuda, triton, reference"), dict(backend="gpu")),
    (sample, "backend", ("[]", "auto, cpu"), dict(backend=[])),
    (sample, "stream", ("array",), dict(stream=numpy.zeros(2))),
    (sample, "slot", ("a tensor [2]",), dict(slot=torch.zeros(2))),
    (sample, "logprobs", ("'no'", "True and False"), dict(logprobs="no")),
    (sample, "diagnostics", ("a tensor [2]",), dict(diagnostics=torch.zeros(2))),
    (sample, "check", ("a tensor [2]", "True and False"), dict(check=torch.zeros(2))),
    (verify, "check", ("'yes'",), dict(check="yes")),
    (logprobs, "check", ("None",), dict(check=None)),
    (token_logprobs, "check", ("2",), dict(check=2)),
    (verify, "method", ("array",), dict(method=numpy.array(["token", "block"]))),
    (verify, "logprobs", ("None",), dict(logprobs=None)),
    (verify, "logits[0]", ("[B, K+1, V]", "[3, 40]"), dict(z=models(B, V))),
    (verify, "logits[0]", ("K >= 0", "0 slots"), dict(z=models(B, 0, V), drafts=torch.zeros(B, 0).long())),
    (verify, "method", ("'typical'", "coupled, token, block"), dict(method="typical")),
    (verify, "draft", ("got 3", "3 models"), dict(draft=3)),
    (verify, "draft", ("got -1",), dict(draft=-1)),
    (verify, "draft_tokens", ("int64", "[3, 2]", "[3, 3]"), dict(drafts=torch.zeros(B, 3).long())),
    (verify, "draft_tokens", ("float32",), dict(drafts=torch.zeros(B, K))),
    (verify, "draft_tokens", ("[3, 2]", "[2, 2]"), dict(drafts=[[1, 2]] * 2)),
    (verify, "draft_tokens", ("numbers", "list"), dict(drafts=[[1, "2"]] * 3)),
    (verify, "draft_tokens", ("numbers", "ndarray"), dict(drafts=numpy.array([["1", "2"]] * 3))),
    (verify, "draft_tokens", ("0 to 39",), dict(drafts=torch.full((B, K), V))),
    (verify, "draft_tokens", ("0 to 39",), dict(drafts=torch.full((B, K), -1))),
    (verify, "draft_tokens", ("0 to 9",), dict(drafts=torch.full((B, K), 10), vocab_size=10)),
    (verify, "draft_tokens", ("meta",), dict(drafts=torch.zeros(B, K, device="meta").long())),
    (verify, "draft_lengths", ("[3]", "[2]"), dict(lengths=long(1, 1))),
    (verify, "draft_lengths", ("float32",), dict(lengths=torch.ones(B))),
    (verify, "draft_lengths", ("0 to 2", "3"), dict(lengths=long(1, 3, 0))),
    (verify, "draft_lengths", ("0 to 2", "-1"), dict(lengths=long(1, -1, 0))),
    (verify, "token_mask", ("[3, 3, 2]", "[3, 2]"), dict(token_mask=mask(B))),
    (sample, "row_index", ("int64 tensor [B]", "float32 [3]"), dict(row_index=torch.zeros(3))),
    (sample, "row_index", ("[B]", "int64 [3, 1]"), dict(row_index=torch.zeros(3, 1).long())),
    (sample, "row_index", ("0 to 2",), dict(row_index=long(0, 3))),
    (sample, "row_index", ("0 to 2",), dict(row_index=long(-1))),
    (sample, "row_index", ("meta", "cpu"), dict(row_index=long(0).to("meta"))),
    (sample, "row_index", ("no rows",), dict(z=models(0, V), row_index=long(0))),
    (sample, "row_index", ("[B]", "'x'"), dict(row_index="x")),
    (sample, "token_mask", ("[2, 2]", "[3, 2]"), dict(token_mask=mask(B), row_index=long(0, 1))),
    (sample, "out", ("[3]", "int32 [3]"), dict(out=torch.zeros(B, dtype=torch.int32))),
    (sample, "out", ("[3]", "int64 [4]"), dict(out=torch.zeros(4).long())),
    (sample, "out", ("contiguous", "strides"), dict(out=torch.zeros(2 * B).long()[::2])),
    (sample, "out", ("meta",), dict(out=torch.zeros(B, device="meta").long())),
    (sample, "out", ("list",), dict(out=[0, 0, 0])),
    (sample, "base", ("beside logits",), dict(base=torch.zeros(B, V))),
    (sample, "ref", ("beside logits",), dict(ref=torch.zeros(B, V))),
    (sample, "tuned", ("beside logits",), dict(tuned=torch.zeros(B, V))),
    (verify, "offsets", ("[B + 1]", "[3, 1]"), dict(z=models(B, V), offsets=torch.zeros(3, 1).long())),
    (verify, "offsets", ("int64", "float32"), dict(z=models(B, V), offsets=torch.zeros(4))),
    (verify, "offsets", ("[B + 1]", "[0]"), dict(z=models(B, V), offsets=torch.zeros(0).long())),
    (verify, "offsets", ("0 to 3",), dict(z=models(B, V), offsets=long(0, 1, 2, 4))),
    (verify, "offsets", ("0 to 3",), dict(z=models(B, V), offsets=long(-1, 1, 2, 3))),
    (verify, "offsets", ("[1, 0, 2]", "1 to 3"), dict(z=models(B, V), offsets=long(0, 1, 1, 3))),
    (verify, "offsets", ("[4, 1, 1]", "1 to 3"), dict(z=models(6, V), offsets=long(0, 4, 5, 6))),
    (verify, "draft_tokens", ("[2, K]", "'x'"), dict(z=models(B, V), drafts="x", offsets=long(0, 1, 3))),
    (verify, "draft_tokens", ("[2, 2]", "[3, 2]"), dict(z=models(B, V), offsets=long(0, 1, 3))),
    (verify, "logits[0]", ("[B, V]", "[3, 3, 40]"), dict(offsets=long(0, 1, 2, 3))),
    (token_logprobs, "ids", ("[3] or [3, n]", "[2]"), dict(ids=long(1, 2))),
    (token_logprobs, "ids", ("[3] or [3, n]", "[3, 1, 1]"), dict(ids=torch.zeros(B, 1, 1).long())),
    (token_logprobs, "ids", ("float32",), dict(ids=torch.zeros(B))),
    (token_logprobs, "ids", ("[3] or [3, n]", "[2]"), dict(ids=[1, 2])),
    (token_logprobs, "ids", ("float32",), dict(ids=[1.0, 2.0, 3.0])),
    (token_logprobs, "ids", ("0 to 39",), dict(ids=long(1, 2, 40))),
    (token_logprobs, "ids", ("0 to 39",), dict(ids=long(1, -2, 0))),
    (logprobs, "vocab_size", ("got 41",), dict(vocab_size=41)),
    (logprobs, "backend", ("'x'",), dict(backend="x")),
]


@pytest.mark.parametrize(
    "call, name, words, kwargs", BAD, ids=[f"{c.__name__}-{n}-{i}" for i, (c, n, *_) in enumerate(BAD)]
)
def test_bad_arguments(call, name, words, kwargs):
    refused(call, name, *words, **kwargs)


def test_nothing_is_computed_before_the_check(monkeypatch):
    from eft_kernels import dispatch

    monkeypatch.setattr(dispatch, "choose", lambda *a: pytest.fail("a backend was asked"))
    for call, name, words, kwargs in BAD:
        if name != "backend":
            refused(call, name, *words, **kwargs)


def test_good_arguments_at_the_edges(backend):
    """The ends of every range, empty batches, no drafts."""
    for kwargs in (
        dict(temperature=0),
        dict(temperature=1e30),
        dict(temperature=1e-5),
        dict(top_k=0),
        dict(top_k=1 << 62),
        dict(top_p=1.2e-38),
        dict(top_p=1),
        dict(min_p=0),
        dict(min_p=1),
        dict(min_p=1e-45),
        dict(upscale_top_p=1.2e-38),
        dict(seed=(1 << 64) - 1),
        dict(seed=-(1 << 63)),
        dict(position=(1 << 63) - 1),
        dict(slot=(1 << 24) - 1),
        dict(top_logprobs=V + 5),
    ):
        out = sample(**dict(seed=1, position=0) | kwargs, backend=backend)
        assert bool(out.valid.all()) and int(out.tokens.min()) >= 0 and int(out.tokens.max()) < V, kwargs
    empty = sample(z=models(0, V), backend=backend, top_logprobs=2, runners_up=3, diagnostics=True)
    assert [list(x.shape) for x in empty] == [[0], [0], [0], [0], [0, 2], [0, 2], [0], [0], [0, 3]]
    assert list(logprobs(z=models(0, V), backend=backend).shape) == [0, V]
    none = verify(z=models(B, 1, V), drafts=torch.zeros(B, 0).long(), backend=backend, seed=1, position=0)
    want = sample(z=[z[:, 0] for z in models(B, 1, V)], seed=1, position=0, backend=backend)
    assert torch.equal(none.tokens[:, 0], want.tokens) and none.num_emitted.tolist() == [1] * B
    empty = verify(z=models(0, K + 1, V), drafts=torch.zeros(0, K).long(), backend=backend)
    assert list(empty.tokens.shape) == [0, K + 1]


def test_top_logprobs_beyond_the_vocabulary_are_padded(backend):
    out = sample(z=[torch.tensor([[0.0, 1.0, -INF, 2.0]])], w=[1.0], top_logprobs=6, backend=backend)
    assert out.top_ids.tolist() == [[3, 1, 0, -1, -1, -1]]
    assert out.top_logprobs[0, 3:].tolist() == [-INF] * 3


# --- arguments of other kinds --------------------------------------------------------------------------------------

UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
SIGNED = [torch.int8, torch.int16, torch.int32]


def same(got, want):
    for x, y in zip(got, want):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED, ids=str)
def test_integers_of_every_width(dtype, backend):
    """Narrow types wrap bounds they cannot hold; unsigned ones have no comparison at all."""

    def narrow(*values):
        return torch.tensor(values).to(dtype)

    for name, values in dict(top_k=(0, 5, 9), position=(0, 5, 100), seed=(1, 2, 127)).items():
        kwargs = dict(dict(seed=1, position=0), **{name: torch.tensor(values)})
        want = sample(backend=backend, **kwargs)
        same(sample(backend=backend, **dict(kwargs, **{name: narrow(*values)})), want)
    drafts, lengths = torch.tensor([[1, 2], [3, 4], [5, 39]]), torch.tensor([2, 0, 1])
    want = verify(drafts=drafts, lengths=lengths, seed=1, position=0, backend=backend)
    same(verify(drafts=drafts.to(dtype), lengths=lengths.to(dtype), seed=1, position=0, backend=backend), want)
    same([token_logprobs(ids=drafts.to(dtype), backend=backend)], [token_logprobs(ids=drafts, backend=backend)])
    if dtype in SIGNED:
        refused(sample, "position", "-1", "allowed is", position=narrow(1, -1, 1))
        refused(sample, "top_k", "-2", "allowed is", top_k=narrow(1, -2, 1))


def test_seeds_of_64_bits(backend):
    """A seed is 64 bits: 2^64 - 3 and -3 are the same, as numbers, in lists, in arrays, in unsigned tensors."""
    big = (1 << 64) - 3
    want = sample(seed=torch.tensor([-3, -3, 1 << 62]), position=0, backend=backend)
    for seed in (
        [big, -3, 1 << 62],
        (big, big, 1 << 62),
        numpy.array([big, big, 1 << 62], dtype=numpy.uint64),
        torch.tensor([-3, -3, 1 << 62]).view(torch.uint64),
        numpy.array([-3, -3, 1 << 62]),
    ):
        same(sample(seed=seed, position=0, backend=backend), want)
    same(sample(seed=big, position=0, backend=backend), sample(seed=-3, position=0, backend=backend))
    for wrong in ([1 << 64, 0, 0], [-(1 << 63) - 1, 0, 0], [0.5, 0, 0]):
        refused(sample, "seed", "allowed is", seed=wrong)


def test_none_and_minus_one_are_off(backend):
    off = dict.fromkeys(NAMES)
    for name in off:
        refused(sample, name, "NoneType", **{name: [None, None, None]})
    want = sample(seed=1, position=0, backend=backend)
    same(sample(seed=1, position=0, backend=backend, **off), want)
    same([logprobs(backend=backend, **off)], [logprobs(backend=backend)])
    drafts = torch.tensor([[1, 2], [3, 4], [5, 6]])
    same(
        verify(drafts=drafts, seed=1, position=0, backend=backend, **off),
        verify(drafts=drafts, seed=1, position=0, backend=backend),
    )
    for top_k in (-1, torch.tensor([-1, 0, -1]), [-1, 0, -1], numpy.full(3, -1, dtype=numpy.int8)):
        same(sample(seed=1, position=0, top_k=top_k, backend=backend), want)
        same([logprobs(top_k=top_k, backend=backend)], [logprobs(backend=backend)])


def test_lists_and_arrays(backend):
    """Values per row, weights, masks, drafts and ids as nested lists or NumPy arrays, of either byte order."""
    tensors, m, mm = {**TENSORS, **NOISE}, mask(B), mask(B, K + 1)
    drafts, lengths = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 1])
    ids = torch.tensor([[1, 2, 3]] * B)
    z = models(B, K + 1, V)
    lists = dict((name, x.tolist()) for name, x in tensors.items())
    arrays = dict((name, x.numpy()) for name, x in tensors.items())
    swapped = dict((name, x.astype(x.dtype.newbyteorder())) for name, x in arrays.items())
    frozen = dict((name, x[::-1].copy()[::-1]) for name, x in arrays.items())  # negative strides, read-only
    for x in frozen.values():
        x.setflags(write=False)
    want = sample(token_mask=m, backend=backend, **tensors)
    judged = verify(z=z, drafts=drafts, lengths=lengths, token_mask=mm, backend=backend, **tensors)
    scored = token_logprobs(ids=ids, backend=backend, **TENSORS)
    for given in (lists, arrays, swapped, frozen):
        same(sample(token_mask=m.numpy(), backend=backend, **given), want)
        same(
            verify(
                z=z, drafts=drafts.numpy(), lengths=lengths.numpy(), token_mask=mm.numpy(), backend=backend, **given
            ),
            judged,
        )
        few = {name: given[name] for name in TENSORS}
        same([token_logprobs(ids=ids.numpy().astype(">i4"), backend=backend, **few)], [scored])
    same(sample(token_mask=m.numpy().view(numpy.uint32), backend=backend, **lists), want)
    same(sample(token_mask=m.view(torch.uint32), backend=backend, **lists), want)
    same(
        verify(z=z, drafts=drafts.tolist(), lengths=tuple(lengths.tolist()), token_mask=mm, backend=backend, **lists),
        judged,
    )
    same([token_logprobs(ids=ids.tolist(), backend=backend, **TENSORS)], [scored])
    one = {name: x[0] for name, x in arrays.items()}  # NumPy's scalars
    same(sample(backend=backend, **one), sample(backend=backend, **{name: x[0] for name, x in lists.items()}))
    none = {name: numpy.array(x) for name, x in one.items()}  # and arrays without dimensions
    same(sample(backend=backend, **none), sample(backend=backend, **one))


def test_masks_repeat_sizes_of_one(backend):
    row = mask(1)
    want = sample(token_mask=row.expand(B, -1), seed=1, position=0, backend=backend)
    for given in (row, row.numpy(), row.tolist()):
        if isinstance(given, list):
            refused(sample, "token_mask", "int32", "int64", token_mask=given)
        else:
            same(sample(token_mask=given, seed=1, position=0, backend=backend), want)
    drafts = torch.tensor([[1, 2], [3, 4], [5, 6]])
    for shape in ((1, 1), (B, 1), (1, K + 1)):
        m = mask(*shape)
        same(
            verify(drafts=drafts, token_mask=m, seed=1, position=0, backend=backend),
            verify(drafts=drafts, token_mask=m.expand(B, K + 1, -1).contiguous(), seed=1, position=0, backend=backend),
        )
    refused(sample, "token_mask", "[3, 2]", "[2, 2]", token_mask=mask(2))
    refused(sample, "token_mask", "[3, 2]", "[3, 1]", token_mask=mask(B)[:, :1])


@pytest.mark.parametrize("preset", [eft.upscale, eft.proxy, eft.interpolate])
@pytest.mark.parametrize("value", ["2", None, range(3), True, 1j], ids=repr)
def test_presets_take_numbers(preset, value):
    with pytest.raises(ValueError, match=f"^(beta|alpha|lam): expected numbers, got {type(value).__name__}"):
        preset(value)


@pytest.mark.parametrize("preset", [eft.upscale, eft.proxy, eft.interpolate])
def test_presets_take_tensors_of_numbers(preset):
    for dtype in (torch.bool, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match=f"^(beta|alpha|lam): got a tensor of {dtype}, allowed are integers and"):
            preset(torch.ones(3).to(dtype))
    want = preset(torch.tensor([1.0, 2.0])).tensor
    for dtype in (torch.uint8, torch.int64, torch.bfloat16, torch.float64):  # -2 is no uint8
        assert torch.equal(preset(torch.tensor([1, 2], dtype=dtype)).tensor, want)


def test_weights_as_lists_and_arrays(backend):
    betas = [0.5, 1.0, 2.0]
    rows = [[b, 1.0, -b] for b in betas]
    want = sample(w=torch.tensor(rows), seed=1, position=0, backend=backend)
    for w in (
        rows,
        tuple(map(tuple, rows)),
        numpy.array(rows),
        numpy.array(rows, dtype=">f4"),
        eft.upscale(betas),
        eft.upscale(numpy.array(betas)),
        eft.weights(rows),
        [betas, 1.0, [-b for b in betas]],
        eft.upscale(torch.tensor(betas)),
    ):
        same(sample(w=w, seed=1, position=0, backend=backend), want)
    one = sample(w=[2.0, 1.0, -2.0], seed=1, position=0, backend=backend)
    for w in (numpy.array([2.0, 1.0, -2.0]), numpy.array([2, 1, -2]), eft.upscale(numpy.float32(2)), eft.upscale(2)):
        same(sample(w=w, seed=1, position=0, backend=backend), one)
    assert eft.weights(rows).rows(slice(0, 2)).tensor.shape == (2, 3)
    for w, words in (
        ([1e300, 1.0, 1.0], ("1e+300", "float32")),
        ([-3.5e38, 1.0, 1.0], ("float32",)),
        ([10**400, 1.0, 1.0], ()),
        ([True, 1.0, 1.0], ("bool",)),
        ([1.0, None, 1.0], ("NoneType",)),
        (torch.tensor([1e300, 1.0, 1.0], dtype=torch.float64), ("finite",)),
        (torch.ones(3, dtype=torch.bool), ("bool",)),
        (torch.ones(3, dtype=torch.complex64), ("complex",)),
        (numpy.array(["1", "2", "3"]), ("numbers",)),
        ([[1.0, 1.0], [1.0]], ("numbers",)),
        ([1j, 1.0, 1.0], ("complex",)),
        (numpy.ones((3, 3, 1)), ("[rows, J]",)),
        (torch.ones(()), ("[]",)),
    ):
        refused(sample, "weights", *words, w=w)
    largest = torch.finfo(torch.float32).max
    assert bool(sample(z=[torch.zeros(B, V)], w=[largest], seed=1, position=0).valid.all())


def test_integers_are_not_truncated():
    refused(sample, "tuned", "4294967297", "3 models", tuned=(1 << 32) + 1)
    refused(sample, "tuned", "4294967297", "3 models", tuned=(1 << 32) + 1, upscale_top_p=0.5)
    refused(sample, "tuned", "True", tuned=True)
    refused(verify, "tuned", str(1 << 64), tuned=1 << 64)
    refused(verify, "draft", str((1 << 32) + 1), draft=(1 << 32) + 1)
    refused(verify, "draft", "True", draft=True)
    refused(sample, "slot", str(1 << 63), slot=1 << 63)
    refused(sample, "slot", "True", slot=True)
    refused(sample, "vocab_size", str(1 << 63), vocab_size=1 << 63)
    refused(sample, "vocab_size", "True", vocab_size=True)
    n = numpy.int64(1)
    same(
        sample(seed=1, position=0, tuned=n, slot=n, top_logprobs=n, vocab_size=n * 30),
        sample(seed=1, position=0, tuned=1, slot=1, top_logprobs=1, vocab_size=30),
    )


# --- tensors of other kinds ----------------------------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass as libraries make them."""


class Wrapper(torch.Tensor):
    """One that stands for another tensor and supports nothing."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {function}")


def lazily_negated(x):
    """The negative of ``x`` in PyTorch's eyes, with a bit instead of new values."""
    y = torch._neg_view(x)
    assert y.is_neg()
    return y


def inference(x):
    with torch.inference_mode():
        return x.clone()


RIGHT = [  # another kind of tensor, and the plain one it equals
    ("negative bit", lazily_negated, lambda x: -x),
    ("part of a conjugate", lambda x: torch.complex(x.float(), x.float()).conj().imag.to(x.dtype), lambda x: -x),
    ("subclass", lambda x: x.as_subclass(Named), lambda x: x),
    ("parameter", lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()), lambda x: x),
    ("requires grad", lambda x: x.clone().requires_grad_(x.is_floating_point()) * 1, lambda x: x),
    ("inference", inference, lambda x: x),
    ("first row expanded", lambda x: x[:1].expand_as(x), lambda x: x[:1].repeat(len(x), *[1] * (x.dim() - 1))),
    (
        "one value expanded",
        lambda x: x[..., :1].expand_as(x),
        lambda x: x[..., :1].repeat(*[1] * (x.dim() - 1), x.shape[-1]),
    ),
    (
        "overlapping",
        lambda x: x.flatten().as_strided(x.shape, (1,) * x.dim()),
        lambda x: x.flatten().as_strided(x.shape, (1,) * x.dim()).clone(),
    ),
    ("every second", lambda x: torch.stack([x, x + 1], -1)[..., 0], lambda x: x),
    ("reversed twice", lambda x: x.flip(-1).contiguous().flip(-1), lambda x: x),
]


def everything():
    """Every tensor argument of `sample`, `verify` and `token_logprobs`."""
    z, zz = models(B, V), models(B, K + 1, V)
    return dict(
        z=z,
        zz=zz,
        w=torch.tensor([[1.0, 1.0, -1.0], [0.5, 1.0, -0.5], [2.0, 1.0, -2.0]]),
        mask=mask(B),
        mask3=mask(B, K + 1),
        drafts=torch.tensor([[1, 2], [3, 4], [5, 6]]),
        lengths=torch.tensor([2, 1, 2]),
        parents=torch.tensor([[0, 0], [0, 1], [0, 1]]),
        ids=torch.tensor([[1, 2], [3, 4], [5, 6]]),
        **TENSORS,
        **NOISE,
    )


def calls(t, backend="auto"):
    several = {name: t[name] for name in (*TENSORS, *NOISE)}
    few = {name: t[name] for name in TENSORS}
    out = eft.sample(t["z"], t["w"], token_mask=t["mask"], runners_up=2, backend=backend, **several)
    args = t["zz"], t["w"], t["drafts"], t["lengths"]
    judged = eft.verify(*args, token_mask=t["mask3"], backend=backend, **several)
    tree = eft.verify(*args, parents=t["parents"], method="coupled", backend=backend, **several)
    return [
        *out,
        *judged,
        *tree,
        eft.token_logprobs(t["z"], t["w"], t["ids"], token_mask=t["mask"], backend=backend, **few),
    ]


@pytest.mark.parametrize("kind, change, plain", RIGHT, ids=[kind for kind, *_ in RIGHT])
def test_tensors_of_every_kind(kind, change, plain, backend):
    """Each tensor argument in turn is of another kind; the call gives what it gives for the plain tensor."""
    for name, x in everything().items():
        if (
            kind == "one value expanded"
            and name in (*TENSORS, *NOISE, "lengths")
            or kind in ("overlapping",)
            and name in ("lengths",)
        ):
            continue
        if kind in ("negative bit", "part of a conjugate"):
            if name not in ("z", "zz", "w") and kind != "negative bit":
                continue
            x = x if isinstance(x, list) else -x if name not in ("w",) else x
        if kind == "part of a conjugate" and not isinstance(x, list) and not x.is_floating_point():
            continue
        changed = [change(y) for y in x] if isinstance(x, list) else change(x)
        wanted = [plain(y) for y in x] if isinstance(x, list) else plain(x)
        same(
            calls(dict(everything(), **{name: changed}), backend), calls(dict(everything(), **{name: wanted}), backend)
        )


ARGUMENT = dict(
    z="logits[0]",
    zz="logits[0]",
    w="weights",
    mask="token_mask",
    mask3="token_mask",
    drafts="draft_tokens",
    lengths="draft_lengths",
    ids="ids",
)


def resized(to):
    def change(x):
        x = x.clone()
        x.untyped_storage().resize_(to)
        return x

    return change


WRONG = [
    ("sparse", lambda x: x.to_sparse(), "a sparse_coo one"),
    ("nested", lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 else x.to_sparse(), "dense"),
    (
        "jagged",
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.dim() > 1 else x.to_sparse(),
        "dense",
    ),
    ("quantized", lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), "quantized"),
    ("mkldnn", lambda x: x.float().to_mkldnn(), "mkldnn"),
    ("freed", resized(0), "resized to 0"),
    ("resized", resized(1), "resized to 1"),
    ("wrapper", Wrapper, "a Wrapper"),
]


@pytest.mark.parametrize("kind, change, words", WRONG, ids=[kind for kind, *_ in WRONG])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_plain_memory_are_named(kind, change, words, backend, monkeypatch):
    if kind == "resized":  # asking costs as much as the rest of the shortcut's checks
        monkeypatch.setattr(dispatch, "shortcut", lambda *args: None)
    for name, x in everything().items():
        changed = [change(y) for y in x] if isinstance(x, list) else change(x)
        with pytest.raises(ValueError) as error:
            calls(dict(everything(), **{name: changed}), backend)
        text = str(error.value)
        assert text.startswith(ARGUMENT.get(name, name)) and words in text, (name, text)


def test_stand_ins_of_tracing_give_their_kind():
    """Meta and fake tensors have shapes alone, and so do the results."""
    want = calls(everything())
    t = everything()
    to = lambda f: {name: [f(y) for y in x] if isinstance(x, list) else f(x) for name, x in t.items()}  # noqa: E731
    with FakeTensorMode() as mode:
        fake = calls(to(mode.from_tensor))
    for got in (calls(to(lambda x: x.to("meta"))), fake, calls(to(mode.from_tensor))):
        for x, y in zip(got, want):
            assert (x is None) == (y is None)
            assert x is None or (x.shape == y.shape and x.dtype == y.dtype)


def test_operators_with_one_argument_on_meta_make_nothing_up():
    """The dispatcher hands such a call to the fake, which would return memory that nobody wrote."""
    for name in ops.SCHEMAS:
        args = list(op_arguments(name, "reference")[0])
        args[3] = torch.ones(B, device="meta")  # temperature
        with pytest.raises(ValueError, match="on meta"):
            getattr(torch.ops.eft_kernels, name)(*args)


def test_function_transforms():
    """Values as ever inside torch.func; vmap has no rule, and says so."""
    z, want = models(B, V), sample(seed=1, position=0)
    got = []

    def draw(x):
        got.append(eft.sample([x, *z[1:]], eft.upscale(), seed=1, position=0))
        return x.sum()

    torch.func.grad(draw)(z[0])
    assert [torch.func.debug_unwrap(t, recurse=True) for t in got[0].tokens] == want.tokens.tolist()
    assert [
        t
        for t in torch.func.functionalize(lambda x: eft.sample([x, *z[1:]], eft.upscale(), seed=1, position=0).tokens)(
            z[0]
        )
    ] == want.tokens.tolist()
    with pytest.raises(ValueError, match=r"logits\[0\]: is batched by torch.vmap"):
        torch.vmap(lambda x: eft.sample([x, *z[1:]], eft.upscale(), seed=1, position=0).tokens)(z[0][None])
    with pytest.raises(ValueError, match="temperature: is batched by torch.vmap"):
        torch.vmap(lambda x: eft.sample(z, eft.upscale(), temperature=x, seed=1, position=0).tokens)(torch.ones(2, B))


@pytest.mark.parametrize("default", (torch.float64, torch.bfloat16, "meta"), ids=str)
def test_torchs_defaults_change_nothing(default, backend):
    """torch.set_default_dtype and set_default_device are other code's business."""

    def run():
        out = []
        for kwargs in ({}, dict(TENSORS, token_mask=words), dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)):
            kwargs = dict(kwargs, backend=backend)
            m = kwargs.pop("token_mask", None)
            out += sample(z=z, token_mask=m, top_logprobs=5, diagnostics=True, seed=seeds, position=3, **kwargs)
            out += [logprobs(z=z, token_mask=m, **kwargs), token_logprobs(z=z, ids=ids, **kwargs)]
            for method in ops.METHODS:
                out += verify(z=zz, drafts=drafts, method=method, logprobs=True, seed=seeds, position=3, **kwargs)
        return out

    z, zz, ids = models(B, V), models(B, K + 1, V), torch.tensor([[1, 2], [3, 4], [5, 6]])
    drafts, seeds, words = torch.tensor([[1, 2], [3, 4], [5, 39]]), torch.tensor([1, 2, 3]), mask(B)
    want = run()
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    same(got, want)


SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4)
ANY_DTYPE = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=2),
    st.tuples(SHAPES, ANY_DTYPE, st.integers(-3, 3)),
)
ARGUMENTS = (
    *PER_ROW,
    "vocab_size",
    "token_mask",
    "tuned",
    "weights",
    "draft_tokens",
    "draft_lengths",
    "ids",
    "logits",
    "row_index",
    "offsets",
    "out",
    "base",
    "ref",
)


def tensor_of(value):
    return torch.full(value[0], value[2]).to(value[1]) if isinstance(value, tuple) else value


@hypothesis.settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(st.sampled_from([*sorted(ops.SCHEMAS), "combine"]), st.sampled_from(ARGUMENTS), VALUES)
def test_any_argument_works_or_is_named(name, argument, value):
    """Whatever one argument is, the call works with the right shapes or raises ValueError that names it."""
    value = tensor_of(value)
    args = dict(logits=models(B, V) if name != "verify" else models(B, K + 1, V), weights=eft.upscale())
    if name == "verify":
        args["draft_tokens"] = torch.zeros(B, K, dtype=torch.int64)
    if name == "token_logprobs":
        args["ids"] = torch.zeros(B, dtype=torch.int64)
    if argument == "seed":
        args["position"] = 0
    if argument == "offsets":
        args["logits"] = models(B, V)
    function = getattr(eft, name)
    hypothesis.assume(argument in inspect.signature(function).parameters)
    args[argument] = [value] * 3 if argument == "logits" and isinstance(value, torch.Tensor) else value
    try:
        out = function(**args)
    except ValueError as error:
        others = {"logits": ("vocab_size", "weights", "draft", "ids"), "offsets": ("logits",)}.get(argument, ())
        assert str(error).startswith((argument, *others)), error
    else:
        tokens = out.tokens if hasattr(out, "tokens") else out
        assert tokens.shape[0] == B or argument in ("logits", "row_index")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_any_good_call_gives_a_token_that_may_be(data):
    """Random models, shapes, types and parameters: tokens are in the processed support, on every backend alike."""
    rows, J = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 8))
    vocab = data.draw(st.lists(st.integers(1, 600), min_size=J, max_size=J))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    dtypes = data.draw(st.lists(types, min_size=J, max_size=J))
    z = [torch.randn(rows, v, generator=g).to(d) for v, d in zip(vocab, dtypes)]
    weights = data.draw(st.lists(st.floats(-2, 2, width=16), min_size=J, max_size=J))
    kwargs = dict(
        temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=data.draw(st.integers(0, 700)),
        top_p=data.draw(st.floats(2.0**-7, 1, width=32)),
        min_p=data.draw(st.floats(0, 1, width=32)),
        upscale_top_p=data.draw(st.sampled_from([1.0, 0.5])),
        tuned=data.draw(st.integers(0, J - 1)),
    )
    outs = [eft.sample(z, weights, seed=torch.arange(rows), position=0, backend=b, **kwargs) for b in conftest.BACKENDS]
    lp = eft.logprobs(z, weights, **kwargs)
    for out in outs:
        assert torch.equal(out.tokens, outs[-1].tokens) and bool(out.valid.all())
        if rows:
            assert bool(torch.isfinite(lp.gather(1, out.tokens[:, None])).all())
            assert float((lp.double().exp().sum(1) - 1).abs().max()) < 1e-5


# --- backends, seeds ------------------------------------------------------------------------------------------------


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


def test_backend_from_the_environment():
    code = (
        "import torch, eft_kernels as eft\nfrom eft_kernels import dispatch\n"
        "try:\n print(dispatch.choose('auto', torch.device('cpu')).__name__)\n"
        " eft.sample([torch.zeros(1, 4)], [1.0])\nexcept ValueError as e: print(e)"
    )
    assert run(code, EFT_KERNELS_BACKEND="reference").stdout.split() == ["eft_kernels.reference"]
    out = run(code, EFT_KERNELS_BACKEND="fast").stdout
    assert "EFT_KERNELS_BACKEND: got 'fast', allowed are cpu, cuda, triton, reference" in out


def test_backends_say_what_they_are():
    rows = eft.backends()
    assert set(rows) == {"cpu", "cuda", "triton", "reference"} and rows["reference"]["available"]
    for row in rows.values():
        assert row["reason"] and row["summary"] and row["devices"]


def test_default_seed_follows_torch():
    """None draws a seed per row from torch's generator: repeatable with manual_seed, different by call and by row."""
    z = [torch.zeros(64, 1000)]
    torch.manual_seed(5)
    one, two = eft.sample(z, [1.0]).tokens, eft.sample(z, [1.0]).tokens
    torch.manual_seed(5)
    assert torch.equal(one, eft.sample(z, [1.0]).tokens)
    assert not torch.equal(one, two) and len(one.unique()) > 40
    zz, drafts = [torch.zeros(8, 2, 100)], torch.zeros(8, 1, dtype=torch.int64)
    torch.manual_seed(6)
    a = eft.verify(zz, [1.0], drafts, draft=0).tokens
    torch.manual_seed(6)
    assert torch.equal(a, eft.verify(zz, [1.0], drafts, draft=0).tokens)


def test_row_seeds():
    seeds = eft.row_seeds(7, 1000)
    assert seeds.dtype == torch.int64 and int(seeds[0]) == 7 and len(seeds.unique()) == 1000
    assert torch.equal(seeds[:10], eft.row_seeds(7, 10))
    assert not set(eft.row_seeds(8, 1000)[1:].tolist()) & set(seeds[1:].tolist())
    for seed in (0, 7, -1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1):
        assert eft.row_seeds(seed, 50).tolist() == [signed(seed), *(splitmix64(seed, i) for i in range(1, 50))]
    start = time.perf_counter()
    assert len(eft.row_seeds(7, 1 << 20)) == 1 << 20
    assert time.perf_counter() - start < 1, "a million rows"


def signed(x):
    return ((x + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def splitmix64(seed, i):
    """Its i-th output, from 1 on (https://prng.di.unimi.it/splitmix64.c)."""
    bits = (1 << 64) - 1
    x = (seed + i * 0x9E3779B97F4A7C15) & bits
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
    return signed(x ^ (x >> 31))


@pytest.mark.parametrize(
    "seed",
    (
        7,
        -3,
        (1 << 64) - 1,
        numpy.int64(12),
        numpy.uint64((1 << 64) - 2),
        torch.tensor(-9),
        torch.tensor(5, dtype=torch.int32),
    ),
    ids=repr,
)
def test_one_seed_for_all_rows_is_row_seeds_of_it(seed, backend):
    """Row 0 keeps it; in `sample`, `verify` by every method, and `torch.ops`. Rows then draw noise of their own."""
    rows = eft.row_seeds(int(seed), B)
    z, zz, drafts = [torch.zeros(B, V)], models(B, K + 1, V), torch.tensor([[1, 2], [3, 4], [5, 6]])
    args = dict(position=6, backend=backend)
    one, many = (eft.sample(z, [1.0], seed=s, **args).tokens for s in (seed, rows))
    assert torch.equal(one, many) and len(set(one.tolist())) == B
    assert one[0] == eft.sample([z[0][:1]], [1.0], seed=seed, **args).tokens[0]
    for method in ops.METHODS:
        one, many = (
            eft.verify(zz, eft.upscale(), drafts, method=method, seed=s, temperature=3.0, **args) for s in (seed, rows)
        )
        assert torch.equal(one.tokens, many.tokens)
    flat = [None, [1.0], *(x for p in PARAMETERS for x in (None, p.off))]
    tail = [None, 6, None, None, None, V, 0, None, "sample", 0, False, 0, False, 0, backend]
    op = torch.ops.eft_kernels.sample
    assert torch.equal(op(z, *flat, None, signed(int(seed)), *tail)[0], op(z, *flat, rows, 0, *tail)[0])


@pytest.mark.parametrize("call", (sample, verify), ids=lambda f: f.__name__)
def test_a_seed_without_a_position_is_refused(call):
    """It would draw the same noise at every step. Without a seed each call draws its own; a position alone is fine."""
    for seed, text in ((3, "3"), (0, "0"), (torch.arange(B), "a tensor"), (torch.tensor(2), "a tensor")):
        with pytest.raises(ValueError, match=f"^position: got None with seed={text}; give the step's number"):
            call(seed=seed)
        with pytest.raises(ValueError, match="^position: got None"):
            call(seed=seed, position=None)
        assert bool(call(seed=seed, position=0).valid.all())
    assert bool(call().valid.all()) and bool(call(position=5).valid.all()) and bool(call(seed=None).valid.all())


def test_inputs_are_not_changed(backend):
    z, zz = models(B, V, dtype=torch.bfloat16), models(B, K + 1, V)
    kwargs = {**TENSORS, **NOISE, "token_mask": mask(B)}
    before = [x.clone() for x in (*z, *zz, *kwargs.values())]
    eft.sample(z, eft.upscale(), backend=backend, top_logprobs=3, diagnostics=True, **kwargs)
    eft.logprobs(z, eft.upscale(), backend=backend, **TENSORS)
    for method in ops.METHODS:
        verify(z=zz, method=method, backend=backend, logprobs=True, **TENSORS, **NOISE)
    assert all(torch.equal(a, b) for a, b in zip(before, (*z, *zz, *kwargs.values())))


# --- threads and processes -----------------------------------------------------------------------------------------


def test_the_interpreter_is_free_during_a_call(compiled):
    """Another Python thread runs while a call of this one does; if the call held the lock it would do nothing."""
    ticks, stop = [], threading.Event()
    z = torch.randn(1, 32000, generator=torch.Generator().manual_seed(0)).bfloat16()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    eft.sample([z], [1.0], seed=1, position=0, top_p=0.9, backend=compiled)
    other = threading.Thread(target=tick)
    other.start()
    start = time.perf_counter()
    eft.sample([z.expand(3000, -1)], [1.0], seed=1, position=0, top_p=0.9, backend=compiled)
    end = time.perf_counter()
    stop.set()
    other.join()
    during = [t for t in ticks if start + 0.1 * (end - start) < t < end - 0.1 * (end - start)]
    assert len(during) >= min(20, (end - start) / 0.02), (len(during), end - start)


def test_calls_from_several_python_threads(compiled):
    """Concurrent calls share the thread pool and give what they give alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        z = models(3, 40000)
        args = [
            dict(seed=i, position=0, top_p=0.9 if i % 2 else 1.0, backend=compiled, top_logprobs=2) for i in range(12)
        ]
        want = [eft.sample(z, eft.upscale(), **a) for a in args]
        got = [None] * len(args)

        def work(i):
            torch.set_num_threads(2)
            got[i] = [eft.sample(z, eft.upscale(), **args[i]) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(args))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for i, outs in enumerate(got):
            for out in outs:
                assert torch.equal(out.tokens, want[i].tokens) and torch.equal(out.logprobs, want[i].logprobs)
    finally:
        torch.set_num_threads(before)


def test_fork_after_threads(compiled):
    """A child of a process whose pool has workers has none itself; also when another thread is inside a call."""
    code = f"""
import os, sys, threading, torch, eft_kernels as eft
torch.set_num_threads(2)
z = [torch.randn(1, 60000, generator=torch.Generator().manual_seed(0))]
run = lambda: eft.sample(z, [1.0], seed=3, position=0, top_p=0.9, backend={compiled!r})
want = run()
other = threading.Thread(target=lambda: [run() for _ in range(300)])
for i in range(6):
    if i == 3:
        other.start()
    pid = os.fork()
    if pid == 0:
        got = run()
        os._exit(0 if torch.equal(got.tokens, want.tokens) and torch.equal(got.logprobs, want.logprobs) else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code or not torch.equal(run().tokens, want.tokens):
        os._exit(code or 4)
other.join()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_no_rows_of_any_stride(backend):
    """An empty tensor is contiguous whatever its strides."""
    z = [torch.zeros(0, 4, 52)[..., ::2], torch.zeros(0, 4, 26)]
    none = torch.zeros(0, dtype=torch.int64)
    out = eft.verify(z, [1.0, 1.0], torch.zeros(0, 3, dtype=torch.int64), seed=none, position=none, backend=backend)
    assert out.tokens.shape == (0, 4)
    assert eft.sample([x[:, 0] for x in z], [1.0, 1.0], seed=none, position=0, backend=backend).tokens.shape == (0,)


def test_arguments_that_the_fuzzer_found():
    z, ids = torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="weights: got values on cpu, meta"):
        eft.sample([z, z], [torch.ones(2), torch.ones(2, device="meta")], seed=1, position=0)
    with pytest.raises(ValueError, match="vocab_size: got a nested tensor"):
        eft.token_logprobs([z], [1.0], ids, vocab_size=torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))
    freed = torch.zeros(2, 9)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="logits: expected a list"):
        eft.sample(freed, [1.0], seed=1, position=0)
