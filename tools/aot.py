"""What the Triton backend's kernels compile to, for GPUs that are not here: registers, loads, instructions per token.

    python -m tools aot                                  # every case, every target
    python -m tools aot --target sm_90 --kernel sample_kernel --case "plain B=64" --json FILE

The backend's own operations are called on CPU tensors, with every launch replaced by its compilation, so that what is
read is what they would launch. A new kernel is a row in `KERNELS`, a new call a `Case` in `cases`.

Exit codes: 0 nothing found, 1 findings (or a call did not compile), 2 bad input or no triton.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from eft_kernels.cli.options import Parser
from eft_kernels.cli.term import Refused
from eft_kernels.parameters import METHODS

from . import ROOT, finish
from .machine_code import (
    AMD_MI300,
    BUDGETED,
    ISSUE_SLOTS_PER_BYTE,
    Instruction,
    Target,
    count,
    load_bits,
    loops,
    nvidia,
    parse_amdgcn,
    parse_ptx,
    parse_sass,
    resident_blocks,
)

CHUNK = 256
DEFAULT = "B=64 V=128256 J=3 bfloat16"
SHOWN = [
    f"{words} {DEFAULT}"
    for words in (  # the cases a person looks at first
        "sample plain",
        "sample with_logprobs",
        "sample top_p",
        "sample all_with_logprobs",
        "sample masked",
        "sample rows",
        "sample upscale_filter",
        "sample diagnostics",
        "sample top_logprobs",
        "sample runners_up",
        "verify coupled plain",
        "verify tree plain",
        "verify token plain",
        "verify block plain",
        "logprobs plain",
        "token_logprobs plain",
    )
]
BACKEND = "eft_kernels._backends.triton"


TARGETS = {"sm_80": nvidia(80), "sm_90": nvidia(90), "sm_100": nvidia(100), "gfx942": AMD_MI300}


def all_models(a: dict) -> int:
    return sum(z.element_size() for z in a["m"].z)


def both_sides(a: dict) -> int:
    sides = [a["target"], *[a["draft"]] * (a["draft"].state.best is not None)]
    return sum(z.element_size() for side in sides for z in side.m.z)


def issue_slots(a: dict) -> float | None:
    """Where rows are many enough for a loop, and logits three bf16 ones or more: fewer leave time for loading only."""
    return ISSUE_SLOTS_PER_BYTE * all_models(a) if all_models(a) >= 6 and a.get("TILES", 2) > 1 else None


class Kernel(NamedTuple):
    """What a kernel's code does not say: each a function of the launch's arguments."""

    bytes: Callable[[dict], int] = all_models  # that it loads for a token, at least
    budget: Callable[[dict], float | None] = issue_slots  # for a token where it should be bound by memory
    tokens: Callable[[dict], int] = lambda a: CHUNK * a["TC"]  # of one time round the loop, or of a program without one


def and_a_write(a: dict) -> float | None:
    """It also writes a float32 for each token."""
    return issue_slots(a) and issue_slots(a) + 4 * ISSUE_SLOTS_PER_BYTE


def no_budget(a: dict) -> None:
    """Bound by arithmetic."""


KERNELS = {  # None: reads no row from end to end
    "sample_kernel": Kernel(),
    "stats_kernel": Kernel(),
    "row_kernel": None,
    "logprobs_kernel": Kernel(budget=and_a_write),
    "ids_kernel": None,
    "top_kernel": None,
    "diagnostics_kernel": Kernel(budget=no_budget),
    "own_stats_kernel": Kernel(),
    "own_mass_kernel": Kernel(budget=no_budget),
    "own_row_kernel": None,
    "mass_kernel": Kernel(budget=no_budget),
    "accept_kernel": None,
    "draft_mass_kernel": None,
    "residual_kernel": Kernel(both_sides, no_budget),
    "block_kernel": None,
    "last_kernel": None,
    "depth_kernel": None,
    "tree_kernel": None,
}


# --- the calls -----------------------------------------------------------------------------------------------------

FILTERS = dict(top_k=dict(top_k=50), top_p=dict(top_p=0.9), min_p=dict(min_p=0.05))
FILTERS["all"] = dict(temperature=0.8) | FILTERS["top_k"] | FILTERS["top_p"] | FILTERS["min_p"]
VARIANTS = {
    "plain": {},
    "temperature": dict(temperature=0.8),
    **FILTERS,
    "upscale_filter": dict(upscale_top_p=0.9),
    "masked": dict(masked=True),
    "with_logprobs": dict(logprobs=True),
    "all_with_logprobs": FILTERS["all"] | dict(logprobs=True),
    "masked_all": FILTERS["all"] | dict(masked=True),
    "rows": dict(rows=True),
    "rows_with_logprobs": dict(rows=True, logprobs=True),
    "indexed": dict(indexed=True, upscale_top_p=0.9, top_p=0.9),
    "draft": dict(stream="draft"),
    "diagnostics": dict(diagnostics=True),
    "top_logprobs": dict(top_logprobs=5),
    "runners_up": dict(runners_up=3),
    "filtered_runners_up": FILTERS["all"] | dict(runners_up=3),
    "drafts_declared": dict(temperature=0.8, drawn_by=dict(temperature=1.0, top_p=0.9)),
}


class Case(NamedTuple):
    """A call. ``dtype`` "mixed" takes turns; ``stride`` is the length of a row where it is not V."""

    op: str = "sample"
    variant: str = "plain"
    batch: int = 64
    vocab: int = 128256
    models: int = 3
    dtype: str = "bfloat16"
    stride: int | None = None
    method: str = "coupled"
    draft: int = 1

    def label(self) -> str:
        words = [
            self.op,
            self.method * (self.op == "verify"),
            "no-draft-logits" * (self.draft < 0),
            self.variant,
            f"B={self.batch}",
            f"V={self.vocab}",
            f"J={self.models}",
            self.dtype,
        ]
        return " ".join([w for w in words if w] + [f"stride={self.stride}"] * (self.stride is not None))


def cases() -> list[Case]:
    out = [Case("sample", v, b) for b in (64, 1, 8, 512) for v in ("plain", "with_logprobs", "top_p")]
    out += [Case("sample", v) for v in VARIANTS if "drawn_by" not in VARIANTS[v]]
    out += [Case("sample", v, dtype=d) for d in ("float16", "float32", "mixed") for v in ("plain", "top_p")]
    out += [Case("sample", v, models=j) for j in (1, 2, 4, 8) for v in ("plain", "top_p")]
    out += [Case("sample", v, 1, n) for n in (1, 32000, 256000, 1 << 22) for v in ("plain", "top_p")]
    out += [Case("sample", v, b, 50257, stride=s) for s in (None, 50304) for b in (64, 1) for v in ("plain", "top_p")]
    out += [Case("verify", v, 64, method=m) for m in METHODS for v in ("plain", "all")]
    out += [Case("verify", "with_logprobs", method=m) for m in METHODS]
    out += [
        Case("verify", "masked", method="token"),
        Case("verify", "upscale_filter", method="token"),
        Case("verify", "all", 2, 1, method="block"),
        Case("verify", "plain", 1, method="block"),
    ]
    # integers of 1 are compile-time values
    out += [Case("verify", v, vocab=17, models=1, method=m, draft=0) for m in METHODS for v in ("rows", "masked")]
    out += [Case("verify", v, method=m) for m in METHODS for v in ("rows", "indexed")]
    out += [Case("verify", "drafts_declared", method=m) for m in METHODS[1:]]
    out += [Case("verify", method=m, draft=-1) for m in METHODS]
    out += [Case("sample", "runners_up", b, n) for b, n in ((1, 128256), (64, 17))]
    out += [Case("verify", v, method="tree") for v in ("plain", "with_logprobs", "rows")]
    out += [Case("verify", "rows", vocab=17, models=1, method="tree", draft=0)]
    out += [Case(op, v, b) for op in ("logprobs", "token_logprobs") for v in ("plain", "all") for b in (64, 1)]
    return list(dict.fromkeys(out))


def call(module, c: Case) -> None:
    """What `eft_kernels.ops` would ask of the backend."""
    import torch

    from eft_kernels.arguments import check_logits, check_params, dtype_of
    from eft_kernels.parameters import NAMES, PER_ROW, DraftParams

    names = ("bfloat16", "float32", "float16") if c.dtype == "mixed" else (c.dtype,)
    slots = (5,) if c.op == "verify" else ()
    z = [
        torch.empty(c.batch, *slots, c.stride or c.vocab, dtype=getattr(torch, names[j % len(names)]))[..., : c.vocab]
        for j in range(c.models)
    ]
    settings = dict(VARIANTS[c.variant])
    logprobs, top = settings.pop("logprobs", False), settings.pop("top_logprobs", 0)
    runners_up = settings.pop("runners_up", 0)
    diagnostics, stream = settings.pop("diagnostics", False), settings.pop("stream", "sample")
    drawn_by = DraftParams(**settings.pop("drawn_by", {}))
    weights = [(-1.0) ** j for j in range(c.models)]
    if settings.pop("masked", False):
        settings["token_mask"] = torch.empty(c.batch, *slots, (c.vocab + 31) // 32, dtype=torch.int32)
    if settings.pop("rows", False):
        settings = {name: torch.full((c.batch,), p.tried[1], dtype=dtype_of(p)) for name, p in PER_ROW.items()}
        weights = torch.ones(c.batch, c.models)
    if settings.pop("indexed", False):
        settings["row_index"] = torch.zeros(c.batch, *slots, dtype=torch.int64)
        z = [x.flatten(0, -2) for x in z]
    z, vocab = check_logits(z, 2 if "row_index" in settings else 2 + len(slots), None)
    sampling = {name: settings.pop(name) for name in NAMES if name in settings}
    p = check_params(z, weights, c.batch, vocab, sampling, tuned=min(1, c.models - 1), **settings)
    if c.op == "sample":
        module.sample(z, p, stream, 0, logprobs, top, diagnostics, runners_up)
    elif c.op == "verify":
        drafts = torch.zeros(c.batch, slots[0] - 1, dtype=torch.int64)
        lengths = torch.full((c.batch,), slots[0] - 1)
        parents = drafts if c.method == "tree" else None
        method = "coupled" if c.method == "tree" else c.method
        module.verify(z, p, drafts, lengths, parents, method, c.draft, drawn_by, logprobs)
    elif c.op == "logprobs":
        module.logprobs(z, p, False)
    else:
        module.token_logprobs(z, p, torch.zeros(c.batch, 1, dtype=torch.int64))


# --- compilation ---------------------------------------------------------------------------------------------------


class Driver:
    """What Triton asks of a driver to compile."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*target[:3])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launches(target: str) -> list:
    """Makes of every launch from here on a compilation, and lists (name, arguments, constants, compiled kernel)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(TARGETS[target]))
    run, seen = JITFunction.run, []

    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        a = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names}).arguments
        seen.append((self.__name__, a, {p.name: a[p.name] for p in self.params if p.is_constexpr}, kernel))
        return kernel

    JITFunction.run = compiled
    return seen


def compile_all(target: str, calls: dict[str, Callable[[], None]], only: str | None = None, tell=None) -> list[dict]:
    """A row for each specialisation that the calls launch, and one for each call that fails."""
    seen, rows = launches(target), {}
    for i, (label, function) in enumerate(calls.items(), 1):
        if tell:
            tell(f"{target} [{i}/{len(calls)}] {label}")
        seen.clear()
        try:
            function()
        except Exception as error:  # whatever the compiler raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: "
            rows[label] = dict(
                target=target, kernel=None, cases=[label], findings=[text + " ".join(str(error).split())[-240:]]
            )
        for name, arguments, constants, kernel in seen:
            if only in (None, name):
                key = name, kernel.hash
                if key not in rows:
                    rows[key] = examine(target, name, arguments, kernel) | dict(constants=constants, cases=[])
                rows[key]["cases"] += [label] * (label not in rows[key]["cases"])
    return list(rows.values())


# --- machine code --------------------------------------------------------------------------------------------------


def main_loop(code: list[Instruction], nbytes: int) -> set[int] | None:
    """The loop whose threads load ``nbytes`` each time round, beside what loops inside it load: with the widest loads,
    then the shortest. Without what an iteration may skip, unless the loads are there."""

    def loaded(part, bits=8):
        return sum(n // 8 for i in part if (n := load_bits(code[i].op)) >= bits)

    every, found = loops(code), []
    for body, always in every:
        inner = set().union(*(b for b, _ in every if b < body))
        part = next((p for p in (always, body) if loaded(p - inner) >= nbytes), None)
        if part:
            found.append((loaded(part - inner, 128) < nbytes, len(part), sorted(part)))
    return set(min(found)[2]) if found else None


LLIR_FUSED = r"call .*@llvm\.fm(?:a|uladd)\.\S*\(|= f(?:mul|add|sub) (?:\w+ )*(?:contract|fast)\b"
LLIR_DIVISION = r"\bf(?:div|sqrt)\b|\b[su](?:div|rem) i64"
MACHINE_FUSED = r"(?:FFMA2?|DFMA|v_(?:pk_)?(?:fma|fmac|mad|mac)(?:mk|ak)?_f32)(?!\d)"  # AMD's of f64 convert to int64


def contractions(asm: dict, ops: list[str], loop: list[str]) -> list[str]:
    """Multiply-adds rounded once: in what Triton hands on, and in machine code (FFMA2 is ptxas' own, even unasked).

    Divisions are made of multiply-adds: where there are any, of the scalar ones only those in the loop count.
    """
    if "ptx" in asm:
        functions = parse_ptx(asm["ptx"]).values()
        asked = [op for f in functions for _, op in f.fusible if re.match(r"(?:fma|mad)\.\S*\bf(?:32|64)", op)]
        divides = any(f.divisions for f in functions)
    else:
        asked, divides = re.findall(LLIR_FUSED, asm["llir"]), re.search(LLIR_DIVISION, asm["llir"])
    found = Counter(x.split("@")[-1].strip("= (") for x in asked)
    if divides:
        ops = loop + [op for op in ops if op.startswith("FFMA2") and op not in loop]
    found += Counter(m[0] for op in ops if (m := re.match(MACHINE_FUSED, op)))
    return [f"contracts: {n} {op}" for op, n in found.items()]


def read_nvidia(kernel) -> tuple[list[Instruction], dict]:
    """Instructions and resources."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def output(tool, *words: str) -> str:
            return subprocess.run([tool.path, *words, file.name], check=True, capture_output=True, text=True).stdout

        usage = output(knobs.nvidia.cuobjdump, "-res-usage")
        code = parse_sass(output(knobs.nvidia.nvdisasm, "-c"))[kernel.metadata.name]
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return code, dict(registers=use["REG"], stack=use["STACK"] + use["LOCAL"])


def read_amd(kernel) -> tuple[list[Instruction], dict]:
    text = kernel.asm["amdgcn"]

    def said(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return parse_amdgcn(text), dict(registers=said("vgpr_count"), stack=said("private_segment_fixed_size"))


def examine(name: str, kernel_name: str, a: dict, kernel) -> dict:
    """The row of one specialisation."""
    target, about, meta = TARGETS[name], KERNELS.get(kernel_name), kernel.metadata
    code, use = (read_nvidia if target.backend == "cuda" else read_amd)(kernel)
    row = dict(
        target=name,
        kernel=kernel_name,
        **use,
        warps=meta.num_warps,
        shared=meta.shared,
        hash=kernel.hash,
        ctas=resident_blocks(target, use["registers"], meta.num_warps, meta.shared),
    )
    findings = [f"spills {use['stack']} bytes"] * any(re.match("LDL|STL|scratch_", x.op) for x in code)
    findings += ["fp fusion is on"] * meta.enable_fp_fusion
    threads = meta.num_warps * target.lanes
    nbytes = about.tokens(a) * about.bytes(a) if about else 0
    loop = main_loop(code, nbytes // threads) if about else None
    findings += contractions(kernel.asm, [x.op for x in code], [code[i].op for i in loop or ()])
    part = [code[i].op for i in sorted(loop or range(len(code))) if code[i].op not in ("NOP", "s_nop")]
    loads = Counter(bits for op in part if (bits := load_bits(op)))
    row |= dict(
        loop=bool(loop),
        instructions=len(part),
        opcodes=count(part),
        tokens=None,
        per_token=None,
        budget=None,
        loads={str(bits): n for bits, n in sorted(loads.items(), reverse=True)},
    )
    if not about:
        return row | dict(findings=findings + ["is not in KERNELS"] * (kernel_name not in KERNELS))
    wide = sum(bits // 8 * n for bits, n in loads.items() if bits >= 128) * threads
    tokens, budget = about.tokens(a), about.budget(a) if name == BUDGETED else None
    per_token = len(part) * threads / tokens
    if aligned(a) and wide < nbytes:
        findings += [f"loads {wide} of {nbytes} bytes in 128 bits"]
    if budget and per_token > budget:
        findings += [f"{per_token:.1f} instructions a token, the budget is {budget:.0f}"]
    return row | dict(tokens=tokens, per_token=per_token, budget=budget, findings=findings)


def aligned(a: dict) -> bool:
    """Triton can see that the rows of all logits start at multiples of 16 bytes."""
    models = [a["m"]] if "m" in a else [a["target"].m, a["draft"].m]
    return all(z.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in z.stride()[:-1]) for m in models for z in m.z)


# --- the tables ----------------------------------------------------------------------------------------------------


def widths(row: dict) -> str:
    return ", ".join(f"{n} x {bits}" for bits, n in row["loads"].items()) or "none"


def per_token(row: dict) -> str:
    return "-" if row["per_token"] is None else f"{row['per_token']:.1f}"


def name_of(row: dict) -> str:
    return " ".join([row["kernel"], *(f"{k}={v}" for k, v in row["constants"].items())])


def detail(rows: list[dict]) -> list[str]:
    head = ["kernel", "case", "registers", "stack", "shared", "CTAs/SM", "loads (bits)", "instructions/token", "budget"]
    lines = [
        [
            name_of(r),
            next(c for c in SHOWN if c in r["cases"]).removesuffix(DEFAULT).strip(),
            r["registers"],
            r["stack"],
            r["shared"],
            r["ctas"],
            widths(r),
            per_token(r),
            "-" if r["budget"] is None else f"{r['budget']:.0f}",
        ]
        for r in rows
    ]
    return report.table(head, [[str(cell) for cell in line] for line in lines], left=2)


def summary(rows: list[dict]) -> list[str]:
    """A line for each kernel: the range over its specialisations, on each target."""
    targets = list(dict.fromkeys(r["target"] for r in rows))
    lines = []
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        cells = []
        for t in targets:
            part = [r for r in rows if (r["kernel"], r["target"]) == (kernel, t)]
            spans = [sorted(x for r in part if (x := r[field]) is not None) for field in ("registers", "per_token")]
            words = [str(len(part)), *(f"{x[0]:.3g} to {x[-1]:.3g}" for x in spans if x)]
            cells.append(", ".join(words) if part else "-")
        lines.append([kernel, *cells])
    return report.table(["kernel", *targets], lines, left=1)


def render(rows: list[dict], command: str) -> str:
    import triton

    good = [r for r in rows if r["kernel"]]
    shown = [r for r in good if r["target"] == BUDGETED and set(SHOWN) & set(r["cases"])]
    bad = [
        f"- {r['target']}, {name_of(r) + ', ' if r['kernel'] else ''}{r['cases'][0]}: {f}"
        for r in rows
        for f in r["findings"]
    ]
    lines = ["# What the Triton kernels compile to", "", f"`{command}`, triton {triton.__version__}, no GPU.", ""]
    if shown:
        lines += [
            f"{BUDGETED}, {DEFAULT}. Loads and instructions are those of the loop over the logits, or of the "
            "whole kernel where it has none.",
            "",
            *detail(shown),
        ]
    if good:
        lines += ["Every specialisation: how many, registers, instructions per token.", "", *summary(good)]
    return "\n".join([*lines, f"{len(bad) or 'No'} findings{':' if bad else '.'}", "", *bad]).rstrip() + "\n"


# --- the command ---------------------------------------------------------------------------------------------------


def child(target: str, kernel: str, words: str) -> None:
    """Rows of one target as JSON on the standard output."""
    import importlib

    import torch

    if TARGETS[target].backend == "hip":
        torch.version.hip = "ahead of time"  # the backend looks there
    module = importlib.import_module(BACKEND)
    calls = {c.label(): lambda c=c: call(module, c) for c in cases() if words in c.label()}
    print(json.dumps(compile_all(target, calls, kernel or None, lambda text: print(text, file=sys.stderr))))


def run(script: list[str]) -> list[dict]:
    """The rows that a process of its own prints: a launch stays a compilation there, and nothing is interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    out = subprocess.run([sys.executable, *script], stdout=subprocess.PIPE, text=True, env=env)
    if out.returncode:
        raise ValueError(f"{' '.join(script)}: exit code {out.returncode}")
    return json.loads(out.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools aot", description=__doc__.split("\n\n")[0])
    p.add_argument("--target", default=",".join(TARGETS), metavar="NAME,...", help=f"of {', '.join(TARGETS)}")
    p.add_argument("--kernel", default="", metavar="NAME", help="only this one")
    p.add_argument("--case", default="", metavar="WORDS", help="only calls whose label holds these words")
    p.add_argument("--json", type=Path, metavar="FILE", help="save the rows, with the opcodes of each main loop")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="save the tables")
    args = p.parse_args(argv)
    targets = args.target.split(",")
    if unknown := set(targets) - set(TARGETS):
        raise Refused(f"--target {min(unknown)}: allowed are {', '.join(TARGETS)}")
    rows = [row for t in targets for row in run(["-m", "tools.aot", t, args.kernel, args.case])]
    if not rows:
        raise Refused(f"--kernel {args.kernel!r} --case {args.case!r}: no call launches that")
    return finish(rows, render(rows, shlex.join(["python", "-m", "tools", "aot", *argv])), args)


if __name__ == "__main__":
    child(*sys.argv[1:])
