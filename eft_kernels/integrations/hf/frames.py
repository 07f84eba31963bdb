"""What the calls around our `generate` were given, read from their stack frames. Nothing else here looks at frames.

Why: transformers' ``generate(..., custom_generate=callable)`` forwards to the callable only keywords that it names,
and of these none that ``GenerationMixin._sample`` names, too (``_extract_generation_mode_kwargs``, 5.0 to 5.24). So
``streamer`` and ``synced_gpus`` never arrive, ``tokenizer`` is taken out before and lost, and ``assistant_model`` and
the negative prompt are dropped in silence. The caller's processors arrive in one list with those that transformers
made, the caller's options in one generation config with the checkpoint's. A streamer that stays silent, an assistant
that is ignored or an option of the caller's that is taken for the checkpoint's would be wrong; so we look at the call.

PEFT's ``PeftModel.generate`` calls that of its base module. The callable is given the base module, which does not say
whether it stands for itself, without the adapter, or for the PeftModel, with it.

Once transformers hands the whole call to the callable, `Call` is made of that, and this file goes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from transformers import GenerationMixin

from .models import peft_models


@dataclass(frozen=True)
class Call:
    """A call of transformers' ``generate``, as it was made."""

    arguments: dict[str, Any]  # those that generate names
    options: dict[str, Any]  # the other keywords: generation options, inputs of the model, arguments of ours

    @property
    def given(self) -> set[str]:
        """Names of the generation options that the caller gave, in the call or by a generation config."""
        config = self.arguments.get("generation_config")
        own = {} if config is None else vars(config)
        return {*self.options, *(name for name, value in own.items() if value is not None)}


def _outwards(frame: FrameType | None, most: int) -> Iterator[FrameType]:
    """``frame`` and its callers, at most so many."""
    for _ in range(most):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def current_call() -> Call | None:
    """The call of transformers' ``generate`` that led to the function that asks; None where it was called directly."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    # a wrapper around our generate may lie between
    frame = next((f for f in _outwards(sys._getframe(2), 5) if f.f_code is code), None)
    if frame is None:
        return None
    signature = inspect.signature(GenerationMixin.generate)
    for outer in _outwards(frame.f_back, 2):
        # its decorators hold what was given before transformers took the tokenizer out and prepared the config
        args, kwargs = outer.f_locals.get("args"), outer.f_locals.get("kwargs")
        if args and args[0] is frame.f_locals["self"] and kwargs and "custom_generate" in kwargs:
            arguments = signature.bind_partial(*args, **kwargs).arguments
            options = arguments.pop("kwargs", {})
            return Call(arguments, options)
    arguments = {name: frame.f_locals[name] for name in signature.parameters}
    del arguments["generation_config"]  # prepared already: the checkpoint's options are in it
    return Call(arguments, arguments.pop("kwargs"))


def meant_model(model: nn.Module) -> nn.Module:
    """The PeftModel whose ``generate`` called transformers' with its base module ``model``, else ``model``."""
    classes = peft_models()
    for frame in _outwards(sys._getframe(2), 32 if classes else 0):
        holder: Any = frame.f_locals.get("self") if frame.f_code.co_name == "generate" else None
        if isinstance(holder, classes) and model in (holder.base_model, getattr(holder.base_model, "model", None)):
            return holder
    return model
