"""Builds what the machine can build and says what and why; installing never fails for want of a compiler.

The CPU extension is built where a C++ compiler is ($CXX, else Python's own, else g++ or clang++). EFT_KERNELS_CPU=0
skips it.

The CUDA extension needs nvcc ($CUDACXX, else $CUDA_HOME/bin/nvcc, else the PATH's) and a C++ compiler.
EFT_KERNELS_CUDA=1 builds it wherever they are, =0 skips it. Unset, it is built where the torch of the build environment
has CUDA or, where there is no torch (pip's build isolation), where an NVIDIA driver is loaded. It holds machine code
for `ARCHS`, of those that nvcc knows, and PTX for newer GPUs; EFT_KERNELS_CUDA_ARCHS="90a;100" asks for these alone.

Neither torch nor ninja is needed: no extension has a torch header. One binary serves every Python from 3.10 on, but for
free-threaded ones, which have no limited API: theirs is built for that Python alone, and importing it
enables the GIL.

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
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# instruction set: flags; the same source once each, chosen at run time
ISAS = {"baseline": []}
X86 = platform.machine().lower() in ("x86_64", "amd64")
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-Wno-uninitialized"]
# no contraction: tokens are equal across backends only with every rounding in place
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-Wall", "-Wno-psabi"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
# GPUs with machine code of their own, and the last of them that all later ones can run as PTX
ARCHS = ("80", "89", "90a", "100", "120")
PTX = ("100", "90", "80")  # the first that nvcc knows; not 120, which 11.0 cannot run
WITHOUT = {"CPU": "the package will run on PyTorch alone, slowly", "CUDA": "NVIDIA GPUs will run the Triton kernels"}


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


class Build(build_ext):
    def build_extension(self, ext):
        kind = ext.name.rpartition("_")[2].upper()
        target, temp = self.get_ext_fullpath(ext.name), os.path.join(self.build_temp, "eft")
        try:
            for folder in (temp, os.path.dirname(target)):
                os.makedirs(folder, exist_ok=True)
            how = (self.cpu if kind == "CPU" else self.cuda)(target, temp)
            print(f"eft_kernels: built the {kind} extension for {how}")
        except Exception as error:
            print(f"eft_kernels: NOT built: the {kind} extension ({error}); {WITHOUT[kind]}")

    def cpu(self, target, temp) -> str:
        cxx = compiler()
        jobs = [("csrc/cpu/kernels.cpp", isa, [f"-DEFT_ISA={isa}", *flags]) for isa, flags in ISAS.items()]
        jobs += [("csrc/cpu/pool.cpp", "pool", []),
                 ("csrc/bindings/cpu_module.cpp", "module", includes() + (["-DEFT_X86"] if X86 else []))]
        objects = []
        for source, name, flags in jobs:
            objects.append(os.path.join(temp, f"{name}.o"))
            if self.force or newer(objects[-1], source, "csrc/*/*.h"):
                self.spawn([*cxx, *FLAGS, *flags, "-c", source, "-o", objects[-1]])
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared"]
        self.spawn([*cxx, *shared, "-pthread", *objects, "-o", target])
        return f"{', '.join(ISAS)} with {' '.join(cxx)}"

    def cuda(self, target, temp) -> str:
        if os.path.exists(target):
            os.remove(target)  # nothing old is left where the build fails
        nvcc, sources = cuda_compiler(), sorted(glob.glob("csrc/cuda/*.cu"))
        if not sources:
            raise RuntimeError("no csrc/cuda/*.cu")
        listed = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        sass, ptx = cuda_targets(set(re.findall(r"compute_(\d+)", listed)), os.environ.get("EFT_KERNELS_CUDA_ARCHS"))
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in sass]
        codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]
        temp = os.path.join(temp, "_".join(["cuda", *sass]))
        os.makedirs(temp, exist_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = f"--threads={max(1, cores // len(sources))}"
        jobs = [(source, [*nvcc, *CUDA_FLAGS, threads, *codes]) for source in sources]
        jobs += [("csrc/bindings/cuda_module.cpp", [*compiler(), *FLAGS, *includes()])]
        jobs = [(source, os.path.join(temp, os.path.basename(source) + ".o"), command) for source, command in jobs]
        stale = [job for job in jobs if self.force or newer(job[1], job[0], "csrc/*/*.h", "csrc/*/*.cuh")]
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda job: self.spawn([*job[2], "-c", job[0], "-o", job[1]]), stale))
        # the CUDA runtime is part of it, and torch's does not stand in for it
        self.spawn([*nvcc, "-shared", "-cudart=static", "-nodlink", "-Xcompiler=-pthread",
                    "-Xlinker=--exclude-libs=ALL", *(job[1] for job in jobs), "-o", target])
        code = [f"sm_{a}" for a in sass] + [f"compute_{a}" for a in ptx]
        return f"{', '.join(code)} with {' '.join(nvcc)}"


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


def includes() -> list[str]:
    return [f"-I{p}" for p in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]


def newer(target: str, source: str, *headers: str) -> bool:
    """Whether ``target`` must be made again: it is older than its source or any header."""
    if not os.path.exists(target):
        return True
    files = (source, "setup.py", *(f for pattern in headers for f in glob.glob(pattern)))
    return any(os.path.getmtime(f) > os.path.getmtime(target) for f in files)


def main():
    nvcc = cuda_compiler()
    reasons = {"CPU": skip_reason(), "CUDA": skip_cuda_reason(
        os.environ.get("EFT_KERNELS_CUDA"), nvcc, compiler(), torch_cuda(),
        os.path.exists("/proc/driver/nvidia/version"))}
    for kind, reason in reasons.items():
        if reason:
            print(f"eft_kernels: NOT built: the {kind} extension ({reason}); {WITHOUT[kind]}")
    extensions = [Extension(f"eft_kernels._{kind.lower()}", sources=[], py_limited_api=limited_api(), optional=True)
                  for kind, reason in reasons.items() if not reason]
    setup(
        packages=find_packages(include=["eft_kernels*"]),
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        options=elsewhere() | ({"bdist_wheel": {"py_limited_api": "cp310"}} if extensions and limited_api() else {}),
    )


if __name__ == "__main__":
    main()
