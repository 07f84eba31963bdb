"""The commands of tools/ that need no test file of their own."""

import os
import subprocess
import sys

import pytest
import torch

from tools import ROOT, sanitize
from tools import __main__ as command


def test_sanitize_runs_its_cases_through_the_backends_of_a_device(capsys):
    assert {*sanitize.NAMES} <= {case.name for case in sanitize.CASES}
    calls = sum(len(sanitize.NAMES) * (9 + 5 * (name == "triton")) for name in sanitize.backends("cpu"))
    assert sanitize.sanitize("cpu") == calls and f"{calls} calls on cpu" in capsys.readouterr().out
    assert command.main(["sanitize", "xpu"]) == 0 and "no backend but the reference" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures there")
def test_launches_are_measured_on_a_gpu(capsys):
    assert command.main(["launch_config"]) == 2
    assert "the cuda backend is not available" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "command"),
        (["polish"], "'sass', 'aot', 'tune', 'launch_config', 'sanitize', 'hub', 'coupled'"),
        (["launch_config", "--field", "colour"], "'colour'"),
        (["tune", "--table", "kitchen"], "'kitchen'"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(words, says, capsys):
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([name, "--help"])
    assert stop.value.code == 0 and f"python -m tools {name}" in capsys.readouterr().out


def test_the_gpu_tests_run_on_a_cpu():
    """They are skipped without a GPU: a name that has changed would show only there."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
        "-k",
        "launches and bf16",
    ]
    env = os.environ | {"EFT_KERNELS_TEST_DEVICE": "cpu"}
    run = subprocess.run(words, cwd=ROOT, env=env, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout[-2000:]
