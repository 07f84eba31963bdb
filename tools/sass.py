"""What the CUDA kernels compile to, for GPUs that are not here: registers, spills, loads, instructions per token.

    python -m tools sass                                 # csrc/cuda, every architecture
    python -m tools sass --arch 90a --kernel sample_stream --json FILE csrc/cuda/row/sample.cu

Findings: spills, a stack, local memory; a multiply-add rounded once; in a marked loop, logits loaded in less than 128
bits, and more instructions a token than memory leaves time for.

Comments in the sources say which loop is meant, and what its iteration does. Words on a line of their own hold up to
`// sass: end`, after code for that line alone; both also for what is inlined there.

    // sass: group [NAME] N tokens   around a loop: a warp takes N bf16 tokens of a row each time round. Where there is
                                     no loop, a warp takes N in all. Add `, no budget` where arithmetic is the bound
    // sass: model                   what is done once for each model: in a loop over models, or behind a condition
    // sass: bf16                    only logits of this type come here (also f16, f32): of the loops that a template
                                     makes of one group, and of the branches inside, the bf16 ones are counted
    // sass: rare                    left out: most iterations do not come here, or not without an option
    // sass: fma                     multiply-adds may be rounded once: no token depends on them

An iteration is counted along its longest way round the loop that avoids blocks of rare lines and of other types, as
issued by a warp (32 lanes), with the models' part scaled to three models. A block is of the lines that most of its
instructions come from. The compiler's line table is the source of that: code that it moves stays with its line, and is
counted where it is executed.

Exit codes: 0 nothing found, 1 findings (or a file does not compile), 2 bad input, no nvcc or no nvdisasm.
"""

from __future__ import annotations

import ctypes
import functools
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused

from . import ROOT, finish
from .machine_code import (
    BUDGETED,
    ISSUE_SLOTS_PER_BYTE,
    LANES,
    Frames,
    Instruction,
    PtxFunction,
    count,
    graph_of,
    load_bits,
    natural_loops,
    nvidia,
    parse_ptx,
    parse_sass,
    resident_blocks,
)

ARCHS = "80,89,90a,100,120"
FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-lineinfo"]
CACHE = ROOT / "build" / "sass"
MODELS, ITEM = 3, 2  # of the budget; bytes of a bf16
TYPES = {"bf16", "f16", "f32"}


class Failed(Exception):
    """A file does not compile."""


# --- tools ---------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """nvcc, or a disassembler: in $CUDA_HOME, on PATH, beside nvcc, or triton's."""
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    for folder in ([f"{home}/bin"] if home else []) + [None, *beside, "/usr/local/cuda/bin"]:
        if found := shutil.which(name, path=folder):
            return found
    try:
        from triton import knobs

        return getattr(knobs.nvidia, name).path
    except (ImportError, AttributeError, RuntimeError):
        raise ValueError(
            f"no {name}: set CUDA_HOME, or put it on PATH" + (", or install triton" if name != "nvcc" else "")
        ) from None


