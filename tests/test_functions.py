"""Reference, C++ and Triton, held to each other function by function, bit for bit.

The C++ functions are those of `eft_kernels._semantics` (`make semantics`), as scalars and by each instruction set's
vectors. Triton's run in its interpreter, in a process of its own that the last test starts. Each function is tried on
edges, on random values, and on what hypothesis finds; with EFT_KERNELS_SLOW=1 log and exp2 on all float32 they take.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eft_kernels import parameters, reference
from eft_kernels.parameters import PARAMETERS, STREAM_CODES, Params

cpp = pytest.importorskip("eft_kernels._semantics", reason="needs `make semantics`")
ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ONE = 1 << 40  # the mass of the best token
N = 1 << 12  # values a function is tried on at once


# --- what functions take -------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    dtype: torch.dtype
    low: float
    high: float
    edges: tuple

    def values(self, generator, n):
        """[n]: the edges, then random ones; floats have random bits, so that all magnitudes occur."""
        if self.dtype == torch.bool:
            return torch.randint(0, 2, (n,), generator=generator).bool()
        if self.dtype.is_floating_point:
            x = self.low + (self.high - self.low) * torch.rand(n, generator=generator, dtype=torch.float64)
            scale = torch.exp2(-60 * torch.rand(n, generator=generator, dtype=torch.float64))
            x = torch.where(torch.rand(n, generator=generator) < 0.5, x, x * scale).clamp(self.low, self.high)
            if self.low > 0 and self.high > 1e30:  # over all exponents
                x = torch.exp2(-126 + 253.9 * torch.rand(n, generator=generator, dtype=torch.float64))
            x = x.to(self.dtype)
        else:
            x = torch.randint(-(1 << 63), (1 << 63) - 1, (n,), generator=generator)
            if self.low > -(1 << 63):  # of random length
                length = torch.randint(0, 63, (n,), generator=generator)
                x = self.low + ((x & ((1 << 62) - 1)) >> length) % (self.high - self.low + 1)
        edges = torch.tensor(self.edges, dtype=self.dtype)
        order = torch.randint(0, len(edges), (n // 4,), generator=generator)  # a quarter: edges meet edges
        x[: n // 4] = edges[order]
        return x[torch.randperm(n, generator=generator)]

    def strategy(self):
        if self.dtype == torch.bool:
            return st.booleans()
        if self.dtype.is_floating_point:
            low, high = torch.tensor([self.low, self.high], dtype=self.dtype).tolist()
            width = torch.finfo(self.dtype).bits
            return st.sampled_from(self.edges) | st.floats(low, high, width=width, allow_subnormal=False)
        return st.sampled_from(self.edges) | st.integers(self.low, self.high)


F32, F64, I64 = torch.float32, torch.float64, torch.int64
TINY, MAX = 2.0**-126, float(np.finfo(np.float32).max)
ROOT_HALF = float(np.float32(0.5**0.5))
NORMAL = Kind(
    F32,
    TINY,
    MAX,
    (
        TINY,
        2 * TINY,
        1.0,
        1 - 2.0**-24,
        1 + 2.0**-23,
        0.5,
        2.0,
        ROOT_HALF,
        float(np.nextafter(np.float32(ROOT_HALF), np.float32(1))),
        MAX,
    ),
)
FRACTION = Kind(F32, ROOT_HALF - 1, 0.4142135381698608, (0.0, ROOT_HALF - 1, 0.4142135381698608))
EXPONENT = Kind(F32, -126.0, 127.0, (-126.0, -24.0, -1.0, 0.0, 1.0, 127.0))
NOT_POSITIVE = Kind(
    F32, -1000.0, 0.0, (0.0, -0.0, -0.5, -1.5, -2.5, -39.5, -40.0, -41.0, -125.5, -126.0, -127.0, -1000.0, -(2.0**-24))
)
UNIT = Kind(F32, 2.0**-57, 1 - 2.0**-24, (2.0**-57, 2.0**-33, 2.0**-24, 0.25, 0.5, 1 - 2.0**-24))
WORD = Kind(I64, 0, (1 << 32) - 1, (0, 1, 255, 256, (1 << 24) - 1, 1 << 24, 1 << 31, (1 << 32) - 129, (1 << 32) - 1))
ANY = Kind(I64, -(1 << 63), (1 << 63) - 1, (0, 1, -1, (1 << 32) - 1, 1 << 32, -(1 << 63), (1 << 63) - 1))
ROW = Kind(I64, 0, 1 << 40, (0, 1, 2, 1 << 31, 1 << 40))
SLOT = Kind(I64, 0, parameters.MAX_SLOT, (0, 1, parameters.MAX_SLOT))
CHUNK = Kind(I64, 0, parameters.MAX_VOCAB // 256, (0, 1, parameters.MAX_VOCAB // 256))
MINIMUM = Kind(F32, 2.0**-65, 0.07, (2.0**-65, 2.0**-40, 0.0625))  # a chunk's smallest Exp(1)
SCORE = Kind(F32, -60.0, 0.0, (0.0, -1e30, float("-inf"), -0.5, -27.9))
SCALE = Kind(F32, 1e-3, 1.5e5, (1.0, float(np.float32(reference.LOG2E)), 1.5e5, 1e-3))
MASS = Kind(I64, 0, ONE, (0, 1, 2, ONE - 1, ONE))
TOTAL = Kind(I64, 1, ONE << 22, (1, 2, ONE, ONE + 1, ONE << 22))
BEST = Kind(F32, -1e30, 1e30, (0.0, -0.0, 1.5, -3.25, 1e-30, 3.3e38, -3.3e38))
REACH = Kind(F32, 0.0, 1e3, (0.0, 2.0**-140, 1e-8, 0.5, 1e30, float("inf"), float("-inf")))
SURPRISES = Kind(I64, 0, 1 << 61, (0, 1, ONE, 1 << 61))
SHARE = Kind(F32, TINY, 1.0, (TINY, 0.5, 1 - 2.0**-24, 1.0))
UNIFORM = Kind(F64, 2.0**-65, 1 - 2.0**-53, (2.0**-65, 0.5, 1 - 2.0**-53))
RATIO = Kind(F64, 0.0, 1.0, (0.0, 2.0**-60, 0.5, 1 - 2.0**-53, 1.0))
REST = Kind(I64, 0, 1 << 58, (0, 1, 1 << 57, 1 << 58))
FLAG = Kind(torch.bool, 0, 1, (False, True))


# --- the definition, where the reference has it within a larger function -------------------------------------------


def mass(s, best, c):
    return reference.mass(s[:, None], best, c)[:, 0]


def surprise(s, best, c):
    return reference.surprise(s[:, None], best, c)[:, 0]


def accept_token(u, t, t_total, d, d_total):
    t, t_total, d, d_total = (x.double() for x in (t, t_total, d, d_total))
    return (u * d) * t_total < t * d_total


def residual(factor, t, t_total, d, d_total):
    rest = t.double() * (factor * (2.0**58 / t_total.double())) - d.double() * (2.0**58 / d_total.double())
    return torch.where(rest >= 1, rest, 0.0)


def block_ratio(ratio, t, t_total, d, d_total):
    t, t_total, d, d_total = (x.double() for x in (t, t_total, d, d_total))
    step = torch.where(d > 0, (t * d_total) / (d * t_total), torch.where(t > 0, float("inf"), 0.0))
    return torch.where(ratio > 0, (ratio * step).clamp(max=1.0), 0.0)


def block_passes(u, ratio, rest, last):
    rest = rest.double()
    whole = rest + (1.0 - ratio) * 2.0**58
    return torch.where(last, u < ratio, (u * whole < rest) | (whole == 0))


def token_gumbel(e, word):
    return torch.minimum(-reference.log(e), -reference.log(e + reference.exponential(reference.uniform(word))))


def sample_words(seed, position, slot, index):
    return reference.words(seed, position, STREAM_CODES["sample"], slot, reference.KIND_TOKEN, index)


def chunk_noise(seed, position, slot, chunk):
    return reference.chunk_noise(seed, position, STREAM_CODES["residual"], slot, chunk)


def fields(record):
    return tuple(record[name] for name in record.dtype.names)


class Function(NamedTuple):
    takes: tuple
    reference: Callable
    cpp: Callable


def log_of(x):
    return -cpp.log(x)


FUNCTIONS = {
    "log_poly": Function((FRACTION, EXPONENT), reference.log_poly, cpp.log_poly),
    "split": Function((NORMAL,), reference.split, lambda x: fields(cpp.split(x))),
    "log": Function((NORMAL,), reference.log, cpp.log),
    "row_seed": Function((ANY, ROW), reference.row_seed, cpp.row_seed),
    "words": Function(
        (ANY, ANY, SLOT, WORD),
        sample_words,
        lambda seed, position, slot, index: fields(cpp.words(seed, position, 0, slot, 1, index)),
    ),
    "uniform": Function((WORD,), reference.uniform, cpp.uniform),
    "exponential": Function((UNIT,), reference.exponential, cpp.exponential),
    "chunk_noise": Function(
        (ANY, ANY, SLOT, CHUNK),
        chunk_noise,
        lambda seed, position, slot, chunk: tuple(
            cpp.chunk_noise(seed, position, STREAM_CODES["residual"], slot, chunk)[name] for name in ("e", "place")
        ),
    ),
    "token_gumbel": Function((MINIMUM, WORD), token_gumbel, lambda e, word: cpp.token_gumbel(e, log_of(e), word)),
    "accept_uniform": Function((ANY, ANY, SLOT), reference.accept_uniform, cpp.accept_uniform),
    "mass": Function((SCORE, Kind(F32, 0.0, 0.0, (0.0,)), SCALE), mass, cpp.mass),
    "surprise": Function((SCORE, Kind(F32, 0.0, 0.0, (0.0,)), SCALE), surprise, cpp.surprise),
    "mean_score": Function((BEST, SCALE, SURPRISES, TOTAL), reference.mean_score, cpp.mean_score),
    "edge": Function((BEST, REACH), reference.edge, cpp.edge),
    "log_total": Function((TOTAL,), reference.log_total, cpp.log_total),
    "mass_limit": Function((SHARE, TOTAL), reference.mass_limit, cpp.mass_limit),
    "accept_token": Function((UNIFORM, MASS, TOTAL, MASS, TOTAL), accept_token, cpp.accept_token),
    "residual": Function((RATIO, MASS, TOTAL, MASS, TOTAL), residual, cpp.residual),
    "block_ratio": Function((RATIO, MASS, TOTAL, MASS, TOTAL), block_ratio, cpp.block_ratio),
    "block_passes": Function((UNIFORM, RATIO, REST, FLAG), block_passes, cpp.block_passes),
}


def several(out):
    return [torch.as_tensor(np.asarray(x)) for x in (out if isinstance(out, tuple) else (out,))]


def hold(name, other, inputs):
    """Every result of `other` has the bits of the reference's (or is NaN where that is)."""
    want, got = several(FUNCTIONS[name].reference(*inputs)), several(other(*inputs))
    assert len(want) == len(got)
    for x, y in zip(want, got):
        if x.is_floating_point():
            assert x.dtype == y.dtype
            same = x.numpy().view(f"u{x.element_size()}") == y.numpy().view(f"u{x.element_size()}")
            same = torch.from_numpy(same) | (x.isnan() & y.isnan()) | ((x == 0) & (y == 0))
        else:
            same = x.to(torch.int64) == y.to(torch.int64)
        at = int((~same).to(torch.int8).argmax())
        assert bool(same.all()), f"{name}{tuple(v[at].item() for v in inputs)}: {x[at]} and {y[at]}"


