"""The device: what a row says of it, cores pinned, its bandwidth, and how one call is timed, counted and weighed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import importlib.metadata
import math
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .. import dispatch
from ..version import __version__

SCHEMA = 1
Timer = Callable[[int], float]  # of n: seconds of one call, over at least n calls


class Unavailable(Exception):
    """What this machine or this installation does not have; the message says why."""


# --- what a row says of where it was measured ----------------------------------------------------------------------


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def default_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def backend(kind: str) -> str:
    """The name of our backend that ``auto`` means on the device."""
    return dispatch.choose("auto", torch.device(kind)).__name__.rsplit(".", 1)[-1]


def _read(path: str, key: str) -> str | None:
    try:
        with open(path) as f:
            return next((line.split(":", 1)[1].strip() for line in f if line.startswith(key)), None)
    except OSError:
        return None


@functools.cache
def _nvidia(query: str) -> str | None:
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return out.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(command: str, kind: str | None = None) -> dict[str, Any]:
    """The fields of a row that describe where, when and by what it was measured; ``run`` is new at every call. Of what
    sources it was, only a checkout knows (benchmarks/provenance.py)."""
    kind = kind or default_kind()
    isa: str | None
    if kind == "cuda":
        name, isa = torch.cuda.get_device_name(), "sm_{}{}".format(*torch.cuda.get_device_capability())
    else:
        name = _read("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
        about = dispatch.backends()["cpu"]
        isa = about["reason"].split(",")[0] if about["available"] else None
    driver = _nvidia("driver_version") if kind == "cuda" else None
    return dict(
        schema=SCHEMA,
        device=name,
        device_kind=kind,
        driver=driver,
        isa=isa,
        cores=len(cores()),
        os=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        eft_kernels=__version__,
        commit=None,
        dirty=None,
        source=None,
        command=command,
        date=time.strftime("%Y-%m-%d %H:%M:%S%z"),
        run=uuid.uuid4().hex[:12],
    )


# --- the CPU: cores and caches -------------------------------------------------------------------------------------


@contextlib.contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """torch and every thread of this process on ``threads`` cores, as before afterwards; None changes nothing."""
    if threads is None:
        yield
        return
    if threads > len(cores()):
        raise Unavailable(f"threads: got {threads}, allowed is 1 to {len(cores())}, the cores of this process")
    before = torch.get_num_threads()
    tasks = [int(t) for t in os.listdir("/proc/self/task")] if hasattr(os, "sched_setaffinity") else []
    was: dict[int, set[int]] = {}
    mine = cores()
    try:
        torch.set_num_threads(threads)
        for task in tasks:  # threads that libraries started earlier too
            with contextlib.suppress(ProcessLookupError):
                was[task] = os.sched_getaffinity(task)
                os.sched_setaffinity(task, mine[:threads])
        yield
    finally:
        torch.set_num_threads(before)
        for task in [int(t) for t in os.listdir("/proc/self/task")] if tasks else []:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(task, was.get(task, set(mine)))


def cache_bytes(level: int) -> int:
    """Size of the CPU's cache of that level (0: the last), 1 MiB or 32 MiB where the system does not say."""
    found: dict[int, int] = {}
    for index in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*"):
        with contextlib.suppress(OSError, ValueError):
            size = Path(index, "size").read_text().strip()
            if Path(index, "type").read_text().strip() != "Instruction":
                found[int(Path(index, "level").read_text())] = int(size.rstrip("KM")) << (20 if "M" in size else 10)
    return found.get(level or max(found, default=0), 1 << 20 if level else 32 << 20)


def rotation_bytes(kind: str) -> int:
    """How much the rotating inputs must hold together: on a GPU no call finds its own in the cache; on a CPU they are
    well beyond the second level (what has just been computed may be in the last)."""
    return 2 * torch.cuda.get_device_properties().L2_cache_size if kind == "cuda" else 8 * cache_bytes(2)


# --- bandwidth -----------------------------------------------------------------------------------------------------


