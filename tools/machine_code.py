"""Machine code as text: instructions, the control-flow graph and its loops, loads, multiply-adds, occupancy.

Read are `nvdisasm -c` (with `-gi` also source lines), PTX, and LLVM's assembly for AMD. Shared by `sass.py` (CUDA
kernels) and `aot.py` (Triton kernels).
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections import Counter
from typing import NamedTuple

LANES = 32  # of an NVIDIA warp
ISSUE_SLOTS_PER_BYTE = 41 / 6  # that an H200 has time for while it reads a byte: 41 for three bf16 logits
BUDGETED = "sm_90"  # the target with that many

Frames = tuple[tuple[str, int], ...]  # file and line, the innermost first


class Instruction(NamedTuple):
    op: str
    operands: str = ""
    targets: tuple[int, ...] = ()  # instructions that it may jump to
    falls: bool = True  # the next one may follow it
    frames: Frames = ()
    part: str = ""  # the function after the kernel that it is in: `$kernel$name`, or a division's slow path


# --- SASS ----------------------------------------------------------------------------------------------------------

_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"`\(([^)]*)\)")

normal = functools.cache(os.path.normpath)


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Each function's instructions, of `nvdisasm -c` or `nvdisasm -c -gi`."""
    functions, code, labels = {}, [], {}
    chain, frames, part, fresh = [], (), "", False
    for line in text.splitlines():
        if line.startswith("\t//##") and (m := _LINE.search(line)):
            chain = [*chain, (normal(m[1]), int(m[2]))] if fresh else [(normal(m[1]), int(m[2]))]
            fresh = True
        elif m := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            code, labels, frames, part, fresh = [], {}, (), "", False
            functions[m[1]] = code, labels
        elif m := re.match(r"([\w.$]+):\s*$", line):
            labels[m[1]] = len(code)
            if m[1].startswith("$"):
                part = m[1]
        elif m := _CODE.search(line):
            if fresh:
                frames, fresh = tuple(chain), False
            code.append((_jump(*m.groups()), frames, part))
    return {name: _resolved(*function) for name, function in functions.items()}


def _jump(guard: str | None, op: str, operands: str) -> tuple[str, str, list[str], bool]:
    """(opcode, operands, labels that it may jump to, whether the next instruction may follow)."""
    # a call of a label is ptxas' way out of some loops: nothing returns from there
    jump = op.startswith(("BRA", "BRX", "JMP", "JMX")) or op.startswith("CALL") and "`(.L" in operands
    condition, *_ = re.split(r"`\(|\(\*", operands) if jump else (operands,)
    to = _LABEL.findall(operands) if jump else []
    if listed := re.search(r'BRANCH_TARGETS ([^"]*)"', operands):
        to = [label.strip() for label in listed[1].split(",")]
    ends = (jump and (listed or not condition.strip()) or op.startswith(("EXIT", "RET"))) and not guard
    # lanes that have parted come together again through a way of their own
    return op, operands.strip(), [] if op.startswith(("BRA.DIV", "BRA.CONV")) else to, not ends


def _resolved(code: list, labels: dict[str, int]) -> list[Instruction]:
    """Labels as indices; those of other functions, and of the end, are left out."""
    known = {label: i for label, i in labels.items() if i < len(code)}
    return [
        Instruction(op, operands, tuple(known[t] for t in to if t in known), falls, frames, part)
        for (op, operands, to, falls), frames, part in code
    ]


# --- AMD -----------------------------------------------------------------------------------------------------------


def parse_amdgcn(text: str) -> list[Instruction]:
    """Instructions of LLVM's assembly for AMD."""
    lines, labels = [], {}
    for line in text.split("\n\t.section", 1)[0].splitlines():
        line = line.split(";")[0].rstrip()
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
        elif re.match(r"\t[a-z]", line):
            op, *operands = line.split(None, 1)
            lines.append((op, operands[0].strip() if operands else ""))
    return [
        Instruction(
            op,
            operands,
            (labels[operands],) if "branch" in op and operands in labels else (),
            op not in ("s_branch", "s_endpgm"),
        )
        for op, operands in lines
    ]


# --- the control-flow graph ----------------------------------------------------------------------------------------

Graph = list[tuple[range, list[int]]]  # basic blocks in order: their instructions, the blocks that may follow


def graph_of(code: list[Instruction]) -> Graph:
    jumps = [[t for t in x.targets if t < len(code)] for x in code]
    starts = {0} | {t for to in jumps for t in to}
    starts |= {i + 1 for i, x in enumerate(code) if x.targets or not x.falls or x.op.startswith("EXIT")}
    edges = [*sorted(s for s in starts if s < len(code)), len(code)]
    number = {start: n for n, start in enumerate(edges[:-1])}
    return [
        (
            range(start, end),
            list(
                dict.fromkeys([number[t] for t in jumps[end - 1]] + [n + 1] * (code[end - 1].falls and end < len(code)))
            ),
        )
        for n, (start, end) in enumerate(zip(edges, edges[1:]))
    ]


