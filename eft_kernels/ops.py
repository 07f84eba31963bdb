"""The operators ``torch.ops.eft_kernels.*`` (schemas, fakes, implementations) and the public functions above them.

The schemas are Python's own, so the operators exist without any compiled library. Every per-row parameter comes twice:
an optional tensor [rows], which wins, and a scalar. A scalar seed stands for `row_seeds` of it. `verify`'s draft_* are
what the drafts were drawn by; where both forms are None, it is the target's value. Public functions check arguments and
name the bad one.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch._subclasses.fake_tensor import is_fake

from . import dispatch
from .arguments import (
    check_bias,
    check_logits,
    check_mask,
    check_params,
    check_row_index,
    dtype_of,
    parameter_of,
    scalar_or_rows,
)
from .checks import INTEGERS, dense, flag, from_host, index, one_of, readable, shown, stands_for_others
from .combination import AnyWeights, Number, Weights, upscale
from .parameters import (
    DRAFTED,
    MAX_MODELS,
    MAX_RUNNERS_UP,
    MAX_SLOT,
    MAX_VOCAB,
    METHOD_CODES,
    METHODS,
    NAMES,
    PER_ROW,
    STREAM_CODES,
    STREAMS,
    DraftParams,
    Parameter,
    Params,
    TokenBias,
)
from .reference import row_seed

# the operators' namespace: of this copy of the package, so that several can live in one process
NAMESPACE = re.sub(r"\W", "_", __package__)
STREAM_NAMES = STREAMS[:2]  # those that are for a caller to choose
PerRow = Number | None  # None: it is off
Value = float | torch.Tensor  # the same, checked


def _pairs(rows: Iterable[Parameter], prefix: str = "", optional: str = "") -> str:
    """The arguments of a schema for parameters: of each an optional tensor, which wins, and a number."""
    return ", ".join(f"Tensor? {prefix}{p.name}, {p.type.__name__}{optional} {prefix}{p.name}_value" for p in rows)


_PARAMS = (
    f"Tensor? weights, float[] weight_values, {_pairs(PER_ROW.values())}, Tensor? token_mask, Tensor? bias_ids, "
    "Tensor? bias_values, int vocab_size, int tuned, Tensor? row_index"
)
SCHEMAS = {
    "sample": f"(Tensor[] logits, {_PARAMS}, str stream, int slot, bool logprobs, int top_logprobs, bool diagnostics, "
    "int runners_up, str backend) -> (Tensor tokens, Tensor valid, Tensor logprobs, Tensor raw_logprobs, "
    "Tensor top_ids, Tensor top_logprobs, Tensor entropy, Tensor tv, Tensor runners_up)",
    "verify": f"(Tensor[] logits, {_PARAMS}, Tensor draft_tokens, Tensor draft_lengths, Tensor? parents, str method, "
    f"int draft, {_pairs(DRAFTED, 'draft_', '?')}, bool logprobs, str backend) -> (Tensor tokens, Tensor num_emitted, "
    "Tensor valid, Tensor logprobs, Tensor raw_logprobs, Tensor path)",
    "logprobs": f"(Tensor[] logits, {_PARAMS}, bool scores, str backend) -> Tensor",
    "token_logprobs": f"(Tensor[] logits, {_PARAMS}, Tensor ids, str backend) -> Tensor",
}
_COUNT = 2 + 2 * len(PER_ROW) + 6  # arguments of _PARAMS
_DRAFT = slice(_COUNT + 5, _COUNT + 5 + 2 * len(DRAFTED))  # of verify's: what drafts were drawn by
_F, _I, _B = torch.float32, torch.int64, torch.bool
_RETURNS = {"sample": (_I, _B, _F, _F, _I, _F, _F, _F, _I), "verify": (_I, _I, _B, _F, _F, _I)}


def _flatten(p: Params, *args: object) -> list[object]:
    """`Params` and an operation's own arguments (`DraftParams` among them) as the operator's."""
    tensor = isinstance(p.weights, torch.Tensor)
    flat: list[object] = [p.weights if tensor else None, [] if tensor else list(p.weights)]
    for name, row in PER_ROW.items():
        value = getattr(p, name)
        flat += [value, row.type(0)] if isinstance(value, torch.Tensor) else [None, value]
    flat += [p.token_mask, *(p.token_bias or (None, None)), p.vocab_size, p.tuned, p.row_index]
    for a in args:
        if type(a) is DraftParams:
            flat += [x for value in a for x in ((value, None) if isinstance(value, torch.Tensor) else (None, value))]
        else:
            flat.append(a)
    return flat


def _values_of(pairs: Sequence[Any]) -> list[Any]:
    return [pairs[i + 1] if pairs[i] is None else pairs[i] for i in range(0, len(pairs), 2)]


def _params(flat: Sequence[Any]) -> Params:
    """The inverse of `_flatten`."""
    weights = tuple(flat[1]) if flat[0] is None else flat[0]
    token_mask, ids, values, *rest = flat[-6:]
    bias = None if ids is None and values is None else TokenBias(ids, values)
    fields = [weights, *_values_of(flat[2:-6]), token_mask, bias, *rest]
    return Params(*fields)


def _checked(name: str, logits: object, p: Params, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's arguments as a backend relies on them. Values of tensors are not looked at; ValueError."""
    fields = p._asdict()
    z, vocab_size = check_logits(logits, 3 if name == "verify" and p.row_index is None else 2, fields.pop("vocab_size"))
    device = z[0].device
    row_index = check_row_index(fields.pop("row_index"), 2 if name == "verify" else 1, z)
    rows, *slots = z[0].shape[:-1] if row_index is None else row_index.shape
    if name == "sample":
        _check_draw(args[0], args[1], args[3], args[5])
    elif name == "verify":
        drafts, lengths, parents, method, draft, drawn_by, logprobs = args
        _check_method(z, slots[0], method, None if draft == -1 else draft)
        args = (
            _integers("draft_tokens", drafts, (rows, slots[0] - 1), device),
            _integers("draft_lengths", lengths, (rows,), device),
            _check_parents(parents, rows, slots[0], method, device, False),
            method,
            draft,
            _own_params(
                drawn_by._asdict(), rows, device, False, _no_distribution(method, None if draft == -1 else draft)
            ),
            logprobs,
        )
    elif name == "token_logprobs":
        ids = args[0]
        if not isinstance(ids, torch.Tensor) or ids.is_nested or ids.dim() != 2:
            raise ValueError(f"ids: expected an int64 tensor [{rows}, n], got {shown(ids)}")
        args = (_integers("ids", ids, (rows, ids.shape[1]), device),)
    sampling = {name: fields.pop(name) for name in NAMES}
    p = check_params(
        z,
        fields.pop("weights"),
        rows,
        vocab_size,
        sampling,
        row_index=row_index,
        **fields,
        needs_tuned=name == "sample" and args[4],
    )
    return z, p, *args


