"""Log-probs of a prompt's tokens, of the combined scores.

SGLang computes them inside a model's forward pass, some rows at a time, from hidden states. So the other models keep
their hidden states, and base's pass makes all logits of the same rows and combines them.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.logprob_processor import LogprobResult

import eft_kernels as eft


class Kept:
    """In the place of the `InputLogprobProcessor` of a model beside base."""

    def forward(self, pruned_states, *args, lm_head, get_logits_fn, logits_metadata, **kwargs):
        self.logits = lambda rows: get_logits_fn(pruned_states[rows], lm_head, logits_metadata, use_logits_buffer=False)
        return LogprobResult(), None


class Combined:
    """In the place of base's `InputLogprobProcessor`, which it gives the combined scores as logits."""

    def __init__(self, inner, others: list[Kept], vocab_size: int):
        self.inner, self.others, self.vocab_size = inner, others, vocab_size
        self.strengths = None  # of the batch: a `composition.Strength`, or `sampler.Rows`

    def forward(self, *, token_to_seq_idx, get_logits_fn, **given):
        weights, upscale_top_p = self.strengths.weights, self.strengths.upscale_top_p
        device, done = given["pruned_states"].device, 0
        request = torch.tensor(token_to_seq_idx, dtype=torch.int64).to(device)

        def of_rows(value, rows):
            return value[request[rows]] if isinstance(value, torch.Tensor) else value

        def scores(states, lm_head, metadata, **more):
            nonlocal done
            rows = slice(done, done + len(states))
            done = rows.stop
            logits = [get_logits_fn(states, lm_head, metadata, **more), *(kept.logits(rows) for kept in self.others)]
            return eft.combine(
                [z[:, : self.vocab_size] for z in logits],
                of_rows(weights, rows),
                upscale_top_p=of_rows(upscale_top_p, rows),
            )

        out = self.inner.forward(token_to_seq_idx=token_to_seq_idx, get_logits_fn=scores, **given)
        for kept in self.others:
            kept.logits = None
        return out


def install(models: list[torch.nn.Module], vocab_size: int) -> Combined:
    """Replaces the models' processors; base's is returned."""
    processors = []
    for model in models:
        found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if len(found) != 1:
            raise ValueError(f"eft: {type(model).__name__} has {len(found)} logits processors, allowed is 1")
        processors += found
    kept = [Kept() for _ in models[1:]]
    for processor, own in zip(processors[1:], kept):
        processor.input_logprob_processor = own
    combined = Combined(processors[0].input_logprob_processor, kept, vocab_size)
    processors[0].input_logprob_processor = combined
    return combined
