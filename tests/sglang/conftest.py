"""Against the real engine: `make test-sglang`. Where SGLang is not installed nothing here is collected."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.shipped import FAMILY

os.environ.setdefault("HF_HUB_OFFLINE", "1")
INSTALLED = any(d.metadata["Name"] == "sglang" for d in importlib.metadata.distributions())
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]


@pytest.fixture(scope="session")
def family():
    from tests.vllm.shipped import Family

    return Family()


@pytest.fixture(scope="session")
def compose(tmp_path_factory):
    """`eft-kernels compose`: (base, tuned, ref, options) to a folder; models are names of the family or folders."""

    def folder(base="base", tuned=("tuned-a",), ref="ref", *options) -> str:
        out = tmp_path_factory.mktemp("composed") / "eft"
        named = [("--base", base), *(("--tuned", name) for name in tuned), ("--ref", ref)]
        models = [x for option, name in named for x in (option, str(FAMILY / Path(name)))]
        subprocess.run(
            [sys.executable, "-m", "eft_kernels", "compose", *models, "--out", str(out), *options], check=True
        )
        return str(out)

    return folder
