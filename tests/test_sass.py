"""tools/sass.py: it reads marks as a person would, and catches planted faults."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import __main__ as command
from tools import sass

ROOT = Path(__file__).parents[1]
PLANTED = ROOT / "tests" / "planted_cuda.cu"


def test_marks():
    marks = sass.parse_marks(
        """a
// sass: group top 256 tokens, no budget
b
  // sass: model bf16
c;  // sass: rare
d
  // sass: end
e
// sass: end
f;  // sass: fma
// sass: group 64 tokens
g
// sass: end""",
        "x/k.cu",
    )
    top, other = sass.Group("top", 256, False, "x/k.cu:2"), sass.Group("k", 64, True, "x/k.cu:11")
    assert marks == {
        3: sass.Mark(top),
        5: sass.Mark(top, frozenset({"model", "bf16", "rare"})),
        6: sass.Mark(top, frozenset({"model", "bf16"})),
        8: sass.Mark(top),
        10: sass.Mark(None, frozenset({"fma"})),
        12: sass.Mark(other),
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\n// sass: group", "k.cu:2: `// sass: group`: allowed are bf16, f16, f32, fma, model, rare, "),
        ("a  // sass: group 64 tokens", "k.cu:1: `// sass: group 64 tokens`: allowed"),
        ("// sass: group 100 tokens", "k.cu:1: .*multiple of 32"),
        ("// sass: group 64 tokens\n// sass: group 64 tokens", "k.cu:2: a group is not inside another"),
        ("// sass: hot", "k.cu:1: `// sass: hot`: allowed"),
        ("// sass:", "k.cu:1: `// sass: `: allowed"),
        ("// sass: end", "k.cu:1: .*ends nothing"),
        ("a\n// sass: rare", "k.cu:2: no `// sass: end` follows"),
    ],
)
def test_bad_marks(text, message):
    with pytest.raises(ValueError, match=message):
        sass.parse_marks(text, "k.cu")


def test_occupancy():
    assert sass.resident("90a", 32, 256, 0) == 2048 and sass.resident("90a", 33, 256, 0) == 1536
    assert sass.resident("89", 32, 256, 0) == 1536 and sass.resident("120", 255, 256, 0) == 256
    assert sass.resident("80", 16, 32, 0) == 1024 and sass.resident("80", 32, 256, 48 << 10) == 768
    assert sass.resident("90a", 255, 1024, 0) == 0
    assert sass.resident("110", 32, 256, 0) == 1536 and sass.resident("90", 32, 256, 0) == 2048


def test_names():
    assert sass.demangle("_ZN3eft4cuda12_GLOBAL__N_113sample_streamENS_10SampleCallEi") in (
        "sample_stream",
        "_ZN3eft4cuda12_GLOBAL__N_113sample_streamENS_10SampleCallEi",
    )  # without libstdc++
    assert sass.demangle("k") == "k"


def test_every_architecture_of_the_build():
    text = (ROOT / "setup.py").read_text()
    assert tuple(sass.ARCHS.split(",")) == eval(re.search(r"^ARCHS = (\(.*\))$", text, re.M)[1])
    flags = eval(re.search(r"^CUDA_FLAGS = (\[.*\])$", text, re.M)[1])
    assert set(sass.FLAGS) - {"-lineinfo"} == set(flags[: flags.index("-Xcompiler")])


# --- with a compiler -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools():
    try:
        sass.tool("nvcc"), sass.tool("nvdisasm")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("sass")


@pytest.fixture(scope="module")
def rows(tools, cache):
    rows = sass.compile_and_examine([PLANTED], ["80", "90a"], cache=cache)
    return {(r["kernel"], r["arch"]): r for r in rows}


def line(text):
    """Where the planted file holds a text."""
    (number,) = (n for n, line in enumerate(PLANTED.read_text().splitlines(), 1) if text in line)
    return f"tests/planted_cuda.cu:{number}"


@pytest.mark.parametrize("kernel", ["good", "ahead", "once", "allowed", "division"])
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nothing_is_found_in_good_ones(rows, kernel, arch):
    row = rows[kernel + "_kernel", arch]
    assert row["findings"] == [] and (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0)
    assert row["threads"] == 256 and row["resident"] >= 768 and row["registers"] > 0


def test_planted_faults_are_found(rows):
    def found(kernel, arch="90a"):
        return "; ".join(rows[kernel + "_kernel", arch]["findings"])

    for arch in ("80", "90a"):
        assert re.fullmatch(
            r"spills: [1-9]\d* bytes stored, \d+ loaded; stack of [1-9]\d* bytes: \d+ [LS][TD]L at .*",
            found("spills", arch),
        )
        assert re.match(r"stack of 256 bytes: \d+ (STL|LDL) at tests/planted_cuda.cu:\d+", found("local", arch))
        assert found("narrow", arch) == "planted_cuda: loads 0 of 1536 bytes in 128 bits"
        assert found("nested", arch) == "planted_cuda: holds a loop that is no model's: counted once"
    assert found("fma") == f"contracts at {line('void fma_kernel')}: 1 fma.rn.f32, 1 FFMA"
    assert found("exp").startswith(f"contracts at {line('void exp_kernel')}: 3 fma.rn.f32")
    assert found("called").startswith(f"contracts at {line('float fused')}: 1 fma.rn.f32")
    assert re.fullmatch(r"planted_cuda: \d\d\.\d instructions a token, the budget is 41", found("works"))
    assert found("works", "80") == "", "the budget is an H200's"