def in_cpp(name):
    return lambda *inputs: FUNCTIONS[name].cpp(*(x.numpy() for x in inputs))


def tried(name, seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    return [kind.values(generator, n) for kind in FUNCTIONS[name].takes]


# --- C++ -----------------------------------------------------------------------------------------------------------

cpp_process = pytest.mark.skipif(INTERPRETED, reason="the process of Triton's interpreter")


@cpp_process
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cpp(name):
    inputs = tried(name, n=1 << 16)
    assert all(x.unique().numel() > 1 for x, kind in zip(inputs, FUNCTIONS[name].takes) if kind.low < kind.high)
    hold(name, in_cpp(name), inputs)


@cpp_process
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cpp_on_what_hypothesis_finds(name):
    kinds = FUNCTIONS[name].takes

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(*(kind.strategy() for kind in kinds)), min_size=1, max_size=20))
    def search(rows):
        hold(name, in_cpp(name), [torch.tensor(x, dtype=kind.dtype) for x, kind in zip(zip(*rows), kinds)])

    search()


@cpp_process
@pytest.mark.parametrize("isa", cpp.lanes)
def test_vectors_are_scalars(isa):
    """An instruction set's vectors give what scalars give, also in a last vector that is not full."""
    lanes = cpp.lanes[isa]
    assert lanes.isa == isa and lanes.width in (4, 8, 16)
    generator = torch.Generator().manual_seed(2)

    def values(kind, n):
        return kind.values(generator, n).numpy()

    for n in (1, lanes.width, 5 * lanes.width + 3, N):
        x, down, u, word = (values(kind, n) for kind in (NORMAL, NOT_POSITIVE, UNIT, WORD))
        e, s, c = (values(kind, n) for kind in (MINIMUM, SCORE, SCALE))
        seed, position, slot = -5 << 40, 7 << 33, 12345
        noise = cpp.chunk_noise(seed, position, 2, slot, word)
        pairs = [
            (lanes.log(x), cpp.log(x)),
            (lanes.exponential(u), cpp.exponential(u)),
            (lanes.uniform(word), cpp.uniform(word)),
            (lanes.token_gumbel(e, -cpp.log(e), word), cpp.token_gumbel(e, -cpp.log(e), word)),
            (cpp.mass_of(*lanes.mass_parts(s, np.zeros_like(s), c)), cpp.mass(s, np.float32(0), c)),
            *zip(lanes.exp2_parts(down), fields(cpp.exp2_parts(down))),
            *zip(lanes.words(seed, position, 3, slot, 1, word), fields(cpp.words(seed, position, 3, slot, 1, word))),
            *zip(lanes.chunk_noise(seed, position, 2, slot, word), fields(noise)),
        ]
        for got, want in pairs:
            assert got.dtype == want.dtype and np.array_equal(got, want)


