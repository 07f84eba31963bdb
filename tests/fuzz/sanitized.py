"""The C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer, beside the usual one.

python tests/fuzz/sanitized.py --seconds 60    builds it and runs fuzz.py on it, with fuzz.py's arguments
"""

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    "-O1",
    "-g1",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": [], **({"avx2": ["-mavx2", "-mfma", "-mf16c"]} if X86 else {})}
OPTIONS = dict(
    ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:detect_odr_violation=0",
    UBSAN_OPTIONS="print_stacktrace=1",
)


def runtime() -> str | None:
    """What LD_PRELOAD must name, for Python itself is not built with the sanitizer; None where there is none."""
    names = []
    for name in ("libasan.so", "libubsan.so"):
        try:
            found = subprocess.run([*CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        except OSError:
            return None
        if not os.path.isabs(found):
            return None
        names.append(os.path.realpath(found))
    return ":".join(names)


def build(folder: Path = ROOT / "build" / "asan") -> Path:
    """The library, made anew where a source or a flag is another."""
    sources = [ROOT / "csrc/cpu/kernels.cpp", ROOT / "csrc/cpu/pool.cpp", ROOT / "csrc/bindings/cpu_module.cpp"]
    content = b"".join(p.read_bytes() for p in sorted([*sources, *ROOT.glob("csrc/*/*.h")]))
    key = hashlib.sha256(content + repr((FLAGS, CXX, ISAS)).encode()).hexdigest()[:16]
    library = folder / key / "_cpu.abi3.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _make(sources, library)
    return library


def _make(sources: list[Path], library: Path):
    kernels, pool, module = sources
    jobs = [(kernels, isa, [f"-DEFT_ISA={isa}", *flags]) for isa, flags in ISAS.items()]
    if X86:  # the module asks for all three
        jobs.append((kernels, "avx512", ["-DEFT_ISA=avx512"]))
    jobs += [(pool, "pool", []), (module, "module", [f"-I{sysconfig.get_path('include')}", *["-DEFT_X86"] * X86])]
    objects = [library.parent / f"{name}.o" for _, name, _ in jobs]

    def compile_one(job, target):
        source, _, flags = job
        subprocess.run([*CXX, *FLAGS, *flags, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(compile_one, jobs, objects))
    part = library.with_suffix(f".{os.getpid()}")
    subprocess.run([*CXX, *FLAGS, "-shared", *objects, "-o", part], check=True)
    part.rename(library)


def command(*options: str) -> tuple[list[str], dict[str, str]]:
    """How to run fuzz.py on the sanitized build: (command, environment)."""
    argv = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--extension", str(build()), *options]
    return argv, {**os.environ, **OPTIONS, "LD_PRELOAD": runtime() or ""}


def main():
    if runtime() is None:
        sys.exit(f"{' '.join(CXX)} has no AddressSanitizer here")
    argv, environment = command(*sys.argv[1:])
    os.execve(argv[0], argv, environment)


if __name__ == "__main__":
    main()
