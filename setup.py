"""Builds what the machine can build and says what and why; installing never fails for want of a compiler.

The CPU extension is built where a C++ compiler is ($CXX, else Python's own, else g++ or clang++). EFT_KERNELS_CPU=0
skips it.

The CUDA extension needs nvcc ($CUDACXX, else $CUDA_HOME/bin/nvcc, else the PATH's) and a C++ compiler.
EFT_KERNELS_CUDA=1 builds it wherever they are, =0 skips it. Unset, it is built where the torch of the build environment
has CUDA or, where there is no torch (pip's build isolation), where an NVIDIA driver is loaded. It holds machine code
for `ARCHS`, of those that nvcc knows, and PTX for newer GPUs; EFT_KERNELS_CUDA_ARCHS="90a;100" asks for these alone.

EFT_KERNELS_SEMANTICS=1 also builds `eft_kernels._semantics`, csrc/semantics function by function, for tests and for
those who write kernels of their own. It needs pybind11 and is no part of a wheel unless asked for.

Everything is compiled by ninja from one build.ninja: on all cores (MAX_JOBS=n: on n), and again only where a source, a
header that it includes or a flag is another. Without ninja everything is compiled each time.

Torch is not needed: no extension has a torch header. One binary serves every Python from 3.10 on, but for free-threaded
ones, which have no limited API: theirs is built for that Python alone, and importing it enables the GIL.

A tree that cannot be written to is built in a temporary folder.
"""

import atexit
import glob
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# instruction set: flags; the same source once each, chosen at run time
ISAS = {"baseline": []}
X86 = platform.machine().lower() in ("x86_64", "amd64")
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-Wno-uninitialized"]
# no contraction: tokens are equal across backends only with every rounding in place
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
]
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
# GPUs with machine code of their own, and the last of them that all later ones can run as PTX
ARCHS = ("80", "89", "90a", "100", "120")
PTX = ("100", "90", "80")  # the first that nvcc knows; not 120, which 11.0 cannot run
NAMES = {"CPU": "the CPU extension", "CUDA": "the CUDA extension", "SEMANTICS": "the semantics module"}
WITHOUT = {
    "CPU": "the package will run on PyTorch alone, slowly",
    "CUDA": "NVIDIA GPUs will run the Triton kernels",
    "SEMANTICS": "its tests will be skipped",
}


# --- what can be built ---------------------------------------------------------------------------------------------


def compiler() -> list[str] | None:
    """The C++ compiler: $CXX, else Python's own, else g++ or clang++."""
    for name in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++", "clang++"):
        words = shlex.split(name or "")
        if words and shutil.which(words[0]):
            return words
        if name and name == os.environ.get("CXX"):
            return None  # a compiler was named and is not there: do not guess another
    return None


def skip_reason() -> str | None:
    """Why there will be no CPU extension; None where it will be built."""
    if os.environ.get("EFT_KERNELS_CPU") == "0":
        return "EFT_KERNELS_CPU=0"
    if os.name == "nt":
        return "Windows is not supported yet"
    if compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    return None