def exp2_is_right(x):
    """p 2^n is 2^max(x, -126) to 2^-22 of it, n the nearest integer."""
    parts = cpp.exp2_parts(x)
    exact = np.maximum(x.astype(np.float64), -126.0)
    np.testing.assert_array_equal(parts["n"], np.rint(np.float32(exact)))
    return np.abs(np.ldexp(parts["p"].astype(np.float64), parts["n"].astype(np.int32)) / np.exp2(exact) - 1).max()


def bits(first, last, step=1):
    return np.arange(first, last, step, dtype=np.uint32).view(np.float32)


SPANS = {"log": (0x00800000, 0x7F800000), "exp2": (0x80000000, 0xFF800001)}  # bits of all that they take


def try_span(name, step):
    first, last = SPANS[name]
    worst = 0.0
    for begin in range(first, last, step << 22):
        x = bits(begin, min(begin + (step << 22), last), step)
        if name == "log":
            hold("log", in_cpp("log"), [torch.from_numpy(x)])
            worst = max(worst, float(np.abs(cpp.log(x) - np.log(x.astype(np.float64))).max()))
            for lanes in cpp.lanes.values():
                assert np.array_equal(lanes.log(x), cpp.log(x))
        else:
            worst = max(worst, float(exp2_is_right(x)))
            for lanes in cpp.lanes.values():
                assert all(map(np.array_equal, lanes.exp2_parts(x), fields(cpp.exp2_parts(x))))
            hold("mass", in_cpp("mass"), [torch.from_numpy(x), torch.zeros(len(x)), torch.ones(len(x))])
    assert worst < {"log": 1e-5, "exp2": 2.0**-22}[name], worst


