"""tests/simt, on which the CUDA kernels run without a GPU: right kernels are right under every schedule, planted faults
are seen, and its intrinsics are CUDA's.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SIMT = Path(__file__).parent / "simt"
SEEDS = 30
NONE, FIRST, SECOND = 0, 1, 2
LIMIT = 227 * 1024

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs Linux and g++"
)


def gcc(*args):
    subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-pthread", *args], check=True)


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """planted.cu compiled, without what runs it"""
    path = tmp_path_factory.mktemp("simt") / "planted.o"
    gcc("-ffp-contract=off", "-x", "c++", "-DEFT_SIMT", "-I", SIMT, "-c", SIMT / "planted.cu", "-o", path)
    return path


@pytest.fixture(scope="session")
def path(planted):
    path = planted.with_suffix(".so")
    gcc("-shared", planted, SIMT / "simt.cpp", "-o", path)
    return path


class Library:
    """The entries of planted.cu, which take numbers and arrays and return None or the error's text."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.simt_set_seed.argtypes = [ctypes.c_uint64]

    def seed(self, n):
        self.library.simt_set_seed(n)

    def __getattr__(self, name):
        function = getattr(self.library, "run_" + name)
        function.restype = ctypes.c_char_p

        def call(*args):
            error = function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in args))
            return error and error.decode()

        return call


@pytest.fixture(scope="session")
def simt(path):
    return Library(path)


@pytest.fixture(autouse=True)
def seeded(request):
    if "simt" in request.fixturenames:
        request.getfixturevalue("simt").seed(1)


def results(simt, case, seeds=SEEDS):
    """what `case` gives with each seed"""
    out = []
    for seed in range(seeds):
        simt.seed(seed)
        out.append(case())
    return out


def line(text):
    """of planted.cu, the first that holds `text`"""
    return next(i for i, row in enumerate((SIMT / "planted.cu").read_text().splitlines(), 1) if text in row)


def integers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, shape, dtype=np.int32)


# --- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_block_sum(simt, threads):
    rows = integers(3, 1111)

    def case():
        out = np.zeros(3, np.int32)
        assert simt.sum_rows(rows, rows.shape[1], out, threads, NONE) is None
        return out.tolist()

    assert results(simt, case) == [rows.sum(1).tolist()] * SEEDS


@pytest.mark.parametrize("fault", [FIRST, SECOND])
def test_a_missing_barrier_is_seen(simt, fault):
    rows = integers(3, 1111)

    def case():
        out = np.zeros(3, np.int32)
        assert simt.sum_rows(rows, rows.shape[1], out, 256, fault) is None
        return out.tolist() == rows.sum(1).tolist()

    assert not all(results(simt, case, 10))


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
def test_the_last_block_to_arrive(simt, blocks):
    values = integers(3000)

    def case(fault=NONE):
        out, partial, counter = np.zeros(1, np.int32), np.zeros(blocks, np.int32), np.zeros(1, np.uint32)
        assert simt.sum_grid(values, values.size, partial, counter, out, blocks, fault) is None
        assert fault or counter[0] == 0
        return out[0] == values.sum()

    assert all(results(simt, case))
    if blocks > 1:
        assert not all(results(simt, lambda: case(FIRST), 10))
        assert not all(results(simt, lambda: case(SECOND)))


@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_cluster_sum(simt, cluster):
    values = integers(3000)
    blocks = 2 * cluster

    def case(fault=NONE):
        out = np.zeros(blocks, np.int32)
        error = simt.sum_cluster(values, values.size, cluster, out, blocks, 64, fault)
        if error:
            assert fault and "out of bounds shared memory access by thread" in error and "which has exited" in error
            return False
        ranks, sums = out % 16, out // 16
        assert ranks.tolist() == list(range(cluster)) * 2
        return len({*sums[:cluster]}) == len({*sums[cluster:]}) == 1 and sums[0] + sums[-1] == values.sum()

    assert all(results(simt, case))
    if cluster > 1:
        assert not all(results(simt, lambda: case(FIRST), 10))
        assert not all(results(simt, lambda: case(SECOND), 10))