def natural_loops(graph: Graph) -> dict[int, tuple[set[int], set[int]]]:
    """By the head of each loop: its blocks, and those of them that every iteration executes."""
    before, reached, todo = {n: [] for n in range(len(graph))}, {0}, [0]
    while todo:
        n = todo.pop()
        for m in graph[n][1]:
            before[m].append(n)
            if m not in reached:
                reached.add(m)
                todo.append(m)
    dominators, changed = {n: {0} if n == 0 else set(reached) for n in reached}, True
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            new = {n} | set.intersection(*(dominators[m] for m in before[n]))
            changed |= new != dominators[n]
            dominators[n] = new
    found = {}  # head: blocks, those on every way round
    for n in reached:
        for head in set(graph[n][1]) & dominators[n]:
            body, todo = {head}, [n]
            while todo:
                if (m := todo.pop()) not in body:
                    body.add(m)
                    todo += before[m]
            old = found.get(head, (set(), body))
            found[head] = old[0] | body, old[1] & dominators[n]
    return {head: (body, always & body) for head, (body, always) in found.items()}


def loops(code: list[Instruction]) -> list[tuple[set[int], set[int]]]:
    """Natural loops: the instructions of each, and those of them that every iteration executes."""
    graph = graph_of(code)
    return [tuple({i for n in part for i in graph[n][0]} for part in found) for found in natural_loops(graph).values()]


# --- loads and opcodes ---------------------------------------------------------------------------------------------


def load_bits(op: str) -> int:
    """Width of a load from global memory, or from an address that may be one; 0 if it is none."""
    if op.startswith(("LDG", "LD.")):
        m = re.search(r"\.[US]?(256|128|64|16|8)\b", op)
        return int(m[1]) if m else 32
    if m := re.match(r"(?:global|buffer)_load_.*?(dwordx[234]|dword|short|byte)", op):
        return dict(dwordx4=128, dwordx3=96, dwordx2=64, dword=32, short=16, byte=8)[m[1]]
    return 0


def count(ops) -> dict[str, int]:
    """Opcodes without their modifiers, the most frequent first."""
    return dict(Counter(op.split(".")[0].split("_e32")[0].split("_e64")[0] for op in ops).most_common())


# --- PTX -----------------------------------------------------------------------------------------------------------


class PtxFunction(NamedTuple):
    """A kernel, or a function that it calls."""

    fusible: list[tuple[Frames, str]]  # multiply-adds, and products and sums that ptxas may contract to one
    divisions: set[Frames]
    threads: int | None = None  # that it is bound to


_ASKED = re.compile(r"\bfma\.\S*?(?:f|bf)(?:16|32|64)(?:x2)?\b|\bmad\.\S*?f(?:32|64)\b")
_OPEN = re.compile(r"\b(?:add|sub|mul)\.(?!r[nzmp]\b)(?:ftz\.|sat\.)*(?:b?f16|f32|f64)(?:x2)?\b")
_DIVISION = re.compile(r"\b(?:div|rcp|sqrt|rem)\.\S*f(?:32|64)\b")


def parse_ptx(text: str) -> dict[str, PtxFunction]:
    files = {n: normal(path) for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    functions, name, frames = {}, None, ()
    for line in text.splitlines():
        if line.startswith("\t.loc") and name is not None:
            _, file, number, _, *rest = line.split(None, 4)
            frames = ((files.get(file, "?"), int(number)),)
            if rest and (at := re.search(r"inlined_at (\d+) (\d+)", rest[0])):
                frames += ((files.get(at[1], "?"), int(at[2])),)
        elif m := re.match(r"(?:\.\w+\s+)*\.(?:entry|func)\s+(?:\(.*?\)\s*)?([\w$]+)", line):
            name, frames = m[1], ()
            functions.setdefault(name, PtxFunction([], set()))
        elif name is None:
            continue
        elif m := re.match(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", line):
            functions[name] = functions[name]._replace(threads=int(m[1]) * int(m[2] or 1) * int(m[3] or 1))
        elif m := _ASKED.search(line) or _OPEN.search(line):
            functions[name].fusible.append((frames, m[0]))
        elif _DIVISION.search(line):
            functions[name].divisions.add(frames[:1])
    return functions


# --- occupancy -----------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    backend: str  # "cuda" or "hip"
    arch: int | str
    lanes: int  # of a warp
    shared: int  # bytes of an SM
    warps: int = 64  # of an SM
    blocks: int = 32


# by compute capability: KiB of shared memory, warps and blocks of an SM
_SMS = {
    75: (64, 32, 16),
    80: (164, 64, 32),
    86: (100, 48, 16),
    87: (164, 48, 16),
    88: (164, 48, 16),
    89: (100, 48, 24),
    90: (228, 64, 32),
    100: (228, 64, 32),
    103: (228, 64, 32),
    110: (228, 48, 24),
    120: (100, 48, 24),
    121: (100, 48, 24),
}


def nvidia(capability: int) -> Target:
    kib, warps, blocks = _SMS.get(capability, _SMS[90])
    return Target("cuda", capability, LANES, kib << 10, warps, blocks)


AMD_MI300 = Target("hip", "gfx942", 64, 64 << 10)


def resident_blocks(target: Target, registers: int, warps: int, shared: int) -> int:
    """Blocks that an SM (a CU) holds at once; where registers are handed out in units, by the unit."""
    if target.backend == "hip":  # four SIMDs of 512 registers a lane, at most 8 waves each
        return min(4 * min(8, 512 // (math.ceil(registers / 8) * 8)) // warps, target.shared // max(shared, 1))
    fits = 4 * (16384 // (math.ceil(registers / 8) * 8 * LANES)) // warps
    return min(fits, target.warps // warps, target.shared // (shared + 1024), target.blocks)