def output(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def architectures(text: str) -> list[str]:
    """The names as nvcc takes them after ``sm_``."""
    known = [line[3:] for line in output(tool("nvcc"), "--list-gpu-code").split() if line.startswith("sm_")]
    out = []
    for word in text.split(","):
        name = word.strip().removeprefix("sm_")
        base = name.rstrip("af")
        if name not in known and (base not in known or int(base) < 90 or len(name) > len(base) + 1):
            raise ValueError(f"--arch {word}: this nvcc knows {', '.join(known)} (from 90 on also with an a)")
        out.append(name)
    return list(dict.fromkeys(out))


# --- compilation ---------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One file for one architecture."""

    file: Path
    arch: str
    log: str  # what ptxas says
    ptx: str
    sass: str  # of nvdisasm, with lines


def digest(*words: str | bytes) -> str:
    state = hashlib.sha256()
    for word in words:
        state.update(word.encode() if isinstance(word, str) else word)
    return state.hexdigest()[:16]


def same(sources: Path) -> bool:
    """What was compiled is as it was."""
    try:
        return all(digest(Path(path).read_bytes()) == was for path, was in json.loads(sources.read_text()).items())
    except (OSError, ValueError):
        return False


def build(file: Path, arch: str, flags: list[str], cache: Path) -> Unit:
    """Compiled and disassembled, once for each state of the file and of what it includes."""
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    kept = cache / f"{file.stem}-{arch}-{digest(str(file), *flags, versions(nvcc), versions(nvdisasm))}"
    parts = ("log", "ptx", "sass")
    if not same(kept / "sources"):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".") as name:
            folder, new = Path(name), Path(name) / "new"
            new.mkdir()
            began = time.time()
            done = subprocess.run(
                [
                    nvcc,
                    *flags,
                    "-Xptxas",
                    "-v",
                    f"-arch=sm_{arch}",
                    "-cubin",
                    "--keep",
                    "--keep-dir",
                    name,
                    "-MMD",
                    "-MF",
                    f"{name}/includes",
                    str(file),
                    "-o",
                    f"{name}/cubin",
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = (done.stderr + done.stdout).splitlines()
                raise Failed(next((x for x in lines if "error" in x), " ".join(lines[-1:])).strip())
            shown = subprocess.run([nvdisasm, "-c", "-gi", f"{name}/cubin"], capture_output=True, text=True)
            if shown.returncode:
                raise ValueError(f"{nvdisasm} on sm_{arch}: {' '.join(shown.stderr.split())[-240:]}")
            for part, text in zip(parts, (done.stderr, next(folder.glob("*.ptx")).read_text(), shown.stdout)):
                (new / part).write_bytes(gzip.compress(text.encode(), 1))
            _, _, words = (folder / "includes").read_text().partition(" : ")
            paths = {str(Path(w).resolve()) for w in shlex.split(words.replace("\\\n", " "))} | {str(file)}
            (new / "sources").write_text(
                json.dumps(
                    {  # one that was written meanwhile is compiled again next time
                        p: digest(Path(p).read_bytes()) if os.path.getmtime(p) < began else None for p in sorted(paths)
                    }
                )
            )
            shutil.rmtree(kept, ignore_errors=True)
            new.rename(kept)
    return Unit(file, arch, *(gzip.decompress((kept / part).read_bytes()).decode() for part in parts))


@functools.cache
def versions(path: str) -> str:
    return output(path, "--version")


# --- marks ---------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    name: str
    tokens: int
    budgeted: bool
    where: str


class Mark(NamedTuple):
    group: Group | None = None
    words: frozenset[str] = frozenset()


WORDS = TYPES | {"model", "rare", "fma"}
NOTHING = Mark()


def parse_marks(text: str, name: str) -> dict[int, Mark]:
    """By line number."""
    stack, marks = [(0, NOTHING)], {}
    for number, line in enumerate(text.splitlines(), 1):
        code, comment, said = line.partition("// sass:")
        where, now = f"{name}:{number}", stack[-1][1]
        if comment:
            alone, said = not code.strip(), said.strip()
            group = re.fullmatch(r"group(?: ([a-z]\w*))? (\d+) tokens(, no budget)?", said)
            if said == "end" and alone:
                if len(stack) == 1:
                    raise ValueError(f"{where}: `// sass: end` ends nothing")
                stack.pop()
                continue
            if group and alone:
                if now.group or int(group[2]) % LANES or not int(group[2]):
                    raise ValueError(f"{where}: a group is not inside another, and has a multiple of {LANES} tokens")
                now = now._replace(group=Group(group[1] or Path(name).stem, int(group[2]), not group[3], where))
            elif said and set(said.split()) <= WORDS:
                now = now._replace(words=now.words | set(said.split()))
            else:
                raise ValueError(
                    f"{where}: `// sass: {said}`: allowed are {', '.join(sorted(WORDS))}, and on a line "
                    "of their own end and group [NAME] N tokens[, no budget]"
                )
            if alone:
                stack.append((number, now))
                continue
        if now != NOTHING:
            marks[number] = now
    if len(stack) > 1:
        raise ValueError(f"{name}:{stack[-1][0]}: no `// sass: end` follows")
    return marks


@functools.lru_cache(maxsize=4096)
def marks_of(path: str, changed: float) -> dict[int, Mark]:
    return parse_marks(Path(path).read_text(errors="replace"), short(path))


def foreign(m: Mark) -> bool:
    """Of another type of logits."""
    return bool(m.words & TYPES) and "bf16" not in m.words


def off(m: Mark) -> bool:
    """Of no iteration that is counted."""
    return "rare" in m.words or foreign(m)


def short(path: str) -> str:
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else Path(path).name


def mark(frames: Frames) -> Mark:
    """Of an instruction from these lines, the innermost first."""
    group, words = None, frozenset()
    for path, line in frames:
        if os.path.exists(path):
            m = marks_of(path, os.path.getmtime(path)).get(line, NOTHING)
            group, words = m.group or group, words | m.words
    return Mark(group, words)


# --- loops and the longest ways through them -----------------------------------------------------------------------


class Level(NamedTuple):
    """A loop, or all of a kernel: its blocks, but each loop inside is one node, its head."""

    first: int
    nodes: set[int]
    after: dict[int, set[int]]
    last: set[int]  # nodes from which it goes round, or ends


class Way(NamedTuple):
    """The longest one through a level."""

    own: list[int]  # blocks
    loops: dict[int, list[int]]  # on it, by head: the blocks of their own longest ways


class Function:
    """Blocks, loops and lines of one kernel."""

    def __init__(self, code: list[Instruction]):
        self.code = [x for x in code if not x.part]
        self.parts = [x for x in code if x.part]
        self.graph = graph_of(self.code)
        self.loops = {head: body for head, (body, _) in natural_loops(self.graph).items()}
        known = {frames: mark(frames) for frames in {x.frames for x in self.code}}
        self.marks = [known[x.frames] for x in self.code]
        self.levels, self.ways = {}, {}

    def issued(self, blocks) -> list[int]:
        return [i for n in blocks for i in self.graph[n][0] if self.code[i].op != "NOP"]

    def most(self, blocks, test) -> bool:
        marks = [self.marks[i] for i in self.issued(blocks)]
        return 2 * sum(map(test, marks)) > len(marks)

    def inside(self, head: int | None) -> dict[int, set[int]]:
        """The outermost loops inside a loop, or inside all."""
        below = {h: b for h, b in self.loops.items() if h != head and (head is None or b < self.loops[head])}
        return {h: b for h, b in below.items() if not any(b < other for other in below.values())}

    def level(self, head: int | None) -> Level:
        if head not in self.levels:
            body = set(range(len(self.graph))) if head is None else self.loops[head]
            loops = self.inside(head)
            node = {n: n for n in body} | {n: h for h, blocks in loops.items() for n in blocks}
            after, last = {}, set()
            for n in body:
                at, to = node[n], self.graph[n][1]
                after.setdefault(at, set()).update(node[m] for m in to if m in body and m != head and node[m] != at)
                if head in to if head is not None else not to or self.code[self.graph[n][0][-1]].op.startswith("EXIT"):
                    last.add(at)
            self.levels[head] = Level(node[head or 0], set(after), after, last)
        return self.levels[head]

    def avoidable(self, level: Level, node: int, banned: set[int]) -> bool:
        """Some way leaves the node out."""
        seen, todo = {level.first}, [level.first] * (node != level.first)
        while todo:
            n = todo.pop()
            if n in level.last:
                return True
            new = level.after[n] - seen - banned - {node}
            seen |= new
            todo += new
        return False

    def banned(self, head: int | None) -> set[int]:
        """Nodes of a level that are rare, or of other types, and that can be left out."""
        level = self.level(head)
        return {n for n in level.nodes if self.most(self.inner(n, head), off) and self.avoidable(level, n, set())}

    def inner(self, node: int, head: int | None) -> list[int]:
        """A node's blocks: of a loop those on its longest way."""
        return self.whole(node) if node in self.loops and node != head else [node]

    def way(self, head: int | None) -> Way | None:
        """The longest one round a loop, or from the kernel's first block to an end."""
        if head in self.ways:
            return self.ways[head]
        level, banned = self.level(head), self.banned(head)
        loops = {n for n in level.nodes if n in self.loops and n != head}
        best, started = {}, set()
        todo = [level.first]
        while todo:  # what comes after a node is known before the node; an edge back to one that waits is left out
            n = todo[-1]
            started.add(n)
            if ready := level.after[n] - banned - started:
                todo.append(min(ready))
                continue
            todo.pop()
            found = [best[m] for m in sorted(level.after[n]) if m in best] + [(0, [])] * (n in level.last)
            if found:
                size, rest = max(found, key=lambda x: x[0])
                best[n] = size + len(self.issued(self.inner(n, head))), [n, *rest]
        _, nodes = best.get(level.first, (0, ()))
        self.ways[head] = (
            Way([n for n in nodes if n not in loops], {n: self.whole(n) for n in nodes if n in loops})
            if nodes
            else None
        )
        return self.ways[head]

    def whole(self, head: int) -> list[int]:
        way = self.way(head)
        return [head] if way is None else [*way.own, *(n for blocks in way.loops.values() for n in blocks)]

    # --- a marked group ---

    def heads(self, group: Group) -> list[int | None]:
        """The loops meant: outermost of those whose own instructions are mostly the group's; None: there is none."""
        found = {}
        for head, body in self.loops.items():
            below = set().union(*(b for h, b in self.inside(head).items()), set())
            marks = [self.marks[i].group == group for n in body - below for i in self.graph[n][0]]
            if 2 * sum(marks) > len(marks):
                found[head] = body
        heads = [h for h, b in found.items() if not any(b < other for other in found.values())]
        types = {h: TYPES & {w for n in found[h] for i in self.graph[n][0] for w in self.marks[i].words} for h in heads}
        wanted = min((len(t) for t in types.values() if "bf16" in t), default=None)
        if wanted is not None:
            heads = [h for h in heads if "bf16" in types[h] and len(types[h]) == wanted]
        loading = [h for h in heads if any(load_bits(self.code[i].op) for n in found[h] for i in self.graph[n][0])]
        return loading or heads or [None]

    def measure(self, group: Group, head: int | None, budgeted: bool) -> dict:
        """One time round a loop (or once through the group's lines, where there is no loop), for three models."""
        level, banned, way = self.level(head), self.banned(head), self.way(head)
        if way is None:
            return dict(
                name=group.name,
                tokens=group.tokens,
                loop=head is not None,
                models=0,
                instructions=0,
                per_token=0,
                budget=None,
                loads={},
                opcodes={},
                lines={},
                findings=["every way round its loop has rare lines or other types"],
            )

        def ours(part):
            return [i for i in self.issued(part) if head is not None or self.marks[i].group == group]

        def bits(part):
            return [(b, i) for i in part if (b := load_bits(self.code[i].op)) and not foreign(self.marks[i])]

        own = ours(way.own)
        inner = [part for blocks in way.loops.values() if (part := ours(blocks))]
        models = [part for part in inner if any(self.marks[i].words & (TYPES | {"model"}) for i in part)]
        others = [part for part in inner if part not in models]
        optional = ours(
            n
            for n in way.own
            if self.most([n], lambda m: bool(m.words & {"model", "bf16"})) and self.avoidable(level, n, banned)
        )
        each = group.tokens * ITEM // LANES * 8  # bits of a model that a lane loads

        def copies(part):  # models that it loads
            every = bits(part)
            wide = sum(b for b, _ in every if b >= 128)
            return (wide or sum(b for b, _ in every)) / each

        first, looped = copies(own), sum(map(copies, models))
        used = MODELS if looped else min(MODELS, first)
        scale = used / first if first > used else 1
        rounds = (used - min(used, first)) / looped if looped else 1
        total = len(own) - (1 - scale) * len(optional) + rounds * sum(map(len, models)) + sum(map(len, others))
        path = [*own, *(i for part in models + others for i in part)]
        loads = Counter(b for b, _ in bits(path))
        per_token = total * LANES / group.tokens
        bound_by_memory = group.budgeted and budgeted and round(used, 2) >= MODELS
        budget = ISSUE_SLOTS_PER_BYTE * ITEM * used if bound_by_memory else None
        findings = []
        loaded = first + looped
        wide, need = sum(b * n for b, n in loads.items() if b >= 128), each * max(1, round(loaded))
        if not loads and group.budgeted:
            findings += ["loads nothing"]
        elif loads and wide < need and group.budgeted:
            findings += [f"loads {wide // 8 * LANES} of {need // 8 * LANES} bytes in 128 bits"]
        elif wide and abs(loaded - round(loaded)) > 0.01 and group.budgeted:
            findings += [f"loads {loaded:.2f} models in 128 bits: is a group {group.tokens} tokens?"]
        narrow = Counter(
            f"{b}-bit load at {self.at(i)}"
            for b, i in bits(path)
            if b < 128 and (self.marks[i].words & (TYPES | {"model"}))
        )
        findings += [f"{n} {what}" for what, n in narrow.items() if wide >= need]
        findings += ["holds a loop that is no model's: counted once"] * bool(others)
        findings += [
            f"calls {self.code[i].operands}"
            for i in path
            if self.code[i].op.startswith("CALL")
            and not self.code[i].targets
            and "$__internal" not in self.code[i].operands
        ]
        if budget and per_token > budget:
            findings += [f"{per_token:.1f} instructions a token, the budget is {budget:.0f}"]
        return dict(
            name=group.name,
            tokens=group.tokens,
            loop=head is not None,
            models=round(used, 2),
            instructions=round(total, 2),
            per_token=per_token,
            budget=budget,
            loads={str(b): n for b, n in sorted(loads.items(), reverse=True)},
            opcodes=count(self.code[i].op for i in path),
            findings=findings,
            lines=dict(Counter(self.at(i) for i in path).most_common()),
        )

    def at(self, i: int) -> str:
        """The innermost line of ours, or of anybody."""
        return place(self.code[i].frames)


def place(frames) -> str:
    ours = [f for f in frames if os.path.exists(f[0]) and "/include/" not in f[0]] or [*frames, ("?", 0)]
    return f"{short(ours[0][0])}:{ours[0][1]}"


# --- multiply-adds -------------------------------------------------------------------------------------------------

FUSED = r"(?:FFMA|DFMA|HFMA)"  # FFMA2, HFMA2.BF16 and their like too


def contractions(f: Function, symbol: str, ptx: dict[str, PtxFunction]) -> list[str]:
    """Multiply-adds that no division is made of, and that nobody marked, by line."""
    parts = [x for x in f.parts if not x.part.startswith("$__internal")]
    names = {symbol, *(x.part.rpartition("$")[2] for x in parts)} & set(ptx)
    divisions, found = set().union(*(ptx[name].divisions for name in names)), {}
    for lines, op in (found_at for name in sorted(names) for found_at in ptx[name].fusible):
        if "fma" not in mark(lines).words:
            found.setdefault(place(lines), Counter())[op] += 1
    for x, m in [*zip(f.code, f.marks), *((x, mark(x.frames)) for x in parts)]:
        constant = x.op.startswith("HFMA2") and re.match(r"\w+, -RZ, RZ, ", x.operands)
        if (
            re.match(FUSED, x.op)
            and not constant
            and "fma" not in m.words
            and (x.frames[:1] not in divisions or x.op.startswith("FFMA2"))
        ):
            found.setdefault(place(x.frames), Counter())[x.op.split(".")[0]] += 1
    return [f"contracts at {where}: " + ", ".join(f"{n} {op}" for op, n in ops.items()) for where, ops in found.items()]


# --- rows ----------------------------------------------------------------------------------------------------------


@functools.cache
def demangle(name: str) -> str:
    """Of C++: the name with its template's arguments, without namespaces and parameters."""
    try:
        function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
        function.restype, status = ctypes.c_void_p, ctypes.c_int()
        at = function(name.encode(), None, None, ctypes.byref(status))
        text = ctypes.string_at(at).decode() if at else name
    except OSError:
        return name
    text = re.sub(r"\(anonymous namespace\)::", "", text)
    text = re.sub(r"^(?:static )?(?:void )?", "", text)
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            text = text[:i]
            break
    return re.sub(r"\b\w+::", "", text)


USE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def resources(log: str) -> dict[str, dict]:
    """Of each kernel, from ptxas -v."""
    out, entry, about = {}, None, None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '([^']+)'", line):
            entry = out.setdefault(m[1], dict(registers=0, stack=0, spill_stores=0, spill_loads=0, shared=0))
        elif m := re.search(r"Function properties for (\S+)", line):
            about = out.get(m[1])
        elif (m := USE.search(line)) and about is not None:
            about.update(stack=int(m[1]), spill_stores=int(m[2]), spill_loads=int(m[3]))
        elif (m := re.search(r"Used (\d+) registers", line)) and entry is not None:
            smem = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            entry.update(registers=int(m[1]), shared=int(smem[1]) if smem else 0)
    return out


