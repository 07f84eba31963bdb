"""A transformers model as the decoding loops see it, with a cache of its own."""

from __future__ import annotations

import inspect

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...decoding import take_columns

# What models call their cache: transformers from 5.24 on, before it, and state-space models before it.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(model) -> str:
    """What the model calls its cache, as an argument and in its output."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in takes), "past_key_values")


class CausalLM:
    """A transformers causal language model as `eft_kernels.decoding.Model`, with a cache of its own."""

    def __init__(self, model, name: str, rollback: bool):
        self.model, self.name, self.takes = model, name, inspect.signature(model.forward).parameters
        self.width, self.cache_name = logits_width(model), cache_name(model)
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if rollback:
            # a window's layer forgets what a rollback needs; a full layer is masked to the window by the model
            self.cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
                                 for layer in self.cache.layers]
            # a DummyLayer reads another layer's cache; early 5.x has none to import
            fixed = {type(layer).__name__ for layer in self.cache.layers} - {"DynamicLayer", "DummyLayer"}
            if fixed or getattr(model, "_is_stateful", False):
                raise ValueError(f"draft_tokens: {name} ({type(model).__name__}) cannot take back rejected tokens "
                                 f"({', '.join(sorted(fixed)) or 'it is stateful'}); use draft_tokens=0")

    def __call__(self, ids, attention_mask, position_ids, keep):
        options = dict(attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=keep)
        options = {k: v for k, v in options.items() if k in self.takes}
        options[self.cache_name] = self.cache
        logits = self.model(input_ids=ids, use_cache=True, return_dict=True, **options).logits
        if logits.shape[-1] != self.width:
            raise ValueError(f"{self.name}: gives logits of width {logits.shape[-1]}, announces {self.width}")
        return logits[:, -keep:]

    def _layers(self):
        return [layer for layer in self.cache.layers if layer.keys is not None]

    def crop(self, count):
        for layer in self._layers():
            layer.crop(-count)

    def realign(self, columns):
        for layer in self._layers():
            layer.keys, layer.values = take_columns(layer.keys, columns), take_columns(layer.values, columns)


def logits_width(model) -> int:
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or model.config.get_text_config(decoder=True).vocab_size
