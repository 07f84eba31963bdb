"""What is built, what gets installed, and what an import costs. Wheels with the extension are built by .ci/run."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import eft_kernels as eft

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "csrc", "eft_kernels"]
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
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.o", "results")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def wheel(tree, into, **environment):
    """Builds a wheel without the network: (its path, what setup.py said)."""
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
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
    assert not [n for n in names if n.endswith((".so", ".cpp", ".h", ".cu", ".cuh"))]
    modules = {p.relative_to(tree).as_posix() for p in (tree / "eft_kernels").rglob("*.py")}
    assert {n for n in names if not n.startswith(info)} == modules | {"eft_kernels/py.typed"}
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


@pytest.fixture
def writer(tmp_path):
    """A compiler that writes its output file, and nothing into it."""
    path = tmp_path / "writer"
    path.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    path.chmod(0o755)
    return path


def read_only(folder) -> list[str]:
    """The beginning of a command that sees ``folder`` read-only: permissions do not bind root, a mount does."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" "$0" && cd "$0" && exec "$@"'
    if os.geteuid():
        return ["sh", "-c", 'chmod -R a-w "$0" && cd "$0" && exec "$@"', folder]
    return ["unshare", "-m", "sh", "-c", mount, folder]


@needs_setuptools
@pytest.mark.parametrize("hook", ("wheel", "pip"))
def test_a_tree_that_cannot_be_written_to(tree, tmp_path, writer, hook):
    """Wheels are built from it, and nothing is left in it or in the temporary folder."""
    copy, into, temporary = tmp_path / "copy", tmp_path / "into", tmp_path / "temporary"
    shutil.copytree(tree, copy)
    into.mkdir(), temporary.mkdir()
    before = sorted(copy.rglob("*"))
    command = read_only(copy)
    if subprocess.run([*map(str, command), "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        refused = subprocess.run([*map(str, command), "touch", "new"], capture_output=True).returncode
        assert refused, "the tree can be written to"
        code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        build = (
            [sys.executable, "-c", code, into]
            if hook == "wheel"
            else [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", into]
        )
        run(*command, *build, PYTHONPATH="", EFT_KERNELS_CUDA="0", CXX=str(writer), TMPDIR=str(temporary))
    finally:
        if os.geteuid():
            subprocess.run(["chmod", "-R", "u+w", copy])
    (path,) = into.glob("*.whl")
    assert "cp310-abi3" in path.name
    with zipfile.ZipFile(path) as z:
        assert {"eft_kernels/_cpu.abi3.so", "eft_kernels/ops.py", "eft_kernels/bench/run.py"} <= {*z.namelist()}
    assert sorted(copy.rglob("*")) == before
    assert not [p for p in temporary.iterdir() if p.name.startswith("eft_kernels")]


FREE_THREADED = """
import sys, sysconfig
found = sysconfig.get_config_vars()
found["Py_GIL_DISABLED"] = 1
found["EXT_SUFFIX"] = ".cpython-313t-x86_64-linux-gnu.so"
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


@needs_setuptools
def test_free_threaded_python_gets_a_build_of_its_own(tree, tmp_path, writer):
    """bdist_wheel raises where the limited API is asked for; nothing says abi3."""
    run(sys.executable, "-c", FREE_THREADED, tmp_path, cwd=tree, PYTHONPATH="", EFT_KERNELS_CUDA="0", CXX=str(writer))
    shutil.rmtree(tree / "build", ignore_errors=True)
    (path,) = tmp_path.glob("*.whl")
    assert "abi3" not in path.name and f"cp{sys.version_info[0]}{sys.version_info[1]}-" in path.name
    with zipfile.ZipFile(path) as z:
        assert [n for n in z.namelist() if n.endswith(".so")] == ["eft_kernels/_cpu.cpython-313t-x86_64-linux-gnu.so"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_modules_compile_without_the_limited_api(tmp_path):
    """As free-threaded Python's header has it; nothing there may say that the lock is not needed."""
    (tmp_path / "pyconfig.h").write_text("#include_next <pyconfig.h>\n#define Py_GIL_DISABLED 1\n")
    check = tmp_path / "check.cpp"
    check.write_text('#include "cpu_module.cpp"\n#ifdef Py_LIMITED_API\n#error "limited"\n#endif\n')
    include = sysconfig.get_path("include")
    run("g++", "-std=c++17", "-fsyntax-only", f"-I{tmp_path}", f"-I{include}", f"-I{ROOT / 'csrc' / 'bindings'}", check)
    assert "Py_MOD_GIL_NOT_USED" not in "".join(p.read_text() for p in (ROOT / "csrc").rglob("*_module.cpp"))


@needs_setuptools
def test_source_distribution_is_complete(tree, tmp_path):
    """Everything the extension is built from is in it."""
    run(sys.executable, "setup.py", "-q", "sdist", "--formats=zip", "-d", tmp_path, cwd=tree, PYTHONPATH="")
    (path,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(path) as z:
        names = {n.split("/", 1)[1] for n in z.namelist()}
    needed = {
        p.relative_to(tree).as_posix()
        for folder in ("csrc", "eft_kernels")
        for p in (tree / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    }
    assert needed and needed <= names, needed - names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "eft_kernels/py.typed"} <= names


def test_import_is_light():
    """`import eft_kernels` brings torch alone."""
    code = (
        "import sys, torch; before = set(sys.modules); import eft_kernels, eft_kernels.cli; "
        "print({m.split('.')[0] for m in set(sys.modules) - before})"
    )
    brought = eval(run(sys.executable, "-c", code))
    assert "eft_kernels" in brought
    assert not brought & {"transformers", "triton", "safetensors", "huggingface_hub", "scipy", "matplotlib"}, brought


WITHOUT_EXTENSION = "import sys; sys.modules['eft_kernels._cpu'] = None; "


def test_without_the_extension_it_works_and_says_so_once(tmp_path):
    code = (
        WITHOUT_EXTENSION
        + """
import warnings, torch, eft_kernels as eft
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    z = [torch.randn(2, 300, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    tokens = [eft.sample(z, eft.upscale(), seed=5, position=0).tokens.tolist() for _ in range(3)]
print(tokens, [str(w.message) for w in seen])
"""
    )
    text = run(sys.executable, "-c", code, EFT_KERNELS_BACKEND="auto")
    assert text.count("the cpu backend is not available") == 1, text
    code = (
        "import torch, eft_kernels as eft; z = [torch.randn(2, 300, generator=torch.Generator().manual_seed(j)) "
        "for j in range(3)]; print([eft.sample(z, eft.upscale(), seed=5, position=0).tokens.tolist()] * 3)"
    )
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


# --- an extension that is there and does not load -------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path):
    """A copy of the package without any extension."""
    shutil.copytree(
        ROOT / "eft_kernels", tmp_path / "eft_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


SAMPLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import warnings, torch, eft_kernels as eft
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    z = [torch.arange(30.0).view(1, 30)]
    print([eft.sample(z, [1.0], seed=5, position=0).tokens.tolist() for _ in range(2)])
print("warned:", *(w.message for w in seen))
print("reason:", eft.backends()[NAME]["reason"])
"""


def loads(folder, name="cpu", **environment):
    text = run(
        sys.executable,
        "-c",
        SAMPLE.replace("NAME", repr(name)),
        cwd=folder,
        PYTHONPATH=str(folder),
        EFT_KERNELS_BACKEND="auto",
        **environment,
    )
    return dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("warned: ", "reason: ")))


@pytest.mark.parametrize("content, words", [(b"", "file too short"), (b"x" * 10000, "invalid ELF header")])
@pytest.mark.skipif(sys.platform != "linux", reason="the words of Linux")
def test_an_extension_that_cannot_be_loaded_is_reported_in_the_loaders_words(installed, content, words):
    for name, what in (("cpu", "C++"), ("cuda", "CUDA")):
        (installed / "eft_kernels" / f"_{name}.abi3.so").write_bytes(content)
        seen = loads(installed, name)
        assert seen["reason"].startswith(f"the {what} extension is there, but cannot be loaded: ")
        assert words in seen["reason"] and "not built" not in seen["reason"]
        assert "the C++ extension is there, but cannot be loaded" in seen["warned"] and words in seen["warned"]


@pytest.mark.skipif(sys.platform != "linux", reason="the words of Linux")
def test_an_extension_that_lacks_a_library_is_reported_in_the_loaders_words(installed):
    """As where libstdc++ is missing or too old."""
    lacking = installed / "lacking.c"
    lacking.write_text("void no_such_function(void); void *PyInit__cpu(void) { no_such_function(); return 0; }\n")
    run("gcc", "-shared", "-fPIC", lacking, "-o", installed / "eft_kernels" / "_cpu.abi3.so")
    seen = loads(installed)
    assert "cannot be loaded" in seen["reason"] and "undefined symbol: no_such_function" in seen["reason"]


def test_an_extension_of_another_python_is_named(installed):
    (installed / "eft_kernels" / "_cpu.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    seen = loads(installed)
    assert "is there for another Python (_cpu.cpython-39-x86_64-linux-gnu.so" in seen["reason"]
    assert ".abi3.so" in seen["reason"] and "not built" not in seen["reason"]


def test_an_extension_that_was_never_built_says_how_to_get_it(installed):
    seen = loads(installed)
    assert "the C++ extension is not built" in seen["reason"] and "g++" in seen["reason"]


@pytest.mark.skipif(not eft.backends()["cpu"]["available"], reason="the C++ extension is not built")
def test_an_unknown_instruction_set_names_its_variable():
    code = """
import torch, eft_kernels as eft
print("reason:", eft.backends()["cpu"]["available"], eft.backends()["cpu"]["reason"])
for kwargs in ({}, dict(seed=1, position=0), dict(backend="cpu")):
    try:
        eft.sample([torch.zeros(1, 4)], [1.0], **kwargs)
    except ValueError as error:
        print("raised:", error)
print(eft.sample([torch.zeros(1, 4)], [1.0], backend="reference").valid.tolist())
"""
    words = "EFT_KERNELS_CPU_ISA: got 'foo', allowed here are baseline"
    text = run(sys.executable, "-c", code, EFT_KERNELS_CPU_ISA="foo", EFT_KERNELS_BACKEND="auto")
    assert f"reason: False {words}" in text and text.count(f"raised: {words}") == 3 and "[True]" in text
    assert "FAILED" in run(sys.executable, "-m", "eft_kernels", "doctor", EFT_KERNELS_CPU_ISA="foo", code=1)


def test_an_extension_of_another_checkout_is_none_of_ours(installed, tmp_path):
    """An editable install finds a submodule by its name alone, in the checkout that was installed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "_cpu.py").write_text("raise SystemExit('loaded from another checkout')")
    (installed / "sitecustomize.py").write_text(f"""
import importlib.util, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "eft_kernels._cpu":
            return importlib.util.spec_from_file_location(name, {str(elsewhere / "_cpu.py")!r})

sys.meta_path.append(Finder)
""")
    assert loads(installed)["reason"].startswith("the C++ extension is not built: ")
