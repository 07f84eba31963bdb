"""The family of examples/ as GGUF files, and in transformers. `make test-llama` has what this needs."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def installed(*names: str) -> bool:
    return any(importlib.util.find_spec(name) is not None for name in names)


collect_ignore_glob = [] if installed("llama_cpp", "ik_llama_cpp") and installed("gguf") else ["test_*.py"]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Makes a GGUF file of a model of the family, once for each set of options."""
    from gguf_files import write_llama

    folder, there = tmp_path_factory.mktemp("gguf"), {}

    def path(name, **options):
        key = (name, repr(options))
        if key not in there:
            there[key] = write_llama(folder / f"{len(there)}-{name}.gguf", name, **options)
        return there[key]

    return path


@pytest.fixture(scope="session")
def exact():
    """Settings with which llama.cpp computes nearest to float32. The fork's cache holds float16."""
    from eft_kernels.integrations.llama_cpp.library import library

    settings = {} if library().fork else {"kv_type": "f32", "flash_attention": False}
    return {"n_threads": 1, **settings}


@pytest.fixture(scope="session")
def model(files, exact):
    from eft_kernels.integrations.llama_cpp import EmulatedModel

    with EmulatedModel(files("base"), files("tuned-a"), files("ref"), **exact) as made:
        yield made


@pytest.fixture(scope="session")
def theirs():
    """The same models in transformers, by name, and their tokenizer."""
    from gguf_files import WEIGHTS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ("base", "tuned-a", "tuned-b", "ref")
    found = {n: AutoModelForCausalLM.from_pretrained(WEIGHTS / n, dtype=torch.float32).eval() for n in names}
    return found, AutoTokenizer.from_pretrained(WEIGHTS / "base")
