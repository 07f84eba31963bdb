"""tools/machine_code.py reads machine code as a person would."""

import pytest

from tools import machine_code as mc

# a switch; a loop (0x50) inside another (0x30), which a call leaves; a function, and what a division calls
SASS = """
	.section	.text.k,"ax",@progbits
.text.k:
k:
	//## File "/a/k.cu", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   BRX R2 -0x30                              (*"BRANCH_TARGETS .L_x_1,.L_x_5"*);
.L_x_1:
	//## File "/inc/f.hpp", line 9 inlined at "/a/h.cuh", line 5
	//## File "/a/h.cuh", line 5 inlined at "/a/k.cu", line 7
	//## File "/a/k.cu", line 7
        /*0030*/                   HFMA2.MMA R0, -RZ, RZ, 0, 0 ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_5) ;
.L_x_2:
	//## File "/a/h.cuh", line 6
        /*0050*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   BRA.U UP0, `(.L_x_2) ;
        /*0070*/               @P1 CALL.REL.NOINC `(.L_x_4) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0090*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
        /*00a0*/                   EXIT ;
.L_x_5:
        /*00b0*/                   WARPSYNC.COLLECTIVE R15, `(.L_x_6) ;
.L_x_6:
        /*00c0*/                   BRA `(.L_x_2) ;
        .weak           $k$f
$k$f:
        /*00d0*/                   FFMA R0, R4, R5, R6 ;
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*00e0*/                   FFMA R0, R4, R5, R6 ;
        /*00f0*/                   RET.REL.NODEC R2 `(k) ;
	.section	.text.other,"ax",@progbits
other:
        /*0000*/                   EXIT ;
"""


def test_reads_sass():
    functions = mc.parse_sass(SASS)
    assert list(functions) == ["k", "other"] and len(functions["other"]) == 1
    code = functions["k"]
    assert len(code) == 16 and code[5].op == "LDG.E.128" and code[5].operands == "R4, desc[UR4][R2.64]"
    assert code[0].frames == (("/a/k.cu", 3),) and code[6].frames == (("/a/h.cuh", 6),)
    assert code[4].frames == (("/inc/f.hpp", 9), ("/a/h.cuh", 5), ("/a/k.cu", 7))
    assert [i for i, x in enumerate(code) if not x.falls] == [2, 8, 10, 12, 15]
    assert {i: x.targets for i, x in enumerate(code) if x.targets} == {2: (3, 11), 6: (5,), 7: (9,), 8: (3,), 12: (5,)}
    assert [x.part.split("_")[0] for x in code[12:]] == ["", "$k$f", "$", "$"]
    graph = mc.graph_of([x for x in code if not x.part])
    assert [list(r) for r, _ in graph] == [[0, 1], [2], [3, 4], [5, 6], [7], [8], [9, 10], [11, 12]]
    assert [to for _, to in graph] == [[1], [2, 7], [3], [3, 4], [6, 5], [2], [], [3]]


# a loop at LOOP over 128-bit loads, which may leave for a cold block and holds a loop of its own
NESTED = """
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.LOOP:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;
        /*0040*/                   FFMA R0, R4, R5, R6 ;
        /*0050*/              @P1  BRA `(.COLD) ;
.BACK:
        /*0060*/                   FADD R0, R0, R4 ;
.INNER:
        /*0070*/                   LDG.E.64 R10, desc[UR4][R2.64] ;
        /*0080*/              @P2  BRA `(.INNER) ;
        /*0090*/                   BRA.U UP0, `(.LOOP) ;
        /*00a0*/                   FADD R0, R0, 1 ;
        /*00b0*/                   EXIT ;
.COLD:
        /*00c0*/                   STL [R1], R0 ;
        /*00d0*/                   BRA `(.BACK) ;
.SELF:
        /*00e0*/                   BRA `(.SELF);
        /*00f0*/                   NOP;
.END:
"""


def test_loops():
    code = mc.parse_sass(NESTED)["k"]
    assert len(code) == 16 and code[3].op == "LDG.E.U16.CONSTANT"
    assert [i for i, x in enumerate(code) if not x.falls] == [11, 13, 14]  # the guarded EXIT and BRA may go on
    assert {i: x.targets for i, x in enumerate(code) if x.targets} == {5: (12,), 8: (7,), 9: (2,), 13: (6,), 14: (14,)}
    outer, inner = sorted(mc.loops(code), key=lambda x: -len(x[0]))
    assert outer == ({*range(2, 10), 12, 13}, set(range(2, 10))) and inner == ({7, 8}, {7, 8})


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


