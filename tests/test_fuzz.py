"""A few seconds of tests/fuzz on every run; `make fuzz` takes minutes."""

import subprocess
import sys
from pathlib import Path

import conftest
import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))
import sanitized  # noqa: E402

pytestmark = pytest.mark.skipif("cpu" not in conftest.COMPILED, reason="the C++ extension is not built")


def run(argv, environment=None, timeout=200):
    p = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=timeout)
    assert p.returncode == 0, f"{p.returncode}\n{p.stdout[-500:]}\n{p.stderr[-3000:]}"
    return int(p.stdout.split(" cases")[0].split()[-1])


def test_calls_nobody_would_write():
    """The same ones each time; `make fuzz` makes others, and what fails prints its seed."""
    assert run([sys.executable, str(FUZZ / "fuzz.py"), "--seconds", "8", "--seed", "0"]) > 5


def test_threads_that_change_what_others_read():
    assert run([sys.executable, str(FUZZ / "fuzz.py"), "--seconds", "3", "--target", "threads"]) > 0


@pytest.mark.skipif(sanitized.runtime() is None, reason="the compiler has no AddressSanitizer")
def test_calls_nobody_would_write_under_sanitizers():
    argv, environment = sanitized.command("--seconds", "10", "--seed", "0")
    assert run(argv, environment) > 0


@pytest.mark.skipif(sanitized.runtime() is None, reason="the compiler has no AddressSanitizer")
def test_the_sanitized_build_stands_in_for_the_other():
    """Its runtime is loaded, and its code is what runs."""
    code = f"""
import sys
sys.path.insert(0, {str(FUZZ)!r})
import fuzz
fuzz.use({str(sanitized.build())!r})
from eft_kernels._backends import cpu
import torch, eft_kernels as eft
loaded = open("/proc/self/maps").read()
assert "libasan" in loaded and "build/asan" in loaded and "eft_kernels/_cpu" not in loaded
print(len(eft.sample([torch.zeros(3, 9)], [1.0], seed=1, position=0).tokens), "cases")
"""
    argv, environment = sanitized.command()
    assert run([sys.executable, "-c", code], environment) == 3
