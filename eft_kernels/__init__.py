"""eft_kernels: emulated fine-tuning (arXiv 2310.12962) and other products of experts, fused down to the token."""

from types import ModuleType

from .combination import Weights, downscale, interpolate, proxy, upscale, weights
from .dispatch import backends
from .ops import (
    DraftOutput,
    SampleOutput,
    VerifyOutput,
    combine,
    draft,
    logprobs,
    row_seeds,
    sample,
    token_logprobs,
    verify,
)
from .parameters import TokenBias
from .token_bias import penalties
from .version import __version__

__all__ = [
    "DraftOutput",
    "SampleOutput",
    "TokenBias",
    "VerifyOutput",
    "Weights",
    "__version__",
    "backends",
    "combine",
    "downscale",
    "draft",
    "hf",
    "interpolate",
    "logprobs",
    "penalties",
    "proxy",
    "row_seeds",
    "sample",
    "token_logprobs",
    "upscale",
    "verify",
    "weights",
]


def __getattr__(name: str) -> ModuleType:
    if name == "hf":  # transformers is imported only when it is used
        from .integrations import hf

        return hf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
