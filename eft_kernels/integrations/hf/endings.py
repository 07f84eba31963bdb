"""When a row's text ends."""

from __future__ import annotations

from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList


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
