"""llama.cpp: emulated fine-tuning of three GGUF models, see docs/llama.cpp.md.

`EmulatedModel` writes text from GGUF files; `Model` is one of them, with settings of its own. llama.cpp is taken from
llama-cpp-python, or from ik-llama-cpp-python, when a model is loaded.
"""

from .emulated import EmulatedModel, InvalidScoresError, Written
from .model import Model

__all__ = ["EmulatedModel", "InvalidScoresError", "Model", "Written"]
