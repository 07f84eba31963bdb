"""The Triton backend: kernels on any GPU that Triton compiles for.

With TRITON_INTERPRET=1 (set before import) the kernels run on CPU tensors in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("triton is not installed (it comes with torch on GPU machines; pip install triton)") from error

from ...dispatch import MaybeTensor, Sampled, Verified
from ...parameters import METHOD_CODES, NAMES, OFF, PARAMETERS, STREAM_CODES, DraftParams, Params
from .. import workspace
from . import config, filter, outputs, race
from . import verify as acceptance
from .config import TileConfig, tile_config
from .rows import Models, Sampling, Upscale
from .verify import Side

Logits = Sequence[torch.Tensor]
P = ParamSpec("P")
T = TypeVar("T")

INTERPRETED: bool = triton.knobs.runtime.interpret
NO_STATE = filter.State(*[None] * len(filter.State._fields))
OPTIONS = dict(enable_fp_fusion=False)  # tokens depend on it
SLACK = 2e-5  # of a float32 sum of exponentials over a row, relative
CHUNK = 256
NO_UPSCALE = Upscale(None, 1.0, None, None, None, tl.constexpr(-1))


def status() -> tuple[bool, str]:
    if INTERPRETED:
        return True, f"triton {triton.__version__}, interpreted on the CPU"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type not in ("cuda", "xpu"):
        return False, "no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return False, f"compute capability {torch.cuda.get_device_capability()}, Triton needs (8, 0)"
    return True, f"triton {triton.__version__}"


@cache
def registers(number: int) -> dict[str, int]:
    """An option: so many for a thread, where ptxas spills to fit another block on a multiprocessor."""
    nvidia = not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return dict(maxnreg=number) if nvidia else {}


def search(masked: bool) -> dict[str, int]:
    """Options of searches over a row: chunks and scores looked at together."""
    tile = dict(TC=32, N=16384) if INTERPRETED else dict(TC=8, N=2048)
    return tile | registers(192 if masked else 128)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


def counters(rows: int, device: torch.device) -> torch.Tensor:
    """int32 zeros [at least rows], left zero: `workspace.counters`."""
    stream = None if INTERPRETED else triton.runtime.driver.active.get_current_stream(device.index)
    return workspace.counters(rows, device, stream)


def on_device(function: Callable[Concatenate[Logits, P], T]) -> Callable[Concatenate[Logits, P], T]:
    """Triton launches on the current device."""

    @wraps(function)
    def run(logits: Logits, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.accelerator.device_index(logits[0].device.index):
            return function(logits, *args, **kwargs)

    return run


def _pair(x: float | torch.Tensor, number: float) -> tuple[MaybeTensor, float]:
    """A parameter as kernels take it: a pointer or None, and a number."""
    return (x, number) if isinstance(x, torch.Tensor) else (None, x)


def _number(w: float) -> float | tl.constexpr:
    """A weight of 1 or -1 needs no product: it is part of the compiled kernel."""
    return tl.constexpr(float(w)) if w in (1, -1) else float(w)


def _varies(p: Params, name: str) -> bool:
    """Some row may have the parameter on."""
    value = getattr(p, name)
    return isinstance(value, torch.Tensor) or value != OFF[name]


class Call:
    """One call's launch arguments, and its launches; depths: of `verify`'s trees, int64 [B, slots]."""

    def __init__(self, logits: Logits, p: Params, depths: MaybeTensor = None) -> None:
        lead = p.lead(logits)
        self.slots = lead[1] if len(lead) == 2 else 1
        self.rows, self.device = lead.numel(), logits[0].device
        self.V, self.chunks = p.vocab_size, ceil_div(p.vocab_size, CHUNK)
        if not isinstance(p.top_k, torch.Tensor) and not 0 < p.top_k < self.V:
            p = p._replace(top_k=0)
        upscales = _varies(p, "upscale_top_p")
        tuned, stride = p.tuned, 0
        weights: MaybeTensor = None
        numbers: tuple[float | tl.constexpr, ...] = ()
        if p.row_index is not None and not isinstance(p.weights, torch.Tensor) and not any(p.weights):
            p = p._replace(weights=torch.zeros(len(logits), device=self.device))  # for `row_of` to show a missing row
        if isinstance(p.weights, torch.Tensor):
            weights = p.weights
            stride = weights.stride(0) if weights.dim() == 2 else 0
        else:  # a model of weight 0 is not read
            live = [j for j, w in enumerate(p.weights) if w != 0 or (upscales and j == tuned)]
            logits, numbers = [logits[j] for j in live], tuple(_number(p.weights[j]) for j in live)
            tuned = live.index(tuned) if tuned in live else -1
        bias = workspace.sorted_bias(p.token_bias, self.V)
        starts, ids, values = bias or (None, None, None)
        self.models = Models(
            tuple(logits),
            tuple(z.stride(0) for z in logits),
            tuple(z.stride(1) if z.dim() == 3 else 0 for z in logits),
            p.row_index,
            0 if p.row_index is None else logits[0].shape[0],
            weights,
            stride,
            numbers,
            p.token_mask,
            0 if p.token_mask is None else p.token_mask.shape[-1],
            starts,
            ids,
            values,
            0 if ids is None else ids.shape[-1],
            self.V,
            self.slots,
        )
        (seed, seed_value), (position, at) = _pair(p.seed, 0), _pair(p.position, 0)
        pointers, scalars = zip(*(_pair(getattr(p, name), off) for name, off in OFF.items()))
        self.sampling = (
            Sampling(pointers, tuple(map(float, scalars)), seed, position, depths, self.slots),
            seed_value,
            at,
        )
        on = [row.name for row in PARAMETERS if row.stage == "filter" and _varies(p, row.name)]
        self.filtered, self.processed = bool(on), _varies(p, "temperature")
        # every row is: its exact mass is known
        self.all_filtered = any(not isinstance(getattr(p, name), torch.Tensor) for name in on)
        self.nucleus, self.typical = "top_p" in on, "typical_p" in on
        self.up = NO_UPSCALE
        self.stream = self.split(tile_config(config.STREAM, self.device, self.rows * self.chunks))
        self.cp, self.search = power_of_2(self.chunks), search(p.token_mask is not None)
        if upscales:
            top_p, value = _pair(p.upscale_top_p, 1.0)
            self.up = Upscale(top_p, value, self.empty(), self.empty(), self.empty(), tl.constexpr(tuned))
            self.upscale()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((self.rows, *shape), dtype=dtype, device=self.device)

    def split(self, tiling: TileConfig) -> dict[str, int]:
        """A tiling as launch options: a program takes TILES * TC chunks, SPLITS programs a row."""
        tiles = min(tiling.tiles_per_program, power_of_2(ceil_div(self.chunks, tiling.chunks_per_tile)))
        splits = ceil_div(self.chunks, tiles * tiling.chunks_per_tile)
        return dict(SPLITS=splits, TILES=tiles, TC=tiling.chunks_per_tile, num_warps=tiling.num_warps)

    def launch(self, kernel: triton.JITFunction, *args: object, **options: int) -> None:
        """A program a row, or SPLITS."""
        if self.rows:
            kernel[(self.rows * options.get("SPLITS", 1),)](self.models, self.up, *args, **options, **OPTIONS)

    def launch_stream(self, kernel: triton.JITFunction, *args: object, **options: int) -> None:
        """A pass over all logits."""
        self.launch(kernel, *args, **options, **self.stream)

    def upscale(self) -> None:
        """Fills `Upscale`."""
        J = len(self.models.z)
        top = torch.empty(J, self.rows, self.chunks, dtype=torch.float32, device=self.device)
        totals = torch.zeros(J, self.rows, dtype=torch.int64, device=self.device)
        self.launch_stream(filter.own_stats_kernel, top, self.rows, self.chunks)
        self.launch_stream(filter.own_mass_kernel, top, totals, self.rows, self.chunks, CP=self.cp)
        self.launch(
            filter.own_row_kernel, top, totals, *self.scratch(), self.rows, self.chunks, CP=self.cp, **self.search
        )

    def scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For chunks that matter, int32 [rows, chunks], and their scores [rows, V]; only what is found is touched."""
        return self.empty(self.chunks, dtype=torch.int32), self.empty(self.V)

    def stats(self, sum: bool, sum_c: bool) -> None:
        """Maxima, sums and sums at temperature [rows, chunks]."""
        self.top = self.empty(self.chunks)
        self.sum = self.empty(self.chunks) if sum else None
        self.sum_c = (self.empty(self.chunks) if self.processed or sum is False else self.sum) if sum_c else None
        self.launch_stream(
            filter.stats_kernel,
            *self.sampling,
            self.top,
            self.sum,
            None if self.sum_c is self.sum else self.sum_c,
            self.chunks,
        )

    def row(
        self,
        domain: int = 0,
        state: filter.State | None = None,
        tokens: MaybeTensor = None,
        valid: MaybeTensor = None,
        logprobs: MaybeTensor = None,
        raw: MaybeTensor = None,
        runners_up: MaybeTensor = None,
    ) -> None:
        """Thresholds into ``state``; samples into ``tokens``, those that come after them into ``runners_up``."""
        scratch = self.scratch() if self.filtered else (None, None)
        self.launch(
            filter.row_kernel,
            *self.sampling,
            domain,
            self.top,
            self.sum,
            self.sum_c,
            *scratch,
            SLACK,
            state,
            tokens,
            valid,
            logprobs,
            raw,
            runners_up,
            0 if runners_up is None else runners_up.shape[1],
            self.chunks,
            CP=self.cp,
            FILTERED=self.filtered,
            TYPICAL=self.typical,
            **self.search,
        )

    def masses(self, state: filter.State) -> None:
        """Exact masses of the rows without filters."""
        if not self.all_filtered:
            self.launch_stream(acceptance.mass_kernel, *self.sampling, state)

    def side(self, state: filter.State) -> Side:
        pointers, numbers, *_ = self.sampling[0]
        at = NAMES.index("temperature")
        return Side(self.models, self.up, state, pointers[at], numbers[at])

    def state(self) -> filter.State:
        return filter.State(
            best=self.empty(),
            floor=self.empty(),
            ceiling=self.empty(),
            lse=self.empty(),
            log_kept=self.empty(),
            total=self.empty(dtype=torch.int64),
            greedy=self.empty(dtype=torch.int64),
            valid=self.empty(dtype=torch.bool),
        )