def test_sixteen_blocks_of_1024_threads(simt):
    values, out = integers(30000), np.zeros(16, np.int32)
    assert simt.sum_cluster(values, values.size, 16, out, 16, 1024, NONE) is None
    assert (out // 16).tolist() == [values.sum()] * 16


def test_the_seed_chooses_the_schedule(simt, path):
    def case():
        out = np.full(384, -1, np.int32)
        assert simt.order(6, np.zeros(1, np.int32), out) is None
        assert sorted(out) == list(range(384))
        return tuple(out)

    first = results(simt, case)
    assert first == results(simt, case) and len({*first}) == SEEDS
    assert {out[0] // 64 for out in first} == {out[-1] // 64 for out in first} == set(range(6))  # blocks

    code = (
        "import ctypes, sys; out = (ctypes.c_int * 384)(); "
        "ctypes.CDLL(sys.argv[1]).run_order(6, ctypes.byref(ctypes.c_int()), out); print(*out)"
    )
    env = {k: v for k, v in os.environ.items() if k != "EFT_SIMT_SEED"}
    for seed, variable in ((1, {}), (1, {"EFT_SIMT_SEED": "1"}), (7, {"EFT_SIMT_SEED": "7"})):
        printed = subprocess.check_output([sys.executable, "-c", code, path], env=env | variable, text=True)
        assert tuple(map(int, printed.split())) == first[seed]


# --- errors --------------------------------------------------------------------------------------------------------


def touch(simt, byte, write=1, shared=1000, blocks=2, threads=64, cluster=1, thread=37):
    return simt.touch(ctypes.c_int64(blocks), threads, cluster, shared, thread, byte, write, np.zeros(1, np.int32))


@pytest.mark.parametrize("shared", [16, 1000, 4096, LIMIT])
def test_accesses_beyond_shared_memory(simt, shared):
    end = (shared + 15) // 16 * 16
    for byte in (0, shared - 4):
        for write in (0, 1):
            assert touch(simt, byte, write, shared) is None
    for byte in (end, end + 5000, end - LIMIT - 9000):
        for write in (0, 1):
            error = touch(simt, byte, write, shared)
            assert error.startswith("out of bounds shared memory access by thread 37 of block "), error
            assert f": byte {byte} of {shared} of block " in error
    for byte in {-1, -16, shared, end - 1}:
        error = touch(simt, byte, 1, shared)
        assert (error is None) == (0 <= byte < shared), byte
        if error:
            assert error.startswith("out of bounds shared memory access by") and f"byte {byte} of {shared}" in error
    assert touch(simt, 0) is None  # after all that


def test_no_shared_memory_at_all(simt):
    for byte in (-1, 0):
        assert "out of bounds shared memory access by thread 37" in touch(simt, byte, shared=0)


def test_shared_memory_holds_nan(simt):
    out = np.zeros(1, np.int32)
    for _ in range(2):
        assert simt.touch(ctypes.c_int64(1), 32, 1, 64, 0, 32, 0, out) is None and out[0] == -1
        assert touch(simt, 32, shared=64) is None


@pytest.mark.parametrize(
    "args, text",
    [
        (dict(threads=1025), "1 to 1024 threads"),
        (dict(threads=0), "1 to 1024 threads"),
        (dict(cluster=17, blocks=17), "1 to 16 blocks"),
        (dict(cluster=4, blocks=6), "no multiple"),
        (dict(blocks=0), "2147483647"),
        (dict(blocks=2**31), "2147483647"),
        (dict(shared=LIMIT + 1), "232448"),
    ],
)
def test_launches_that_cannot_be(simt, args, text):
    assert text in touch(simt, 0, **args)


MISUSES = {
    "exit before barrier": (0, ["exits, but thread", "is at __syncthreads (", "has exited"]),
    "barrier and collective": (1, ["deadlock: thread 32 of block", "(and 30 more); thread 33 of block"]),
    "two barriers": (2, ["__syncthreads (", "__syncthreads_or (", "but thread"]),
    "two collectives": (3, ["__ballot_sync (", "__any_sync (", "but thread"]),
    "two places": (4, ["is at __syncwarp (", "waits at __syncwarp ("]),
    "exit before collective": (5, ["thread 5 of block", "exits, but thread", "is at __shfl_sync (", "has exited"]),
    "mask": (6, ["__shfl_sync", "with mask 0x0000FFFF, but all lanes take part"]),
    "cluster rank": (7, ["is at cluster_pointer (", "with byte 0 of 64, rank 2 of 1"]),
    "recursion": (8, ["stack overflow in thread"]),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse(simt, name):
    how, texts = MISUSES[name]
    errors = results(simt, lambda: simt.misuse(how, np.zeros(1, np.int32)))
    assert all(e and "of block" in e for e in errors)
    for text in texts:
        assert any(text in e for e in errors), (text, errors[0])
    if how == 0:
        assert any(f"__syncthreads (planted.cu:{line('// exit before barrier')})" in e for e in errors)
    assert touch(simt, 0) is None


@pytest.mark.parametrize("streaming", [0, 1])
def test_misaligned_loads(simt, streaming):
    values, out = np.arange(64, dtype=np.int32), np.zeros(1, np.int32)
    start = -values.ctypes.data % 16 // 4
    assert simt.load_at(values[start:], streaming, out) is None and out[0] == 4 * start + 6
    for words in (1, 2, 3):
        error = simt.load_at(values[start + words :], streaming, out)
        assert error.startswith("misaligned 16-byte load: thread") and "(planted.cu:" in error


def test_other_faults_are_not_ours(path):
    code = (
        "import ctypes, faulthandler, sys; faulthandler.enable(); ctypes.CDLL(sys.argv[1]).run_load_at(None, 0, None)"
    )
    process = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert process.returncode == -signal.SIGSEGV and "Segmentation fault" in process.stderr


# --- CUDA's names --------------------------------------------------------------------------------------------------

RESULTS = np.dtype(
    [
        *((n, "i4") for n in ("shuffle", "up")),
        ("exchanged", "f4"),
        *((n, "i4") for n in ("any", "all", "reduced_max", "reduced_min", "reduced_add", "any_of_block")),
        *((n, "u4") for n in ("ballot", "unsigned_max", "unsigned_min", "unsigned_add", "funnel")),
        *((n, "i4") for n in ("population", "first", "leading", "at_zero")),
        *((n, "i8") for n in ("wide", "wide_up")),
        ("wide_exchanged", "u8"),
    ],
    align=True,
)


@pytest.mark.parametrize("threads", [32, 96, 84])
def test_intrinsics(simt, threads):
    """A lane that the last warp lacks has no defined value."""
    random = np.random.default_rng(2)
    x = random.integers(0, 1 << 32, threads, dtype=np.uint32)
    wide = random.integers(-(1 << 63), (1 << 63) - 1, threads)
    got = np.zeros(threads, RESULTS)
    assert simt.intrinsics(x, wide, got, threads) is None
    t, lane = np.arange(threads), np.arange(threads) % 32
    i, first, undefined = x.view(np.int32), t - lane, {}

    def each(function, values=x):  # one value a warp
        return np.array([function(values[k : k + 32]) for k in first])

    def moved(name, values, source):
        undefined[name] = source >= threads
        return values.take(source, mode="clip")

    expected = dict(
        shuffle=moved("shuffle", i, first + (t * 7 + 3) % 32),
        up=i[np.where(lane < 5, t, t - 5)],
        exchanged=moved("exchanged", i.astype(np.float32), t ^ 9),
        any=each(lambda w: x[-1] in w),
        all=each(lambda w: x[0] not in w),
        reduced_max=each(np.max, i),
        reduced_min=each(np.min, i),
        reduced_add=each(lambda w: w.sum(dtype=np.uint32)).view(np.int32),
        any_of_block=1,
        ballot=each(lambda w: sum(int(v & 4 != 0) << k for k, v in enumerate(w))),
        unsigned_max=each(np.max),
        unsigned_min=each(np.min),
        unsigned_add=each(lambda w: w.sum(dtype=np.uint32)),
        funnel=[((int(~v) * 3 % (1 << 32) << 32 | int(v)) >> (k + 13) % 32) % (1 << 32) for k, v in enumerate(x)],
        population=[int(v).bit_count() for v in x],
        first=[(int(v) & -int(v)).bit_length() for v in x],
        leading=[32 - (int(v >> k) % (1 << 32)).bit_length() for v, k in zip(i, lane)],
        at_zero=3200,
        wide=moved("wide", wide, first + 31 - lane),
        wide_up=wide[np.where(lane < 1, t, t - 1)],
        wide_exchanged=moved("wide_exchanged", wide, t ^ 31).view(np.uint64),
    )
    assert set(expected) == set(RESULTS.names)
    for name, values in expected.items():
        ignored = undefined.get(name, False)
        np.testing.assert_array_equal(np.where(ignored, 0, got[name]), np.where(ignored, 0, values), name)


def test_half(simt):
    out = np.zeros(65536, np.float32)
    assert simt.widen(out) is None
    halves = np.arange(65536).astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(halves))
    number = ~np.isnan(halves)
    np.testing.assert_array_equal(out.view(np.uint32)[number], halves.astype(np.float32).view(np.uint32)[number])


def test_arithmetic(simt):
    some = np.array([0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 3e38, -140.0, 1e-45], np.float32)
    a, b = (np.ascontiguousarray(m.ravel()) for m in np.meshgrid(some, some))
    larger, power = np.zeros_like(a), np.zeros_like(a)
    assert simt.arithmetic(a, b, a.size, larger, power) is None
    expected = np.maximum(a, b)  # with NaN from either
    expected[(a == 0) & (b == 0)] = np.where(np.signbit(a) & np.signbit(b), -0.0, 0.0)[(a == 0) & (b == 0)]
    np.testing.assert_array_equal(np.isnan(larger), np.isnan(a) | np.isnan(b))
    number = ~np.isnan(larger)
    np.testing.assert_array_equal(larger.view(np.uint32)[number], expected.view(np.uint32)[number])
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp2(a)
    expected[expected < np.finfo(np.float32).tiny] = 0
    np.testing.assert_allclose(power, expected, rtol=2**-22)


def test_atomics(simt):
    values = integers(192)

    def case():
        total, count = np.zeros(1, np.int32), np.full(1, 2**32 - 100, np.uint32)
        wide, largest = np.zeros(1, np.uint64), np.zeros(1, np.uint32)
        assert simt.atomics(values, total, count, wide, largest) is None
        return total[0], count[0], wide[0], largest[0]

    assert {*results(simt, case)} == {(values.sum(), 192 * 3 - 100, 192 << 33, values.view(np.uint32).max())}


# --- the build -----------------------------------------------------------------------------------------------------


def test_speed(simt):
    out, times = np.zeros(256, np.int32), []
    for _ in range(5):
        start = time.perf_counter()
        assert simt.shuffles(256, 1000, out) is None
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25, times  # ten milliseconds and less on an idle core


def test_without_assembly(planted, tmp_path):
    gcc("-shared", "-DEFT_SIMT_UCONTEXT", planted, SIMT / "simt.cpp", "-o", tmp_path / "ucontext.so")
    simt = Library(tmp_path / "ucontext.so")
    test_cluster_sum(simt, 2)
    test_accesses_beyond_shared_memory(simt, 1000)
    test_misuse(simt, "recursion")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_the_same_file(tmp_path):
    command = ["nvcc", "-std=c++17", "-fmad=false", "-arch=sm_90", "-c", SIMT / "planted.cu"]
    subprocess.run([*command, "-o", tmp_path / "planted.o"], check=True)
