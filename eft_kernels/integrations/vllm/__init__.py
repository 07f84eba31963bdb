"""Emulated fine-tuning inside vLLM: `EftForCausalLM`, an architecture that holds base, tuned and ref.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. A folder made by
``eft-kernels compose`` is then a model like any other, ``vllm serve FOLDER``; see docs/vllm.md.
"""

from __future__ import annotations

from ..composition import ARCHITECTURE

KNOWN_VERSIONS = ("0.32",)  # of vLLM: those that tests/vllm has run with


def register() -> None:
    """Makes the architecture known to vLLM. It imports neither the model nor torch: vLLM only logs what fails here."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .startup import EftConfig

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EftConfig
