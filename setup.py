"""Builds what the machine can build and says what and why; installing never fails for want of a compiler.

EFT_KERNELS_CPU=0 skips the C++ extension. Neither torch nor ninja is needed: the extension has no torch header.
"""

import glob
import os
import platform
import shlex
import shutil
import sysconfig

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
    if os.environ.get("EFT_KERNELS_CPU") == "0":
        return "EFT_KERNELS_CPU=0"
    if os.name == "nt":
        return "Windows is not supported yet"
    if compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    return None


class Build(build_ext):
    def build_extension(self, ext):
        cxx, temp = compiler(), os.path.join(self.build_temp, "eft")
        os.makedirs(temp, exist_ok=True)
        include = [f"-I{p}" for p in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]
        jobs = [("csrc/cpu/kernels.cpp", isa, [f"-DEFT_ISA={isa}", *flags]) for isa, flags in ISAS.items()]
        jobs += [("csrc/cpu/pool.cpp", "pool", []),
                 ("csrc/bindings/cpu_module.cpp", "module", include + (["-DEFT_X86"] if X86 else []))]
        objects = []
        try:
            for source, name, flags in jobs:
                objects.append(os.path.join(temp, f"{name}.o"))
                if self.force or newer(objects[-1], source):
                    self.spawn([*cxx, *FLAGS, *flags, "-c", source, "-o", objects[-1]])
            target = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shared = ["-bundle", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared"]
            self.spawn([*cxx, *shared, "-pthread", *objects, "-o", target])
            print(f"eft_kernels: built the CPU extension for {', '.join(ISAS)} with {' '.join(cxx)}")
        except Exception as error:
            print(f"eft_kernels: NOT built: the CPU extension ({error}); the package will run on PyTorch alone, slowly")


def newer(target: str, source: str) -> bool:
    """Whether ``target`` must be made again: it is older than its source or any header."""
    if not os.path.exists(target):
        return True
    headers = glob.glob("csrc/*/*.h")
    return any(os.path.getmtime(f) > os.path.getmtime(target) for f in (source, "setup.py", *headers))


reason = skip_reason()
if reason:
    print(f"eft_kernels: NOT built: the CPU extension ({reason}); the package will run on PyTorch alone, slowly")
setup(
    packages=[*find_packages(include=["eft_kernels*"]), "eft_kernels._benchmarks"],
    package_dir={"eft_kernels._benchmarks": "benchmarks"},
    ext_modules=[] if reason else [Extension("eft_kernels._cpu", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": Build},
    options={} if reason else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
