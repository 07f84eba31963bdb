"""tools/aot.py: it catches planted faults, and finds none in our kernels."""

import json
import re
from pathlib import Path

import pytest

from tools import __main__ as command
from tools import aot
from tools import machine_code as mc

ROOT = Path(__file__).parents[1]
PLANTED = str(ROOT / "tests" / "planted_kernels.py")


def test_main_loop():
    loop = [mc.Instruction(op) for op in ("LDG.E.128", "LDG.E.U16", "FFMA")] + [mc.Instruction("BRA", targets=(6,))]
    loop += [mc.Instruction("LDG.E.64"), mc.Instruction("BRA", targets=(4,)), mc.Instruction("BRA", targets=(0,))]
    assert aot.main_loop(loop, 18) == {0, 1, 2, 3, 6} == aot.main_loop(loop, 16), "without the loop inside"
    assert aot.main_loop(loop, 19) is None, "what the loop inside loads is not its own"


def test_contractions():
    def found(text, ops, loop=(), stage="ptx"):
        if stage == "ptx":
            text = ".visible .entry k(\n)\n{\n" + text.replace("; ", ";\n") + "\n}\n"
        return aot.contractions({stage: text}, [*ops, *loop], list(loop))

    assert found("mul.f32 a; add.rn.f32 b; mad.lo.s32 c; fma.rn.bf16x2 d;", ["FMUL", "FADD", "HFMA2", "IMAD"]) == []
    assert found("fma.rn.f32 a; fma.rn.ftz.f32 a; fma.rn.f32x2 b; fma.rn.f64 c;", []) == [
        f"contracts: 1 fma.rn.{kind}" for kind in ("f32", "ftz.f32", "f32x2", "f64")
    ]
    assert found("mul.rn.f32x2 a; add.rn.f32x2 b;", ["FFMA2", "FFMA2"]) == ["contracts: 2 FFMA2"]
    assert found("", ["FFMA", "FFMA.FTZ", "DFMA"]) == ["contracts: 2 FFMA", "contracts: 1 DFMA"]
    assert found("div.rn.f32 a;", ["FFMA"]) == [], "a division is made of them"
    assert found("div.rn.f32 a;", ["FFMA2"], ["FFMA"]) == ["contracts: 1 FFMA", "contracts: 1 FFMA2"]
    llir = "declare float @llvm.fma.f32(float) \n %1 = fmul float %a, %b \n %2 = fadd nsz float %a, %b"
    assert found(llir, ["v_mul_f32_e32", "v_max_f32"], stage="llir") == []
    assert found(llir, ["v_pk_fma_f32", "v_fmac_f32_e32"], stage="llir") == [
        "contracts: 1 v_pk_fma_f32",
        "contracts: 1 v_fmac_f32",
    ]
    assert found("%1 = fmul contract float %a", [], stage="llir") == ["contracts: 1 fmul contract"]
    assert found("%1 = call float @llvm.fmuladd.f32(float %a)", [], stage="llir") == ["contracts: 1 llvm.fmuladd.f32"]


def test_every_kernel_of_the_backend_is_listed():
    sources = "".join(p.read_text() for p in (ROOT / "eft_kernels" / "_backends" / "triton").glob("*.py"))
    assert set(re.findall(r"^def (\w+_kernel)\(", sources, re.M)) == set(aot.KERNELS)


def test_bad_input_is_one_line(capsys):
    pytest.importorskip("triton")
    assert command.main(["aot", "--target", "sm_90,sm_1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--target sm_1: allowed are sm_80, sm_90" in err and len(err.splitlines()) == 1


# --- with a compiler -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools():
    triton = pytest.importorskip("triton")
    try:
        return triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def planted(request, tools):
    return {row["cases"][0]: row for row in aot.run([PLANTED, request.param])}


def test_planted_faults_are_found(planted):
    findings = {name: ", ".join(row["findings"]) for name, row in planted.items()}
    nvidia = planted["good"]["target"] == "sm_90"
    assert findings["good"] == ""
    assert "fp fusion is on" in findings["fusion"] and ("FFMA" if nvidia else "v_fma") in findings["fusion"]
    assert "contracts" in findings["fma"] and "fusion" not in findings["fma"]
    assert findings["shifted"] == "loads 0 of 12288 bytes in 128 bits"
    assert re.fullmatch(r"RuntimeError at planted_kernels.py:\d+: said so", findings["fails"])
    assert findings["unknown"] == "is not in KERNELS"
    assert findings["works"] == ("50.5 instructions a token, the budget is 41" if nvidia else "")
    assert findings["spills"].startswith("spills ")


def test_a_good_kernel_by_hand(planted):
    row = planted["good"]
    lanes = aot.TARGETS[row["target"]].lanes
    assert row["loop"] and row["tokens"] == 2048 and row["loads"] == {"128": 3 * 2048 * 2 // 16 // (4 * lanes)}
    assert row["per_token"] == row["instructions"] * 4 * lanes / 2048 and row["stack"] == 0
    assert not {"NOP", "s_nop"} & set(planted["unknown"]["opcodes"]), "padding is no instruction"
    assert sum(row["opcodes"].values()) == row["instructions"] and row["constants"]["TC"] == 8
    each = 3 * 2048 // (4 * lanes)  # a product and a sum of every logit
    names = ("FMUL", "FADD") if lanes == 32 else ("v_mul_f32", "v_add_f32")
    assert [row["opcodes"][name] for name in names] == [each, each]


def test_findings_fail(planted, monkeypatch, capsys):
    rows = list(planted.values())
    monkeypatch.setattr(aot, "run", lambda script: rows)
    assert command.main(["aot", "--target", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert all(f"{row['cases'][0]}: {finding}" in out for row in rows for finding in row["findings"])
    assert f"{sum(len(row['findings']) for row in rows)} findings:" in out and "| planted_kernel |" in out
    monkeypatch.setattr(aot, "run", lambda script: [planted["good"]])
    assert command.main(["aot", "--target", "sm_90"]) == 0


def test_default_sample_has_no_finding(tools, capfd, tmp_path):
    path, table = tmp_path / "rows", tmp_path / "table.md"
    label = "sample plain B=64 V=128256 J=3 bfloat16"
    words = ["aot", "--target", "sm_90", "--kernel", "sample_kernel", "--case", label]
    assert command.main([*words, "--json", str(path), "--markdown", str(table)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["cases"] for r in rows] == [[label]]
    assert rows[0]["loads"]["128"] == 6 and 0 < rows[0]["per_token"] <= rows[0]["budget"]
    assert f"{rows[0]['per_token']:.1f} | 41 |" in table.read_text() and "No findings" in capfd.readouterr().out


@pytest.mark.parametrize(
    "label",
    [
        "sample upscale_filter B=64 V=128256 J=3 bfloat16",
        "sample top_p B=1 V=1 J=3 bfloat16",
        "verify token rows B=64 V=17 J=1 bfloat16",
        "sample diagnostics B=64 V=128256 J=3 bfloat16",
        "sample runners_up B=64 V=128256 J=3 bfloat16",
        "verify tree rows B=64 V=17 J=1 bfloat16",
    ],
)
def test_a_kernels_constants_reach_its_loops(label, tools, capfd):
    """Triton 3.6 loses those of a kernel's own tuples (`tuned`, an integer of 1) where the interpreter keeps them."""
    assert command.main(["aot", "--target", "sm_90", "--case", label]) == 0, capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_nothing_is_found(target, tools, capfd):
    assert command.main(["aot", "--target", target]) == 0, capfd.readouterr().out
