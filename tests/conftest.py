"""What every test shares: no network, poisoned outputs, the list of backends.

A test that takes ``backend`` runs once for each backend that is available here, one that takes ``compiled`` once for
each but the reference, which it compares with. tests/test_cases.py holds that the C++ one is here wherever it can be.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import eft_kernels as eft
from eft_kernels import dispatch

# Each has an environment of its own: make test-llama, make test-sglang, make test-vllm. (Two files named conftest would
# be one module.)
collect_ignore = ["llamacpp", "sglang", "vllm"]

BACKENDS = [name for name, row in eft.backends().items() if row["available"]]
COMPILED = [name for name in BACKENDS if name != "reference"]

if os.environ.get("TRITON_INTERPRET") == "1":
    # A device function patches triton.language at each call, which takes longer than the call. Once a module is enough.
    from triton.runtime import interpreter

    def call(self, *args, seen=set(), **kwargs):  # noqa: B006
        if id(self.fn.__globals__) not in seen:
            seen.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Unless a test says otherwise: spinning threads only cost where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llamas():
    """Small random models of transformers: base, tuned a, tuned b, ref."""
    from test_hf import make

    return [make("llama", s) for s in (1, 2, 3, 4)]


def pytest_generate_tests(metafunc):
    for fixture, names in (("backend", BACKENDS), ("compiled", COMPILED)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; runs with EFT_KERNELS_SLOW=1")


def pytest_collection_modifyitems(items):
    if os.environ.get("EFT_KERNELS_SLOW") != "1":
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes; EFT_KERNELS_SLOW=1 runs it"))


class Poisoned:
    """``torch`` as a backend sees it in tests: memory from ``empty`` holds NaN, -77 or True until it is written."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if name not in ("empty", "empty_like", "empty_strided"):
            return value

        def poisoned(*args, **kwargs):
            out = value(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else True if out.dtype == torch.bool else -77)

        return poisoned


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    for name in BACKENDS:
        package = dispatch.load(name)
        inner = [x for x in vars(package).values() if getattr(x, "__package__", None) == package.__name__]
        for module in (package, *inner):  # the reference is several
            if getattr(module, "torch", None) is torch:
                monkeypatch.setattr(module, "torch", Poisoned(torch))
        if hasattr(module, "_cpu"):  # makes its outputs itself
            module._cpu.set_poison(True)
