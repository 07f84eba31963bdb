"""The CUDA extension without a GPU or nvcc: when it is built, how, what its module hands to kernels, who takes over."""

import ctypes
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

from eft_kernels import dispatch
from eft_kernels._backends import workspace
from eft_kernels.parameters import DRAFTED, OFF

FILTERS_OFF = [off for name, off in OFF.items() if name != "temperature"]

ROOT = Path(__file__).resolve().parents[1]
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    """setup.py, as a module."""
    return load("eft_setup", ROOT / "setup.py")


# --- when ----------------------------------------------------------------------------------------------------------

NVCC, CXX = ["nvcc"], ["g++"]


@needs_setuptools
@pytest.mark.parametrize(
    "wanted, nvcc, cxx, torch_cuda, driver, why",
    [
        (None, NVCC, CXX, "13.0", True, None),
        (None, NVCC, CXX, "13.0", False, None),  # a machine that builds for others
        (None, NVCC, CXX, "", True, "torch is built without CUDA"),
        (None, NVCC, CXX, None, True, None),  # pip's build isolation
        (None, NVCC, CXX, None, False, "neither torch nor an NVIDIA driver"),
        (None, None, CXX, "13.0", True, "nvcc was not found"),
        (None, NVCC, None, "13.0", True, "no C++ compiler"),
        ("", NVCC, CXX, "", False, "EFT_KERNELS_CUDA=1 builds it all the same"),
        ("1", NVCC, CXX, "", False, None),
        ("1", NVCC, CXX, None, False, None),
        ("1", None, CXX, "13.0", True, "nvcc was not found"),
        ("0", NVCC, CXX, "13.0", True, "EFT_KERNELS_CUDA=0"),
    ],
)
def test_when_it_is_built(build, wanted, nvcc, cxx, torch_cuda, driver, why):
    got = build.skip_cuda_reason(wanted, nvcc, cxx, torch_cuda, driver)
    assert got is None if why is None else why in got


