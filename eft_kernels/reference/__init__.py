"""The definition, in PyTorch. Every other backend returns the same tokens, bit for bit.

What makes that possible: scores and noise are float32 operations in one stated order, without contraction; logarithm
and exponential are polynomials; masses are 64-bit fixed point, so that their sums do not depend on order. The names are
those of csrc/semantics. Any device; slow on purpose (nothing is fused, every token's noise is drawn).

    noise.py         counters, Philox, Gumbel noise, the race that draws a token
    masses.py        probabilities as integers, and what a share of them reaches
    rows.py          a row: its parameters, its scores, the interval of scores that its filters keep
    operations.py    sample, logprobs, token_logprobs
    verification.py  verify: coupled, token, block

Shapes: R rows, V tokens, J models. Integers that are 32-bit words are kept in int64 tensors.
"""

from .masses import MASS_BITS, log_total, mass, mass_limit, nucleus, surprise
from .noise import (
    CHUNK,
    KIND_CHUNK,
    KIND_TOKEN,
    accept_uniform,
    chunk_noise,
    exponential,
    first_max,
    gumbel,
    log,
    log_poly,
    philox,
    race,
    row_seed,
    split,
    uniform,
    words,
)
from .operations import logprobs, sample, token_logprobs
from .rows import LOG2E, NEG_INF, Rows, edge, mean_score
from .verification import verify


def status() -> tuple[bool, str]:
    return True, "always here"


__all__ = [
    "CHUNK",
    "KIND_CHUNK",
    "KIND_TOKEN",
    "LOG2E",
    "MASS_BITS",
    "NEG_INF",
    "Rows",
    "accept_uniform",
    "chunk_noise",
    "edge",
    "exponential",
    "first_max",
    "gumbel",
    "log",
    "log_poly",
    "log_total",
    "logprobs",
    "mass",
    "mass_limit",
    "mean_score",
    "nucleus",
    "philox",
    "race",
    "row_seed",
    "sample",
    "split",
    "status",
    "surprise",
    "token_logprobs",
    "uniform",
    "verify",
    "words",
]
