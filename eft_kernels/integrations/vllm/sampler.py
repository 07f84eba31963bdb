"""Sampling on vLLM's V2 model runner: `eft_kernels.sample` on the logits of all models in one step.

The runner asks the model for a `ModelState` and lets its `custom_sampler` stand in for the sampler: no patching.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

import eft_kernels as eft

from ..composition import request_of, strength_of
from .model import packed


class EftModelState(DefaultModelState):
    def prepare_inputs(self, input_batch, req_states):
        # before each pass whose rows are sampled, also where a CUDA graph replays the pass
        self.model.expect_sampling()
        return super().prepare_inputs(input_batch, req_states)

    def custom_sampler(self, sampler):
        ours = EftSampler(sampler, self.model, self.max_num_reqs)
        config = self.vllm_config.speculative_config
        if config is None:
            return ours, None
        from .verifier import EftVerifier

        return ours, EftVerifier(ours, config)


class Logits(NamedTuple):
    """What a step's rows are sampled from."""

    models: list[torch.Tensor]  # J tensors [rows, V]
    weights: torch.Tensor | tuple[float, ...]  # J floats, or float32 [rows, J]
    upscale_top_p: torch.Tensor | float
    token_mask: torch.Tensor | None  # int32 [rows, ceil(V / 32)]: of the rows' grammars

    def scores(self) -> torch.Tensor:
        """Combined, float32 [rows, V]."""
        return eft.combine(
            self.models,
            self.weights,
            upscale_top_p=self.upscale_top_p,
            token_mask=self.token_mask,
            tuned=min(1, len(self.models) - 1),
        )


