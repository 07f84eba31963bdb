"""``--sampling-backend eft``: `eft_kernels.sample` on the logits of all models in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB, Sampler
from sglang.srt.sampling.sampling_params import TOP_K_ALL

import eft_kernels as eft

from ..composition import Composition, request_of, strength_of


@dataclass
class Rows:
    """What each row of a batch asks for beside SGLang's own parameters."""

    weights: torch.Tensor | tuple[float, ...]  # J floats, or float32 [rows, J]
    upscale_top_p: torch.Tensor | float
    seed: torch.Tensor  # int64 [rows]
    prompt_length: torch.Tensor  # int64 [rows]


class Requests:
    """Makes the rows of a batch, again only when its requests change."""

    def __init__(self, composition: Composition, random_seed: int, device):
        self.mode, self.default, self.device = composition.mode, composition.default, device
        # for requests without a seed; every rank draws the same
        self.generator = torch.Generator().manual_seed(random_seed)
        self.last: list = []
        self.made: Rows | None = None

    def rows(self, requests: list) -> Rows:
        if self.made is None or len(requests) != len(self.last) or any(a is not b for a, b in zip(requests, self.last)):
            self.last, self.made = list(requests), self.make([self.of(request) for request in requests])
        return self.made

    def of(self, request) -> tuple:
        """(weights, upscale_top_p, seed, prompt length), noted in the request."""
        own = getattr(request, "eft", None)
        if own is None:
            params = request.sampling_params
            given = request_of(params.custom_params, "custom_params")
            strength = strength_of(given, self.mode, "custom_params: eft", self.default)
            seed = params.sampling_seed
            if seed is None:
                seed = int(torch.randint(1 << 62, (), generator=self.generator))
            own = request.eft = (strength.weights, strength.upscale_top_p, seed, len(request.origin_input_ids))
        return own

    def make(self, rows: list[tuple]) -> Rows:
        weights, upscale_top_p, seed, length = zip(*rows)

        def tensor(values, dtype):
            return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

        return Rows(
            weights[0] if len(set(weights)) == 1 else tensor(weights, torch.float32),
            upscale_top_p[0] if len(set(upscale_top_p)) == 1 else tensor(upscale_top_p, torch.float32),
            tensor(seed, torch.int64),
            tensor(length, torch.int64),
        )


@dataclass
class Step:
    """What the sampler needs of a step beside the scores."""

    models: list[torch.Tensor] | None  # J tensors [rows, V]; None where the scores are to be sampled from
    rows: Rows
    position: torch.Tensor  # int64 [rows]: the number of the token to write, 0 for a request's first


def changes_scores(info) -> bool:
    """Whether SGLang writes into the scores before they are sampled from."""
    orchestrator = info.penalizer_orchestrator
    return (
        info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
        or (orchestrator is not None and orchestrator.is_required)
        or info.logit_bias is not None
        or bool(info.grammars)
        or info.has_custom_logit_processor
    )


class EftSampler(Sampler):
    """A row's text depends on its own request alone: its noise is a function of (seed, number of the new token).

    Scores that SGLang has changed (penalties, biases, grammars, custom processors) are sampled as they are; where it
    changes none, tokens come from the logits of all models and no scores are written.
    """

    end = 0  # ends the text of a row with NaN

    def forward(
        self,
        logits_output,
        sampling_info,
        return_logprob,
        top_logprobs_nums,
        token_ids_logprobs,
        positions,
        *,
        logprob_logits=None,
    ):
        step: Step = logits_output.eft
        logits_output.eft = None
        scores = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        if step.models is None:
            models, weights, upscale_top_p = [scores], (1.0,), 1.0
        else:
            models, weights, upscale_top_p = step.models, step.rows.weights, step.rows.upscale_top_p
        out = eft.sample(
            models,
            weights,
            upscale_top_p=upscale_top_p,
            seed=step.rows.seed,
            position=step.position,
            logprobs=False,
            tuned=min(1, len(models) - 1),
            **parameters(sampling_info, scores.shape[1]),
        )
        tokens = torch.where(out.valid, out.tokens, self.end)
        if return_logprob:
            if not sampling_info.is_all_greedy and not SGLANG_RETURN_ORIGINAL_LOGPROB:
                scores = scores / sampling_info.temperatures
            found = self.output_logprob_processor.compute_logprobs(
                torch.log_softmax(scores, -1), top_logprobs_nums, token_ids_logprobs, tokens
            )
            found.write_output_to(logits_output)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens


def parameters(info, vocab_size: int) -> dict:
    """SGLang's sampling parameters as those of `eft_kernels.sample`; a filter that no request uses is left out."""
    greedy = info.top_ks == 1  # as SGLang writes temperature 0
    given = dict(temperature=info.temperatures[:, 0].masked_fill(greedy, 0.0))
    if info.is_all_greedy:
        return given
    if info.need_top_k_sampling:
        off = greedy | (info.top_ks == TOP_K_ALL)
        given["top_k"] = info.top_ks.clamp(max=vocab_size).masked_fill(off, 0).long()
    if info.need_top_p_sampling:
        given["top_p"] = info.top_ps
    if info.need_min_p_sampling:
        given["min_p"] = info.min_ps
    return given
