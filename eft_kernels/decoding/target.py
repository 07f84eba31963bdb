"""The distribution that is sampled: the emulated one, its processors and its filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..combination import Weights
from ..ops import VerifyOutput, combine, draft, logprobs, sample, verify
from ..parameters import GREEDY
from .text import Text

Value = float | torch.Tensor  # of a sampling parameter: a number, or a tensor [B]


@dataclass
class Target:
    """``softmax(sum_j w_j z_j)`` with sampling parameters, and optionally a function of the scores in between."""

    weights: Weights
    seeds: torch.Tensor  # int64 [B]
    # sampling parameters, numbers or tensors [B]: those of any scores, and those of the combination alone
    filters: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    combining: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    vocab_size: int | None = None  # needed where the models' logits differ in width: a draft must exist for all
    # process(ids [B, P + n], scores [B, V] float32) -> scores, before the filters; `verify` calls its method
    # of_rows(ids, scores, rows) instead, if it has one: only the rows of the mask [B] have n new tokens
    process: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    keep_logits: bool = False  # record the scores before process ...
    keep_scores: bool = False  # ... and after process and filters

    def __post_init__(self) -> None:
        # keyword arguments of the operations
        self.emulate: dict[str, Any] = dict(self.combining, vocab_size=self.vocab_size)
        self.noise: dict[str, Any] = dict(self.filters, seed=self.seeds)
        self.materialise = self.process is not None or self.keep_logits or self.keep_scores

    def scores(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """Emulated scores, float32 [B, V], of the models' logits [B, V_j]: `eft_kernels.combine`.

        Processors that look at a logit's sign (repetition penalty) do to one model of weight 1 what they do to it.
        """
        return combine(logits, self.weights, **self.emulate)

    def filtered(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] divided by the temperature, -inf outside the filters; greedy rows stay as they are."""
        temperature = torch.as_tensor(self.filters.get("temperature", 1.0), dtype=torch.float32, device=scores.device)
        temperature = temperature.reshape(-1, 1).expand(scores.shape[0], 1)
        greedy = temperature < GREEDY
        filters: dict[str, Any] = dict(self.filters)
        kept = logprobs([scores], [1.0], **filters) > float("-inf")
        scores = torch.where(kept | greedy, scores, float("-inf"))
        return scores / torch.where(greedy, 1.0, temperature)

    def sample(
        self, logits: list[torch.Tensor], text: Text, position: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One token per row of logits [B, V_j]: (tokens, valid, raw scores or None, processed scores or None)."""
        if not self.materialise:
            out = sample(logits, self.weights, position=position, logprobs=False, **self.emulate, **self.noise)
            return out.tokens, out.valid, None, None
        raw = scores = self.scores(logits)
        if self.process is not None:
            scores = self.process(text.prefix(position), raw.clone()).float()
        out = sample([scores], [1.0], position=position, logprobs=False, **self.noise)
        return out.tokens, out.valid, raw, self.filtered(scores) if self.keep_scores else None

    def draft(
        self, logits: torch.Tensor, position: torch.Tensor, slot: int, method: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A draft per row from the drafting model's own logits [B, V]: (tokens, valid)."""
        out = draft(logits, slot=slot, method=method, position=position, vocab_size=self.vocab_size, **self.noise)
        return out.tokens, out.valid

    def verify(
        self,
        logits: list[torch.Tensor],
        text: Text,
        drafts: torch.Tensor,
        lengths: torch.Tensor,
        reach: list[int],
        method: str,
        draft: int,
    ) -> tuple[VerifyOutput, torch.Tensor | None, torch.Tensor | None]:
        """`verify` of drafts [B, K] under logits [B, K+1, V_j]: (its output, raw scores, processed scores).

        reach[b]: how many slots of row b (from slot 0) can be emitted, 0 for a row that ended.
        """
        noise = dict(self.noise, position=text.length, method=method)
        if not self.materialise:
            return verify(logits, self.weights, drafts, lengths, draft=draft, **self.emulate, **noise), None, None
        slots = drafts.shape[1] + 1
        raw = scores = torch.stack([self.scores([z[:, i] for z in logits]) for i in range(slots)], 1)  # [B, K+1, V]
        process = self.process
        if process is not None:
            scores = raw.clone()
            of_rows = getattr(process, "of_rows", lambda ids, scores, rows: process(ids, scores))
            counts = torch.tensor(reach, device=drafts.device)
            text.put(drafts, torch.arange(slots - 1, device=drafts.device) < counts[:, None] - 1)
            every, start = torch.arange(len(reach), device=drafts.device), text.length.tolist()
            spans = [(n, n + r) for n, r in zip(start, reach) if r]
            for n in range(min(a for a, _ in spans), max(b for _, b in spans)):
                slot = n - text.length  # [B], the slot that follows n new tokens
                here = (slot >= 0) & (slot < counts)
                if not bool(here.any()):
                    continue
                slot = slot.clamp(0, slots - 1)
                own = scores[every, slot]
                done = of_rows(text.prefix(n), own.clone(), here).float()
                scores[every, slot] = torch.where(here[:, None], done, own)
        out = verify([scores, logits[draft]], [1.0, 0.0], drafts, lengths, draft=1, vocab_size=scores.shape[2], **noise)
        final = None
        if self.keep_scores:
            final = torch.stack([self.filtered(scores[:, i]) for i in range(slots)], 1)
        return out, raw, final