def cuda_compiler() -> list[str] | None:
    """nvcc: $CUDACXX, else $CUDA_HOME/bin/nvcc, else the PATH's."""
    named = shlex.split(os.environ.get("CUDACXX") or "")
    if named:
        return named if shutil.which(named[0]) else None
    paths = [os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc")] if os.environ.get("CUDA_HOME") else []
    return next(([path] for path in (*paths, "nvcc") if shutil.which(path)), None)


def torch_cuda() -> str | None:
    """The CUDA version of the torch that is here, "" of one without, None without torch; importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        return runpy.run_path(os.path.join(os.path.dirname(spec.origin), "version.py"))["cuda"] or ""
    except (OSError, KeyError):
        return None


def skip_cuda_reason(wanted: str | None, nvcc, cxx, torch, driver: bool) -> str | None:
    """Why there will be no CUDA extension; None where it will be built.

    ``wanted`` is EFT_KERNELS_CUDA; ``nvcc``, ``cxx`` and ``torch`` are what the functions above found.
    """
    if wanted == "0":
        return "EFT_KERNELS_CUDA=0"
    if os.name == "nt":
        return "Windows is not supported yet"
    if nvcc is None:
        return "nvcc was not found (put it on the PATH, or set CUDA_HOME)"
    if cxx is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    if wanted == "1" or torch or (torch is None and driver):
        return None
    what = "there is neither torch nor an NVIDIA driver" if torch is None else "torch is built without CUDA"
    return f"{what}; EFT_KERNELS_CUDA=1 builds it all the same"


def cuda_targets(known: set[str], wanted: str | None) -> tuple[list[str], list[str]]:
    """(machine code for, PTX for): what ``wanted``, of the form of EFT_KERNELS_CUDA_ARCHS, names, else the default."""
    named = re.findall(r"\w+", wanted or "")
    if named:
        return named, []
    sass, ptx = [a for a in ARCHS if a.rstrip("a") in known], [a for a in PTX if a in known][:1]
    if not sass:
        raise RuntimeError(f"nvcc knows none of the GPUs {', '.join(ARCHS)}")
    return sass, ptx


# --- how -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A file and the command that makes it; a compilation writes what it includes into ``depfile``."""

    output: str
    inputs: list[str]
    command: list[str]
    depfile: str = ""


def compilation(command: list[str], source: str, output: str) -> Step:
    depfile = output + ".d"
    return Step(output, [source], [*command, "-MD", "-MF", depfile, "-c", source, "-o", output], depfile)


def link(command: list[str], objects: list[Step], target: str, *flags: str) -> Step:
    inputs = [step.output for step in objects]
    return Step(target, inputs, [*command, *inputs, "-o", target, *flags])


def includes() -> list[str]:
    return [f"-I{p}" for p in sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude")})]


def shared_library() -> list[str]:
    return [*compiler(), *(["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"])]


def cpu(target: str, folder: str) -> tuple[list[Step], str]:
    """The steps that make the CPU extension, the last one ``target``, and what it is built for."""
    cxx = [*compiler(), *FLAGS]
    steps = [
        compilation([*cxx, f"-DEFT_ISA={isa}", *flags], "csrc/cpu/kernels.cpp", f"{folder}/{isa}.o")
        for isa, flags in ISAS.items()
    ]
    steps.append(compilation(cxx, "csrc/cpu/pool.cpp", f"{folder}/pool.o"))
    steps.append(
        compilation(
            [*cxx, *includes(), *(["-DEFT_X86"] if X86 else [])],
            "csrc/bindings/cpu_module.cpp",
            f"{folder}/cpu_module.o",
        )
    )
    steps.append(link([*shared_library(), "-pthread"], steps, target))
    return steps, f"{', '.join(ISAS)} with {shlex.join(compiler())}"


def cuda(target: str, folder: str) -> tuple[list[Step], str]:
    nvcc, sources = cuda_compiler(), sorted(glob.glob("csrc/cuda/**/*.cu", recursive=True))
    if not sources:
        raise RuntimeError("no csrc/cuda/**/*.cu")
    listed = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    sass, ptx = cuda_targets(set(re.findall(r"compute_(\d+)", listed)), os.environ.get("EFT_KERNELS_CUDA_ARCHS"))
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in sass]
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]
    folder = os.path.join(folder, "_".join(["cuda", *sass]))  # each set of GPUs keeps its objects
    threads = f"--threads={max(1, cores() // len(sources))}"
    steps = [
        compilation([*nvcc, *CUDA_FLAGS, threads, *codes], source, f"{folder}/{os.path.basename(source)}.o")
        for source in sources
    ]
    steps.append(
        compilation([*compiler(), *FLAGS, *includes()], "csrc/bindings/cuda_module.cpp", f"{folder}/cuda_module.o")
    )
    # the CUDA runtime is part of it, and torch's does not stand in for it
    steps.append(
        link(
            [*nvcc, "-shared", "-cudart=static", "-nodlink", "-Xcompiler=-pthread", "-Xlinker=--exclude-libs=ALL"],
            steps,
            target,
        )
    )
    code = [f"sm_{a}" for a in sass] + [f"compute_{a}" for a in ptx]
    return steps, f"{', '.join(code)} with {shlex.join(nvcc)}"