def _implementation(name: str) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    def run(logits: list[torch.Tensor], *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        own = args[_COUNT:-1]
        if name == "verify":
            own = *args[_COUNT : _DRAFT.start], DraftParams(*_values_of(args[_DRAFT])), *args[_DRAFT.stop : -1]
        checked = _checked(name, logits, _params(args[:_COUNT]), own)
        out = getattr(dispatch.choose(args[-1], logits[0].device), name)(*checked)
        if isinstance(out, torch.Tensor):
            return out
        # an operator returns tensors: what was not asked for is empty
        return tuple(logits[0].new_empty(0, dtype=dtype) if t is None else t for t, dtype in zip(out, _RETURNS[name]))

    return run


def _plain() -> bool:
    """Nothing listens to the dispatcher (which costs more than a small kernel)."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _device_type(logits: Sequence[torch.Tensor]) -> str:
    try:
        return "cuda" if logits[0].is_cuda else "cpu"
    except (TypeError, AttributeError, LookupError, RuntimeError):
        return "cpu"  # whoever looks closer will say what is wrong


@overload
def _call(
    name: Literal["sample"], logits: list[torch.Tensor], p: Params, *args: object, backend: str
) -> dispatch.Sampled: ...
@overload
def _call(
    name: Literal["verify"], logits: list[torch.Tensor], p: Params, *args: object, backend: str
) -> dispatch.Verified: ...
@overload
def _call(
    name: Literal["logprobs", "token_logprobs"], logits: list[torch.Tensor], p: Params, *args: object, backend: str
) -> torch.Tensor: ...
def _call(name: str, logits: list[torch.Tensor], p: Params, *args: object, backend: str) -> Any:
    """The operator; without the dispatcher where nothing listens to it."""
    plain = all(type(z) is torch.Tensor or type(z) is torch.nn.Parameter for z in logits)
    if plain and _plain() and logits[0].device.type != "meta":
        return getattr(dispatch.choose(backend, logits[0].device), name)(logits, p, *args)
    try:
        return getattr(getattr(torch.ops, NAMESPACE), name)(logits, *_flatten(p, *args), backend)
    except Exception as error:
        if plain or torch.compiler.is_compiling():
            raise
        j = next(j for j, z in enumerate(logits) if stands_for_others(z))
        raise ValueError(
            f"logits[{j}]: expected a plain tensor, got a {type(logits[j]).__name__} "
            f"that fails with {type(error).__name__}: {error}"
        ) from error


def _values(weights: AnyWeights) -> tuple[float, ...] | torch.Tensor | None:
    if type(weights) is not Weights:  # quicker than isinstance; mypy narrows less by it
        weights = Weights(weights)  # type: ignore[arg-type]
    return weights.tensor if weights.values is None else weights.values


Fake = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def _shapes_alone(fake: Fake) -> Fake:
    """A fake for tensors without values. One of them beside real logits would have it make up the results."""

    @functools.wraps(fake)
    def run(logits: list[torch.Tensor], *args: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not logits:
            raise ValueError(f"logits: expected a list of 1 to {MAX_MODELS} tensors, one per model, got 0 tensors")
        if logits[0].device.type != "meta" and not is_fake(logits[0]):
            raise ValueError(f"an argument is on meta, the logits are on {logits[0].device}; move it there")
        return fake(logits, *args)

    return run


def _fake_lead(logits: list[torch.Tensor], args: Sequence[Any]) -> torch.Size:
    return _params(args[:_COUNT]).lead(logits)


def _fake_sample(logits: list[torch.Tensor], *args: Any) -> tuple[torch.Tensor, ...]:
    (B,), (_, _, logprobs, n, diagnostics, m, _) = _fake_lead(logits, args), args[_COUNT:]
    shapes: list[tuple[int, ...]] = [(B,), (B,)] + [(B if logprobs else 0,)] * 2 + [(B, n) if n else (0,)] * 2
    shapes += [(B if diagnostics else 0,)] * 2 + [(B, m) if m else (0,)]
    return tuple(logits[0].new_empty(s, dtype=d) for s, d in zip(shapes, _RETURNS["sample"]))


def _fake_verify(logits: list[torch.Tensor], *args: Any) -> tuple[torch.Tensor, ...]:
    B, S = _fake_lead(logits, args)
    shapes: list[tuple[int, ...]] = [(B, S), (B,), (B,)] + [(B, S) if args[-2] else (0,)] * 2
    shapes.append((0,) if args[_COUNT + 2] is None else (B, S))
    return tuple(logits[0].new_empty(s, dtype=d) for s, d in zip(shapes, _RETURNS["verify"]))


def _fake_logprobs(logits: list[torch.Tensor], *args: Any) -> torch.Tensor:
    return logits[0].new_empty((*_fake_lead(logits, args), args[_COUNT - 3]), dtype=torch.float32)


def _fake_token_logprobs(logits: list[torch.Tensor], *args: Any) -> torch.Tensor:
    return logits[0].new_empty(args[-2].shape, dtype=torch.float32)


library = torch.library.Library(NAMESPACE, "DEF")
_FAKES: dict[str, Fake] = dict(
    sample=_fake_sample, verify=_fake_verify, logprobs=_fake_logprobs, token_logprobs=_fake_token_logprobs
)
for _name, _fake in _FAKES.items():
    library.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        library.impl(_name, _implementation(_name), _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shapes_alone(_fake), lib=library)


class SampleOutput(NamedTuple):
    """What `sample` returns; B rows."""

    tokens: torch.Tensor  # int64 [B], -1 where the row is invalid
    valid: torch.Tensor  # bool [B], False: NaN or +inf in the row, no token left, or a parameter out of range
    logprobs: torch.Tensor | None  # float32 [B], nats, under the processed distribution (greedy: 0)
    raw_logprobs: torch.Tensor | None  # float32 [B], nats, under the emulated distribution before sampling parameters
    top_ids: torch.Tensor | None  # int64 [B, n], of the emulated distribution, -1 padded
    top_logprobs: torch.Tensor | None  # float32 [B, n]
    entropy: torch.Tensor | None  # float32 [B], nats, of the emulated distribution
    tv: torch.Tensor | None  # float32 [B], total variation between the tuned and the emulated distribution, 0..1
    runners_up: torch.Tensor | None  # int64 [B, m], the tokens that came next in the draw, -1 padded


class VerifyOutput(NamedTuple):
    """What `verify` returns; B rows of K drafts."""

    tokens: torch.Tensor  # int64 [B, K+1], the accepted drafts, then one token of the target; -1 padded
    num_emitted: torch.Tensor  # int64 [B], accepted + 1 (accepted alone where the row is invalid)
    valid: torch.Tensor  # bool [B], False: the slot after the accepted drafts is invalid, as in `SampleOutput`
    logprobs: torch.Tensor | None  # float32 [B, K+1], nats, under the processed target
    raw_logprobs: torch.Tensor | None  # float32 [B, K+1], nats, under the emulated distribution
    path: torch.Tensor | None  # of a tree: int64 [B, K+1], each token's slot (an invalid one ends it), -1 padded


class DraftOutput(NamedTuple):
    """What `draft` returns, B rows; `verify` takes one for each draft and holds it to what the draft was drawn by."""

    tokens: torch.Tensor  # int64 [B], -1 where the row is invalid
    valid: torch.Tensor  # bool [B], as in `SampleOutput`
    logprobs: torch.Tensor | None  # float32 [B], nats, under the distribution that was drawn from
    runners_up: torch.Tensor | None  # int64 [B, m], as in `SampleOutput`
    method: str
    slot: int
    seed: PerRow
    position: PerRow
    params: DraftParams
    vocab_size: int
    token_mask: torch.Tensor | None
    token_bias: TokenBias | None


def _eager_cpu(device: torch.device) -> bool:
    """Looking at values costs no synchronisation."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def row_seeds(seed: int, rows: int, device: torch.device | str | None = None) -> torch.Tensor:
    """A seed per row from one, int64 [rows]: row 0 keeps ``seed``, row i gets splitmix64(seed + i * golden ratio).

    `sample` and `verify` do the same to a ``seed`` that is one number.
    """
    p = PER_ROW["seed"]
    seed = index("seed", seed, p.low, p.high, p.allowed) & ((1 << 64) - 1)
    rows = index("rows", rows, 0, 1 << 40, "an integer >= 0")
    return row_seed(seed - (1 << 64) if seed >= 1 << 63 else seed, torch.arange(rows, device=device))


def _noise(seed: PerRow, position: PerRow, rows: int, device: torch.device) -> tuple[PerRow, PerRow]:
    """(seed, position) as given, or fresh seeds; ValueError where a seed would repeat its noise at every step."""
    if position is None:
        if seed is not None:
            raise ValueError(
                f"position: got None with seed={'a tensor' if isinstance(seed, torch.Tensor) else seed}; "
                "give the step's number (0 for a row's first new token, then 1, ...): the same seed and "
                "position draw the same noise again"
            )
        position = 0
    if seed is None:
        seed = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), dtype=torch.int64, device=device)
    elif (
        isinstance(seed, torch.Tensor)
        and seed.dim() == 0
        and not (seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool)
    ):
        seed = row_seed(seed.to(torch.int64), torch.arange(rows, device=seed.device))
    return seed, position


