"""Which of transformers' processors the fused operation applies itself, and which run in PyTorch before it."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from ...combination import Weights
from ...decoding import Target
from ...parameters import OFF, PARAMETERS
from .arguments import refuse_unless

# transformers' order of what it appends after the caller's processors, and the filters of ours among them
ORDER = (
    lp.TemperatureLogitsWarper,
    lp.TopHLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.WatermarkLogitsProcessor,
    lp.SynthIDTextWatermarkLogitsProcessor,
    lp.LogitNormalization,
)
WARPERS = {getattr(lp, p.warper): p.name for p in PARAMETERS if p.warper}


class _Filter:
    """A named sampling parameter, number or tensor [rows], in its place among transformers' processors."""

    def __init__(self, name: str, value):
        self.name, self.value = name, value

    def __call__(self, input_ids, scores):
        return Target(Weights([1.0]), None, {self.name: self.value}).filtered(scores)


def _kind(processor) -> type | None:
    """The transformers class whose place a processor takes."""
    if isinstance(processor, _Filter):
        return next(k for k, name in WARPERS.items() if name == processor.name)
    return type(processor)


def _value(processor):
    """(name, value) of a filter that the operation can apply itself, else None."""
    if isinstance(processor, _Filter):
        return processor.name, processor.value
    name = WARPERS.get(type(processor))
    usual = dict(min_tokens_to_keep=1, filter_value=-torch.inf)
    if name is None or any(getattr(processor, k, v) != v for k, v in usual.items()):
        return None
    return name, getattr(processor, name)


def sampling_of(processors, config, named: dict, callers) -> tuple[LogitsProcessorList, dict]:
    """(processors to apply to the scores in PyTorch, filters for the operation), in transformers' order.

    named: our own sampling arguments, which replace the warpers that transformers made from its config. callers: the
    processors that the caller gave. Only filters at the end of the list, in the operation's order, go to it.
    """
    processors = list(processors)
    if not config.do_sample:
        for name, value in named.items():
            off = (OFF[name], 0) if name == "temperature" else (OFF[name],)
            neutral = not isinstance(value, torch.Tensor) and value in off
            refuse_unless(name, value, neutral, "only with do_sample=True")
        return LogitsProcessorList(processors), {"temperature": 0.0}
    own = {id(p) for p in callers or ()}
    for name, value in named.items():
        kind = next(k for k, n in WARPERS.items() if n == name)
        old = [i for i, p in enumerate(processors) if type(p) is kind and id(p) not in own]
        if old:
            del processors[old[-1]]
        at = len(processors)
        while (
            at
            and id(processors[at - 1]) not in own
            and _kind(processors[at - 1]) in ORDER
            and ORDER.index(_kind(processors[at - 1])) > ORDER.index(kind)
        ):
            at -= 1
        processors.insert(at, _Filter(name, value))
    filters, order = {}, list(WARPERS.values())
    while processors and (found := _value(processors[-1])) is not None:
        name, value = found
        if filters and order.index(name) >= min(order.index(n) for n in filters):
            break
        filters[name] = value
        processors.pop()
    return LogitsProcessorList(processors), filters