def semantics(target: str, folder: str) -> tuple[list[Step], str]:
    import pybind11

    cxx, x86 = [*compiler(), *FLAGS], ["-DEFT_X86"] if X86 else []
    steps = [
        compilation(
            [*cxx, f"-DEFT_ISA={isa}", *flags], "csrc/bindings/semantics_lanes.cpp", f"{folder}/semantics_{isa}.o"
        )
        for isa, flags in ISAS.items()
    ]
    steps.append(
        compilation(
            [*cxx, *includes(), f"-I{pybind11.get_include()}", *x86],
            "csrc/bindings/semantics_module.cpp",
            f"{folder}/semantics_module.o",
        )
    )
    steps.append(link(shared_library(), steps, target))
    return steps, f"Python {sys.version_info[0]}.{sys.version_info[1]} with {shlex.join(compiler())}"


# --- ninja ---------------------------------------------------------------------------------------------------------


def cores() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("MAX_JOBS") or here)


def find_ninja() -> str | None:
    """That of the Python package, else the PATH's."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")


def ninja_file(steps: list[Step], folder: str) -> str:
    def path(name):
        return re.sub(r"([$ :])", r"$\1", name)

    lines = ["ninja_required_version = 1.3", f"builddir = {path(folder)}", ""]
    for kind, more in (("compile", ["  depfile = $depfile", "  deps = gcc"]), ("link", [])):
        lines += [f"rule {kind}", "  command = $words", f"  description = {kind} $what", *more, ""]
    for step in steps:
        kind, inputs = "compile" if step.depfile else "link", " ".join(map(path, step.inputs))
        words, what = (text.replace("$", "$$") for text in (shlex.join(step.command), os.path.basename(step.output)))
        lines += [f"build {path(step.output)}: {kind} {inputs}", f"  words = {words}", f"  what = {what}"]
        if step.depfile:
            lines.append(f"  depfile = {path(step.depfile)}")
    return "\n".join(lines) + "\n"


def run_ninja(ninja: str, steps: list[Step], targets: list[str], folder: str) -> list[str]:
    """The targets that are as their sources say; on a terminal, ninja shows one line of progress."""
    file = os.path.join(folder, "build.ninja")
    with open(file, "w") as out:
        out.write(ninja_file(steps, folder))
    command = [ninja, "-f", file]
    shown = None if sys.stdout.isatty() else subprocess.PIPE
    done = subprocess.run([*command, "-k", "0", "-j", str(cores()), *targets], stdout=shown, text=True)
    if done.returncode == 0:
        return targets
    print(done.stdout or "", end="", flush=True)
    # the others may be finished all the same
    plans = {target: subprocess.run([*command, "-n", target], capture_output=True, text=True) for target in targets}
    return [target for target, plan in plans.items() if plan.returncode == 0 and "no work to do" in plan.stdout]


def run_all(steps: list[Step], targets: list[str]) -> list[str]:
    """The same without ninja: every command, whatever is there already."""

    def run(step):
        os.makedirs(os.path.dirname(step.output), exist_ok=True)
        made = subprocess.run(step.command).returncode == 0
        if not made:
            print(f"FAILED: {shlex.join(step.command)}", flush=True)
        return step.output, made

    print("eft_kernels: ninja was not found, so that everything is compiled again (pip install ninja)", flush=True)
    with ThreadPoolExecutor(cores()) as pool:
        made = dict(pool.map(run, [step for step in steps if step.depfile]))
    links = [step for step in steps if not step.depfile]
    return [step.output for step in links if all(made[name] for name in step.inputs) and run(step)[1]]


class Build(build_ext):
    def build_extensions(self):
        folder = os.path.join(self.build_temp, "eft")
        if self.force:
            shutil.rmtree(folder, ignore_errors=True)
        steps, targets, how = [], {}, {}
        for extension in self.extensions:
            kind = extension.name.rpartition("_")[2].upper()
            target = self.get_ext_fullpath(extension.name)
            try:
                for path in (folder, os.path.dirname(target)):
                    os.makedirs(path, exist_ok=True)
                more, how[kind] = PLANS[kind](target, folder)
                steps += more
                targets[kind] = target
            except Exception as error:
                remove(target)
                REASONS[kind] = str(error)
        try:
            ninja, wanted = find_ninja(), list(targets.values())
            built = run_ninja(ninja, steps, wanted, folder) if ninja else run_all(steps, wanted)
        except Exception as error:
            built = []
            print(f"eft_kernels: {error}", flush=True)
        for kind, target in targets.items():
            if target in built:
                print(f"eft_kernels: built {NAMES[kind]} for {how[kind]}", flush=True)
            else:
                remove(target)  # nothing old is left where the build fails
                REASONS[kind] = "a command above failed"
        say_what_is_missing()

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            if not os.path.exists(os.path.join(self.build_lib, name)):
                remove(name)
        super().copy_extensions_to_source()


def remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)


PLANS = {"CPU": cpu, "CUDA": cuda, "SEMANTICS": semantics}
REASONS: dict[str, str | None] = {}  # why an extension is not built; None of those that are


def say_what_is_missing() -> None:
    for kind, reason in REASONS.items():
        if reason:
            print(f"eft_kernels: NOT built: {NAMES[kind]} ({reason}); {WITHOUT[kind]}", flush=True)


# --- setuptools ----------------------------------------------------------------------------------------------------


def limited_api() -> bool:
    """One binary for every Python >= 3.10. Free-threaded ones have no limited API."""
    return not sysconfig.get_config_var("Py_GIL_DISABLED")


def writable(folder: str) -> bool:
    """Files can be made in ``folder``; tried, because permissions do not tell of a read-only mount."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def elsewhere() -> dict:
    """Options that put what a build leaves behind into a temporary folder; none where the tree can be written to."""
    if all(map(writable, filter(os.path.isdir, (".", "build", "eft_kernels.egg-info")))):
        return {}
    folder = tempfile.mkdtemp(prefix="eft_kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"build": {"build_base": folder}, "egg_info": {"egg_base": folder}}


def main():
    REASONS["CPU"] = skip_reason()
    REASONS["CUDA"] = skip_cuda_reason(
        os.environ.get("EFT_KERNELS_CUDA"),
        cuda_compiler(),
        compiler(),
        torch_cuda(),
        os.path.exists("/proc/driver/nvidia/version"),
    )
    if os.environ.get("EFT_KERNELS_SEMANTICS") == "1":
        REASONS["SEMANTICS"] = skip_reason() and "there is no CPU extension"
    extensions = [
        Extension(
            f"eft_kernels._{kind.lower()}",
            sources=[],
            optional=True,
            py_limited_api=limited_api() and kind != "SEMANTICS",
        )
        for kind, reason in REASONS.items()
        if not reason
    ]
    if not extensions:
        say_what_is_missing()
    abi3 = extensions and all(extension.py_limited_api for extension in extensions)
    setup(
        packages=find_packages(include=["eft_kernels*"]),
        package_data={"eft_kernels": ["py.typed"]},
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        options=elsewhere() | ({"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {}),
    )


if __name__ == "__main__":
    main()
