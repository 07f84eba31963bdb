"""tools/tune.py: which tilings are candidates, the table chosen from times, what is printed; times are made up."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from eft_kernels._backends.triton import config
from eft_kernels._backends.triton.config import TileConfig
from eft_kernels.bench import run, shapes
from eft_kernels.bench.shapes import Shape
from tools import ROOT, tune
from tools import __main__ as command
from tools.tune import Point, Times

A, B, C = TileConfig(1, 4, single_tile=True), TileConfig(4, 8, 8), TileConfig(32, 8)


def times(**medians):
    """{A, B, C: Times} of medians in microseconds, 1% apart from percentile to percentile."""
    return {dict(A=A, B=B, C=C)[name]: Times(x, x * 0.995, x * 1.005, 7) for name, x in medians.items()}


class Machine:
    """A GPU with a law in place of a clock: a tiling costs more the further its share of a row is from the best."""

    processors = 132

    def __init__(self):
        self.absent, self.asked, self.compiled = {}, [], []

    def compile(self, name, vocab, tilings):
        self.compiled += [(name, vocab, tiling) for tiling in tilings]

    def time(self, name, p, tilings, until):
        assert {(name, p.vocab, tiling) for tiling in tilings} <= set(self.compiled), "only what was compiled"
        self.asked.append((name, p, tilings))
        wanted = max(4, p.work // (8 * 132))
        out = {}
        for tiling in tilings:
            share = tiling.tiles_per_program * tiling.chunks_per_tile
            x = (2 + p.work / 1000) * (1 + 0.2 * abs(share - wanted) / max(share, wanted))
            x *= 0.9 if tiling.single_tile else 1
            out[tiling] = Times(x, x * 0.999, x * 1.001, 7)
        return out


# --- candidates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", tune.POINTS, ids=str)
@pytest.mark.parametrize("single_tile", [True, False])
def test_candidates(single_tile, p):
    tilings = tune.candidates(single_tile, p)
    assert tilings and len(set(tilings)) == len(tilings)
    for tiling in tilings:
        assert tiling == tune.clamp(tiling, p.vocab) and tune.programs(tiling, p) <= 64 * 132
        if tiling.single_tile:
            assert tiling.tiles_per_program == 1 and single_tile and p.work <= tune.SINGLE_TILE_WORK
        assert 4 <= tiling.chunks_per_tile * 256 / (tiling.num_warps * 32) <= 32
    assert any(c.single_tile for c in tilings) == (single_tile and p.work <= tune.SINGLE_TILE_WORK)
    assert max(tune.programs(c, p) for c in tilings) >= min(132, p.work // 4), "every multiprocessor has one"


def test_a_launch_takes_no_more_tiles_than_a_row_has():
    assert tune.clamp(TileConfig(64, 8, 8), 32000) == TileConfig(16, 8, 8), "125 chunks are 16 tiles of 8"
    assert tune.clamp(TileConfig(64, 8, 8), 262144) == TileConfig(64, 8, 8)
    assert tune.clamp(TileConfig(4, 16), 1) == TileConfig(1, 16)


def test_what_config_takes_now_is_a_candidate():
    with tune.forced("sample", TileConfig(64, 2)):
        tilings = tune.wanted("sample", 32000, Machine())
    assert {p: c[0] for p, c in tilings.items()} == {p: TileConfig(64, 2) for p in tune.POINTS if p.vocab == 32000}


def test_contenders():
    near = {Point(8): times(A=1, B=1.2, C=2), Point(64): times(A=3, B=1, C=2)}
    assert tune.contenders([A, B, C], Point(16), near) == [A, B], "C is far behind at both"
    assert tune.contenders([C, B, A], Point(16), near) == [C, B, A], "the first stays"
    assert tune.contenders([A, B, C], Point(128), near) == [A, B, C], "nothing above"
    assert tune.contenders([A, B, C], Point(16), {Point(1): near[Point(8)], Point(512): near[Point(64)]}) == [A, B, C]


# --- the choice ----------------------------------------------------------------------------------------------------


def test_choose():
    results = {
        Point(1): times(A=5, B=8, C=20),
        Point(2): times(A=6, B=8, C=20),
        Point(8): times(A=12, B=9, C=15),
        Point(64): times(B=30, C=30.1),
        Point(512): times(B=300, C=200),
    }
    assert tune.choose(results) == [
        ((2 * 501 + 8 * 501) // 2, A),
        ((64 + 8) * 501 // 2, B),
        (1 << 62, C),
    ] or tune.choose(results) == [((2 * 501 + 8 * 501) // 2, A), ((64 + 512) * 501 // 2, B), (1 << 62, C)]


def test_a_difference_inside_the_noise_makes_no_row():
    results = {Point(1): times(A=5, B=5.04), Point(2): times(A=6.05, B=6), Point(8): times(A=9, B=9.05)}
    assert tune.choose(results) == [(1 << 62, A)]
    noisy = {Point(1): times(A=5, B=5.5), Point(2): times(A=6.6, B=6), Point(8): times(A=9, B=9.9)}
    assert tune.choose(noisy) == [(751, A), (2505, B), (1 << 62, A)]
    noisy[Point(2)][B] = noisy[Point(2)][B]._replace(p20=5.7, p80=6.4)
    assert tune.choose(noisy) == [(1 << 62, A)]


def test_choose_only_what_was_measured_there():
    results = {Point(1): times(A=5, B=9), Point(8): times(B=9), Point(512): times(C=9)}
    assert tune.choose(results) == [(2254, A), (260 * 501, B), (1 << 62, C)]


def test_equal_work_of_two_vocabularies_is_one_choice():
    a, b = Point(2, 256 * 100), Point(1, 256 * 200)
    assert a.work == b.work
    assert tune.choose({a: times(A=5, B=6), b: times(A=7, B=5), Point(1): times(A=5, B=5)}) == [(1 << 62, B)]


# --- printing ------------------------------------------------------------------------------------------------------


def test_an_entry_is_what_config_holds():
    text = tune.entry("NVIDIA H200", [(512, A), (8192, B), (1 << 62, TileConfig(2, 16, 8, True))])
    assert eval("{" + text + "}", {"TileConfig": TileConfig}) == {
        "NVIDIA H200": ((512, A), (8192, B), (1 << 62, TileConfig(2, 16, 8, True)))
    }
    assert text.splitlines()[1] == "        (512, TileConfig(1, 4, single_tile=True)),"
    assert "(1 << 62, TileConfig(2, 16, 8," in text
    for table in (config.SAMPLE, config.STREAM):
        text = tune.entry("default", table["default"])
        assert eval("{" + text + "}", {"TileConfig": TileConfig})["default"] == table["default"]


def test_tune(capsys, tmp_path):
    machine, path, about = Machine(), tmp_path / "rows", dict(device="NVIDIA H200", schema=1)
    was = dict(config.SAMPLE), dict(config.STREAM)
    assert tune.tune(list(tune.TABLES), machine, 1e9, str(path), about=about) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["table"], r["batch"], r["vocab"]) for r in rows} == {
        (n, p.rows, p.vocab) for n in tune.TABLES for p in tune.POINTS
    }
    for name, text in zip(tune.TABLES, out.split("\nconfig.")[1:]):
        part = [r for r in rows if r["table"] == name]
        block = "\n".join(line for line in text.splitlines() if line.startswith("    "))
        table = eval("{" + block + "}", {"TileConfig": TileConfig})["NVIDIA H200"]
        assert len(table) >= 3 and table[-1][0] == 1 << 62 and sorted(table)[0] == table[0]
        assert any(tiling.single_tile for _, tiling in table) == (name == "sample")
        for p in tune.POINTS:
            here = [r for r in part if (r["batch"], r["vocab"]) == (p.rows, p.vocab)]
            chosen = [r for r in here if r["chosen"]]
            assert len(chosen) == 1 and chosen[0]["work"] == p.work and chosen[0]["device"] == "NVIDIA H200"
            assert chosen[0]["median_us"] < 1.1 * min(r["median_us"] for r in here), p
            now = tune.now(name)(p)
            assert any(TileConfig(*(r[field] for field in TileConfig._fields)) == now for r in here), (
                "what is used now, too"
            )
    assert "not measured" not in out and (config.SAMPLE, config.STREAM) == was


def test_what_there_is_no_time_for_is_said(capsys):
    clock = iter(range(1000))
    results, skipped = tune.measure_points("sample", Machine(), 5.5, clock=lambda: next(clock))
    assert list(results) == tune.POINTS[:6] and skipped == tune.POINTS[6:]
    text = tune.render("sample", "X", results, skipped, {(Point(1), B): "out of registers"}, tune.now("sample"))
    assert (
        "not measured, no time left: 128 x 128256" in text and "TileConfig(4, 8, 8) at 1 x 128256: out of reg" in text
    )


def test_nothing_measured_fails(capsys):
    machine = Machine()
    machine.time = lambda *_: {}
    assert tune.tune(["sample"], machine, 1e9, about=dict(device="X")) == 1
    assert "nothing could be timed" in capsys.readouterr().err


# --- measuring -----------------------------------------------------------------------------------------------------


def test_forced():
    was = dict(config.SAMPLE), dict(config.STREAM)
    with pytest.raises(KeyError), tune.forced("sample", B):
        assert config.tile_config(config.SAMPLE, torch.device("cpu"), 1) == B
        assert config.tile_config(config.STREAM, torch.device("cpu"), 1) != B
        raise KeyError
    assert (config.SAMPLE, config.STREAM) == was


def test_tokens_of_the_tilings_must_be_equal():
    tokens, lp = torch.tensor([1, 2]), torch.tensor([-0.5, float("nan")])
    tune.check("this", Shape(), tokens, tokens.clone())
    tune.check("this", Shape(), (tokens, lp), (tokens, lp + 1e-6))
    for got in ((tokens + 1, lp), (tokens, lp + 1e-3)):
        with pytest.raises(run.WrongTokens, match="this is not what the first candidate gives at sample plain"):
            tune.check("this", Shape(), got, (tokens, lp))


def test_times_of_several_calls_add_up():
    assert tune.added([[1e-6, 2e-6, 3e-6], [1e-5]]) == pytest.approx(Times(12, 11.4, 12.6, 1))


class Here(tune.Gpu):
    """The same on this CPU, whose backend knows no tilings; kernels are compiled for a GPU."""

    ours, backend = tune.OURS[0], "auto"

    def __init__(self, target=None):
        self.processors, self.target = 132, target
        self.absent, self.gated, self.pool, self.jobs = {}, set(), None, {}

    def shape(self, p, op="sample", variant="plain"):
        return Shape(op, variant, p.rows, p.vocab, rounds=1)


def test_every_tiling_is_timed_behind_the_gate(monkeypatch):
    p, seen, gated = Point(2, 3000), [], []
    gate, ours = run.gate, shapes.ours
    monkeypatch.setattr(run, "gate", lambda s, *args: gated.append((s.op, s.variant)) or gate(s, *args))
    monkeypatch.setattr(
        shapes, "ours", lambda *args, **kwargs: seen.append(config.STREAM["default"]) or ours(*args, **kwargs)
    )
    with Here() as machine:
        got = machine.time("stream", p, [A, B, C], 0)
        machine.time("stream", Point(1, 3000), [A, B], 0)
    assert list(got) == [A, B, C] and not machine.absent and gated == [("sample", "top_p"), ("logprobs", "plain")]
    assert all(0 < t.p20 <= t.median <= t.p80 and t.repetitions >= 3 for t in got.values())
    assert dict.fromkeys(seen) == dict.fromkeys(((1 << 62, tiling),) for tiling in (A, B, C)), (
        "each with its own tiling"
    )


def test_a_tiling_that_fails_is_absent_and_one_with_other_tokens_stops_all(monkeypatch):
    p, ours = Point(2, 3000), shapes.ours

    def make(*args, **kwargs):
        call, tiling = ours(*args, **kwargs), config.SAMPLE["default"][0][1]

        def other(z):
            if tiling == B:
                raise MemoryError("out of registers")
            return call(z) + (tiling == C)

        return other

    monkeypatch.setattr(shapes, "ours", make)
    machine = Here()
    assert list(machine.time("sample", p, [A, B], 0)) == [A]
    assert machine.absent == {(p, B): "MemoryError: out of registers"}
    assert machine.time("sample", p, [B], 0) == {}
    with pytest.raises(run.WrongTokens, match=r"TileConfig\(32, 8\) is not what the first"):
        machine.time("sample", p, [A, C], 0)
    monkeypatch.setattr(run, "gate", lambda *_: (_ for _ in ()).throw(run.WrongTokens("red")))
    with pytest.raises(run.WrongTokens, match="red"):
        Here().time("sample", p, [A], 0)


def test_processes_compile_ahead(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p, impossible = Point(1, 3000), TileConfig(1, 3)
    with Here("sm_90") as machine:
        machine.compile("sample", p.vocab, [A, impossible])
        assert machine.compiled("sample", p, [A, impossible], time.monotonic() + 300) == [A]
        assert machine.absent.pop((p, impossible)).startswith("CompilationError")
        assert len(list(tmp_path.rglob("sample_kernel.cubin"))) == 1
        machine.compile("sample", p.vocab, [B])
        assert machine.compiled("sample", p, [B], 0) == [] and machine.absent == {(p, B): "not compiled in time"}


AHEAD = """
import torch
from eft_kernels.bench import shapes
from eft_kernels._backends.triton.config import TileConfig
from tools import tune
seen = tune.start("sm_90")
for name in tune.TABLES:
    tune.build(name, 3000, TileConfig(2, 2))
hashes = {kernel.hash for *_, kernel in seen}
for name in tune.TABLES:
    for rows in (2, 8, 64):
        with tune.forced(name, TileConfig(2, 2)):
            for op, variant in tune.TABLES[name].calls:
                z = [torch.empty(rows, 3000, dtype=torch.bfloat16) for _ in range(3)]
                shapes.ours(op, variant, shapes.problem(shapes.Shape(op, variant, rows, 3000)))(z)
assert {kernel.hash for *_, kernel in seen} == hashes, "other kernels for more rows"
print(sorted({name for name, *_ in seen}))
"""


def test_compiled_ahead_is_what_is_launched(tmp_path):
    """For any number of rows."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(
        TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT)
    )
    out = subprocess.run([sys.executable, "-c", AHEAD], capture_output=True, text=True, env=env)
    assert out.stdout == "['logprobs_kernel', 'row_kernel', 'sample_kernel', 'stats_kernel']\n", out.stderr
    assert list(tmp_path.rglob("*.cubin"))


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu(capsys):
    assert command.main(["tune", "--table", "sample"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no CUDA device is here" in err and len(err.splitlines()) == 1