def sample(
    logits: Sequence[torch.Tensor] | None = None,
    weights: AnyWeights | None = None,
    *,
    base: torch.Tensor | None = None,
    tuned: int | torch.Tensor = 1,
    ref: torch.Tensor | None = None,
    # parameters: arguments
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    typical_p: PerRow = 1.0,
    upscale_top_p: PerRow = 1.0,
    # parameters: end
    seed: PerRow = None,
    position: PerRow = None,
    vocab_size: int | None = None,
    token_mask: torch.Tensor | None = None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None = None,
    logprobs: bool = True,
    top_logprobs: int = 0,
    diagnostics: bool = False,
    runners_up: int = 0,
    row_index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    stream: str = "sample",
    slot: int = 0,
    backend: str = "auto",
    check: bool = False,
) -> SampleOutput:
    """One token per row from ``softmax(sum_j w_j z_j)`` after the sampling parameters.

    With ``weights = upscale()`` and logits [base, tuned, ref] this is emulated fine-tuning (arXiv 2310.12962).

    Args:
      logits: J tensors [B, V_j] (or [B, 1, V_j]), float32, float16 or bfloat16, any mix, any row stride.
      weights: `Weights`, J numbers, or a tensor [J] or [B, J]. A model of weight 0 is not read.
      base, tuned, ref: instead of ``logits``, the three by name; weights are then `upscale()` if not given. Beside
        ``logits``, tuned is the index of the tuned model (for upscale_top_p and diagnostics).
      The sampling parameters: numbers, or tensors, lists or NumPy arrays [B]. upscale_top_p applies first, then the
      others in this order:
        temperature: divides the scores; 0 (below 1e-5) is greedy, the lowest id on ties.
        top_k: keeps the k largest scores; 0 or -1 is off.
        top_p: keeps a token if those more likely have less than this mass together; 1 is off.
        min_p: keeps tokens of at least this share of the likeliest token's probability; 0 is off.
        typical_p: keeps the tokens whose log-probability is nearest to its mean, the fewest that have this mass
          together; 1 is off.
        upscale_top_p: conservative decoding: outside the smallest nucleus of this mass of the tuned model's own
          distribution a token keeps log p_tuned; 1 is off.
        Filters are thresholds on the score: ties are kept. None is a parameter's default.
      seed, position: integers (64 bits) or tensors [B]. The noise is a pure function of a row's (seed, position,
        stream, slot, token), whatever the batch or the device. One ``seed`` for all rows is expanded as `row_seeds`
        does; of a tensor [B], rows of equal seed and position share noise. A seed needs a ``position``, the step's
        number: without one every step would repeat its noise. seed=None draws fresh seeds from torch's generator.
      vocab_size: V, at most (and by default) the shortest V_j.
      token_mask: int32 [B, ceil(V / 32)] or [1, ...], bit 1 = allowed (xgrammar's layout; further words are ignored);
        applied before everything.
      token_bias: `TokenBias` or a pair of ids and values [B, N] or [1, N], added to the emulated scores of these tokens
        before temperature and filters; `penalties` makes it from the tokens so far.
      logprobs: return the token's log-probs; off saves the exponentials.
      top_logprobs: n most likely tokens of the emulated distribution, n up to 2^22. diagnostics: entropy and TV to
        ``tuned``.
      runners_up: m tokens, 0 to 15, that came next in the draw that the token won, in order, of those that the filters
        keep; -1 where there are fewer. Greedy: the next best scores, whatever the filters.
      row_index: int64 [B], which row of the logits, then [N, V_j], each row reads; one outside [0, N) is invalid. All
        else is by row of the call.
      out: int64 [B], contiguous, no memory of other arguments; tokens are written there, and it is returned as
        ``tokens``.
      stream, slot: which of the position's noise. Drafts have noise of their own: use `draft`, which knows it.
      backend: "auto" or a name of `backends()`. check: also check the values of tensors on a GPU (synchronises).

    Returns: `SampleOutput`. A row with NaN, +inf, or nothing left gives token -1 and valid False, that row alone.
    Raises: ValueError naming the argument, before anything is computed.
    """
    # parameters: values
    sampling = (temperature, top_k, top_p, min_p, typical_p, upscale_top_p)
    # parameters: end
    check = check is not False and flag("check", check)
    logits, weights, tuned = _models(logits, weights, base, tuned, ref)
    if isinstance(out, torch.Tensor):
        dense("out", out)  # here: the shortcut does not see how much memory it has
    if (
        seed is not None
        and position is not None
        and not check
        and type(stream) is str
        and _plain()
        and (shortcut := dispatch.shortcut("try_sample", backend, _device_type(logits)))
    ):
        found = shortcut(
            logits,
            row_index,
            _values(weights),
            *sampling,
            seed,
            position,
            token_mask,
            token_bias,
            vocab_size,
            tuned,
            STREAM_CODES.get(stream),
            slot,
            logprobs,
            top_logprobs,
            diagnostics,
            runners_up,
            out,
        )
        if found is not None:
            return SampleOutput(*found)
    logits, vocab_size = check_logits(logits, 2, vocab_size)
    device = logits[0].device
    row_index = check_row_index(row_index, 1, logits)
    rows = len(logits[0] if row_index is None else row_index)
    if out is not None:
        _check_out(out, rows, device)
    slot, top_logprobs, runners_up = _check_draw(stream, slot, top_logprobs, runners_up)
    logprobs, diagnostics = flag("logprobs", logprobs), flag("diagnostics", diagnostics)
    seed, position = _noise(seed, position, rows, device)
    p = check_params(
        logits,
        weights,
        rows,
        vocab_size,
        dict(zip(NAMES, sampling)),
        seed=seed,
        position=position,
        token_mask=token_mask,
        token_bias=token_bias,
        tuned=tuned,
        row_index=row_index,
        check=check or _eager_cpu(device),
        needs_tuned=diagnostics,
    )
    found = _call("sample", logits, p, stream, slot, logprobs, top_logprobs, diagnostics, runners_up, backend=backend)
    tokens, valid, lp, raw, top_ids, top_lp, entropy, tv, others = found
    if out is not None:
        tokens = out.copy_(tokens)
    return SampleOutput(
        tokens,
        valid,
        *((lp, raw) if logprobs else (None, None)),
        *((top_ids, top_lp) if top_logprobs else (None, None)),
        *((entropy, tv) if diagnostics else (None, None)),
        others if runners_up else None,
    )


