"""One cache for several models that go on with the same tokens, as transformers' decoding handles a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...decoding import OwnPrompt
from .arguments import OwnIds, own_prompts
from .models import CACHE_NAMES, CausalLM

# what this version of transformers calls a cache in outputs and in `generate`
CACHE = next(name for name in CACHE_NAMES if name in {f.name for f in fields(CausalLMOutputWithPast)})
UNBOUNDED = 1 << 40  # new tokens; a cache does not know how long a text will be
Term = CausalLM | OwnPrompt


class EmulatedCache(Cache):
    """The caches of all models of an `EmulatedModel`; the model makes it, and fills it from its first pass on.

    Beams move, repeat and drop its rows, assisted decoding takes columns back: each model's own cache does it.

    Args:
      terms: makes the models with their caches, in order.
      names: what errors call them.
      vocab_size: ids that all of them have.
      prompts: own prompts, as in `eft_kernels.hf.generate`.
      shared: columns of the prompt that own prompts replace (None: those of the first pass).
      rollback: ``terms`` makes caches that can forget columns.
    """

    def __init__(
        self,
        terms: Callable[[], list[CausalLM]],
        names: Sequence[str],
        vocab_size: int,
        prompts: Sequence[OwnIds] | Mapping[str, OwnIds] | None = None,
        shared: int | None = None,
        rollback: bool = False,
    ):
        super().__init__(layers=[])
        self.make, self.names, self.vocab_size = terms, names, vocab_size
        self.prompts, self.shared, self.rollback = prompts, shared, rollback
        self.columns = 0  # that all models have read
        self.terms: list[Term] = []  # none before the first pass

    def __call__(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, keep: int
    ) -> list[torch.Tensor]:
        """Reads ids [B, n]; each model's logits [B, keep, V_j] of the last columns (0: of all)."""
        if not self.columns:
            self._begin(ids)
        known = self.columns + ids.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(ids), known):
            raise ValueError(
                f"attention_mask: got {list(attention_mask.shape)}, allowed is {[len(ids), known]}, cached and new"
            )
        if not keep and any(isinstance(term, OwnPrompt) for term in self.terms):
            raise ValueError("prompts: give logits_to_keep; a model has no logits for the columns of another's prompt")
        self.columns = known
        return [term(ids, attention_mask, position_ids, keep) for term in self.terms]

    def _begin(self, ids: torch.Tensor) -> None:
        models = self.make()
        own = own_prompts(self.prompts, self.names, len(ids), ids.device, self.vocab_size)
        shared = ids.shape[1] if self.shared is None else self.shared
        if shared > ids.shape[1] and any(p is not None for p in own):
            raise ValueError(
                f"prompts: the first pass reads {ids.shape[1]} of {shared} columns, all of which own prompts replace; "
                "leave prefill_chunk_size out"
            )
        self.terms = [
            m if p is None else OwnPrompt(m, shared, *p, max_new_tokens=UNBOUNDED) for m, p in zip(models, own)
        ]

    def _take_rows(self, rows: torch.Tensor) -> None:
        for term in self.terms:
            term.take_rows(rows)

    # --- what transformers calls ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # unbounded

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        self.columns, self.terms = 0, []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.columns:
            self._take_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -n columns; older versions of transformers give the columns to keep, above 0."""
        count = -tokens_to_remove if tokens_to_remove < 0 else self.columns - (tokens_to_remove or self.columns)
        if count >= 0:  # 0 says that all are kept: models with states let go of what goes back
            self.columns -= count
            for term in self.terms:
                term.crop(count)

    def activate_past_recording(self) -> None:
        """Nothing to switch: a cache that assisted decoding gets was made to go back."""

    @property
    def batch_size(self) -> int:
        return len(self.terms[0].ids) if self.terms else -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def is_croppable(self) -> bool:
        return self.rollback

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]