class EftSampler:
    """In the place of vLLM's sampler, of which it keeps the state of the requests.

    A row's text depends on its own request alone: its noise is a function of (seed, number of the new token), and which
    way it is sampled is a matter of its own parameters. Rows of requests that change the scores (penalties, biases,
    allowed ids, bad words, min_tokens, thinking budgets, custom processors) are sampled from the combined scores after
    vLLM's own processors, all others from the logits.
    """

    def __init__(self, inner, model, max_num_reqs: int):
        self.inner, self.model = inner, model
        composition = model.composition
        self.mode, self.default = composition.mode, composition.default
        self.weights = UvaBackedTensor((max_num_reqs, len(self.default.weights)), dtype=torch.float32)
        self.upscale_top_p = UvaBackedTensor(max_num_reqs, dtype=torch.float32)
        self.weights.np[:], self.upscale_top_p.np[:] = self.default.weights, self.default.upscale_top_p
        self.weights.copy_to_uva()
        self.upscale_top_p.copy_to_uva()
        self.processed = np.zeros(max_num_reqs, dtype=bool)  # slots whose scores something changes
        for processor in (*inner.logits_processors, inner.thinking_budget_state):
            note_answers(processor, self.processed)
        ends = getattr(model.config, "eos_token_id", None)
        self.end = ends[0] if isinstance(ends, (list, tuple)) and ends else ends or 0

    def __getattr__(self, name):  # the runner reads the inner sampler's state of requests
        return getattr(self.inner, name)

    def add_request(self, slot: int, params) -> None:
        given = request_of(params.extra_args)
        strength = strength_of(given, self.mode, "extra_args: eft", self.default)
        self.weights.np[slot], self.upscale_top_p.np[slot] = strength.weights, strength.upscale_top_p
        self.processed[slot] = False
        self.inner.add_request(slot, params)

    def apply_staged_writes(self) -> None:
        self.weights.copy_to_uva()
        self.upscale_top_p.copy_to_uva()
        self.inner.apply_staged_writes()

    def __call__(self, logits: torch.Tensor, batch) -> SamplerOutput:
        num_nans = get_num_nans(logits) if self.inner.compute_nans else None
        of = self.logits_of(logits, batch)
        tokens, combined = self.sample(of, batch)
        if self.inner.trace_replay_state is not None:
            self.inner.trace_replay_state.apply_trace(tokens, batch.idx_mapping)
        dims = self.inner.get_logprobs_dims(batch.idx_mapping_np)
        logprobs = None if dims is None else self.logprobs(of, combined, tokens, batch, *dims)
        sampled, rejected = get_num_sampled_and_rejected(
            batch.seq_lens.new_ones(batch.num_reqs),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            self.inner.req_states.prefill_len.gpu,
        )
        return SamplerOutput(tokens.view(-1, 1), logprobs, num_nans, sampled, rejected)

    def logits_of(self, handed: torch.Tensor, batch) -> Logits:
        models = self.model.take_logits(handed)
        if models is None:  # a dummy run: these are scores already
            return Logits([handed], (1.0,), 1.0, None)
        slots, rows = batch.idx_mapping_np, batch.expanded_idx_mapping
        w, p = self.weights.np[slots], self.upscale_top_p.np[slots]
        weights = tuple(w[0].tolist()) if (w == w[:1]).all() else self.weights.gpu[rows]
        upscale_top_p = float(p[0]) if (p == p[0]).all() else self.upscale_top_p.gpu[rows]
        # vLLM writes a grammar's bitmask into what it was handed as -inf: base's logits, and base may have weight 0
        mask = packed(handed != float("-inf")) if batch.has_structured_output_reqs else None
        return Logits(models, weights, upscale_top_p, mask)

    def sample(self, of: Logits, batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token for each row, int64 [rows], and the combined scores if they were needed, before any processor."""
        processed, combined = self.processed[batch.idx_mapping_np], None
        parameters = self.parameters(batch)
        if not processed.any():
            return self.draw(of, parameters), None
        combined = of.scores()
        changed = self.draw(Logits([self.process(combined, batch)], (1.0,), 1.0, None), parameters)
        if processed.all():
            return changed, combined
        rows = torch.from_numpy(self.processed).to(changed.device)[batch.expanded_idx_mapping]
        return torch.where(rows, changed, self.draw(of, parameters)), combined

    def draw(self, of: Logits, parameters: dict) -> torch.Tensor:
        out = eft.sample(
            of.models,
            of.weights,
            upscale_top_p=of.upscale_top_p,
            token_mask=of.token_mask,
            logprobs=False,
            tuned=min(1, len(of.models) - 1),
            **parameters,
        )
        return torch.where(out.valid, out.tokens, self.end)  # a row with NaN ends its text

    def parameters(self, batch) -> dict:
        """The sampling parameters and the noise of each row; a filter that no request uses is left out."""
        states, slots, rows = self.inner.sampling_states, batch.idx_mapping_np, batch.expanded_idx_mapping
        given = dict(
            temperature=states.temperature.gpu[rows],
            seed=states.seeds.gpu[rows],
            position=self.positions(batch, rows),
        )
        for name, off in (("top_k", states.vocab_size), ("top_p", 1.0), ("min_p", 0.0)):
            state = getattr(states, name)
            if (state.np[slots] != off).any():
                given[name] = state.gpu[rows]
        if "top_k" in given:
            given["top_k"] = given["top_k"].long()
        return given

    def positions(self, batch, rows) -> torch.Tensor:
        """The number of the token that each row is to write, 0 for a request's first; also after a preemption."""
        written = batch.positions[batch.logits_indices] + 1
        return (written - self.inner.req_states.prompt_len.gpu[rows]).clamp(min=0)

    def process(self, combined: torch.Tensor, batch, input_ids=None) -> torch.Tensor:
        """The scores after vLLM's processors and thinking budgets."""
        if input_ids is None:
            input_ids = batch.input_ids[batch.logits_indices]
        context = LogitsContext(
            expanded_idx_mapping=batch.expanded_idx_mapping,
            idx_mapping=batch.idx_mapping,
            idx_mapping_np=batch.idx_mapping_np,
            expanded_local_pos=batch.expanded_local_pos,
            input_ids=input_ids,
            pos=batch.positions[batch.logits_indices],
            seq_lens_upper_bound_np=batch.seq_lens_cpu_upper_bound.numpy(),
        )
        changed = combined.clone()
        for processor in self.inner.logits_processors:
            changed = processor.apply(changed, context)
        self.inner.thinking_budget_state.apply(changed, context)
        return changed

    def logprobs(self, of: Logits, combined, tokens, batch, top: int, chosen_ids: int):
        """vLLM's log-probs of each row: of the scores, or of what was sampled from."""
        mode = self.inner.logprobs_mode
        combined = of.scores() if combined is None else combined
        if mode in PROCESSED_LOGPROBS_MODES:
            combined = self.kept(combined, batch, mode)
        return compute_topk_scores(
            combined,
            top,
            tokens,
            batch.cu_num_logits_np.tolist() if len(combined) != batch.num_reqs else None,
            logprob_token_ids_state=self.inner.logprob_token_ids_state,
            expanded_idx_mapping=batch.expanded_idx_mapping,
            max_per_req_token_ids=chosen_ids,
            logits_mode=mode in ("raw_logits", "processed_logits"),
        )

    def kept(self, combined, batch, mode: str) -> torch.Tensor:
        """The scores after processors, temperature and filters; -inf outside."""
        changed = self.process(combined, batch)
        parameters = self.parameters(batch)
        temperature = parameters["temperature"][:, None]
        for name in ("seed", "position"):
            parameters.pop(name)
        if mode == "processed_logprobs":
            return eft.logprobs([changed], (1.0,), tuned=0, **parameters)
        greedy = temperature == 0
        parameters["temperature"] = torch.where(greedy, 1.0, temperature)[:, 0]
        inside = eft.logprobs([changed], (1.0,), tuned=0, **parameters) != float("-inf")
        return torch.where(inside, changed / torch.where(greedy, 1.0, temperature), float("-inf"))


def note_answers(processor, slots: np.ndarray) -> None:
    """Notes in ``slots`` for which requests ``processor`` says that it changes their scores."""
    ask = processor.add_request

    def add_request(slot, params):
        changes = ask(slot, params)
        slots[slot] |= bool(changes)
        return changes

    processor.add_request = add_request