def test_loops_by_hand(rows):
    (good,), (ahead,), (once,), (works,), (nested,) = (
        rows[f"{name}_kernel", "90a"]["groups"] for name in ("good", "ahead", "once", "works", "nested")
    )
    assert [g["name"] for g in (good, ahead, once)] == ["planted_cuda", "ahead", "once"]
    assert [g["loads"] for g in (good, ahead, once, works)] == [{"128": n} for n in (2, 8, 3, 1)]
    assert [g["loop"] for g in (good, ahead, once)] == [True, True, False]
    assert all(g["models"] == 3 and g["budget"] == pytest.approx(41) and g["loops"] == 1 for g in (good, ahead, once))
    for g in (good, ahead, once, works):
        assert g["per_token"] == pytest.approx(g["instructions"] * 32 / g["tokens"])
    # a product, a sum and a conversion of every logit, a maximum of every token; the rest is addresses and branches
    for g, tokens, most in ((good, 16, 16), (ahead, 16, 14), (once, 8, 14)):
        assert (3 * 3 + 1) * tokens <= g["instructions"] <= most * tokens
    assert good["opcodes"]["FMUL"] == 16 and ahead["opcodes"]["FMUL"] == 4 * 16, "once round a loop over models"
    assert "STG" not in good["opcodes"], "it is marked as rare"
    assert works["per_token"] >= 3 * (8 * 2 + 1)
    assert nested["models"] == 1 and nested["budget"] is None


def test_contraction_is_found(tools, cache):
    file = cache / "fuse.cu"
    file.write_text("__global__ void fuse_kernel(float* p) { p[1] = p[1] * p[2] + p[3]; }")
    (row,) = sass.compile_and_examine([file], ["90a"], flags=[f for f in sass.FLAGS if "fmad" not in f], cache=cache)
    assert row["findings"] == ["contracts at fuse.cu:1: 1 fma.rn.f32, 1 FFMA"]
    (row,) = sass.compile_and_examine([file], ["90a"], cache=cache)
    assert row["findings"] == [] and row["threads"] is None and row["resident"] is None


def test_compiled_once(tools, tmp_path, monkeypatch):
    file, header = tmp_path / "k.cu", tmp_path / "k.cuh"
    header.write_text("#define N 1\n// sass: group lost 64 tokens\n// sass: end\n")
    file.write_text('#include "k.cuh"\n__global__ void k_kernel(float* p) { p[0] = N; }')
    flags = [*sass.FLAGS, "-DX"]
    (row,) = sass.compile_and_examine([file], ["80"], flags=flags, cache=tmp_path / "cache")
    assert row["findings"] == []
    run, ran = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ran.append(args) or run(*args, **kwargs))
    assert sass.compile_and_examine([file], ["80"], flags=flags, cache=tmp_path / "cache") == [row] and ran == []
    header.write_text("#define N 1\n// sass: group lost 64 tokens\n#define M\n// sass: end\n")
    assert [r["findings"] for r in sass.compile_and_examine([file], ["80"], flags=flags, cache=tmp_path / "cache")] == [
        [],
        ["group lost: no kernel has code of it"],
    ]
    assert len(ran) == 2 and len(list((tmp_path / "cache").iterdir())) == 1


def test_command(rows, cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sass, "CACHE", cache)
    saved, table = tmp_path / "rows", tmp_path / "table.md"
    words = ["sass", "--arch", "90a,sm_80", str(PLANTED)]
    assert command.main([*words, "--json", str(saved), "--markdown", str(table)]) == 1
    out = capsys.readouterr().out
    kept = [json.loads(line) for line in saved.read_text().splitlines()]
    assert sorted(map(str, kept)) == sorted(map(str, json.loads(json.dumps([*rows.values()]))))
    assert out.strip() == table.read_text().strip() and "| ahead | 8 x 128 |" in out
    assert all(f"- sm_{r['arch']}, {r['kernel']}: {f}" in out for r in rows.values() for f in r["findings"])
    assert command.main([*words, "--kernel", "good_kernel"]) == 0 and "No findings." in capsys.readouterr().out
    assert command.main([*words, "--kernel", "good"]) == 2
    bad = tmp_path / "bad.cu"
    bad.write_text("__global__ void k() { nothing(); }")
    assert command.main(["sass", "--arch", "80", str(bad)]) == 1
    assert re.search(r'bad.cu: does not compile: .*identifier "nothing" is undefined', capsys.readouterr().out)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--arch", "80,70", str(PLANTED)], "--arch 70: this nvcc knows 75, 80"),
        (["--arch", "80a"], "--arch 80a: "),
        (["--arch", "x"], "--arch x: "),
        ([str(ROOT / "no.cu")], "no.cu: no such file"),
    ],
)
def test_bad_input_is_one_line(tools, words, message, capsys):
    assert command.main(["sass", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("missing", ["nvcc", "nvdisasm"])
def test_no_tool(missing, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == missing else name)
    if missing == "nvdisasm":
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton.knobs, "nvidia", None)
    monkeypatch.setattr(sass, "output", lambda *words: "sm_80\n")
    assert command.main(["sass", "--arch", "80", str(PLANTED)]) == 2
    assert f"no {missing}: set CUDA_HOME" in capsys.readouterr().err
