"""Penalties on tokens that were used before, and biases by id, as a `TokenBias`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch

from .arguments import MAX_WEIGHT, check_logits, check_weights
from .checks import INTEGERS, dense, from_host, is_real, readable, shown
from .combination import Number, Weights
from .parameters import TokenBias


def penalties(
    prompt: torch.Tensor | None,
    output: torch.Tensor | None,
    *,
    presence: Number = 0.0,
    frequency: Number = 0.0,
    repetition: Number = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    logits: Sequence[torch.Tensor] | None = None,
    weights: Weights | Sequence[float] | torch.Tensor | None = None,
) -> TokenBias:
    """The ``token_bias`` of the usual penalties, for the next token of each row.

    Args:
      prompt, output: int64 [B, P] and [B, T], the tokens so far, -1 where there is none; one of them may be None.
      presence: taken off the score of every token in ``output``; frequency: the same, once for each time it is there
        (as OpenAI's API and vLLM define them). Numbers or [B].
      repetition: divides the score of every token in ``prompt`` or ``output`` if it is above 0, else multiplies it
        (Keskar et al., arXiv 1909.05858), as transformers and vLLM do. Above 0, a number or [B]; 1 is off. What it adds
        depends on the scores: it needs ``logits`` and ``weights``, those that `sample` will be given (where it is given
        ``upscale_top_p``, ``[combine(..., upscale_top_p=...)]`` and ``(1.0,)``).
      logit_bias: {id: value}, added in all rows; -inf bans a token. (To allow a few tokens only, use ``token_mask``.)

    Returns: `TokenBias` [B, P + T + len(logit_bias)]. Shapes depend on no values, and with numbers and tensors on the
    device, without ``logit_bias``, nothing waits for it.
    Raises: ValueError naming the argument.
    """
    prompt, output = _tokens("prompt", prompt), _tokens("output", output)
    given = [x for x in (prompt, output) if x is not None]
    if not given:
        raise ValueError("prompt: got None beside output=None; give at least one of them")
    rows, device = given[0].shape[0], given[0].device
    if given[-1].shape[0] != rows or given[-1].device != device:
        raise ValueError(f"output: expected {rows} rows on {device}, got {given[-1].shape[0]} on {given[-1].device}")
    empty = given[0].new_empty(rows, 0)
    prompt, output = (empty if x is None else x for x in (prompt, output))

    tokens, order = torch.cat([prompt, output], 1).sort(dim=1, stable=True)
    used = (order >= prompt.shape[1]).cumsum(1)  # tokens of the output up to here
    end = torch.searchsorted(tokens, tokens, right=True) - 1  # of the run of equal tokens
    start = torch.searchsorted(tokens, tokens)
    before = torch.where(start > 0, used.gather(1, (start - 1).clamp(min=0)), 0)
    count = used.gather(1, end) - before  # how often the token is in the output
    ids = torch.where((torch.arange(tokens.shape[1], device=device) == start) & (tokens >= 0), tokens, -1)

    taken = _column("presence", presence, rows, device) * (count > 0)
    taken = taken + _column("frequency", frequency, rows, device) * count
    values = -taken
    if isinstance(repetition, torch.Tensor) or not isinstance(repetition, numbers.Real) or repetition != 1:
        factor = _column("repetition", repetition, rows, device)
        if is_real(repetition):  # looked at on the host: nothing waits for the device
            above = repetition > 0
        else:
            looks = not isinstance(repetition, torch.Tensor) or factor.device.type == "cpu"
            above = not (looks and readable(factor)) or bool((factor > 0).all())
        if not above:
            raise ValueError(f"repetition: got {shown(repetition)}, allowed are numbers above 0")
        if logits is None or weights is None:
            raise ValueError("repetition: needs logits and weights, those that sample will be given")
        s = _scores_at(ids, logits, weights, rows, device)
        values = values + torch.where(s.isfinite(), torch.where(s > 0, s / factor, s * factor) - s, 0.0)
    if logit_bias is not None:
        if not isinstance(logit_bias, Mapping) or not all(
            isinstance(i, numbers.Integral)
            and abs(i) < 1 << 63
            and isinstance(x, numbers.Real)
            and (x == -math.inf or abs(x) < MAX_WEIGHT)
            for i, x in logit_bias.items()
        ):
            raise ValueError(f"logit_bias: expected a mapping of ids to numbers, got {shown(logit_bias)}")
        more = torch.tensor(list(logit_bias), dtype=torch.int64, device=device)
        ids = torch.cat([ids, more.expand(rows, -1)], 1)
        more = torch.tensor(list(logit_bias.values()), dtype=torch.float32, device=device)
        values = torch.cat([values, more.expand(rows, -1)], 1)
    return TokenBias(ids, values)


def _tokens(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    x = from_host(name, x, torch.device("cpu")) if x is not None else x
    if x is None:
        return None
    x = dense(name, x) if isinstance(x, torch.Tensor) else x
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected an int64 tensor [B, n] or None, got {shown(x)}")
    return x.to(torch.int64)


def _column(name: str, x: Number, rows: int, device: torch.device) -> torch.Tensor:
    """float32 [rows, 1], or [1, 1] of a number."""
    x = from_host(name, x, device, torch.float32)
    if isinstance(x, torch.Tensor):
        x = dense(name, x)
        if x.is_complex() or x.shape not in ((rows,), ()):
            raise ValueError(f"{name}: expected a number or a tensor [{rows}], got {shown(x)}")
        if x.device != device:
            raise ValueError(f"{name}: is on {x.device}, the tokens are on {device}; move it there")
        return x.to(torch.float32).reshape(-1, 1)
    if not is_real(x) or not abs(x) < MAX_WEIGHT:
        raise ValueError(f"{name}: expected a float32 number or a tensor [{rows}], got {shown(x)}")
    return torch.full((1, 1), float(x), device=device)


def _scores_at(
    ids: torch.Tensor,
    logits: Sequence[torch.Tensor],
    weights: Weights | Sequence[float] | torch.Tensor,
    rows: int,
    device: torch.device,
) -> torch.Tensor:
    """sum_j w_j z_j of some tokens, float32 like ids [rows, N]; what is at -1 does not matter."""
    try:
        logits, vocab_size = check_logits(logits, 2, None)
    except ValueError as error:  # there is no vocab_size to name here
        raise ValueError(str(error).replace("vocab_size: got 0", "logits: got a vocabulary of 0")) from error
    if logits[0].shape[0] != rows or logits[0].device != device:
        raise ValueError(f"logits: expected {rows} rows on {device}, got {logits[0].shape[0]} on {logits[0].device}")
    w = check_weights(weights, len(logits), rows, device, False)
    w = torch.as_tensor(w, dtype=torch.float32, device=device).expand(rows, -1)
    at = ids.clamp(0, vocab_size - 1)
    s = torch.zeros(ids.shape, dtype=torch.float32, device=device)
    for j, z in enumerate(logits):
        s = s + torch.where(w[:, j : j + 1] != 0, w[:, j : j + 1] * z.gather(1, at).to(torch.float32), 0.0)
    return s