def draft(
    logits: torch.Tensor,
    *,
    slot: int,
    method: str,
    # parameters: arguments of draft
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    typical_p: PerRow = 1.0,
    # parameters: end
    seed: PerRow,
    position: PerRow,
    vocab_size: int | None = None,
    token_mask: torch.Tensor | None = None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None = None,
    logprobs: bool = False,
    runners_up: int = 0,
    backend: str = "auto",
    check: bool = False,
) -> DraftOutput:
    """A draft per row from one model, by the noise that `verify`'s ``method`` needs.

    Args:
      logits: the drafting model's own, [B, V].
      slot: the draft's place in its round, 0 to K - 1; of a tree, how many drafts lead to it. method: as for `verify`.
      seed: the one that `verify` will be given. position: of this draft: the round's (that of slot 0) + slot.
      The sampling parameters are the drafts' own; they need not be the target's. The others: see `sample`.
      runners_up: further drafts for the same place, for a tree (``parents`` of `verify`); "coupled" alone.

    Returns: `DraftOutput`; give `verify` a list of the round's. Raises: ValueError naming the argument.
    """
    # parameters: values of draft
    sampling = (temperature, top_k, top_p, min_p, typical_p)
    # parameters: end
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"logits: expected the drafting model's tensor [B, V], got {type(logits).__name__}")
    one_of("method", method, METHODS)
    slot = _slot(slot)
    if runners_up and method != "coupled":
        raise ValueError(
            f"runners_up: got {shown(runners_up)} with method={method!r}, allowed is 0; trees go with method='coupled'"
        )
    if seed is None:
        raise ValueError("seed: got None; give the seed that verify will be given")
    noise: dict[str, Any] = dict(stream="sample") if method == "coupled" else dict(stream="draft", slot=slot)
    given: dict[str, Any] = {  # verify takes None for the target's value
        name: PER_ROW[name].off if x is None else x for name, x in zip(DraftParams._fields, sampling)
    }
    out = sample(
        [logits],
        (1.0,),
        **given,
        seed=seed,
        position=position,
        vocab_size=vocab_size,
        token_mask=token_mask,
        token_bias=token_bias,
        logprobs=logprobs,
        runners_up=runners_up,
        tuned=0,
        backend=backend,
        check=check,
        **noise,
    )
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    # copies: what their owner writes there until verify looks at them does not count
    mask = bias = None
    if token_mask is not None:
        mask = check_mask(token_mask, (logits.shape[0], (vocab_size + 31) // 32), logits.device).clone()
    if token_bias is not None:
        bias = check_bias(token_bias, logits.shape[:1], logits.device)
        bias = bias and TokenBias(bias.ids.clone(), bias.values.clone())
    *own, seed, position = (
        x.clone() if isinstance(x, torch.Tensor) else copy.copy(x) for x in (*given.values(), seed, position)
    )
    return DraftOutput(
        out.tokens,
        out.valid,
        out.logprobs,
        out.runners_up,
        method,
        slot,
        seed,
        position,
        DraftParams(*own),
        vocab_size,
        mask,
        bias,
    )


def verify(
    logits: Sequence[torch.Tensor] | None = None,
    weights: AnyWeights | None = None,
    draft_tokens: torch.Tensor | Sequence[DraftOutput] | None = None,
    draft_lengths: torch.Tensor | None = None,
    *,
    base: torch.Tensor | None = None,
    tuned: int | torch.Tensor = 1,
    ref: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    method: str = "token",
    draft: int | None = 1,
    # parameters: arguments
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    typical_p: PerRow = 1.0,
    upscale_top_p: PerRow = 1.0,
    # parameters: end
    seed: PerRow = None,
    position: PerRow = None,
    vocab_size: int | None = None,
    token_mask: torch.Tensor | None = None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None = None,
    # parameters: arguments draft_
    draft_temperature: PerRow = None,
    draft_top_k: PerRow = None,
    draft_top_p: PerRow = None,
    draft_min_p: PerRow = None,
    draft_typical_p: PerRow = None,
    # parameters: end
    logprobs: bool = False,
    backend: str = "auto",
    check: bool = False,
) -> VerifyOutput:
    """Judge K drafted tokens per row against the emulated distribution and add one token of its own.

    Args:
      logits: J tensors [B, K+1, V_j]: slot i holds the logits that follow the first i drafts. Or base, tuned and ref,
        see `sample`.
      offsets: int64 [B + 1] of ragged rounds: the logits are [N, V_j], and row b's slots are rows offsets[b] to
        offsets[b + 1] - 1 of them, at most K + 1; so are those of token_mask [N, ...] and token_bias [N, n].
      draft_tokens: int64 [B, K], or the round's K outputs of `draft`: these say how they were drawn, and what cannot
        be judged is refused (of tensors on a GPU only with ``check``); a row's drafts end at its first invalid one.
      parents: int64 [B, K], of drafts that are a tree ("coupled" alone): the slot that draft i follows, 0 to i. Slot 0
        follows the text so far, slot i + 1 follows draft i; a slot's logits are those after the text and the drafts on
        its path. The longest path whose drafts are all the target's own samples is accepted; among equally long ones,
        the path that ends in the lowest slot. A draft of -1 is never accepted (a draw may have fewer runners-up).
      draft_lengths: int64 [B], how many of them count (default K, or what ``offsets`` have room for).
      method: "coupled": slot i's own sample with the noise of (seed, position + i), accepted while it equals the
        draft (of `draft` at the same positions): exactly the tokens of plain decoding for equal logits (a model's
        pass over K + 1 tokens rounds bfloat16 logits in another order than its pass over one).
        "token": accept where u q(d) < p(d), else the residual (p - q)+ (Leviathan et al., arXiv 2211.17192; Chen et
        al., arXiv 2302.01318). "block": block verification (Sun et al., arXiv 2403.10444). Both for drafts drawn from
        the draft distribution by `draft`: with other noise, or from another distribution, the tokens are not the
        target's.
      draft: index of the model whose logits were the draft distribution's (it may have weight 0), under the same
        mask and bias; None for a deterministic proposer.
      draft_temperature, draft_top_k, ...: numbers or tensors [B], what the drafts were drawn by where it is not the
        target's temperature, top_k, ... "coupled" compares tokens alone and takes none.
      position: of slot 0; slot i is at position + i (of a tree: + the number of drafts that lead to it).
      token_mask: int32 [B, K+1, ceil(V / 32)], token_bias: [B, K+1, N]; both hold for the draft distribution, too.
      The others: see `sample`.

    Returns: `VerifyOutput`. Raises: ValueError naming the argument, before anything is computed.
    """
    # parameters: values
    sampling = (temperature, top_k, top_p, min_p, typical_p, upscale_top_p)
    # parameters: end
    # parameters: values draft_
    drawn_by = (draft_temperature, draft_top_k, draft_top_p, draft_min_p, draft_typical_p)
    # parameters: end
    check = check is not False and flag("check", check)
    logits, weights, tuned = _models(logits, weights, base, tuned, ref)
    if (
        offsets is None
        and seed is not None
        and position is not None
        and not check
        and _plain()
        and type(method) is str
        and method in METHODS
        and (shortcut := dispatch.shortcut("try_verify", backend, _device_type(logits)))
    ):
        out = shortcut(
            logits,
            None,
            _values(weights),
            *sampling,
            seed,
            position,
            token_mask,
            token_bias,
            vocab_size,
            tuned,
            draft_tokens,
            draft_lengths,
            parents,
            METHOD_CODES[method],
            draft,
            *drawn_by,
            logprobs,
        )
        if out is not None:
            return VerifyOutput(*out)
    logits, vocab_size = check_logits(logits, 3 if offsets is None else 2, vocab_size)
    device = logits[0].device
    look = check or _eager_cpu(device)
    row_index = None
    if offsets is None:
        rows, slots = logits[0].shape[:2]
    else:
        row_index, room = _ragged(offsets, draft_tokens, logits, look)
        rows, slots = row_index.shape
        if draft_lengths is not None:
            draft_lengths = _integers("draft_lengths", draft_lengths, (rows,), device)
            _check_lengths(draft_lengths, slots, look)
            room = torch.minimum(room, draft_lengths)
        draft_lengths = room
        n = len(logits[0])
        if token_mask is not None:
            token_mask = _per_slot("token_mask", token_mask, row_index, n, device)
        if isinstance(token_bias, (tuple, list)) and len(token_bias) == 2:
            token_bias = TokenBias(
                *(_per_slot(f"token_bias[{i}]", x, row_index, n, device) for i, x in enumerate(token_bias))
            )
    draft, logprobs = _check_method(logits, slots, method, draft), flag("logprobs", logprobs)
    parents = _check_parents(parents, rows, slots, method, device, look, draft_lengths)
    seed, position = _noise(seed, position, rows, device)
    p = check_params(
        logits,
        weights,
        rows,
        vocab_size,
        dict(zip(NAMES, sampling)),
        seed=seed,
        position=position,
        token_mask=token_mask,
        token_bias=token_bias,
        tuned=tuned,
        row_index=row_index,
        check=look,
    )
    drafts = None
    if (
        isinstance(draft_tokens, (list, tuple))
        and all(isinstance(d, DraftOutput) for d in draft_tokens)
        or isinstance(draft_tokens, DraftOutput)
    ):
        if parents is not None:
            raise ValueError(
                "draft_tokens: got outputs of eft.draft, allowed with parents is a tensor of their tokens [B, K]"
            )
        drafts, draft_tokens = draft_tokens, _tokens_of(draft_tokens, rows, slots - 1, device)
    elif isinstance(draft_tokens, (list, tuple)) and any(
        isinstance(x, (torch.Tensor, DraftOutput)) for x in draft_tokens
    ):
        raise ValueError(
            f"draft_tokens: expected an int64 tensor [{rows}, {slots - 1}] (torch.stack(tokens, 1)) or "
            "the round's outputs of eft.draft, got a list of tensors"
        )
    refused = "draft_tokens say what they were drawn by" if drafts is not None else _no_distribution(method, draft)
    params = _own_params(dict(zip(DraftParams._fields, drawn_by)), rows, device, look, refused)
    if drafts is not None:
        params = _drawn_by(drafts, p, draft_lengths, rows, device, method, draft, look)
        if drafts:  # a row's drafts end at its first invalid one
            there = torch.stack([d.valid for d in drafts], 1).long().cumprod(1).sum(1)
            draft_lengths = (
                there
                if draft_lengths is None
                else torch.minimum(there, _integers("draft_lengths", draft_lengths, (rows,), device))
            )
    draft_tokens = _integers("draft_tokens", draft_tokens, (rows, slots - 1), device)
    if draft_lengths is None:
        draft_lengths = torch.full((rows,), slots - 1, dtype=torch.int64, device=device)
    draft_lengths = _integers("draft_lengths", draft_lengths, (rows,), device)
    _check_lengths(draft_lengths, slots, look)
    if look and rows and readable(draft_tokens) and readable(draft_lengths):
        counts = torch.arange(slots - 1, device=device) < draft_lengths[:, None]
        least = 0 if parents is None else -1
        if bool((counts & ((draft_tokens < least) | (draft_tokens >= vocab_size))).any()):
            raise ValueError(f"draft_tokens: got an id outside {least} to {vocab_size - 1}")
    out = _call(
        "verify",
        logits,
        p,
        draft_tokens,
        draft_lengths,
        parents,
        method,
        -1 if draft is None else draft,
        params,
        logprobs,
        backend=backend,
    )
    tokens, num_emitted, valid, lp, raw, path = out
    return VerifyOutput(
        tokens, num_emitted, valid, *((lp, raw) if logprobs else (None, None)), None if parents is None else path
    )


def _check_parents(
    parents: object, rows: int, slots: int, method: str, device: torch.device, look: bool, lengths: object = None
) -> torch.Tensor | None:
    if parents is None:
        return None
    if method != "coupled":
        raise ValueError(f"parents: got a tree with method={method!r}, allowed is 'coupled'")
    checked = _integers("parents", parents, (rows, slots - 1), device)
    if not look or not readable(checked):
        return checked
    draft = torch.arange(slots - 1, device=device)
    wrong = (checked < 0) | (checked > draft)
    if lengths is not None:  # what follows a row's drafts may be anything
        wrong &= draft < _integers("draft_lengths", lengths, (rows,), device)[:, None]
    if bool(wrong.any()):
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"parents[{b}, {i}]: got {int(checked[b, i])}, allowed is 0 to {i}: a slot before its own")
    return checked


def _check_lengths(lengths: torch.Tensor, slots: int, look: bool) -> None:
    if look and lengths.numel() and readable(lengths):
        if int(lengths.min()) < 0 or int(lengths.max()) > slots - 1:
            raise ValueError(f"draft_lengths: got {lengths.tolist()}, allowed is 0 to {slots - 1}")


def _ragged(
    offsets: object, drafts: object, logits: Sequence[torch.Tensor], look: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ragged rounds the row of every slot, int64 [B, K+1] (-1 where a row has none), and room for drafts [B]."""
    device = logits[0].device
    offsets = from_host("offsets", offsets, device)
    if not isinstance(offsets, torch.Tensor) or dense("offsets", offsets).dim() != 1 or not len(offsets):
        raise ValueError(f"offsets: expected an int64 tensor [B + 1], got {shown(offsets)}")
    offsets = _integers("offsets", offsets, offsets.shape, device)
    if isinstance(drafts, (list, tuple)) and all(isinstance(d, DraftOutput) for d in drafts):
        slots = len(drafts) + 1
    elif isinstance(tokens := from_host("draft_tokens", drafts, device), torch.Tensor) and tokens.dim() == 2:
        slots = tokens.shape[1] + 1
    else:
        raise ValueError(
            f"draft_tokens: expected an int64 tensor [{len(offsets) - 1}, K] or the round's outputs of eft.draft, got "
            + shown(drafts)
        )
    counts = offsets.diff()
    if look and readable(offsets):
        n = len(logits[0])
        if int(offsets[0]) < 0 or int(offsets[-1]) > n:
            raise ValueError(f"offsets: got {offsets.tolist()}, allowed is 0 to {n}, the logits' rows")
        if len(counts) and (int(counts.min()) < 1 or int(counts.max()) > slots):
            raise ValueError(f"offsets: got rounds of {counts.tolist()} slots, allowed is 1 to {slots}")
    at = torch.minimum(offsets[:-1, None] + torch.arange(slots, device=device), offsets[1:, None] - 1)
    return torch.where(counts[:, None] > 0, at, -1), (counts - 1).clamp(0, slots - 1)


def _per_slot(name: str, x: Any, row_index: torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """What each of the n rows of ragged logits has, [n, size] or [1, size], as [B, K+1, size] or [1, 1, size]."""
    x = from_host(name, x, device)
    if isinstance(x, torch.Tensor) and dense(name, x).dim() == 3 and x.shape[1] == 1:
        x = x[:, 0]
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or len(x) not in (1, n):
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a row for each row of the logits, [{n}, size], or [1, size], got {got}")
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, the logits are on {device}; move it there")
    return x[:, None] if len(x) == 1 else x[row_index.clamp(0, n - 1)]


def _models(
    logits: Sequence[torch.Tensor] | None,
    weights: AnyWeights | None,
    base: torch.Tensor | None,
    tuned: int | torch.Tensor,
    ref: torch.Tensor | None,
) -> tuple[Sequence[torch.Tensor], AnyWeights, int]:
    """(logits, weights, index of the tuned model), where base, tuned and ref may be given by name."""
    if base is None and ref is None and not isinstance(tuned, torch.Tensor):
        if logits is None:
            raise ValueError("logits: got None; give a list of tensors, or base=, tuned= and ref=")
        if weights is None:
            raise ValueError("weights: got None; give one for each model, such as eft_kernels.upscale()")
        return logits, weights, tuned
    if logits is not None:
        name = "base" if base is not None else "ref" if ref is not None else "tuned"
        raise ValueError(f"{name}: got a model beside logits; give the list, or base=, tuned= and ref=")
    if base is None or ref is None or not isinstance(tuned, torch.Tensor):
        missing = "base" if base is None else "ref" if ref is None else "tuned"
        raise ValueError(f"{missing}: is missing; base=, tuned= and ref= go together, each a tensor of logits")
    return [base, tuned, ref], upscale() if weights is None else weights, 1


def _slot(slot: object) -> int:
    return index("slot", slot, 0, MAX_SLOT, "an integer from 0 to 2^24 - 1")


def _check_out(out: object, rows: int, device: torch.device) -> None:
    got = f"{out.dtype} {list(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
    if not isinstance(out, torch.Tensor) or out.dtype is not torch.int64 or out.shape != (rows,):
        raise ValueError(f"out: expected an int64 tensor [{rows}], got {got}")
    if out.device != device:
        raise ValueError(f"out: is on {out.device}, the logits are on {device}")
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")


def _check_draw(stream: object, slot: object, top_logprobs: object, runners_up: object) -> tuple[int, int, int]:
    one_of("stream", stream, STREAM_NAMES)
    return (
        _slot(slot),
        index("top_logprobs", top_logprobs, 0, MAX_VOCAB, f"an integer from 0 to {MAX_VOCAB}"),
        index("runners_up", runners_up, 0, MAX_RUNNERS_UP, f"an integer from 0 to {MAX_RUNNERS_UP}"),
    )


def _check_method(logits: Sequence[torch.Tensor], slots: int, method: object, draft: object) -> int | None:
    if slots < 1:
        raise ValueError("logits[0]: expected [B, K+1, V] with K >= 0, got 0 slots")
    one_of("method", method, METHODS)
    if draft is None:
        return None
    return index("draft", draft, 0, len(logits) - 1, f"None or the index of one of the {len(logits)} models")


def _no_distribution(method: str, draft: int | None) -> str | None:
    """Why a round of drafts has no distribution that could be declared, if it has none."""
    return (
        "coupled compares tokens alone"
        if method == "coupled"
        else "draft=None has no distribution"
        if draft is None
        else None
    )


def _own_params(
    params: Mapping[str, object], rows: int, device: torch.device, look: bool, refused: str | None = None
) -> DraftParams:
    """Parameters that drafts were drawn by, checked; ``refused``: why none may be given."""
    for name, x in params.items():
        if refused and x is not None:
            raise ValueError(f"draft_{name}: got a value, allowed is None: {refused}")
    checked: list[Any] = [  # of the types that the table says
        x if x is None else scalar_or_rows(f"draft_{name}", x, rows, device, look) for name, x in params.items()
    ]
    return DraftParams(*checked)


def _tokens_of(drafts: DraftOutput | Sequence[DraftOutput], rows: int, K: int, device: torch.device) -> torch.Tensor:
    """int64 [B, K] of K outputs of `draft`."""
    if isinstance(drafts, DraftOutput) or len(drafts) != K:
        got = "one of them" if isinstance(drafts, DraftOutput) else len(drafts)
        raise ValueError(
            f"draft_tokens: expected a list of {K} outputs of eft.draft, for logits of {K + 1} slots, got {got}"
        )
    tokens = [_integers(f"draft_tokens[{i}]", d.tokens, (rows,), device) for i, d in enumerate(drafts)]
    return torch.stack(tokens, 1) if tokens else torch.empty(rows, 0, dtype=torch.int64, device=device)


def _differ(name: str, a: Value, b: Value, rows: int, look: bool) -> bool:
    """Whether two values of a parameter, each a number or a tensor [B], are seen to differ."""
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return a != b
    if not look:
        return False
    device = next(x.device for x in (a, b) if isinstance(x, torch.Tensor))
    if name == "seed":
        a, b = (x if isinstance(x, torch.Tensor) else row_seeds(int(x), rows, device) for x in (a, b))
    a, b = (torch.as_tensor(x, dtype=dtype_of(parameter_of(name)), device=device).expand(rows) for x in (a, b))
    return not torch.equal(a, b)


def _drawn_by(
    drafts: Sequence[DraftOutput],
    p: Params,
    lengths: torch.Tensor | None,
    rows: int,
    device: torch.device,
    method: str,
    draft: int | None,
    look: bool,
) -> DraftParams:
    """What a round of `draft`s was drawn by; ValueError where `verify` by ``p`` and ``method`` would not judge it."""
    first = None
    for i, d in enumerate(drafts):

        def bad(name: str, got: object, allowed: str, i: int = i) -> ValueError:
            return ValueError(f"draft_tokens[{i}]: was drawn with {name} {got}, allowed is {allowed}")

        if d.method != method:
            raise bad("method", repr(d.method), f"{method!r}, as verify is told")
        if d.slot != i:
            raise bad("slot", d.slot, f"{i}, its place in the round")
        seed, _ = _noise(d.seed, 0, rows, device)
        seed, position = (
            scalar_or_rows(n, x, rows, device, False) for n, x in (("seed", seed), ("position", d.position))
        )
        if _differ("seed", seed, p.seed, rows, look):
            raise bad("seed", _text(seed), f"verify's, {_text(p.seed)}")
        if _differ("position", position, p.position + i, rows, look):
            raise bad("position", _text(position), f"verify's + {i}, {_text(p.position + i)}")
        if method == "coupled":
            continue
        if draft is None:
            raise ValueError("draft: got None, allowed is the index of the model that draft_tokens were drawn from")
        if d.vocab_size != p.vocab_size:
            raise bad("vocab_size", d.vocab_size, f"verify's, {p.vocab_size}")
        drawn: tuple[tuple[str, Sequence[torch.Tensor] | None, Sequence[torch.Tensor] | None], ...] = (
            (
                "token_mask",
                d.token_mask if d.token_mask is None else [d.token_mask],
                None if p.token_mask is None else [p.token_mask],
            ),
            ("token_bias", d.token_bias, p.token_bias),
        )
        for name, used, ours in drawn:
            if (used is None) != (ours is None):
                raise bad(name, "None" if used is None else "another", "that of verify's slot")
            if used is None or ours is None or not look:
                continue
            counts = slice(None) if lengths is None else lengths > i  # rows that have this draft
            if not all(torch.equal(a[counts], b[:, i][counts]) for a, b in zip(used, ours)):
                raise bad(name, "another", "that of verify's slot")
        own = _own_params(d.params._asdict(), rows, device, False)
        first = first or own
        for name, x in own._asdict().items():
            if _differ(name, x, getattr(first, name), rows, look):
                raise bad(name, _text(x), f"that of draft_tokens[0], {_text(getattr(first, name))}")
    return first or DraftParams()


def _text(x: Value) -> str:
    return (
        "a tensor on the device"
        if isinstance(x, torch.Tensor) and x.device.type != "cpu"
        else str(x.tolist() if isinstance(x, torch.Tensor) else x)
    )


def _integers(name: str, value: object, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    value = from_host(name, value, device)
    if isinstance(value, torch.Tensor):
        value = dense(name, value)
    if not isinstance(value, torch.Tensor) or value.dtype not in INTEGERS or value.shape != shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected an int64 tensor {list(shape)}, got {got}")
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, the logits are on {device}; move it there")
    return value.to(torch.int64).contiguous()


def _scored(
    logits: Sequence[torch.Tensor] | None,
    weights: AnyWeights | None,
    models: tuple[torch.Tensor | None, int | torch.Tensor, torch.Tensor | None],
    sampling: Mapping[str, object],
    vocab_size: int | None,
    token_mask: torch.Tensor | None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None,
    row_index: torch.Tensor | None,
    check: bool,
) -> tuple[list[torch.Tensor], Params, bool]:
    """(logits, parameters, whether values are looked at) of a function that draws nothing; ``models``: base, tuned and
    ref by name."""
    check = check is not False and flag("check", check)
    logits, weights, tuned = _models(logits, weights, *models)
    logits, vocab_size = check_logits(logits, 2, vocab_size)
    row_index = check_row_index(row_index, 1, logits)
    look = check or _eager_cpu(logits[0].device)
    p = check_params(
        logits,
        weights,
        len(logits[0] if row_index is None else row_index),
        vocab_size,
        sampling,
        token_mask=token_mask,
        token_bias=token_bias,
        tuned=tuned,
        row_index=row_index,
        check=look,
    )
    return logits, p, look


def logprobs(
    logits: Sequence[torch.Tensor] | None = None,
    weights: AnyWeights | None = None,
    *,
    base: torch.Tensor | None = None,
    tuned: int | torch.Tensor = 1,
    ref: torch.Tensor | None = None,
    # parameters: arguments
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    typical_p: PerRow = 1.0,
    upscale_top_p: PerRow = 1.0,
    # parameters: end
    vocab_size: int | None = None,
    token_mask: torch.Tensor | None = None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None = None,
    row_index: torch.Tensor | None = None,
    backend: str = "auto",
    check: bool = False,
) -> torch.Tensor:
    """Log-softmax of the emulated distribution, float32 [B, V], nats; arguments as in `sample`.

    With temperature or filters it is the processed distribution, -inf outside (greedy: 0 at one token). An invalid
    row is NaN. No gradient flows back.
    """
    # parameters: values
    sampling = (temperature, top_k, top_p, min_p, typical_p, upscale_top_p)
    # parameters: end
    logits, p, _ = _scored(
        logits,
        weights,
        (base, tuned, ref),
        dict(zip(NAMES, sampling)),
        vocab_size,
        token_mask,
        token_bias,
        row_index,
        check,
    )
    return _call("logprobs", logits, p, False, backend=backend)


def combine(
    logits: Sequence[torch.Tensor] | None = None,
    weights: AnyWeights | None = None,
    *,
    base: torch.Tensor | None = None,
    tuned: int | torch.Tensor = 1,
    ref: torch.Tensor | None = None,
    upscale_top_p: PerRow = 1.0,
    vocab_size: int | None = None,
    token_mask: torch.Tensor | None = None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None = None,
    row_index: torch.Tensor | None = None,
    backend: str = "auto",
    check: bool = False,
) -> torch.Tensor:
    """The emulated scores ``sum_j w_j z_j``, float32 [B, V], for a sampler of your own; arguments as in `sample`.

    They are log-probs but for a constant of each row; with ``upscale_top_p`` that constant makes the likeliest token's
    score its sum. Tokens that are excluded, by a model's -inf or ``token_mask``, are -inf; a row in which a model has
    NaN or +inf, or in which no token is left, is NaN. No gradient flows back.
    """
    logits, p, _ = _scored(
        logits,
        weights,
        (base, tuned, ref),
        dict(upscale_top_p=upscale_top_p),
        vocab_size,
        token_mask,
        token_bias,
        row_index,
        check,
    )
    scores = _call("logprobs", logits, p, True, backend=backend)
    if not isinstance(p.upscale_top_p, torch.Tensor) and p.upscale_top_p == 1:
        return scores
    before_bias = scores
    if p.token_bias is not None:
        before_bias = _call("logprobs", logits, p._replace(token_bias=None), True, backend=backend)
    best = before_bias.argmax(1)
    rows = torch.arange(len(best), device=best.device)
    at = rows if p.row_index is None else p.row_index.clamp(0, max(0, len(logits[0]) - 1))
    weights = torch.as_tensor(p.weights, dtype=torch.float32, device=best.device).expand(len(best), -1)
    terms = torch.stack([z[at, best].float() for z in logits], 1) * weights
    constant = torch.where(weights == 0, 0, terms).sum(1) - before_bias[rows, best]
    on = torch.as_tensor(p.upscale_top_p, device=best.device).expand(len(best)) < 1
    return scores + torch.where(on, constant, 0)[:, None]


def token_logprobs(
    logits: Sequence[torch.Tensor] | None = None,
    weights: AnyWeights | None = None,
    ids: torch.Tensor | None = None,
    *,
    base: torch.Tensor | None = None,
    tuned: int | torch.Tensor = 1,
    ref: torch.Tensor | None = None,
    # parameters: arguments
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    typical_p: PerRow = 1.0,
    upscale_top_p: PerRow = 1.0,
    # parameters: end
    vocab_size: int | None = None,
    token_mask: torch.Tensor | None = None,
    token_bias: TokenBias | tuple[torch.Tensor, torch.Tensor] | None = None,
    row_index: torch.Tensor | None = None,
    backend: str = "auto",
    check: bool = False,
) -> torch.Tensor:
    """Emulated log-probs of given tokens, float32 like ``ids`` ([B] or [B, n] int64), without [B, V] in memory.

    exp of minus their mean over a text is its perplexity under the emulated model. Otherwise as `logprobs`.
    """
    # parameters: values
    sampling = (temperature, top_k, top_p, min_p, typical_p, upscale_top_p)
    # parameters: end
    logits, p, look = _scored(
        logits,
        weights,
        (base, tuned, ref),
        dict(zip(NAMES, sampling)),
        vocab_size,
        token_mask,
        token_bias,
        row_index,
        check,
    )
    (rows,), device = p.lead(logits), logits[0].device
    ids = from_host("ids", ids, device)
    if not isinstance(ids, torch.Tensor) or dense("ids", ids).dim() not in (1, 2) or ids.shape[0] != rows:
        got = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"ids: expected an int64 tensor [{rows}] or [{rows}, n], got {got}")
    shape = ids.shape
    ids = _integers("ids", ids, shape, device).reshape(rows, shape[1] if len(shape) == 2 else 1)
    if look and ids.numel() and readable(ids) and (int(ids.min()) < 0 or int(ids.max()) >= p.vocab_size):
        raise ValueError(f"ids: got an id outside 0 to {p.vocab_size - 1}")
    return _call("token_logprobs", logits, p, ids, backend=backend).reshape(shape)