@cpp_process
@pytest.mark.parametrize("name", SPANS)
def test_a_stride_of_all_float32(name):
    try_span(name, 4099)


@cpp_process
@pytest.mark.slow
@pytest.mark.parametrize("name", SPANS)
def test_all_float32(name):
    try_span(name, 1)


# --- parameters ----------------------------------------------------------------------------------------------------


@cpp_process
def test_filters():
    """What follows from a row's parameters, over all that tests sweep, their ranges' ends and values outside."""
    rows, vocab = 3000, 50
    generator = np.random.default_rng(0)
    values = {}
    for q in PARAMETERS:
        odd = (q.low, q.high) if q.type is int else (q.low, q.high, np.nan, -1.0, 2e30, np.inf)
        choices = np.array(
            [*[q.off] * 6, *q.tried, *odd] + ([vocab - 1, vocab, vocab + 1] if q.type is int else []),
            dtype=np.int64 if q.type is int else np.float32,
        )
        values[q.name] = generator.choice(choices, rows)
    best = np.float32(3.5)
    got = cpp.filters(values, rows, vocab, best)
    p = Params(
        **{
            **{name: torch.from_numpy(x) for name, x in values.items()},
            "weights": [1.0],
            "seed": 0,
            "position": 0,
            "token_mask": None,
            "token_bias": None,
            "vocab_size": vocab,
            "tuned": 0,
        }
    )
    want = reference.Rows([torch.zeros(rows, vocab)], p)
    assert 100 < got["valid"].sum() < rows - 100 and 10 < got["filtered"].sum() < rows - 10
    for name in (*values, "inverse_temperature", "c", "greedy"):
        assert np.array_equal(got[name], getattr(want, name).numpy()), name
    assert np.array_equal(got["valid"], want.in_range.numpy())
    assert np.array_equal(got["filtered"], want.filtered().numpy())
    assert np.array_equal(got["processed"], ((want.temperature != 1) | want.filtered()).numpy())
    for row in range(200):
        one = {name: x[row] for name, x in values.items()}
        assert cpp.may_filter(one, 1, vocab) == got["filtered"][row]
    assert cpp.may_filter({"top_p": values["top_p"]}, rows, vocab)
    assert not cpp.may_filter({"temperature": values["temperature"]}, rows, vocab)


