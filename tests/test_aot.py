"""benchmarks/aot.py: it reads machine code as a person would, catches planted faults, and finds none in our kernels."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import aot

ROOT = Path(__file__).parents[1]
PLANTED = str(ROOT / "tests" / "planted_kernels.py")

# at 0x20 a loop over 128-bit loads, which may leave for a cold block (0xc0) and holds a loop of its own (0x70)
SASS = """
	code for sm_90
		Function : k
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 EXIT ;                                     /* 0x000000000000894d */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;           /* 0x0000000402047981 */
        /*0030*/              @!P1 LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0040*/                   FFMA R0, R4, R5, R6 ;                      /* 0x0000000504007223 */
        /*0050*/              @P1  BRA 0xc0 ;                                 /* 0x0000000000000947 */
        /*0060*/                   FADD R0, R0, R4 ;                          /* 0x0000000400007221 */
        /*0070*/                   LDG.E.64 R10, desc[UR4][R2.64] ;           /* 0x0000000402047981 */
        /*0080*/              @P2  BRA 0x70 ;                                 /* 0x0000000000000947 */
        /*0090*/                   BRA.U UP0, 0x20 ;                          /* 0xfffffffc00fc7947 */
        /*00a0*/                   FADD R0, R0, 1 ;                           /* 0x3f80000000007421 */
        /*00b0*/                   EXIT ;                                     /* 0x000000000000794d */
        /*00c0*/                   STL [R1], R0 ;                             /* 0x0000000001007387 */
        /*00d0*/                   BRA 0x60 ;                                 /* 0xfffffffc00fc7947 */
        /*00e0*/                   BRA 0xe0;                                  /* 0xfffffffc00fc7947 */
        /*00f0*/                   NOP;                                       /* 0x0000000000007918 */
"""
AMDGCN = """
	.text
k:                                      ; @k
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 17 22 ; toy.py:17:22
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ushort v5, v6, s[4:5]
	v_fmac_f32_e32 v0, v1, v2
	s_cbranch_scc0 .LBB0_1
.LBB0_2:
	s_endpgm
	.section	.rodata,"a",@progbits
	s_nop 0
"""


def test_sass():
    code = aot.parse_sass(SASS)
    assert len(code) == 16 and code[3].op == "LDG.E.U16.CONSTANT"
    assert [i for i, x in enumerate(code) if not x.falls] == [11, 13, 14]  # the guarded EXIT and BRA may go on
    assert {i: x.target for i, x in enumerate(code) if x.target is not None} == {5: 12, 8: 7, 9: 2, 13: 6, 14: 14}
    outer, inner = sorted(aot.loops(code), key=lambda x: -len(x[0]))
    assert outer == ({*range(2, 10), 12, 13}, set(range(2, 10))) and inner == ({7, 8}, {7, 8})
    assert aot.main_loop(code, 16) == set(range(2, 10)) and aot.main_loop(code, 8) == set(range(2, 10))
    assert aot.main_loop(code, 19) is None, "what the loop inside loads is not its own"


def test_amdgcn():
    code = aot.parse_amdgcn(AMDGCN)
    assert [x.op for x in code] == ["s_cbranch_scc1", "buffer_load_dwordx4", "global_load_ushort", "v_fmac_f32_e32",
                                    "s_cbranch_scc0", "s_endpgm"]
    assert aot.loops(code) == [({1, 2, 3, 4}, {1, 2, 3, 4})]
    assert [aot.load_bits(x.op) for x in code] == [0, 128, 16, 0, 0, 0]


@pytest.mark.parametrize("op, bits", [
    ("LDG.E.128", 128), ("LDG.E.EF.128.CONSTANT", 128), ("LDG.E.ENL2.256", 256), ("LDG.E.64", 64), ("LDG.E", 32),
    ("LDG.E.U16", 16), ("LDG.E.S8", 8), ("LDGSTS.E.BYPASS.128", 128), ("LDS.128", 0), ("LDC.64", 0), ("STG.E.128", 0),
    ("global_load_dwordx2", 64), ("buffer_load_short_d16_hi", 16), ("global_load_lds_dword", 32), ("s_load_dwordx8", 0),
])
def test_load_widths(op, bits):
    assert aot.load_bits(op) == bits


def test_contractions():
    def found(ptx, ops, loop=(), stage="ptx"):
        return aot.contractions({stage: ptx}, [*ops, *loop], list(loop))
    assert found("mul.f32 a; add.rn.f32 b; mad.lo.s32 c; fma.rn.bf16x2 d;", ["FMUL", "FADD", "HFMA2", "IMAD"]) == []
    assert found("fma.rn.f32 a; fma.rn.ftz.f32 a; fma.rn.f32x2 b; fma.rn.f64 c;", []) == [
        f"contracts: 1 fma.rn.{kind}" for kind in ("f32", "ftz.f32", "f32x2", "f64")]
    assert found("mul.rn.f32x2 a; add.rn.f32x2 b;", ["FFMA2", "FFMA2"]) == ["contracts: 2 FFMA2"]
    assert found("", ["FFMA", "FFMA.FTZ", "DFMA"]) == ["contracts: 2 FFMA", "contracts: 1 DFMA"]
    assert found("div.rn.f32 a;", ["FFMA"]) == [], "a division is made of them"
    assert found("div.rn.f32 a;", ["FFMA2"], ["FFMA"]) == ["contracts: 1 FFMA", "contracts: 1 FFMA2"]
    llir = "declare float @llvm.fma.f32(float) \n %1 = fmul float %a, %b \n %2 = fadd nsz float %a, %b"
    assert found(llir, ["v_mul_f32_e32", "v_max_f32"], stage="llir") == []
    assert found(llir, ["v_pk_fma_f32", "v_fmac_f32_e32"], stage="llir") == ["contracts: 1 v_pk_fma_f32",
                                                                             "contracts: 1 v_fmac_f32"]
    assert found("%1 = fmul contract float %a", [], stage="llir") == ["contracts: 1 fmul contract"]
    assert found("%1 = call float @llvm.fmuladd.f32(float %a)", [], stage="llir") == ["contracts: 1 llvm.fmuladd.f32"]


def test_occupancy():
    h200, a100, mi300 = (aot.TARGETS[name] for name in ("sm_90", "sm_80", "gfx942"))
    assert aot.ctas(h200, 32, 4, 0) == 16  # threads
    assert aot.ctas(h200, 33, 4, 0) == aot.ctas(h200, 40, 4, 0) == 12  # registers, handed out eight at a time
    assert aot.ctas(h200, 32, 1, 0) == 32 and aot.ctas(h200, 255, 16, 0) == 0
    assert aot.ctas(h200, 32, 4, 64 << 10) == 3 and aot.ctas(a100, 32, 4, 64 << 10) == 2  # shared memory
    assert aot.ctas(mi300, 32, 4, 0) == aot.ctas(mi300, 64, 4, 0) == 8 and aot.ctas(mi300, 65, 4, 0) == 7
    assert aot.ctas(mi300, 64, 4, 40 << 10) == 1


def test_every_kernel_of_the_backend_is_listed():
    sources = "".join(p.read_text() for p in (ROOT / "eft_kernels" / "triton").glob("*.py"))
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


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_nothing_is_found(target, tools, capfd):
    assert command.main(["aot", "--target", target]) == 0, capfd.readouterr().out