def test_reads_amdgcn():
    code = mc.parse_amdgcn(AMDGCN)
    assert [x.op for x in code] == [
        "s_cbranch_scc1",
        "buffer_load_dwordx4",
        "global_load_ushort",
        "v_fmac_f32_e32",
        "s_cbranch_scc0",
        "s_endpgm",
    ]
    assert mc.loops(code) == [({1, 2, 3, 4}, {1, 2, 3, 4})]
    assert [mc.load_bits(x.op) for x in code] == [0, 128, 16, 0, 0, 0]


@pytest.mark.parametrize(
    "op, bits",
    [
        ("LDG.E.128", 128),
        ("LDG.E.EF.128.CONSTANT", 128),
        ("LDG.E.ENL2.256", 256),
        ("LDG.E.64", 64),
        ("LDG.E", 32),
        ("LDG.E.U16", 16),
        ("LDG.E.S8", 8),
        ("LDGSTS.E.BYPASS.128", 128),
        ("LD.E.64", 64),
        ("LD.E", 32),
        ("LDS.128", 0),
        ("LDC.64", 0),
        ("LDC", 0),
        ("LDL.64", 0),
        ("LDSM.16", 0),
        ("STG.E.128", 0),
        ("global_load_dwordx2", 64),
        ("buffer_load_short_d16_hi", 16),
        ("global_load_lds_dword", 32),
        ("s_load_dwordx8", 0),
    ],
)
def test_load_widths(op, bits):
    assert mc.load_bits(op) == bits


def test_reads_ptx():
    ptx = mc.parse_ptx("""
.visible .entry k(
	.param .u64 p
)
.maxntid 16, 8, 1
{
	.loc	1 12 3
	div.rn.f32 	%f3, %f1, %f2;
	.loc	1 13 3
	mul.rn.f32 	%f3, %f1, %f2;
	add.rn.ftz.f64 	%f3, %f1, %f2;
	mad.lo.s32 	%r1, %r1, %r2, %r3;
	.loc	2 14 3, function_name $L__info_string0, inlined_at 1 24 7
	fma.rn.f32 	%f3, %f1, %f2, %f4;
	fma.rn.bf16x2 	%r3, %r1, %r2, %r4;
	mul.f32 	%f3, %f1, %f2;
	sub.ftz.f32 	%f3, %f1, %f2;
}
.func (.param .b32 r) f(
)
{
	rcp.rn.f32 	%f3, %f1;
}
	.file	1 "/a/k.cu"
	.file	2 "/a/b/../h.cuh"
""")
    at = (("/a/h.cuh", 14), ("/a/k.cu", 24))
    assert ptx["k"] == mc.PtxFunction(
        threads=128,
        divisions={(("/a/k.cu", 12),)},
        fusible=[(at, "fma.rn.f32"), (at, "fma.rn.bf16x2"), (at, "mul.f32"), (at, "sub.ftz.f32")],
    )
    assert ptx["f"] == mc.PtxFunction(threads=None, divisions={()}, fusible=[])


def test_occupancy():
    h200, a100, mi300 = mc.nvidia(90), mc.nvidia(80), mc.AMD_MI300
    assert mc.resident_blocks(h200, 32, 4, 0) == 16  # threads
    assert mc.resident_blocks(h200, 33, 4, 0) == mc.resident_blocks(h200, 40, 4, 0) == 12  # registers come in eights
    assert mc.resident_blocks(h200, 32, 1, 0) == 32 and mc.resident_blocks(h200, 255, 16, 0) == 0
    assert mc.resident_blocks(h200, 32, 4, 64 << 10) == 3 and mc.resident_blocks(a100, 32, 4, 64 << 10) == 2
    assert mc.resident_blocks(mi300, 32, 4, 0) == mc.resident_blocks(mi300, 64, 4, 0) == 8
    assert mc.resident_blocks(mi300, 65, 4, 0) == 7 and mc.resident_blocks(mi300, 64, 4, 40 << 10) == 1