def bandwidth(kind: str, threads: int | None) -> tuple[float, float]:
    """(GB/s that the device can deliver to a kernel that only reads, or a GPU's copy; GB/s of a copy, read + written):
    the best of some passes over buffers far beyond every cache. Call it within `pinned(threads)`; None: every core."""
    if kind == "cuda":
        a = torch.ones(1 << 28, dtype=torch.int32, device=kind)  # 1 GiB
        b = torch.empty_like(a)
        copy = best_rate(timer(b.copy_, [(a,)], kind, "eager"), 2 * a.nbytes)
        return copy, copy
    size = max(256 << 20, 4 * cache_bytes(0))
    a = torch.ones(size, dtype=torch.uint8)
    b = torch.ones_like(a)
    # memchr reads as fast as the core can, and ctypes lets go of the interpreter lock
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    readers = len(cores()) if threads is None else threads
    part = size // readers
    with ThreadPoolExecutor(readers) as pool:

        def read() -> None:
            jobs = [pool.submit(find, a.data_ptr() + i * part, 0, part) for i in range(readers)]
            if any(job.result() for job in jobs):
                raise RuntimeError("memchr found a zero in a buffer of ones")

        return (
            best_rate(timer(read, [()], kind, "eager"), part * readers),
            best_rate(timer(b.copy_, [(a,)], kind, "eager"), 2 * size),
        )


def best_rate(measure: Timer, nbytes: int, passes: int = 7) -> float:
    measure(1)
    return nbytes / min(measure(1) for _ in range(passes)) / 1e9


# --- one call: its time, its operators, its memory -----------------------------------------------------------------


def timer(call: Callable[..., object], sets: Sequence[tuple[Any, ...]], kind: str, launch: str) -> Timer:
    """A function of n: seconds of one ``call(*set)``, over at least n calls whose inputs rotate over ``sets``."""
    turn = 0

    def calls(n: int) -> None:
        nonlocal turn
        for _ in range(n):
            call(*sets[turn % len(sets)])
            turn += 1

    if kind == "cpu":

        def measure(n: int) -> float:
            start = time.perf_counter()
            calls(n)
            return (time.perf_counter() - start) / n

        return measure

    def events(work: Callable[[], object], n: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds: float = start.elapsed_time(end) * 1e-3
        return seconds / n

    if launch == "eager":
        return lambda n: events(lambda: calls(n), n)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what allocates or compiles does it before the capture
        calls(2)
    torch.cuda.current_stream().wait_stream(stream)
    graph, turn = torch.cuda.CUDAGraph(), 0
    with torch.cuda.graph(graph):
        calls(len(sets))

    def replay(times: int) -> None:
        for _ in range(times):
            graph.replay()

    def measure_replay(n: int) -> float:
        times = math.ceil(n / len(sets))
        return events(lambda: replay(times), times * len(sets))

    return measure_replay


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr: the profiler's library writes two lines a session there."""
    keep, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(null)


def profile(call: Callable[..., object], args: tuple[Any, ...], kind: str) -> tuple[int, int]:
    """(launches, peak bytes beyond the inputs) of one call: on a GPU its kernels and the caching allocator's peak; on
    a CPU the operators of torch that call no other (a compiled graph is one) and the running sum of allocations.
    What our own CPU kernels do, torch does not see: see `own_scratch`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if kind == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*args)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    with quiet(), torch.profiler.profile(activities=activities, profile_memory=kind == "cpu") as seen:
        call(*args)
        if kind == "cuda":
            torch.cuda.synchronize()
    if kind == "cuda":
        return sum(e.device_type.name == "CUDA" for e in seen.events()), peak
    raw = sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    now = peak = 0
    for event in raw:
        now += event.nbytes()
        peak = max(peak, now)
    leaf = [
        e
        for e in seen.events()
        if e.name.startswith("aten::") and not any(c.name.startswith("aten::") for c in e.cpu_children)
    ]
    return len(leaf) + sum("CompiledFxGraph" in e.name for e in seen.events()), peak


def own_scratch() -> int:
    """Bytes that our CPU kernels hold beyond what torch allocated."""
    scratch = getattr(getattr(dispatch.load("cpu"), "_cpu", None), "scratch_bytes", None)
    return scratch() if scratch else 0


def issue_us(slots: float) -> float | None:
    """Microseconds in which this GPU issues so many instructions of a thread (4 schedulers a processor, 32 lanes)."""
    clock = _nvidia("clocks.max.sm")  # MHz
    return slots / (torch.cuda.get_device_properties().multi_processor_count * 4 * 32 * float(clock)) if clock else None