@needs_setuptools
def test_which_nvcc(build, tmp_path, monkeypatch):
    for folder in ("home/bin", "path", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.cuda_compiler() is None
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build.cuda_compiler() == ["nvcc"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert build.cuda_compiler() == ["nvcc"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.cuda_compiler() == [str(tmp_path / "home/bin/nvcc")]
    monkeypatch.setenv("CUDACXX", f"{tmp_path}/other/nvcc --verbose")
    assert build.cuda_compiler() == [f"{tmp_path}/other/nvcc", "--verbose"]
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    assert build.cuda_compiler() is None, "one was named: no other is guessed"


@needs_setuptools
@pytest.mark.parametrize("text, want", [("cuda = '13.0'", "13.0"), ("cuda: str | None = None", ""), ("", None)])
def test_which_torch(build, tmp_path, monkeypatch, text, want):
    (tmp_path / "version.py").write_text(text)
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    assert build.torch_cuda() == want
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.torch_cuda() is None


@needs_setuptools
def test_which_gpus(build):
    cuda_13 = {"75", "80", "86", "89", "90", "100", "103", "110", "120", "121"}
    assert build.cuda_targets(cuda_13, None) == (["80", "89", "90a", "100", "120"], ["100"])
    assert build.cuda_targets({"70", "80", "89", "90"}, "") == (["80", "89", "90a"], ["90"])
    assert build.cuda_targets(cuda_13, "90a") == (["90a"], [])
    assert build.cuda_targets(cuda_13, "90a;100, 120") == (["90a", "100", "120"], [])
    with pytest.raises(RuntimeError, match="knows none"):
        build.cuda_targets({"52", "75"}, None)


# --- how -----------------------------------------------------------------------------------------------------------

FAKE = """#!/bin/sh
echo "$0 $@" >> "$LOG"
case "$*" in
  *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit 0;;
  *broken.cu*) exit 1;;
esac
while [ $# -gt 1 ]; do case $1 in -o) out=$2;; -MF) depfile=$2;; -c) source=$2;; esac; shift; done
if [ -n "$depfile" ]; then
  folder=$(dirname "$source")
  headers=$(sed -n 's/^#include "\\(.*\\)"/\\1/p' "$source")
  echo "$out: $source $(for h in $headers; do ls "$folder/$h" 2>/dev/null; done | tr '\\n' ' ')" > "$depfile"
fi
: > "$out"
"""

WITHOUT_NINJA = """
import runpy, shutil, sys
sys.modules["ninja"], which = None, shutil.which
shutil.which = lambda name, *args, **kwargs: None if name == "ninja" else which(name, *args, **kwargs)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def make(tmp_path):
    """`make(**environment)` builds in a tree with compilers that only write down what they are asked, and what a source
    includes: (the sources they compiled, all commands, what setup.py said)."""
    tree, log = tmp_path / "tree", tmp_path / "log"
    for name in ("nvcc", "c++"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "csrc/bindings",
        "csrc/semantics",
        "eft_kernels/__init__.py",
        "eft_kernels/version.py",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tree / name)
    (tree / "csrc/cuda").mkdir()
    for name, text in (("a.cu", '#include "shared.cuh"\n'), ("b.cu", ""), ("shared.cuh", "")):
        (tree / "csrc/cuda" / name).write_text(text)

    def run(ninja=True, **environment):
        log.write_text("")
        environment = {
            **os.environ,
            "LOG": str(log),
            "EFT_KERNELS_CPU": "0",
            "EFT_KERNELS_CUDA": "1",
            "CXX": str(tmp_path / "c++"),
            "CUDACXX": str(tmp_path / "nvcc"),
            **environment,
        }
        command = ["setup.py"] if ninja else ["-c", WITHOUT_NINJA]
        p = subprocess.run(
            [sys.executable, *command, "-q", "build_ext", "--inplace"],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert p.returncode == 0, p.stdout + p.stderr
        commands = log.read_text().splitlines()
        compiled = sorted(
            Path(word).name for c in commands if " -c " in c for word in c.split() if word.endswith((".cu", ".cpp"))
        )
        return compiled, commands, p.stdout + p.stderr

    run.tree = tree
    return run


def edit(path):
    """Changes a file, as an editor does: its time is later than that of all that was made before."""
    path.write_text(path.read_text() + "\n")
    later = time.time() + 1
    os.utime(path, (later, later))
    time.sleep(max(0.0, later - time.time()))


@pytest.fixture(params=["ninja", "without ninja"])
def ninja(request, build):
    if request.param == "ninja" and build.find_ninja() is None:
        pytest.skip("needs ninja")
    return request.param == "ninja"


@needs_setuptools
def test_build(make, build):
    """Every source for every GPU; again only what changed, or includes what changed; each set of GPUs keeps its own."""
    if build.find_ninja() is None:
        pytest.skip("needs ninja")
    everything = ["a.cu", "b.cu", "cuda_module.cpp"]
    compiled, commands, said = make(EFT_KERNELS_CUDA_ARCHS="")
    assert compiled == everything
    assert "built the CUDA extension for sm_80, sm_90a, compute_90 with" in said
    assert (make.tree / "eft_kernels/_cuda.abi3.so").exists()
    for command in commands:
        if ".cu " in command:
            assert "-fmad=false" in command and "-O3" in command and "-gencode=arch=compute_90a,code=sm_90a" in command
    assert "-cudart=static" in commands[-1] and " -c " not in commands[-1]
    compiled, commands, _ = make(EFT_KERNELS_CUDA_ARCHS="")
    assert compiled == [] and not any("-shared" in command for command in commands), "nothing is linked again either"
    for name, again in (
        ("cuda/b.cu", ["b.cu"]),
        ("cuda/shared.cuh", ["a.cu"]),
        ("bindings/arguments.h", ["cuda_module.cpp"]),
    ):
        edit(make.tree / "csrc" / name)
        assert make(EFT_KERNELS_CUDA_ARCHS="")[0] == again
        assert make(EFT_KERNELS_CUDA_ARCHS="")[0] == []
    compiled, commands, said = make(EFT_KERNELS_CUDA_ARCHS="90a")
    assert compiled == everything and "sm_80" not in "".join(commands) and "for sm_90a with" in said
    compiled, commands, _ = make(EFT_KERNELS_CUDA_ARCHS="")
    assert compiled == [] and "-shared" in commands[-1], "another set of GPUs is linked from its own objects"
    setup = make.tree / "setup.py"
    setup.write_text(setup.read_text().replace('"-Wno-psabi",', '"-Wno-psabi", "-DMORE",'))
    assert make(EFT_KERNELS_CUDA_ARCHS="")[0] == ["cuda_module.cpp"], "its flags are others"


@needs_setuptools
def test_without_ninja_everything_is_compiled_each_time(make):
    """Never from what an earlier build left, which may be older than a header."""
    for _ in range(2):
        compiled, _, said = make(ninja=False)
        assert compiled == ["a.cu", "b.cu", "cuda_module.cpp"]
        assert "ninja was not found" in said and "built the CUDA extension" in said


@needs_setuptools
def test_a_failed_build_fails_nothing(make, ninja):
    tree, make = make.tree, functools.partial(make, ninja=ninja)
    (tree / "csrc/cpu").mkdir()
    for name in ("kernels.cpp", "pool.cpp"):
        (tree / "csrc/cpu" / name).touch()
    assert "built the CUDA extension" in make()[2]
    (tree / "csrc/cuda/broken.cu").touch()
    said = make(EFT_KERNELS_CPU="1")[2]
    assert "built the CPU extension" in said, "of two, the other one is built"
    assert "NOT built: the CUDA extension (" in said and "nvcc" in said and "broken.cu" in said and "Triton" in said
    assert not list(tree.rglob("_cuda*.so")), "nothing old is installed instead"
    assert list((tree / "eft_kernels").glob("_cpu*.so"))
    for path in (tree / "csrc/cuda").glob("*.cu"):
        path.unlink()
    assert "no csrc/cuda/**/*.cu" in make()[2]
    compiled, commands, said = make(EFT_KERNELS_CUDA="0")
    assert not commands and "NOT built: the CUDA extension (EFT_KERNELS_CUDA=0)" in said


@needs_setuptools
def test_max_jobs(build, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.cores() == 3
    monkeypatch.setenv("MAX_JOBS", "")
    assert build.cores() >= 1


@needs_setuptools
def test_a_folder_of_any_name(build, tmp_path):
    """Spaces, colons and dollars in paths and flags reach the compiler as they are."""
    folder = tmp_path / "a $b: c"
    folder.mkdir()
    source, seen = folder / "x y.cpp", folder / "seen"
    source.write_text("int main() {}\n")
    cxx = folder / "c++"
    cxx.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {shlex.quote(str(seen))}\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    cxx.chmod(0o755)
    ninja = build.find_ninja() or pytest.skip("needs ninja")
    step = build.compilation([str(cxx), "-DX='$HOME'"], str(source), str(folder / "x.o"))
    assert build.run_ninja(ninja, [step], [step.output], str(folder)) == [step.output]
    assert seen.read_text().splitlines() == step.command[1:]


# --- what the module hands over ------------------------------------------------------------------------------------

# Kernels that write down their `Place`, and an exchange interface that says that tensors of the CPU's are on GPU 1 (one
# of them: on GPU 0).
SOURCE = r"""
#include <Python.h>
#include "bindings/dlpack.h"
#include "cuda/kernels.h"
using namespace eft;
namespace {
const dlpack::ExchangeAPI* real;
dlpack::ExchangeAPI api;
void (*release)(dlpack::Managed*);
}
extern "C" {
__attribute__((visibility("default"))) int64_t seen[8];  // launches, device, stream, aligned, freed, ids
__attribute__((visibility("default"))) void* elsewhere;
__attribute__((visibility("default"))) PyObject* pretend(PyObject* capsule) {
  real = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  api = *real;
  api.tensor_from_object = [](void* o, dlpack::Tensor* t) {
    int error = real->tensor_from_object(o, t);
    t->device = {dlpack::kCUDA, o == elsewhere ? 0 : 1};
    return error;
  };
  api.allocate = [](dlpack::Tensor* t, dlpack::Managed** out, void* c, void (*e)(void*, const char*, const char*)) {
    if (t->device.type != dlpack::kCUDA || t->device.id != 1) return e(c, "ValueError", "another device"), -1;
    dlpack::Tensor host = *t;
    host.device = {dlpack::kCPU, 0};
    int error = real->allocate(&host, out, c, e);
    if (t->dtype.code == dlpack::kUint) {
      release = (*out)->deleter;
      (*out)->deleter = [](dlpack::Managed* m) { ++seen[4], release(m); };
    }
    return error;
  };
  api.current_stream = [](int32_t type, int32_t id, void** stream) {
    *stream = reinterpret_cast<void*>(type * 100 + id);
    return 0;
  };
  return PyCapsule_New(&api, "dlpack_exchange_api", nullptr);
}
}
template <class C>
int64_t bytes(const C& c, int device) { return c.rows * c.slots * 100 + device; }
template <class C>
const char* launch(const C& c, const Place& p) {
  ++seen[0], seen[1] = p.device, seen[2] = reinterpret_cast<int64_t>(p.stream);
  seen[3] = p.scratch && reinterpret_cast<uintptr_t>(p.scratch) % 256 == 0 && seen[4] == seen[0] - 1;
  for (int64_t i = 0; i < bytes(c, p.device); ++i) static_cast<char*>(p.scratch)[i] = 1;
  for (int64_t i = 0; i < c.rows * c.slots; ++i) if (p.counters[i]) return "counters are not zero";
  return nullptr;
}
const CudaKernels& eft::cuda_kernels() {
  static const CudaKernels k{bytes<SampleCall>, bytes<VerifyCall>,
    [](const LogprobsCall&, int) -> int64_t { return 0; },
    [](const SampleCall& c, const Place& p) {
      for (int64_t i = 0; i < c.rows; ++i) c.tokens[i] = i;
      return launch(c, p);
    }, launch<VerifyCall>,
    [](const LogprobsCall& c, const Place& p) -> const char* {
      seen[5] = c.n_ids;
      return p.scratch ? "not asked for" : "out of threads";
    }, [](int device) -> const char* { return device ? nullptr : "too old"; }};
  return k;
}
"""


@pytest.fixture(scope="module")
def planted(build, tmp_path_factory):
    """(the module with those kernels, what they saw, the type of its tensors)"""
    folder, cxx = tmp_path_factory.mktemp("module"), build.compiler()
    if cxx is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    (folder / "kernels.cpp").write_text(SOURCE)
    library = folder / "_cuda.abi3.so"
    command = [
        *cxx,
        "-O0",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-shared",
        "-w",
        f"-I{ROOT}/csrc",
        f"-I{sysconfig.get_path('include')}",
        ROOT / "csrc/bindings/cuda_module.cpp",
        folder / "kernels.cpp",
        "-o",
        library,
    ]
    p = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert p.returncode == 0, shlex.join(map(str, command)) + p.stderr
    module, raw = load("_cuda", library), ctypes.PyDLL(str(library))
    raw.pretend.restype, raw.pretend.argtypes = ctypes.py_object, [ctypes.py_object]

    class Tensor(torch.Tensor):
        __dlpack_c_exchange_api__ = raw.pretend(torch.Tensor.__dlpack_c_exchange_api__)

    module.attach(Tensor, torch.nn.Parameter)
    return module, (ctypes.c_int64 * 8).in_dll(raw, "seen"), ctypes.c_void_p.in_dll(raw, "elsewhere"), Tensor


@needs_setuptools
def test_module(planted):
    """Device, stream, aligned scratch until the launch is done; scalars are checked, values on the device are not."""
    module, seen, elsewhere, Tensor = planted
    assert module.simt is False and not hasattr(module, "set_poison")
    assert module.unusable(0) == "too old" and module.unusable(1) is None

    def there(x):
        return x.as_subclass(Tensor)

    z, zeros = [there(torch.zeros(3, 8)) for _ in range(2)], there(torch.zeros(24, dtype=torch.int32))

    def sample(counters=zeros, strict=True, z=z, weights=(1.0, 1.0), temperature=1.0):
        own = 0, 0, False, 0, False, 0
        options = None, weights, temperature, *FILTERS_OFF, 5, 0, None, None, 8, 1
        return module.sample(counters, strict, z, *options, *own)

    tokens, valid, *rest = sample()
    assert tokens.tolist() == [0, 1, 2] and valid.shape == (3,) and rest == [None] * 7
    assert list(seen[:5]) == [1, 1, 201, True, 1]
    bad = there(torch.full((3,), -1.0))
    assert sample(temperature=bad) is not None and sample(temperature=-1.0, strict=False) is not None
    assert sample(temperature=-1.0) is None and sample(weights=(1.0, float("nan"))) is None
    for wrong in (None, 3, zeros[:5], there(zeros.long()), zeros.view(6, 4), zeros[::2][:2]):
        assert sample(wrong) is None
    for x, call in ((zeros, {}), (z[1], {}), (bad, dict(temperature=bad))):
        elsewhere.value = id(x)
        assert sample(**call) is None, "on two GPUs"
    elsewhere.value = None
    launches = seen[0]
    assert sample(z=[there(torch.zeros(0, 8))] * 2)[0].shape == (0,) and seen[0] == launches

    slots, drafts = [there(torch.zeros(3, 4, 8))], there(torch.zeros(3, 3, dtype=torch.int64))
    options = (None, (1.0,), 1.0, *FILTERS_OFF, 5, 0, None, None, 8, 0)
    judged = drafts, None, None, 1, None, *[None] * len(DRAFTED), True
    out = module.verify(zeros, False, slots, *options, *judged)
    assert out[5] is None
    assert [tuple(x.shape) for x in out[:5]] == [(3, 4), (3,), (3,), (3, 4), (3, 4)] and seen[3] and seen[4] == seen[0]
    assert module.verify(zeros[:23], False, slots, *options, *judged) is None
    for ids, count in ((None, 8), (there(torch.zeros(3, 5, dtype=torch.int64)), 5)):
        with pytest.raises(RuntimeError, match="logprobs: out of threads"):
            module.logprobs(zeros, False, z[:1], *options, ids, False)
        assert seen[5] == count
    zeros[4] = 1
    with pytest.raises(RuntimeError, match="verify: counters are not zero"):
        module.verify(zeros, False, slots, *options, *judged)


def test_counters():
    """A buffer for each stream, kept, and a longer one where it is too short."""
    cpu = torch.device("cpu")
    a, b, again = (workspace.counters(5, cpu, stream) for stream in ("a", "b", "a"))
    assert a.data_ptr() == again.data_ptr() != b.data_ptr() and a.dtype == torch.int32 and not a.any()
    more = workspace.counters(5000, cpu, "a")
    assert more.shape[0] >= 5000 and not more.any() and more.data_ptr() == workspace.counters(3, cpu, "a").data_ptr()
    assert workspace.counters(0, cpu, "a").data_ptr() == more.data_ptr()


# --- who takes over ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "built, here, warned",
    [
        (True, {"cuda", "triton"}, []),
        (True, {"triton"}, ["cuda"]),
        (False, {"triton"}, []),
        (False, {"reference"}, ["triton"]),
        (True, {"reference"}, ["cuda", "triton"]),
    ],
)
def test_auto_on_a_gpu(monkeypatch, built, here, warned):
    """CUDA, else Triton. It is said where the CUDA extension cannot run, not where it was never built."""
    extension = types.ModuleType("eft_kernels._cuda")
    extension.__spec__ = importlib.machinery.ModuleSpec("eft_kernels._cuda", None)
    monkeypatch.setitem(sys.modules, "eft_kernels._cuda", extension if built else None)
    monkeypatch.setattr(dispatch.extension, "_files", lambda name: [])  # in place, it may be there
    monkeypatch.setattr(dispatch, "status", lambda name: (name in here, f"{name} is too old"))
    monkeypatch.setattr(dispatch, "load", lambda name: name)
    monkeypatch.delenv("EFT_KERNELS_BACKEND", raising=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        chosen = dispatch._choose.__wrapped__("auto", "cuda")
    assert chosen == next(b.name for b in dispatch.TABLE if b.name in here and b.name != "cpu")
    assert len(seen) == len(warned)
    for warning, name in itertools.zip_longest(seen, warned):
        assert f"the {name} backend is not available ({name} is too old)" in str(warning.message)
