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
from .trees import Tree

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
        self, logits: torch.Tensor, position: torch.Tensor, slot: int, method: str, runners_up: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws from the drafting model's own logits [B, E, V] of E nodes at ``position`` [B]: the winner and the
        runners-up of each, int64 [B, E, 1 + m] (-1: there is none), and whether its row was valid, [B, E]."""
        rows, nodes = logits.shape[:2]

        def each(x: Any) -> Any:  # of a row: for each of its nodes
            return x.repeat_interleave(nodes, 0) if isinstance(x, torch.Tensor) and x.dim() and nodes > 1 else x

        out = draft(
            logits.reshape(rows * nodes, -1),
            slot=slot,
            method=method,
            position=each(position),
            vocab_size=self.vocab_size,
            runners_up=runners_up,
            **{name: each(x) for name, x in self.noise.items()},
        )
        tokens = out.tokens[:, None]
        if out.runners_up is not None:
            tokens = torch.cat([tokens, out.runners_up], 1)
        return tokens.view(rows, nodes, -1), out.valid.view(rows, nodes)

    def verify(
        self,
        logits: list[torch.Tensor],
        text: Text,
        tree: Tree,
        drafts: torch.Tensor,
        lengths: torch.Tensor,
        reach: list[int],
        method: str,
        draft: int | None,
    ) -> tuple[VerifyOutput, torch.Tensor | None, torch.Tensor | None]:
        """`verify` of a tree's drafts [B, N] under logits [B, N+1, V_j]: (its output, raw scores, processed scores).

        Scores are [B, N+1, V], of the slots. lengths: int64 [B], the drafts of a chain that count. reach[b]: how many
        tokens of row b can be emitted, 0 for a row that ended. draft: the model that drew them (None: no model did).
        """
        noise = dict(self.noise, position=text.length, method=method)
        shape: dict[str, Any] = dict(draft_lengths=lengths)
        if not tree.is_chain:
            shape = dict(parents=torch.tensor(tree.parents, device=drafts.device).expand(len(drafts), -1))
        if not self.materialise:
            return verify(logits, self.weights, drafts, draft=draft, **shape, **self.emulate, **noise), None, None
        slots = drafts.shape[1] + 1
        raw = scores = torch.stack([self.scores([z[:, i] for z in logits]) for i in range(slots)], 1)  # [B, N+1, V]
        if self.process is not None:
            scores = self._processed(raw, text, tree, drafts, reach)
        models, weights, drawn = [scores], [1.0], None
        if draft is not None:
            models, weights, drawn = [scores, logits[draft]], [1.0, 0.0], 1
        out = verify(models, weights, drafts, draft=drawn, vocab_size=raw.shape[2], **shape, **noise)
        final = None
        if self.keep_scores:
            final = torch.stack([self.filtered(scores[:, i]) for i in range(slots)], 1)
        return out, raw, final

    def _processed(
        self, raw: torch.Tensor, text: Text, tree: Tree, drafts: torch.Tensor, reach: list[int]
    ) -> torch.Tensor:
        """The processed scores of slots [B, N+1, V], each by the prefix that leads to it."""
        process = self.process
        assert process is not None
        scores = raw.clone()
        of_rows = getattr(process, "of_rows", lambda ids, scores, rows: process(ids, scores))
        every, counts = (torch.tensor(x, device=drafts.device) for x in (range(len(reach)), reach))
        slots, leading = tree.slots.to(drafts.device), tree.drafts.to(drafts.device)
        spans = [(n, n + r) for n, r in zip(text.length.tolist(), reach) if r]
        for n in range(min(a for a, _ in spans), max(b for _, b in spans)):
            depth = n - text.length  # [B], of the slots that follow n new tokens
            for of_level in slots.T:  # one slot of each depth
                slot = of_level[depth.clamp(0, len(of_level) - 1)]  # [B]
                here = (depth >= 0) & (depth < counts) & (slot >= 0)
                if not bool(here.any()):
                    break
                slot = slot.clamp(min=0)
                path = torch.arange(leading.shape[1], device=drafts.device) < depth[:, None]
                text.put(drafts.gather(1, leading[slot]).clamp(min=0) if len(tree) else drafts, path)
                own = scores[every, slot]
                done = of_rows(text.prefix(n), own.clone(), here).float()
                scores[every, slot] = torch.where(here[:, None], done, own)
        return scores
