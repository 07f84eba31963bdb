"""Masses: probabilities as 64-bit fixed point, 2^40 for the best score. Sums do not depend on order."""

from __future__ import annotations

import torch

from .noise import log

MASS_BITS = 40  # the mass of the best token is 2^40
RESIDUAL_BITS = 58  # the residual of a whole distribution is 2^58
SURPRISE_BITS = 16


def exponent(scores: torch.Tensor, best: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """(s - best) c, the exponent of base 2; scores [R, V], best and c [R]."""
    return ((scores - best[:, None]) * c[:, None]).clamp(min=-126.0)


def mass(scores: torch.Tensor, best: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """exp2((s - best) c) as int64 fixed point, 2^40 at the best score, truncated; scores [R, V], best and c [R]."""
    x = exponent(scores, best, c)
    n = torch.round(x)
    f = x - n
    p = f * 1.535336188319500e-4 + 1.339887440266574e-3
    p = p * f + 9.618437357674640e-3
    p = p * f + 5.550332471162809e-2
    p = p * f + 2.402264791363012e-1
    p = p * f + 6.931472028550421e-1
    p = p * f + 1.0
    significand = (p * 2.0**24).to(torch.int64)
    shift = n.to(torch.int64) + (MASS_BITS - 24)
    return torch.where(shift >= 0, significand << shift.clamp(min=0), significand >> (-shift).clamp(0, 63))


def surprise(scores: torch.Tensor, best: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """mass times how many bits the score is below the best, int64, truncated (the bits to 2^-16, then the product)."""
    bits = (exponent(scores, best, c) * -(2.0**SURPRISE_BITS)).to(torch.int64)
    return mass(scores, best, c) * bits >> SURPRISE_BITS


def log_total(total: torch.Tensor) -> torch.Tensor:
    """log of a fixed-point mass, float32; 0 for the mass of one best token."""
    return log(total.to(torch.float32) * 2.0**-MASS_BITS)


def mass_limit(p: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The mass strictly above a token must be below this for the token to be in the nucleus of mass p."""
    return (p.to(torch.float64) * total.to(torch.float64)).to(torch.int64).clamp(min=1)


def nucleus(scores: torch.Tensor, masses: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """The smallest score kept by a nucleus: the mass strictly above it is below ``limit`` [R]. Ties stay."""
    order = scores.sort(dim=1, descending=True)
    sorted_mass = masses.gather(1, order.indices)
    above = sorted_mass.cumsum(1) - sorted_mass
    # of equal scores all have the mass above the first one
    starts = torch.ones_like(above, dtype=torch.bool)
    starts[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    above = torch.where(starts, above, 0).cummax(1).values
    return torch.where(above < limit[:, None], order.values, float("inf")).amin(1)