@cpp_process
def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        cpp.filters({"top_q": 1.0}, 1, 10)
    with pytest.raises(ValueError, match="top_p"):
        cpp.filters({"top_p": np.ones(2, np.float32)}, 3, 10)
    with pytest.raises(ValueError, match="length"):
        cpp.lanes["baseline"].token_gumbel(np.ones(3), np.ones(2), np.ones(3))


@cpp_process
def test_every_function_is_here():
    """All that csrc/semantics defines, but for what only puts these together."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "semantics").glob("*.h"))
    defined = set(re.findall(r"^(?:EFT_HD|inline) [\w<>:]+ (\w+)\(", text, re.M))
    parts = {
        "typical_interval",
        "bits",
        "from_bits",
        "to_float",
        "to_int",
        "select",
        "minimum",
        "maximum",
        "mul_hi_lo",
        "in_range",
        "source",
        "source_of",
        "mass_parts",
    }
    assert parts <= defined and len(defined) > 20
    missing = {name for name in defined - parts if not {name, name.removesuffix("_of")} & set(dir(cpp))}
    assert not missing


# --- Triton --------------------------------------------------------------------------------------------------------

if INTERPRETED:
    triton = pytest.importorskip("triton")
    tl = triton.language
    from eft_kernels._backends.triton import semantics

    @triton.jit
    def words_here(seed, position, slot, index):
        return semantics.words(seed, position, (slot << 3) | semantics.KIND_TOKEN, index)

    @triton.jit
    def chunk_noise_here(seed, position, slot, chunk):
        return semantics.chunk_noise(seed, position, (slot << 3) | (semantics.RESIDUAL << 1), chunk)

    @triton.jit
    def uniform_here(word):
        return semantics.uniform(word.to(tl.uint32))

    @triton.jit
    def token_gumbel_here(e, word):
        return semantics.token_gumbel(e, word.to(tl.uint32))

    @triton.jit
    def residual_here(factor, t, t_total, d, d_total):
        return semantics.residual(
            t,
            d,
            factor * (semantics.RESIDUAL_ONE / t_total.to(tl.float64)),
            semantics.RESIDUAL_ONE / d_total.to(tl.float64),
        )

    HERE = {
        "words": words_here,
        "chunk_noise": chunk_noise_here,
        "uniform": uniform_here,
        "token_gumbel": token_gumbel_here,
        "residual": residual_here,
    }

    @triton.jit
    def apply_1(function: tl.constexpr, x, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, function(tl.load(x + i)))

    @triton.jit
    def apply_1_to_2(function: tl.constexpr, x, out, other, N: tl.constexpr):
        i = tl.arange(0, N)
        a, b = function(tl.load(x + i))
        tl.store(out + i, a)
        tl.store(other + i, b)

    @triton.jit
    def apply_2(function: tl.constexpr, x, y, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, function(tl.load(x + i), tl.load(y + i)))

    @triton.jit
    def apply_3(function: tl.constexpr, x, y, z, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, function(tl.load(x + i), tl.load(y + i), tl.load(z + i)))

    @triton.jit
    def apply_4(function: tl.constexpr, x, y, z, w, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, function(tl.load(x + i), tl.load(y + i), tl.load(z + i), tl.load(w + i)))

    @triton.jit
    def apply_4_to_2(function: tl.constexpr, x, y, z, w, out, other, N: tl.constexpr):
        i = tl.arange(0, N)
        a, b = function(tl.load(x + i), tl.load(y + i), tl.load(z + i), tl.load(w + i))
        tl.store(out + i, a)
        tl.store(other + i, b)

    @triton.jit
    def apply_4_to_4(function: tl.constexpr, x, y, z, w, out, b, c, d, N: tl.constexpr):
        i = tl.arange(0, N)
        r0, r1, r2, r3 = function(tl.load(x + i), tl.load(y + i), tl.load(z + i), tl.load(w + i))
        tl.store(out + i, r0)
        tl.store(b + i, r1)
        tl.store(c + i, r2)
        tl.store(d + i, r3)

    @triton.jit
    def apply_5(function: tl.constexpr, x, y, z, w, v, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, function(tl.load(x + i), tl.load(y + i), tl.load(z + i), tl.load(w + i), tl.load(v + i)))

    def in_triton(name):
        def call(*inputs):
            outs = [torch.empty(len(inputs[0]), dtype=x.dtype) for x in several(FUNCTIONS[name].reference(*inputs))]
            suffix = f"_to_{len(outs)}" if len(outs) > 1 else ""
            kernel = globals()[f"apply_{len(inputs)}{suffix}"]
            kernel[(1,)](HERE.get(name) or getattr(semantics, name), *inputs, *outs, len(inputs[0]))
            return tuple(outs)

        return call

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_triton(name):
        hold(name, in_triton(name), tried(name, seed=1))

    def test_triton_order():
        """Integers that compare as the floats do, and back; a key with a token, the lower id first."""
        infinity = float("inf")
        x = torch.tensor(
            [
                -infinity,
                -MAX,
                -1.0,
                -TINY,
                -0.0,
                0.0,
                TINY,
                1.0,
                1 + 2.0**-23,
                MAX,
                infinity,
                *torch.randn(N - 11, generator=torch.Generator().manual_seed(3)).tolist(),
            ]
        )
        keys, back, packed = torch.empty(N, dtype=torch.int32), torch.empty(N), torch.empty(N, dtype=torch.int64)
        token = torch.randint(0, 1 << 22, (N,), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
        apply_1[(1,)](semantics.ordered, x, keys, N)
        apply_1[(1,)](semantics.unordered, keys, back, N)
        apply_2[(1,)](semantics.pack, x, token, packed, N)
        assert torch.equal(back, x) and torch.equal(keys.sort().values, keys[x.sort(stable=True).indices])
        assert keys[4] == keys[5]
        tokens = torch.empty(N, dtype=torch.int32)
        apply_1[(1,)](semantics.packed_key, packed, back, N)
        apply_1[(1,)](semantics.packed_token, packed, tokens, N)
        assert torch.equal(back, x) and torch.equal(tokens, token)
        best = sorted(range(N), key=lambda i: (-float(x[i]), int(token[i])))
        assert torch.equal(packed[best], packed.sort(descending=True).values)


@cpp_process
def test_triton_in_its_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__, "-k", "test_triton"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and f" {len(FUNCTIONS) + 1} passed" in done.stdout, done.stdout + done.stderr
