"""What is built, what gets installed, and what an import costs. Wheels with the extension are built by .ci/run."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import eft_kernels as eft

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "csrc", "eft_kernels",
           "benchmarks"]
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")


def run(*argv, cwd=ROOT, code=0, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    p = subprocess.run([str(a) for a in argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert p.returncode == code, p.stdout + p.stderr
    return p.stdout + p.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources alone, without anything that was built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.o",
                                                                                      "results"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def wheel(tree, into, **environment):
    """Builds a wheel without the network: (its path, what setup.py said)."""
    code = ("import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])")
    environment = dict(PYTHONPATH="", EFT_KERNELS_CUDA="0") | environment
    said = run(sys.executable, "-c", code, into, cwd=tree, **environment)
    shutil.rmtree(tree / "build", ignore_errors=True)
    (path,) = into.glob("*.whl")
    return path, said


@needs_setuptools
def test_wheel_without_a_compiler(tree, tmp_path):
    """EFT_KERNELS_CPU=0, EFT_KERNELS_CUDA=0: pure Python, for any machine, with the metadata that pip needs."""
    path, said = wheel(tree, tmp_path, EFT_KERNELS_CPU="0")
    assert path.name == f"eft_kernels-{eft.__version__}-py3-none-any.whl"
    assert "NOT built: the CPU extension (EFT_KERNELS_CPU=0)" in said
    assert "NOT built: the CUDA extension (EFT_KERNELS_CUDA=0)" in said
    with zipfile.ZipFile(path) as z:
        names = z.namelist()
        info = f"eft_kernels-{eft.__version__}.dist-info"
        metadata = Parser().parsestr(z.read(f"{info}/METADATA").decode())
        entry = configparser.ConfigParser()
        entry.read_string(z.read(f"{info}/entry_points.txt").decode())
    assert not [n for n in names if n.endswith((".so", ".cpp", ".h", ".cu", ".cuh"))
                or n.startswith(("tests", "benchmarks"))]
    assert {n for n in names if not n.startswith(info)} == {
        *(p.relative_to(tree).as_posix() for p in (tree / "eft_kernels").rglob("*.py")),
        *(f"eft_kernels/_benchmarks/{p.name}" for p in (tree / "benchmarks").glob("*.py"))}
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in names)
    assert metadata["Requires-Python"] == ">=3.10" and metadata["Name"] == "eft-kernels"
    requires = metadata.get_all("Requires-Dist")
    core = [r for r in requires if "extra ==" not in r]
    assert [re.match(r"[\w-]+", r).group() for r in core] == ["torch"], "the core needs torch alone"
    assert {"hf", "test", "bench"} <= set(metadata.get_all("Provides-Extra"))
    assert entry["console_scripts"]["eft-kernels"] == "eft_kernels.cli:main"


@needs_setuptools
@pytest.mark.parametrize("cxx, why", [("/nonexistent/c++", "no C++ compiler was found"), ("false", "NOT built")])
def test_a_missing_or_broken_compiler_fails_nothing(tree, tmp_path, cxx, why):
    path, said = wheel(tree, tmp_path, CXX=cxx)
    assert why in said
    with zipfile.ZipFile(path) as z:
        assert not [n for n in z.namelist() if n.endswith(".so")]


@needs_setuptools
def test_source_distribution_is_complete(tree, tmp_path):
    """Everything the extension is built from is in it."""
    run(sys.executable, "setup.py", "-q", "sdist", "--formats=zip", "-d", tmp_path, cwd=tree, PYTHONPATH="")
    (path,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(path) as z:
        names = {n.split("/", 1)[1] for n in z.namelist()}
    needed = {p.relative_to(tree).as_posix() for folder in ("csrc", "eft_kernels", "benchmarks")
              for p in (tree / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")}
    assert needed and needed <= names, needed - names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_import_is_light():
    """`import eft_kernels` brings torch alone."""
    code = ("import sys, torch; before = set(sys.modules); import eft_kernels, eft_kernels.cli; "
            "print({m.split('.')[0] for m in set(sys.modules) - before})")
    brought = eval(run(sys.executable, "-c", code))
    assert "eft_kernels" in brought
    assert not brought & {"transformers", "triton", "safetensors", "huggingface_hub", "scipy", "matplotlib"}, brought


WITHOUT_EXTENSION = "import sys; sys.modules['eft_kernels._cpu'] = None; "


def test_without_the_extension_it_works_and_says_so_once(tmp_path):
    code = WITHOUT_EXTENSION + """
import warnings, torch, eft_kernels as eft
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    z = [torch.randn(2, 300, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    tokens = [eft.sample(z, eft.upscale(), seed=5, position=0).tokens.tolist() for _ in range(3)]
print(tokens, [str(w.message) for w in seen])
"""
    text = run(sys.executable, "-c", code, EFT_KERNELS_BACKEND="auto")
    assert text.count("the cpu backend is not available") == 1, text
    code = "import torch, eft_kernels as eft; z = [torch.randn(2, 300, generator=torch.Generator().manual_seed(j)) " \
           "for j in range(3)]; print([eft.sample(z, eft.upscale(), seed=5, position=0).tokens.tolist()] * 3)"
    assert text.startswith(run(sys.executable, "-c", code).strip()), "the same tokens with and without"


def test_doctor_without_the_extension():
    """It still works, says what is missing and how to get it."""
    code = WITHOUT_EXTENSION + "from eft_kernels.cli import main; sys.exit(main(['doctor']))"
    text = run(sys.executable, "-c", code, EFT_KERNELS_BACKEND="auto")
    assert "not built" in text and "g++" in text and "not here" in text and "check  ok" in text


def test_doctor_with_a_forced_backend():
    text = run(sys.executable, "-m", "eft_kernels", "doctor", EFT_KERNELS_BACKEND="reference")
    assert "EFT_KERNELS_BACKEND=reference" in text and "check  ok" in text
    text = run(sys.executable, "-m", "eft_kernels", "doctor", EFT_KERNELS_BACKEND="abacus", code=1)
    assert "FAILED" in text and "'abacus'" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_leaves_a_given_interpreter_alone():
    """`make test PYTHON=... VENV=` runs no pip and makes no environment; without VENV= it does both."""
    plan = run("make", "-nB", "test", "VENV=", f"PYTHON={sys.executable}")
    assert "pytest" in plan and "setup.py" in plan and "PYTHONPATH=" in plan
    assert "pip" not in plan and "venv" not in plan.replace(sys.executable, "")
    assert "-m pip" in run("make", "-nB", "test", "VENV=/tmp/nowhere")
