"""The CUDA backend for the host: csrc/cuda on the shim, as the module `eft_kernels._cuda`."""

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    "-O2",
    "-g1",
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Werror",
    "-DEFT_SIMT",
    f"-I{ROOT / 'tests' / 'simt'}",
    f"-I{sysconfig.get_path('include')}",
]


def build(folder: Path = ROOT / "build" / "simt", replace: dict[str, tuple[str, str]] | None = None) -> Path:
    """The library, made anew where a source or a flag is another; ``replace``: {file of csrc/cuda: (text, by what)}."""
    sources = sorted((ROOT / "csrc" / "cuda").rglob("*.cu")) + [
        ROOT / "tests/simt/simt.cpp",
        ROOT / "csrc/bindings/cuda_module.cpp",
    ]
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("tests/simt/*.h")]
    content = b"".join(p.read_bytes() for p in sorted([*sources, *headers]))
    key = hashlib.sha256(content + repr((FLAGS, CXX, sorted((replace or {}).items()))).encode()).hexdigest()[:16]
    library = folder / key / "_cuda.abi3.so"
    work = library.parent
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _make(work, sources, replace, library)
    return library


def _make(work: Path, sources: list[Path], replace, library: Path):
    if replace:  # a copy of csrc with one text replaced
        sources = [_copy(work, p, replace) for p in sources]
    objects = [work / f"{p.stem}.o" for p in sources]

    def compile_one(source, target):
        kind = ["-x", "c++"] if source.suffix == ".cu" else []
        subprocess.run([*CXX, *FLAGS, *kind, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, sources, objects))
    part = library.with_suffix(f".{os.getpid()}")
    subprocess.run([*CXX, "-shared", *objects, "-o", part], check=True)
    part.rename(library)


def _copy(work: Path, source: Path, replace) -> Path:
    tree = work / "csrc"
    if not tree.exists():
        shutil.copytree(ROOT / "csrc", tree)
        for name, (old, new) in replace.items():
            path = tree / "cuda" / name
            text = path.read_text()
            assert old in text, f"{name} does not have {old!r}"
            path.write_text(text.replace(old, new))
    return tree / source.relative_to(ROOT / "csrc") if source.is_relative_to(ROOT / "csrc") else source


def load(library: Path):
    """(module, handle): the handle has simt_set_seed, simt_set_device, simt_barriers and simt_launches."""
    loader = importlib.machinery.ExtensionFileLoader("eft_kernels._cuda", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    handle = ctypes.CDLL(str(library))
    handle.simt_set_seed.argtypes = [ctypes.c_uint64]
    handle.simt_barriers.restype = handle.simt_launches.restype = ctypes.c_int64
    return module, handle