@on_device
def sample(
    logits: Logits,
    p: Params,
    stream: str,
    slot: int,
    logprobs: bool,
    top_logprobs: int,
    diagnostics: bool,
    runners_up: int,
) -> Sampled:
    call = Call(logits, p)
    B, device = call.rows, call.device
    tokens, valid = call.empty(dtype=torch.int64), call.empty(dtype=torch.bool)
    lp, raw = (call.empty() if logprobs else None for _ in range(2))
    others = call.empty(runners_up, dtype=torch.int64) if runners_up else None
    domain = STREAM_CODES[stream] << 1 | slot << 3
    more = bool(top_logprobs or diagnostics)
    if call.filtered or more:
        call.stats(sum=logprobs or more, sum_c=logprobs or call.nucleus)
        state = call.state() if more else None
        call.row(domain, state, tokens, valid, lp, raw, others)
    else:
        tiling = tile_config(config.SAMPLE, device, B * call.chunks)
        split = call.split(tiling)
        splits = split["SPLITS"]
        part_key = call.empty(splits, dtype=torch.int64)
        part = call.empty(splits, 4) if logprobs else None
        call.launch(
            race.sample_kernel,
            *call.sampling,
            domain,
            tokens,
            valid,
            lp,
            raw,
            counters(B, device),
            part_key,
            part,
            call.empty(splits, runners_up, dtype=torch.int64) if runners_up else None,
            others,
            runners_up,
            PARTS=power_of_2(splits),
            OTHERS=power_of_2(max(1, runners_up)),
            DIRECT=tiling.single_tile,
            PROCESSED=call.processed,
            **split,
            **(registers(96) if runners_up else {}),
        )
    top_ids = top_lp = entropy = tv = None
    if top_logprobs:
        top_ids, top_lp = call.empty(top_logprobs, dtype=torch.int64), call.empty(top_logprobs)
        found, buffer = call.empty(call.chunks, dtype=torch.int32), call.empty(call.V, dtype=torch.int64)
        call.launch(
            outputs.top_kernel,
            call.top,
            found,
            buffer,
            state,
            top_ids,
            top_lp,
            top_logprobs,
            call.chunks,
            CP=call.cp,
            **call.search,
        )
    if diagnostics:
        entropy, tv = call.empty(), call.empty()
        z = logits[p.tuned]
        call.launch(outputs.diagnostics_kernel, state, z, z.stride(0), entropy, tv, call.chunks, TC=call.search["TC"])
    return tokens, valid, lp, raw, top_ids, top_lp, entropy, tv, others