def resident(arch: str, registers: int, threads: int, shared: int) -> int:
    """Threads that an SM holds at once, in blocks of so many. Dynamic shared memory is not counted."""
    warps = -(-threads // LANES)
    return threads * resident_blocks(nvidia(int(arch.rstrip("af"))), registers, warps, shared)


def examine(unit: Unit, kernel: str | None = None, seen: set[Group] | None = None) -> list[dict]:
    """A row for each kernel."""
    rows, ptx, use, functions = [], parse_ptx(unit.ptx), resources(unit.log), parse_sass(unit.sass)
    budgeted = f"sm_{unit.arch.rstrip('af')}" == BUDGETED
    for symbol, about in use.items():
        name = demangle(symbol)
        if kernel not in (None, name, name.split("<")[0]):
            continue
        f = Function(functions[symbol])
        threads = ptx[symbol].threads
        row = dict(
            kernel=name,
            arch=unit.arch,
            file=short(str(unit.file)),
            symbol=symbol,
            **about,
            threads=threads,
            resident=threads and resident(unit.arch, about["registers"], threads, about["shared"]),
            instructions=len(f.issued(range(len(f.graph)))),
        )
        findings = []
        if about["spill_stores"] or about["spill_loads"]:
            findings += [f"spills: {about['spill_stores']} bytes stored, {about['spill_loads']} loaded"]
        local = Counter(
            f"{x.op.split('.')[0]} at {place(x.frames)}" for x in f.code + f.parts if re.match("LDL|STL", x.op)
        )
        if about["stack"] or local:
            some = ", ".join(f"{n} {what}" for what, n in local.most_common(3)) or "not used"
            findings += [f"stack of {about['stack']} bytes: {some}" + ", ..." * (len(local) > 3)]
        findings += contractions(f, symbol, ptx)
        groups = []
        for group in dict.fromkeys(m.group for m in f.marks if m.group):
            if seen is not None:
                seen.add(group)
            measured = [f.measure(group, head, budgeted) for head in f.heads(group)]
            worst = max(measured, key=lambda g: (len(g["findings"]), g["per_token"]))
            groups.append(worst | dict(loops=len(measured)))
            findings += [f"{group.name}: {text}" for text in dict.fromkeys(t for g in measured for t in g["findings"])]
        rows.append(row | dict(groups=groups, findings=findings))
    return rows


def marked(files: list[Path]) -> dict[str, Group]:
    """Every group in these files and in the headers beside them; of csrc/cuda in all of its headers."""
    ours = ROOT / "csrc" / "cuda"
    folders = {f.parent for f in files}
    if any(f.resolve().is_relative_to(ours) for f in files):
        folders |= {ours, *(p for p in ours.iterdir() if p.is_dir())}
    paths = {*files, *(p for folder in folders for p in [*folder.glob("*.h"), *folder.glob("*.cuh")])}
    groups = [m.group for p in sorted(paths) for m in marks_of(str(p), p.stat().st_mtime).values() if m.group]
    return {g.where: g for g in groups}


def compile_and_examine(
    files: list[Path],
    archs: list[str],
    kernel: str | None = None,
    flags: list[str] = FLAGS,
    cache: Path | None = None,
    tell=None,
) -> list[dict]:
    """Rows of every file for every architecture, compiled as many at once as there are cores."""
    files = [f.resolve() for f in files]
    groups = marked(files)  # marks that are wrong are told before anything is compiled
    jobs = [(f, a) for a in archs for f in files]

    def one(job):
        file, arch = job
        row = dict(kernel=None, arch=arch, file=short(str(file)))
        try:
            out = build(file, arch, flags, cache or CACHE)
        except Failed as error:
            out = row | dict(findings=[f"does not compile: {error}"])
        if tell:
            tell(f"sm_{arch} {row['file']}")
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        units = list(pool.map(one, jobs))
    seen, rows = set(), []
    for unit in units:
        rows += [unit] if isinstance(unit, dict) else examine(unit, kernel, seen)
    if kernel is None and all(row["kernel"] for row in rows):
        everything = all(set(f.parent.glob("*.cu")) <= set(files) for f in files)
        rows += [
            dict(kernel=None, arch="any", file=where, findings=[f"group {g.name}: no kernel has code of it"])
            for where, g in groups.items()
            if everything and g not in seen
        ]
    return rows


# --- the tables ----------------------------------------------------------------------------------------------------

HEAD = [
    "kernel",
    "sm",
    "registers",
    "stack",
    "spilled",
    "shared",
    "threads",
    "threads/SM",
    "loop",
    "loads (bits)",
    "instructions/token",
    "budget",
]


def lines_of(row: dict) -> list[list[str]]:
    def cell(x):
        return "-" if x is None else str(x)

    first = [
        row["kernel"],
        row["arch"],
        cell(row["registers"]),
        cell(row["stack"]),
        f"{row['spill_stores']}/{row['spill_loads']}",
        cell(row["shared"]),
        cell(row["threads"]),
        cell(row["resident"]),
    ]
    out = []
    for g in row["groups"] or [None]:
        loads = g and (", ".join(f"{n} x {bits}" for bits, n in g["loads"].items()) or "none")
        tail = (
            ["-"] * 4
            if g is None
            else [
                g["name"] + " (no loop)" * (not g["loop"]),
                loads,
                f"{g['per_token']:.1f}",
                "-" if g["budget"] is None else f"{g['budget']:.0f}",
            ]
        )
        out.append([*first, *tail])
        first = [""] * len(first)
    return out


def render(rows: list[dict], command: str) -> str:
    good = [r for r in rows if r["kernel"]]
    order = {name: i for i, name in enumerate(dict.fromkeys(r["kernel"] for r in good))}
    good.sort(key=lambda r: order[r["kernel"]])
    release = re.search(r"release ([\d.]+)", versions(tool("nvcc")))
    bad = [
        f"- {'sm_' * (r['arch'] != 'any') + r['arch']}, {r['kernel'] or r['file']}: {f}"
        for r in rows
        for f in r["findings"]
    ]
    lines = [
        "# What the CUDA kernels compile to",
        "",
        f"`{command}`, CUDA {release[1] if release else '?'}, no GPU.",
        "",
        "Bytes of stack, spills (stored/loaded) and static shared memory; threads that an SM holds, by registers "
        "and launch bounds; of each marked loop, the loads that are counted, and the instructions a lane issues "
        f"for a token of {MODELS} bf16 models. The budget is an H200's.",
        "",
    ]
    lines += report.table(HEAD, [line for r in good for line in lines_of(r)], left=2) if good else []
    return "\n".join([*lines, f"{len(bad) or 'No'} findings{':' if bad else '.'}", "", *bad]).rstrip() + "\n"


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools sass", description=__doc__.split("\n\n")[0])
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: those of csrc/cuda")
    p.add_argument("--arch", default=ARCHS, metavar="NAME,...", help=f"default: {ARCHS}")
    p.add_argument("--kernel", metavar="NAME", help="only this one")
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="save the rows, with opcodes and source lines of each marked loop"
    )
    p.add_argument("--markdown", type=Path, metavar="FILE", help="save the tables")
    args = p.parse_args(argv)
    files = args.files or sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    if not files:
        raise Refused("no csrc/cuda/**/*.cu here; name a file")
    if missing := [str(f) for f in files if not f.is_file()]:
        raise Refused(f"{missing[0]}: no such file")
    tool("nvdisasm")
    rows = compile_and_examine(
        files, architectures(args.arch), args.kernel, tell=lambda text: print(text, file=sys.stderr)
    )
    if not rows:
        raise Refused(f"no kernel {args.kernel or ''} in {', '.join(map(str, files))}")
    return finish(rows, render(rows, shlex.join(["python", "-m", "tools", "sass", *argv])), args)
