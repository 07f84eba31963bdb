"""The documentation: its code runs, its links lead somewhere, its numbers are measured, its API page is current."""

import __future__

import collections
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import eft_kernels as eft

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    p.relative_to(ROOT).as_posix(): p
    for p in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "family" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
LINKED = {**PAGES, "CHANGELOG.md": ROOT / "CHANGELOG.md", "benchmarks/findings": ROOT / "benchmarks/findings/README.md"}
RUN, SHOWN = {"python", "bash"}, {"math", "text", "json"}
# blocks that cannot run here: how many of a page, and why
NOT_RUN = {
    "README.md": {"installs": 1},
    "CONTRIBUTING.md": {"installs": 1, "minutes": 1},
    "docs/gpu-status.md": {"needs a GPU": 1},
    "docs/install.md": {"installs": 2},
    "docs/integration.md": {"needs a GPU": 1},
    "docs/quickstart.md": {"installs": 2, "downloads models": 1},
    "examples/family/README.md": {"hours": 1},
    "docs/vllm.md": {"needs vLLM": 4},
    "docs/sglang.md": {"needs SGLang": 2},  # tests/sglang runs what they show
    "docs/llama.cpp.md": {"needs llama.cpp": 4},  # tests/llamacpp runs them
}


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, where the code begins
    not_run: str | None  # why
    hidden: bool = False

    def padded(self) -> str:
        """The code on the lines that it has in the page, for tracebacks."""
        return "\n" * (self.line - 1) + self.code


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, and as Python what `<!-- run first ... -->` hides."""
    found, lines, i = [], text.split("\n"), 0
    while i < len(lines):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", lines[i])
        hidden = lines[i] == "<!-- run first"
        if fence or hidden:
            begin = i + 1
            end = "-->" if hidden else fence[1]
            while lines[i + 1].strip() != end:
                i += 1
            marked = re.fullmatch(r"<!-- not run: (.+) -->", lines[begin - 2].strip()) if begin > 1 else None
            found.append(
                Block(
                    "python" if hidden else fence[2],
                    "\n".join(lines[begin : i + 1]) + "\n",
                    begin + 1,
                    marked and marked[1],
                    hidden,
                )
            )
            i += 1
        i += 1
    return found


BLOCKS = {name: blocks(page.read_text(encoding="utf-8")) for name, page in PAGES.items()}


def with_blocks(language: str) -> list[str]:
    return [name for name, found in BLOCKS.items() if any(b.language == language and not b.not_run for b in found)]


# --- the blocks ----------------------------------------------------------------------------------------------------


def test_blocks_are_found():
    text = (
        "```python\na\n```\n\n<!-- not run: why -->\n```bash\nb\nc\n```\n<!-- run first\nd\n-->\n"
        "- x\n  ~~~text\n  e\n  ~~~\n"
    )
    assert blocks(text) == [
        Block("python", "a\n", 2, None),
        Block("bash", "b\nc\n", 7, "why"),
        Block("python", "d\n", 11, None, True),
        Block("text", "  e\n", 15, None),
    ]
    assert len(with_blocks("python")) > 8 and len(with_blocks("bash")) > 3
    for name, page in PAGES.items():
        fences = len(re.findall(r"(?m)^\s*(```|~~~)", page.read_text(encoding="utf-8")))
        assert fences == 2 * sum(not b.hidden for b in BLOCKS[name]), name


@pytest.mark.parametrize("name", PAGES)
def test_no_code_escapes(name):
    """Each block says what it is, and none is only indented."""
    for block in BLOCKS[name]:
        assert block.language in RUN | SHOWN, f"{name}:{block.line}: {block.language!r}"
    text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1$", "", PAGES[name].read_text(encoding="utf-8"))
    assert not re.search(r"(?m)^\n {4}\S", text), "an indented block of code"


def test_few_blocks_are_not_run():
    marked = {name: dict(collections.Counter(b.not_run for b in found if b.not_run)) for name, found in BLOCKS.items()}
    assert {name: reasons for name, reasons in marked.items() if reasons} == NOT_RUN


@pytest.mark.parametrize("name", with_blocks("python"))
def test_python_blocks_run(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    threads, module = torch.get_num_threads(), types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look it up
    try:
        for block in BLOCKS[name]:
            if block.language == "python" and not block.not_run:
                flags = __future__.annotations.compiler_flag
                exec(compile(block.padded(), name, "exec", flags=flags, dont_inherit=True), vars(module))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", with_blocks("bash"))
def test_bash_blocks_run(name, tmp_path):
    pytest.importorskip("transformers")
    for command, argv in {"python": "", "eft-kernels": "-m eft_kernels"}.items():
        (tmp_path / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {argv} "$@"\n')
        (tmp_path / command).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for block in BLOCKS[name]:
        if block.language == "bash" and not block.not_run:
            p = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.code],
                cwd=ROOT,
                env=environment,
                text=True,
                capture_output=True,
                timeout=300,
            )
            assert p.returncode == 0, f"{name}:{block.line}\n{p.stdout}{p.stderr}"


# --- links ---------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its blocks of code and its code spans."""
    text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1$", "", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", lambda m: re.sub(r"[\[\]()]", "", m[0]), text)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them; the site makes the same."""
    found = []
    for title in re.findall(r"(?m)^#{1,6} +(.+?) *$", prose(page)):
        found.append(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    assert len(found) == len(set(found)), f"{page}: two headings share an anchor"
    return set(found)


@pytest.mark.parametrize("name", LINKED)
def test_links(name):
    page = LINKED[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and ROOT in there.parents, f"{name}: {target}: no such file"
        if anchor:
            assert anchor in anchors(there), f"{name}: {target}: no such heading"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^ +- .+: (\S+\.md)$", text)
    assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_the_citation_is_of_this_version():
    assert f"\nversion: {eft.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


# --- the API reference ---------------------------------------------------------------------------------------------


def test_api_reference_is_current():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("docs_tools", ROOT / "tools" / "docs.py")
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    page = tools.api()
    assert page == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), (
        "run `python tools/docs.py --write docs/api.md`"
    )
    documented = set(re.findall(r"(?m)^### (?:class )?(\S+)$", page))
    assert set(eft.__all__) - {"hf", "__version__"} <= documented


def test_docstrings_become_lists():
    spec = importlib.util.spec_from_file_location("docs_tools", ROOT / "tools" / "docs.py")
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    doc = """Adds.

    Args:
      a, b (default 1): numbers; ``a`` is
        first. c: a third.

    Returns: the sum. Raises: ValueError.
    """
    assert tools.prose(doc, "abc").split("\n\n") == [
        "Adds.",
        "**Arguments**",
        "- `a`, `b` (default 1): numbers; `a` is\n  first. c: a third.",
        "**Returns** the sum.",
        "**Raises** ValueError.",
    ]


# --- numbers -------------------------------------------------------------------------------------------------------

IMPLEMENTATIONS = ("eft", "combine_max", "lean", "compiled", "eager")  # the columns of docs/benchmarks.md


def shown(us: float) -> str:
    for unit, scale in (("µs", 1), ("ms", 1e3), ("s", 1e6)):
        if float(f"{us / scale:.3g}") < 1000:
            return f"{us / scale:.3g} {unit}"


@pytest.fixture(scope="module")
def measured():
    """{(threads, batch, variant): {implementation: median in microseconds}} of the shapes in the tables."""
    from benchmarks import report

    wanted = dict(op="sample", vocab=128256, models=3, dtype="bfloat16", logits="peaked")
    return {
        (s.threads, s.batch, s.variant): {name: row["median_us"] for name, row in group.items()}
        for s, group in report.newest(report.read(ROOT / "benchmarks" / "results" / "amd-epyc")).items()
        if wanted.items() <= s._asdict().items()
    }


def test_times_are_rows(measured):
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    table = re.findall(r"(?m)^\| (\d) \| (\d+) \| (none|top-p 0.9) \| (.+) \|$", page)
    assert len(table) == 12
    for threads, batch, variant, cells in table:
        times = measured[int(threads), int(batch), {"none": "plain"}.get(variant, "top_p")]
        ours = times["eft"]
        want = [
            f"**{shown(ours)}**",
            shown(times["combine_max"]),
            *(f"{shown(times[n])} ({times[n] / ours:.3g}x)" for n in IMPLEMENTATIONS[2:]),
        ]
        assert cells.split(" | ") == want
    readme = (ROOT / "README.md").read_text("utf-8")
    for name, label in {
        "eager": "eager PyTorch",
        "compiled": "torch.compile",
        "lean": "the leanest PyTorch",
        "eft": r"\*\*eft-kernels",
    }.items():
        cells = re.search(rf"(?m)^\| {label}.*? \| (.+) \| (.+) \|$", readme).groups()
        assert [c.strip("*") for c in cells] == [shown(measured[1, 1, v][name]) for v in ("plain", "top_p")]


def test_shares_of_the_gap_are_the_familys():
    results = json.loads((ROOT / "examples/family/results.json").read_text())
    shares = {}
    for style in "ab":
        gaps = [
            (x[style]["base"] - x[style][f"emulated {style}"]) / (x[style]["base"] - x[style][f"large-{style}"])
            for x in results["seeds"]
        ]
        shares[style] = f"{statistics.mean(gaps):.0%}"
    for name, words in {
        "README.md": f"recovers {shares['a']} (King James Bible) and {shares['b']} (Jane Austen)",
        "docs/faq.md": f"{shares['a']} and {shares['b']} of the held-out loss",
    }.items():
        assert words in " ".join(PAGES[name].read_text("utf-8").split())