def _states(logits: Logits, p: Params) -> tuple[Call, filter.State]:
    """A `Call` and the state of its rows."""
    call = Call(logits, p)
    call.stats(sum=True, sum_c=True)
    state = call.state()
    call.row(state=state)
    return call, state


@on_device
def logprobs(logits: Logits, p: Params, scores: bool) -> torch.Tensor:
    call, state = _states(logits, p)
    out = call.empty(call.V)
    call.launch_stream(outputs.logprobs_kernel, *call.sampling, state, out, SCORES=scores)
    return out


@on_device
def token_logprobs(logits: Logits, p: Params, ids: torch.Tensor) -> torch.Tensor:
    call, state = _states(logits, p)
    out = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    call.launch(outputs.ids_kernel, *call.sampling, state, ids, ids.shape[1], None, None, out, None, N=128)
    return out


def _accept(
    call: Call,
    target: Side,
    other: Side,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    own: MaybeTensor,
    method: str,
    tokens: torch.Tensor,
    emitted: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """Judges chains of drafts: fills tokens [B, S], emitted [B] and valid [B]."""
    B, S = tokens.shape
    device, uses_masses, blocks = tokens.device, method != "coupled", method == "block"
    accepted = torch.empty(B, dtype=torch.int32, device=device)
    factor = torch.empty(B, dtype=torch.float64, device=device)
    ratios = torch.empty(B, S, dtype=torch.float64, device=device) if blocks else None
    options = dict(METHOD=METHOD_CODES[method], **OPTIONS)
    masses = None
    if uses_masses:
        masses = call.empty(4, dtype=torch.int64)
        if S > 1:
            acceptance.draft_mass_kernel[(B * (S - 1),)](target, other, draft_tokens, masses, S, num_warps=1, **OPTIONS)
    acceptance.accept_kernel[(B,)](
        target,
        other,
        *call.sampling,
        draft_tokens,
        draft_lengths,
        own,
        masses,
        accepted,
        factor,
        ratios,
        S,
        num_warps=1,
        **options,
    )
    if blocks:
        residual_sums = torch.zeros(B, S, dtype=torch.int64, device=device)
        acceptance.residual_kernel[(B * S * call.stream["SPLITS"],)](
            target, other, draft_tokens, accepted, ratios, residual_sums, S, **call.stream, **OPTIONS
        )
        acceptance.block_kernel[(B,)](
            *call.sampling, accepted, factor, ratios, residual_sums, S, num_warps=1, **OPTIONS
        )
    acceptance.last_kernel[(B,)](
        target,
        other,
        *call.sampling,
        call.top,
        draft_tokens,
        draft_lengths,
        own,
        accepted,
        factor,
        tokens,
        emitted,
        valid,
        S,
        call.chunks,
        CP=call.cp,
        SP=power_of_2(S),
        **options,
    )


@on_device
def verify(
    logits: Logits,
    p: Params,
    draft_tokens: torch.Tensor,
    draft_lengths: torch.Tensor,
    parents: MaybeTensor,
    method: str,
    draft: int,
    drawn_by: DraftParams,
    logprobs: bool,
) -> Verified:
    B, S = p.lead(logits)
    device, uses_masses = logits[0].device, method != "coupled"
    options = dict(num_warps=1, **OPTIONS)
    depths = path = None
    if parents is not None:
        depths, path = (torch.empty(B, S, dtype=torch.int64, device=device) for _ in range(2))
        if B:
            acceptance.depth_kernel[(B * S,)](parents, depths, S, **options)
    call = Call(logits, p, depths)
    call.stats(sum=logprobs, sum_c=logprobs or call.nucleus)
    state = call.state()
    own, own_valid = (None, None) if uses_masses else (call.empty(dtype=torch.int64), call.empty(dtype=torch.bool))
    call.row(STREAM_CODES["sample"] << 1, state, own, own_valid)
    target, other = call.side(state), call.side(NO_STATE)
    if uses_masses:
        call.masses(state)
        if draft >= 0:
            drafting = Call([logits[draft]], drawn_by.of(p))
            drafting.stats(sum=False, sum_c=drafting.nucleus)
            drawn = drafting.state()
            other = drafting.side(drawn)
            drafting.row(state=drawn)
            drafting.masses(drawn)
    tokens, valid = call.empty(dtype=torch.int64).view(B, S), torch.empty(B, dtype=torch.bool, device=device)
    emitted = torch.empty(B, dtype=torch.int64, device=device)
    lp, raw = (call.empty().view(B, S) if logprobs else None for _ in range(2))
    if B and parents is not None:
        acceptance.tree_kernel[(B,)](
            parents, draft_tokens, draft_lengths, own, tokens, emitted, valid, path, S, SP=power_of_2(S), **options
        )
    elif B:
        _accept(call, target, other, draft_tokens, draft_lengths, own, method, tokens, emitted, valid)
    if logprobs:
        call.launch(outputs.ids_kernel, *call.sampling, state, tokens, 1, emitted, path, lp, raw, N=1, num_warps=1)
    return tokens, emitted, valid, lp, raw, path
