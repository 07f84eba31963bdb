"""Speculation on vLLM's V2 runner: vLLM drafts, by whatever method; the emulated model verifies here.

Drafts that are a proposer's likeliest tokens (vLLM's default) are verified by the coupled rule, which is exact for any
draft: a row writes its own sample, with the noise of (seed, position), and goes on while that is the draft. So a
request's text is the one it has without speculation. Drafts that were drawn from the draft model
(``draft_sample_method="probabilistic"``) are verified by `eft_kernels.verify`, by the rule "token" or "block"
(``rejection_sample_method``), which accepts more of them and keeps the distribution.
"""

from __future__ import annotations

import torch
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled

import eft_kernels as eft

RULES = {"standard": "token", "block": "block"}


class EftVerifier:
    """In the place of vLLM's rejection sampler. Rows are ragged: request i has rows cu_num_logits[i] to [i + 1]."""

    def __init__(self, sampler, config):
        self.sampler = sampler
        self.slots = config.num_speculative_tokens + 1
        self.rule = RULES[config.rejection_sample_method]

    def __call__(self, logits, batch, draft_logits=None, invalid_drafts=None) -> SamplerOutput:
        sampler = self.sampler
        num_nans = get_num_nans(logits) if sampler.inner.compute_nans else None
        of = sampler.logits_of(logits, batch)
        drafts = self.drafts_of(batch, invalid_drafts)
        own, combined = sampler.sample(of, batch)
        rows, inside = self.rows_of(batch)
        tokens, emitted = self.coupled(own, drafts, rows, inside)
        processed = sampler.processed[batch.idx_mapping_np]
        # the rules know the drafts' distribution before masks alone
        if draft_logits is not None and of.token_mask is None and not processed.all():
            drawn, their = self.drawn(of, draft_logits, drafts, rows, inside, batch)
            changed = torch.from_numpy(processed).to(tokens.device)
            tokens = torch.where(changed[:, None], tokens, drawn)
            emitted = torch.where(changed, emitted, their)
        logprobs = self.logprobs(of, combined, tokens, emitted, batch)
        sampled, rejected = get_num_sampled_and_rejected(
            emitted.to(torch.int32),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            sampler.inner.req_states.prefill_len.gpu,
        )
        return SamplerOutput(tokens, logprobs, num_nans, sampled, rejected)

    def drafts_of(self, batch, invalid) -> torch.Tensor:
        """The token that each row was given, int64 [num_logits]; -1 for what cannot be accepted."""
        drafts, _ = gather_draft_sampled(
            batch.input_ids,
            batch.positions,
            batch.logits_indices,
            batch.expanded_idx_mapping,
            batch.expanded_local_pos,
            self.sampler.inner.req_states.prefill_len.gpu,
        )
        return (drafts if invalid is None else drafts.masked_fill(invalid, -1)).long()

    def rows_of(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of each request's slot, int64 [requests, K + 1], and which slots there are."""
        starts, ends = batch.cu_num_logits[: batch.num_reqs, None], batch.cu_num_logits[1 : batch.num_reqs + 1, None]
        rows = starts + torch.arange(self.slots, device=starts.device)
        return torch.minimum(rows, ends - 1).long(), rows < ends

    @staticmethod
    def coupled(own, drafts, rows, inside) -> tuple[torch.Tensor, torch.Tensor]:
        """Each slot's own sample, up to the first that is not the draft."""
        tokens = own[rows]
        accepted = (tokens[:, :-1] == drafts[rows[:, 1:]]) & inside[:, 1:]
        return tokens, 1 + accepted.long().cumprod(1).sum(1)

    def drawn(self, of, draft_logits, drafts, rows, inside, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`eft_kernels.verify`, the draft model beside the others with weight 0."""
        sampler, first = self.sampler, rows[:, 0]
        offsets = batch.cu_num_logits[: batch.num_reqs + 1].long()
        # the draft model's logits [requests, K, V] as rounds one after the other; after the last draft there are none
        request = torch.repeat_interleave(
            torch.arange(batch.num_reqs, device=rows.device), offsets.diff(), output_size=len(drafts)
        )
        slot = batch.expanded_local_pos.long().clamp(max=draft_logits.shape[1] - 1)
        drafted = draft_logits[batch.idx_mapping[request], slot, : of.models[0].shape[1]]
        if isinstance(of.weights, torch.Tensor):
            weights = torch.nn.functional.pad(of.weights[first], (0, 1))
        else:
            weights = (*of.weights, 0.0)
        upscale_top_p = of.upscale_top_p
        if isinstance(upscale_top_p, torch.Tensor):
            upscale_top_p = upscale_top_p[first]
        given = {name: x[first] for name, x in sampler.parameters(batch).items()}
        proposed = torch.where(inside[:, 1:], drafts[rows[:, 1:]], -1)
        out = eft.verify(
            [*of.models, drafted],
            weights,
            proposed.clamp(min=0),
            (proposed >= 0).long().cumprod(1).sum(1),
            offsets=offsets,
            method=self.rule,
            draft=len(of.models),
            upscale_top_p=upscale_top_p,
            draft_top_k=0,
            draft_top_p=1.0,
            draft_min_p=0.0,
            **given,
        )
        # a row with NaN ends its text
        at_end = torch.arange(self.slots, device=rows.device) == out.num_emitted[:, None]
        tokens = torch.where(at_end & ~out.valid[:, None], sampler.end, out.tokens).clamp(min=0)
        return tokens, torch.where(out.valid, out.num_emitted, out.num_emitted + 1)

    def logprobs(self, of, combined, tokens, emitted, batch):
        top = self.sampler.inner.sampling_states.max_num_logprobs(batch.idx_mapping_np)
        if top == NO_LOGPROBS:
            return None
        counts = batch.cu_num_logits[1 : batch.num_reqs + 1] - batch.cu_num_logits[: batch.num_reqs]
        total = len(batch.expanded_local_pos)
        request = torch.repeat_interleave(
            torch.arange(batch.num_reqs, device=tokens.device), counts.long(), output_size=total
        )
        slot = batch.expanded_local_pos.long()
        flat = torch.where(slot < emitted[request], tokens[request, slot], 0)
        return self.sampler.logprobs(of, combined, flat, batch, top, 0)
