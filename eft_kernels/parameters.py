"""The sampling parameters, one row each, and the limits and codes that all languages share.

Everything else about a parameter follows from its row: how it is checked, the operators' schemas, the structs of
csrc/semantics/parameters.h and how they are read, the arguments of the Triton kernels, of the public functions and of
the command line, the table in docs/semantics.md, and the values that tests sweep. Generated text is written by
``python tools/parameters.py``.

What filters keep is defined by `reference.rows.Rows.interval`. Masses, their limits and typical-p's interval are the
same functions, under the same names, in csrc/semantics and in triton/semantics.py. How the thresholds are searched for
is each backend's own: csrc/cpu/row.h, csrc/cuda/row/filter.cuh and triton/filter.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

# --- limits and codes ----------------------------------------------------------------------------------------------

MAX_MODELS = 8
MAX_VOCAB = 1 << 22  # the fixed-point masses (2^MASS_BITS each) of this many tokens cannot overflow 63 bits
MAX_SLOT = (1 << 24) - 1  # the noise's counters hold 24 bits of it
MAX_RUNNERS_UP = 15  # of a race
MASS_BITS = 40  # a fixed-point mass is 2^MASS_BITS at the best score, and 0 from 2^-(MASS_BITS + 1) of it down
GREEDY = 1e-5  # temperatures below are greedy
TINY = 2.0**-126  # a float32 that no mode flushes to 0
# A mask by the least number of a type: a logit <= MASKED excludes its token where the models' sum is not finite, or as
# large as only a mask makes it.
MASKED, LARGE = -3.38e38, 1e30
# their places are their codes
METHODS = ("coupled", "token", "block")
STREAMS = ("sample", "draft", "accept", "residual")
METHOD_CODES = {name: code for code, name in enumerate(METHODS)}
STREAM_CODES = {name: code for code, name in enumerate(STREAMS)}

# --- parameters ----------------------------------------------------------------------------------------------------

INT64 = -(1 << 63), (1 << 63) - 1


class Parameter(NamedTuple):
    """A value per row: a number, or a tensor [rows]."""

    name: str
    type: type  # float: a float32; int: an int64
    off: float  # what None means: it changes nothing
    low: float
    high: float
    allowed: str  # what an error says
    doc: str
    # scale: the temperature; filter: tokens are left out; combine: how models are combined (not a draft's, which has
    # one model); noise: what is drawn
    stage: str
    tried: tuple[float, ...]  # values that tests sweep; the second one is on
    warper: str = ""  # the class of transformers that does the same


# in the order in which they apply, which is transformers'; what is of the stage "combine" applies before them
PARAMETERS = (
    Parameter(
        name="temperature",
        type=float,
        off=1.0,
        low=0,
        high=1e30,
        allowed="0 to 1e30 (below 1e-5 is greedy)",
        doc="divides the scores; 0 (below 1e-5) is greedy, the lowest id on ties",
        stage="scale",
        tried=(1.0, 0.7, 0.0, 1e-5, 1e30),
        warper="TemperatureLogitsWarper",
    ),
    Parameter(
        name="top_k",
        type=int,
        off=0,
        low=-1,
        high=INT64[1],
        allowed="an integer >= 0 (0 and -1 are off)",
        doc="keeps the k largest scores; 0 or -1 is off",
        stage="filter",
        tried=(0, 5, 1, 300),
        warper="TopKLogitsWarper",
    ),
    Parameter(
        name="top_p",
        type=float,
        off=1.0,
        low=TINY,
        high=1,
        allowed="in (0, 1] (1 is off)",
        doc="keeps a token if those more likely have less than this mass together; 1 is off",
        stage="filter",
        tried=(1.0, 0.9, 0.3, 1e-6),
        warper="TopPLogitsWarper",
    ),
    Parameter(
        name="min_p",
        type=float,
        off=0.0,
        low=0,
        high=1,
        allowed="in [0, 1] (0 is off)",
        doc="keeps tokens of at least this share of the likeliest token's probability; 0 is off",
        stage="filter",
        tried=(0.0, 0.05, 1.0),
        warper="MinPLogitsWarper",
    ),
    Parameter(
        name="typical_p",
        type=float,
        off=1.0,
        low=TINY,
        high=1,
        allowed="in (0, 1] (1 is off)",
        doc="keeps the tokens whose log-probability is nearest to its mean, the fewest that have this mass together; "
        "1 is off",
        stage="filter",
        tried=(1.0, 0.5, 0.95, 1e-6),
        warper="TypicalLogitsWarper",
    ),
    Parameter(
        name="upscale_top_p",
        type=float,
        off=1.0,
        low=TINY,
        high=1,
        allowed="in (0, 1] (1 is off)",
        doc="conservative decoding: outside the smallest nucleus of this mass of the tuned model's own distribution "
        "a token keeps log p_tuned; 1 is off",
        stage="combine",
        tried=(1.0, 0.9, 0.3),
    ),
)
NOISE = (
    Parameter(
        name="seed",
        type=int,
        off=0,
        low=INT64[0],
        high=(1 << 64) - 1,
        allowed="a 64-bit integer",
        doc="of the noise",
        stage="noise",
        tried=(0, 1, -1, *INT64),
    ),
    Parameter(
        name="position",
        type=int,
        off=0,
        low=0,
        high=INT64[1],
        allowed="an integer >= 0",
        doc="the step's number, of the noise",
        stage="noise",
        tried=(0, 7, 1 << 40),
    ),
)
PER_ROW = {p.name: p for p in (*PARAMETERS, *NOISE)}
NAMES = tuple(p.name for p in PARAMETERS)
FILTERS = tuple(p for p in PARAMETERS if p.stage == "filter")
DRAFTED = tuple(p for p in PARAMETERS if p.stage != "combine")  # those that drafts have, too
OFF = {p.name: p.off for p in PARAMETERS}


class TokenBias(NamedTuple):
    """What is added to the emulated scores of some tokens, sparse: before temperature and filters.

    ids: int64 [rows, N] (`verify`: [rows, K+1, N]); one outside [0, V) adds nothing (padding), of equal ones all are
    added, in order. values: float32 of the same shape; -inf bans a token, NaN and +inf make the row invalid.
    """

    ids: torch.Tensor
    values: torch.Tensor


class Params(NamedTuple):
    """What a backend receives beside the logits: each value a Python scalar or a tensor [rows]."""

    weights: tuple[float, ...] | torch.Tensor  # J floats, or float32 [J] or [rows, J]
    # parameters: fields
    temperature: float | torch.Tensor
    top_k: int | torch.Tensor
    top_p: float | torch.Tensor
    min_p: float | torch.Tensor
    typical_p: float | torch.Tensor
    upscale_top_p: float | torch.Tensor
    # parameters: end
    seed: int | torch.Tensor  # a scalar is expanded by row_seed
    position: int | torch.Tensor
    token_mask: torch.Tensor | None  # int32 [rows, ceil(V / 32)] (verify: [rows, K+1, ceil(V / 32)]), bit 1 = allowed
    token_bias: TokenBias | None
    vocab_size: int
    tuned: int
    # int64 [rows] (verify: [rows, K+1]): the row of the logits [N, V] that each reads, one outside [0, N) is invalid
    row_index: torch.Tensor | None = None

    def lead(self, logits: Sequence[torch.Tensor]) -> torch.Size:
        """[rows], or [rows, K+1] of `verify`."""
        return logits[0].shape[:-1] if self.row_index is None else self.row_index.shape


class DraftParams(NamedTuple):
    """What `verify`'s drafts were drawn by: each value a Python scalar, a tensor [rows], or None: as the target."""

    # parameters: draft fields
    temperature: float | torch.Tensor | None = None
    top_k: int | torch.Tensor | None = None
    top_p: float | torch.Tensor | None = None
    min_p: float | torch.Tensor | None = None
    typical_p: float | torch.Tensor | None = None
    # parameters: end

    def of(self, p: Params) -> Params:
        """`Params` of the draft distribution: one model alone."""
        own = OFF | {q.name: getattr(p, q.name) for q in DRAFTED}
        own |= {name: x for name, x in self._asdict().items() if x is not None}
        return p._replace(weights=(1.0,), tuned=0, **own)
