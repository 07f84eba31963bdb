"""When a row's text ends."""

from __future__ import annotations

import copy

import torch
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import logits_process as lp


def end_tokens(models) -> list[int]:
    """Ids that end a text for any of the models, by their generation configs, ascending.

    A chat model ends its turn with a token that the model it was trained from may never use.
    """
    ends = set()
    for model in models:
        own = getattr(model.generation_config, "eos_token_id", None)
        ends |= {own} if isinstance(own, int) else set(own or ())
    return sorted(ends)


def stop_strings_of(models, names, given, tokenizer) -> list[str]:
    """Texts that end a row: ``given`` (a text, a list or None) or, where the call gives none, those of the generation
    configs of ``models``, beside the model that transformers looked at itself."""
    if given is not None:
        return [given] if isinstance(given, str) else list(given)
    found = []
    for model, name in zip(models, names):
        own = getattr(model.generation_config, "stop_strings", None) or []
        own = [own] if isinstance(own, str) else list(own)
        if own and not tokenizer:
            raise ValueError(
                f"stop_strings: {name}'s generation config ends texts with {own}; give tokenizer=..., or "
                "stop_strings=[] to go without"
            )
        found += own
    return found


def endings_of(stopping_criteria, prompt_length: int):
    """(max_new_tokens, end-of-text ids, the other criteria)."""
    limits, eos, others = [], [], StoppingCriteriaList()
    for criterion in stopping_criteria:
        if type(criterion) is MaxLengthCriteria:
            limits.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos += criterion.eos_token_id.reshape(-1).tolist()
        else:
            others.append(criterion)
    if not limits:
        raise ValueError("max_new_tokens: got None, allowed is a length to stop at")
    return max(1, min(limits) - prompt_length), eos, others


def hold_back(processors, config, ends: list[int], prompt_length: int, device) -> LogitsProcessorList:
    """``processors`` with those that forbid or favour the end of text knowing all of ``ends``.

    transformers made them for the end tokens of the model that `generate` was called on, and made none where it has
    none.
    """
    ids = torch.tensor(ends, device=device)
    held = LogitsProcessorList()
    for p in processors:
        if type(p) in (
            lp.MinLengthLogitsProcessor,
            lp.MinNewTokensLengthLogitsProcessor,
            lp.ExponentialDecayLengthPenalty,
        ):
            p = copy.copy(p)
            p.eos_token_id = ids
        held.append(p)
    kinds = {type(p) for p in held}
    if (config.min_new_tokens or 0) > 0 and lp.MinNewTokensLengthLogitsProcessor not in kinds:
        held.insert(0, lp.MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, ids, device=device))
    if (config.min_length or 0) > 0 and lp.MinLengthLogitsProcessor not in kinds:
        held.insert(0, lp.MinLengthLogitsProcessor(config.min_length, ids, device=device))
    return held
