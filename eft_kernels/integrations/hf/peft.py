"""Adapters of PEFT: a model with its adapter on or off, held once; and models that are one and the same.

An adapter changes its base module in place: the module that ``PeftModel.get_base_model()`` returns computes with the
adapter on. Off is a state of the layers, entered for the forwards of one of the models alone.
"""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

# What these do lies in PeftModel's own forward, not in layers of the module.
NOT_IN_LAYERS = {"ADAPTION_PROMPT", "POLY", "XLORA", "SHADOW"}
# Initialisations that leave the base weights as they were; any other may move part of them into the adapter.
PURE_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class Off:
    """Stands for ``model`` with its adapters off, where a model is expected."""

    def __init__(self, model):
        self.model = model


def _holders() -> tuple[type, ...]:
    """The classes that hold an adapted module; none unless PEFT is imported."""
    peft = sys.modules.get("peft")
    return (
        ()
        if peft is None
        else tuple(getattr(peft, name) for name in ("PeftModel", "PeftMixedModel") if hasattr(peft, name))
    )


def layers_of(module) -> list:
    """The layers of a module that an adapter can be switched on and off in."""
    if "peft" not in sys.modules or not isinstance(module, torch.nn.Module):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, other

    kinds = (BaseTunerLayer, ModulesToSaveWrapper, getattr(other, "AuxiliaryTrainingWrapper", BaseTunerLayer))
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock(module):
    """One for each adapted module: whoever switches its adapters has it to himself until they are switched back."""
    with _locks_lock:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def switched(module, off: bool):
    """The adapters of ``module`` off for a while, or (off=False) left as they are while nobody else switches them.

    The state of the layers alone: PEFT's own switch also counts parameters and sets requires_grad.
    """
    with _lock(module):
        layers = layers_of(module) if off else []
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, state in zip(layers, before):
                layer._disable_adapters = state


def unwrapped(model, name: str):
    """The transformers module that an adapter sits in; ``model`` itself where it is none of PEFT's."""
    holders = _holders()
    if not holders:
        return model
    from peft.tuners.tuners_utils import BaseTuner

    while isinstance(model, (*holders, BaseTuner)):
        for config in model.peft_config.values():
            kind = getattr(config.peft_type, "value", config.peft_type)
            if config.is_prompt_learning or kind in NOT_IN_LAYERS or getattr(config, "alora_invocation_tokens", None):
                what = "virtual tokens" if config.is_prompt_learning else "a forward of its own"
                raise ValueError(
                    f"{name}: {kind} works by {what}, which emulated decoding cannot honour; allowed are "
                    "adapters made of layers, such as LORA"
                )
        model = model.model if isinstance(model, BaseTuner) else model.get_base_model()
    return model


def calling(model):
    """The PeftModel whose ``generate`` called transformers' with its base module ``model``, else ``model``."""
    holders, frame = _holders(), sys._getframe(2)
    for _ in range(32 if holders else 0):
        if frame is None:
            break
        if frame.f_code.co_name == "generate":
            holder = frame.f_locals.get("self")
            if isinstance(holder, holders) and model in (holder.base_model, getattr(holder.base_model, "model", None)):
                return holder
        frame = frame.f_back
    return model


def resolved(models, names):
    """(transformers modules, a context for the forwards of each, whether its adapter is off there).

    The base module on its own, beside a PeftModel over it, stands for the same weights with the adapter off.
    """
    held = [isinstance(m, _holders()) for m in models]
    inner = [unwrapped(m.model if isinstance(m, Off) else m, name) for m, name in zip(models, names)]
    adapted = {id(module) for module, holder in zip(inner, held) if holder}
    off = [
        isinstance(m, Off) or (id(module) in adapted and not holder) for m, module, holder in zip(models, inner, held)
    ]
    contexts = [nullcontext] * len(models)
    for j, name in enumerate(names):
        if off[j]:
            _check_switch(inner[j], name)
        if off[j] or layers_of(inner[j]):
            contexts[j] = partial(switched, inner[j], off[j])
    for j, name in enumerate(names):
        if not name.startswith("tuned"):
            continue
        with contexts[j]() if not off[j] else nullcontext():
            on = any(layer.active_adapters and not layer.disable_adapters for layer in layers_of(inner[j]))
        if off[-1] and inner[j] is inner[-1] and not on:
            raise ValueError(f"{name}: its adapter is switched off, so it has the weights of ref; switch it on")
        for i in (*range(1, j), len(names) - 1):  # other tuned models, and ref
            if off[i] == off[j] and same_weights(inner[i], inner[j]):
                what = "the result would be model alone" if names[i] == "ref" else "two models are expected"
                raise ValueError(
                    f"{name}: has the same weights as {names[i]} (one module, or shared memory), so "
                    f"{what}; give another model, or one with an adapter (PEFT) and ref=None"
                )
    return inner, contexts, off


def check_distinct(models, off, prompts, names) -> None:
    """No two terms of a combination may be one: the same weights, adapter and prompt."""
    for j in range(1, len(models)):
        for i in range(j):
            if prompts[i] is None and prompts[j] is None and same_weights(models[i], models[j]) and off[i] == off[j]:
                raise ValueError(
                    f"{names[j]}: is {names[i]} (one module, or shared memory) with the same prompt; give "
                    "it another prompt in prompts, or add their weights"
                )


def _check_switch(module, name: str) -> None:
    pure = {"bias": (None, "none"), "init_lora_weights": PURE_INITS, "layer_replication": (None,)}
    for config in getattr(module, "peft_config", {}).values():
        for option, allowed in pure.items():
            value = getattr(config, option, None)
            if value not in allowed:
                raise ValueError(
                    f"{name}: an adapter with {option}={value!r} changes its base and cannot be switched "
                    "off; load the model that it was trained from as ref"
                )


def _storage(parameter):
    """What tells one parameter's memory from another's."""
    try:
        address = parameter.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own
        address = 0
    return (address, tuple(parameter.shape), tuple(parameter.stride())) if address else id(parameter)


def same_weights(a, b) -> bool:
    """Whether two models are one: the same module, or every parameter in the same memory."""
    if a is b:
        return True
    if not all(isinstance(m, torch.nn.Module) for m in (a, b)):
        return False
    ours, theirs = ({_storage(p) for p in m.parameters()} for m in (a, b))
    return bool(ours) and ours == theirs
