"""The operators ``torch.ops.eft_kernels.*`` (schemas, fakes, implementations) and the public functions above them.

The schemas are Python's own, so the operators exist without any compiled library. Every per-row parameter comes twice:
an optional tensor [rows], which wins, and a scalar. Public functions check arguments and name the bad one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import is_fake

from . import dispatch
from .checks import INTEGERS, dense, flag, from_host, index, one_of, readable, stands_for_others
from .params import MAX_VOCAB, Params, check_logits, check_params
from .weights import Weights

STREAM_NAMES = ("sample", "draft")
METHODS = ("coupled", "token", "block")

_PARAMS = (
    "Tensor? weights, float[] weight_values, Tensor? temperature, float temperature_value, Tensor? top_k, "
    "int top_k_value, Tensor? top_p, float top_p_value, Tensor? min_p, float min_p_value, Tensor? upscale_top_p, "
    "float upscale_top_p_value, Tensor? seed, int seed_value, Tensor? position, int position_value, "
    "Tensor? token_mask, int vocab_size, int tuned"
)
SCHEMAS = {
    "sample": f"(Tensor[] logits, {_PARAMS}, str stream, int slot, bool logprobs, int top_logprobs, bool diagnostics, "
              "str backend) -> (Tensor tokens, Tensor valid, Tensor logprobs, Tensor raw_logprobs, Tensor top_ids, "
              "Tensor top_logprobs, Tensor entropy, Tensor tv)",
    "verify": f"(Tensor[] logits, {_PARAMS}, Tensor draft_tokens, Tensor draft_lengths, str method, int draft, "
              "bool logprobs, str backend) -> (Tensor tokens, Tensor num_emitted, Tensor valid, Tensor logprobs, "
              "Tensor raw_logprobs)",
    "logprobs": f"(Tensor[] logits, {_PARAMS}, str backend) -> Tensor",
    "token_logprobs": f"(Tensor[] logits, {_PARAMS}, Tensor ids, str backend) -> Tensor",
}
_PAIRS = ("temperature", "top_k", "top_p", "min_p", "upscale_top_p", "seed", "position")
_COUNT = 2 + 2 * len(_PAIRS) + 3  # arguments of _PARAMS
_F, _I, _B = torch.float32, torch.int64, torch.bool
_RETURNS = {"sample": (_I, _B, _F, _F, _I, _F, _F, _F), "verify": (_I, _I, _B, _F, _F)}


def _flatten(p: Params) -> list:
    """`Params` as the operators' arguments."""
    tensor = isinstance(p.weights, torch.Tensor)
    flat = [p.weights if tensor else None, [] if tensor else list(p.weights)]
    for name in _PAIRS:
        value = getattr(p, name)
        number = 0 if name in ("top_k", "seed", "position") else 0.0
        flat += [value, number] if isinstance(value, torch.Tensor) else [None, value]
    return [*flat, p.token_mask, p.vocab_size, p.tuned]


def _params(flat) -> Params:
    """The inverse of `_flatten`."""
    weights = tuple(flat[1]) if flat[0] is None else flat[0]
    pairs = [flat[i + 1] if flat[i] is None else flat[i] for i in range(2, 2 + 2 * len(_PAIRS), 2)]
    return Params(weights, *pairs, *flat[-3:])


def _checked(name: str, logits, p: Params, args: tuple):
    """An operator's arguments as a backend relies on them. Values of tensors are not looked at; ValueError."""
    fields = p._asdict()
    logits, vocab_size = check_logits(logits, 3 if name == "verify" else 2, fields.pop("vocab_size"))
    (rows, *slots), device = logits[0].shape[:-1], logits[0].device
    if name == "sample":
        _check_draw(*args[:2], args[3])
    elif name == "verify":
        drafts, lengths, method, draft, logprobs = args
        _check_method(logits, method, None if draft == -1 else draft)
        args = (_integers("draft_tokens", drafts, (rows, slots[0] - 1), device),
                _integers("draft_lengths", lengths, (rows,), device), method, draft, logprobs)
    elif name == "token_logprobs":
        args = (_integers("ids", args[0], (rows, *args[0].shape[1:2]), device),)
        if args[0].dim() != 2:
            raise ValueError(f"ids: expected an int64 tensor [{rows}, n], got {list(args[0].shape)}")
    p = check_params(logits, fields.pop("weights"), rows, vocab_size, needs_tuned=name == "sample" and args[4],
                     **fields)
    return logits, p, *args


def _implementation(name: str):
    def run(logits, *args):
        checked = _checked(name, logits, _params(args[:_COUNT]), args[_COUNT:-1])
        out = getattr(dispatch.choose(args[-1], logits[0].device), name)(*checked)
        if isinstance(out, torch.Tensor):
            return out
        # an operator returns tensors: what was not asked for is empty
        return tuple(logits[0].new_empty(0, dtype=dtype) if t is None else t
                     for t, dtype in zip(out, _RETURNS[name]))
    return run


def _plain() -> bool:
    """Nothing listens to the dispatcher (which costs more than a small kernel)."""
    return not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack() and \
        torch._C._functorch.peek_interpreter_stack() is None


def _device_type(logits) -> str:
    try:
        return "cuda" if logits[0].is_cuda else "cpu"
    except (TypeError, AttributeError, LookupError):
        return "cpu"  # whoever looks closer will say what is wrong


def _call(name: str, logits, p: Params, *args, backend: str):
    """The operator; without the dispatcher where nothing listens to it."""
    plain = all(type(z) is torch.Tensor or type(z) is torch.nn.Parameter for z in logits)
    if plain and _plain() and logits[0].device.type != "meta":
        return getattr(dispatch.choose(backend, logits[0].device), name)(logits, p, *args)
    try:
        return getattr(torch.ops.eft_kernels, name)(logits, *_flatten(p), *args, backend)
    except Exception as error:
        if plain or torch.compiler.is_compiling():
            raise
        j = next(j for j, z in enumerate(logits) if stands_for_others(z))
        raise ValueError(f"logits[{j}]: expected a plain tensor, got a {type(logits[j]).__name__} "
                         f"that fails with {type(error).__name__}: {error}") from error


def _values(weights):
    weights = weights if type(weights) is Weights else Weights(weights)
    return weights.tensor if weights.values is None else weights.values


def _shapes_alone(fake):
    """A fake for tensors without values. One of them beside real logits would have it make up the results."""
    @functools.wraps(fake)
    def run(logits, *args):
        if logits[0].device.type != "meta" and not is_fake(logits[0]):
            raise ValueError(f"an argument is on meta, the logits are on {logits[0].device}; move it there")
        return fake(logits, *args)
    return run


def _fake_sample(logits, *args):
    B, (_, _, logprobs, n, diagnostics, _) = logits[0].shape[0], args[_COUNT:]
    shapes = [(B,), (B,)] + [(B if logprobs else 0,)] * 2 + [(B, n) if n else (0,)] * 2
    shapes += [(B if diagnostics else 0,)] * 2
    return tuple(logits[0].new_empty(s, dtype=d) for s, d in zip(shapes, _RETURNS["sample"]))


def _fake_verify(logits, *args):
    B, S = logits[0].shape[:2]
    shapes = [(B, S), (B,), (B,)] + [(B, S) if args[-2] else (0,)] * 2
    return tuple(logits[0].new_empty(s, dtype=d) for s, d in zip(shapes, _RETURNS["verify"]))


def _fake_logprobs(logits, *args):
    return logits[0].new_empty((logits[0].shape[0], args[_COUNT - 2]), dtype=torch.float32)


def _fake_token_logprobs(logits, *args):
    return logits[0].new_empty(args[-2].shape, dtype=torch.float32)


library = torch.library.Library("eft_kernels", "DEF")
for _name, _fake in dict(sample=_fake_sample, verify=_fake_verify, logprobs=_fake_logprobs,
                         token_logprobs=_fake_token_logprobs).items():
    library.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        library.impl(_name, _implementation(_name), _key)
    torch.library.register_fake(f"eft_kernels::{_name}", _shapes_alone(_fake), lib=library)


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


class VerifyOutput(NamedTuple):
    """What `verify` returns; B rows of K drafts."""

    tokens: torch.Tensor  # int64 [B, K+1], the accepted drafts, then one token of the target; -1 padded
    num_emitted: torch.Tensor  # int64 [B], accepted + 1 (accepted alone where the row is invalid)
    valid: torch.Tensor  # bool [B], False: the slot after the accepted drafts holds NaN, +inf or no token
    logprobs: torch.Tensor | None  # float32 [B, K+1], nats, under the processed target
    raw_logprobs: torch.Tensor | None  # float32 [B, K+1], nats, under the emulated distribution


def _eager_cpu(device) -> bool:
    """Looking at values costs no synchronisation."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _fresh_seeds(rows: int, device) -> torch.Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), dtype=torch.int64, device=device)


def row_seeds(seed: int, rows: int, device=None) -> torch.Tensor:
    """A seed per row from one: row 0 keeps ``seed``, row i gets splitmix64(seed + i). int64 [rows]."""
    out, mask = [], (1 << 64) - 1
    for i in range(rows):
        x = seed & mask
        if i:
            x = (x + i * 0x9E3779B97F4A7C15) & mask
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x ^= x >> 31
        out.append(x - (1 << 64) if x >= 1 << 63 else x)
    return torch.tensor(out, dtype=torch.int64, device=device)


def sample(logits: Sequence[torch.Tensor], weights: Weights | Sequence[float] | torch.Tensor, *, temperature=1.0,
           top_k=0, top_p=1.0, min_p=0.0, upscale_top_p=1.0, seed=None, position=0, vocab_size: int | None = None,
           token_mask: torch.Tensor | None = None, logprobs: bool = True, top_logprobs: int = 0,
           diagnostics: bool = False, stream: str = "sample", slot: int = 0, tuned: int = 1, backend: str = "auto",
           check: bool = False) -> SampleOutput:
    """One token per row from ``softmax(sum_j w_j z_j)`` after temperature, top-k, top-p and min-p.

    With ``weights = upscale()`` and logits [base, tuned, ref] this is emulated fine-tuning (arXiv 2310.12962).

    Args:
      logits: J tensors [B, V_j], float32, float16 or bfloat16, any mix, any row stride.
      weights: `Weights`, J numbers, or a tensor [J] or [B, J]. A model of weight 0 is not read.
      temperature, top_k, top_p, min_p: a number, or a tensor, list or NumPy array [B]; in this order, as in
        transformers. Every filter is a threshold on the score and keeps ties. temperature below 1e-5 is greedy (lowest
        id on ties); 0 or -1, 1.0, 0.0 switch top_k, top_p, min_p off. None is the default.
      upscale_top_p: the paper's conservative decoding: outside the smallest nucleus of this mass of the tuned
        model's own distribution a token keeps log p_tuned. 1.0 is off.
      seed, position: integers (64 bits) or tensors [B]. The noise is a pure function of (seed, position, stream,
        slot, token), whatever the batch, the row or the device; rows that share seed and position share noise, so
        give each row its own seed (`row_seeds`). None draws fresh seeds from torch's generator.
      vocab_size: V, at most (and by default) the shortest V_j.
      token_mask: int32 [B, ceil(V / 32)] or [1, ...], bit 1 = allowed (xgrammar's layout); applied before everything.
      logprobs: return the token's log-probs; off saves the exponentials.
      top_logprobs: n most likely tokens of the emulated distribution, n up to 2^22. diagnostics: entropy and TV to
        ``tuned``.
      stream, slot: "draft" and the draft's place in its round for drafts that `verify` judges by "token" or "block".
      tuned: which of the models is the tuned one (upscale_top_p, diagnostics).
      backend: "auto" or a name of `backends()`. check: also check the values of tensors on a GPU (synchronises).

    Returns: `SampleOutput`. A row with NaN, +inf, or nothing left gives token -1 and valid False, that row alone.
    Raises: ValueError naming the argument, before anything is computed.
    """
    if seed is not None and not check and type(stream) is str and _plain() and \
            (shortcut := dispatch.shortcut("try_sample", backend, _device_type(logits))):
        out = shortcut(logits, _values(weights), temperature, top_k, top_p, min_p, upscale_top_p, seed, position,
                       token_mask, vocab_size, tuned, 0 if stream == "sample" else 1 if stream == "draft" else None,
                       slot, logprobs, top_logprobs, diagnostics)
        if out is not None:
            return SampleOutput(*out)
    logits, vocab_size = check_logits(logits, 2, vocab_size)
    rows, device = logits[0].shape[0], logits[0].device
    slot, top_logprobs = _check_draw(stream, slot, top_logprobs)
    logprobs, diagnostics = flag("logprobs", logprobs), flag("diagnostics", diagnostics)
    p = check_params(logits, weights, rows, vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                     upscale_top_p=upscale_top_p, seed=_fresh_seeds(rows, device) if seed is None else seed,
                     position=position, token_mask=token_mask, tuned=tuned, check=check or _eager_cpu(device),
                     needs_tuned=diagnostics)
    out = _call("sample", logits, p, stream, slot, logprobs, top_logprobs, diagnostics, backend=backend)
    tokens, valid, lp, raw, top_ids, top_lp, entropy, tv = out
    return SampleOutput(tokens, valid, *((lp, raw) if logprobs else (None, None)),
                        *((top_ids, top_lp) if top_logprobs else (None, None)),
                        *((entropy, tv) if diagnostics else (None, None)))


def verify(logits: Sequence[torch.Tensor], weights: Weights | Sequence[float] | torch.Tensor,
           draft_tokens: torch.Tensor, draft_lengths: torch.Tensor | None = None, *, method: str = "token",
           draft: int | None = 1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, upscale_top_p=1.0, seed=None,
           position=0, vocab_size: int | None = None, token_mask: torch.Tensor | None = None, logprobs: bool = False,
           tuned: int = 1, backend: str = "auto", check: bool = False) -> VerifyOutput:
    """Judge K drafted tokens per row against the emulated distribution and add one token of its own.

    Args:
      logits: J tensors [B, K+1, V_j]: slot i holds the logits that follow the first i drafts.
      draft_tokens: int64 [B, K]. draft_lengths: int64 [B], how many of them count (default K).
      method: "coupled": slot i's own sample with the noise of (seed, position + i), accepted while it equals the
        draft (drafts sampled with stream="sample" at the same positions): exactly the tokens of plain decoding.
        "token": accept where u q(d) < p(d), else the residual (p - q)+ (Leviathan et al., arXiv 2211.17192; Chen et
        al., arXiv 2302.01318). "block": block verification (Sun et al., arXiv 2403.10444). Both for drafts sampled
        with stream="draft", slot=i, position=position + i.
      draft: index of the model whose logits, with the same temperature, filters and mask, were the draft
        distribution (it may have weight 0); None for a deterministic proposer.
      position: of slot 0; slot i is at position + i. token_mask: int32 [B, K+1, ceil(V / 32)]. Others: see `sample`.

    Returns: `VerifyOutput`. Raises: ValueError naming the argument, before anything is computed.
    """
    if seed is not None and not check and _plain() and type(method) is str and method in METHODS and \
            (shortcut := dispatch.shortcut("try_verify", backend, _device_type(logits))):
        out = shortcut(logits, _values(weights), temperature, top_k, top_p, min_p, upscale_top_p, seed, position,
                       token_mask, vocab_size, tuned, draft_tokens, draft_lengths, METHODS.index(method), draft,
                       logprobs)
        if out is not None:
            return VerifyOutput(*out)
    logits, vocab_size = check_logits(logits, 3, vocab_size)
    rows, slots = logits[0].shape[:2]
    device = logits[0].device
    draft, logprobs = _check_method(logits, method, draft), flag("logprobs", logprobs)
    look = check or _eager_cpu(device)
    draft_tokens = _integers("draft_tokens", draft_tokens, (rows, slots - 1), device)
    if draft_lengths is None:
        draft_lengths = torch.full((rows,), slots - 1, dtype=torch.int64, device=device)
    draft_lengths = _integers("draft_lengths", draft_lengths, (rows,), device)
    if look and rows and readable(draft_tokens) and readable(draft_lengths):
        if int(draft_lengths.min()) < 0 or int(draft_lengths.max()) > slots - 1:
            raise ValueError(f"draft_lengths: got {draft_lengths.tolist()}, allowed is 0 to {slots - 1}")
        counts = torch.arange(slots - 1, device=device) < draft_lengths[:, None]
        if bool((counts & ((draft_tokens < 0) | (draft_tokens >= vocab_size))).any()):
            raise ValueError(f"draft_tokens: got an id outside 0 to {vocab_size - 1}")
    p = check_params(logits, weights, rows, vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                     upscale_top_p=upscale_top_p, seed=_fresh_seeds(rows, device) if seed is None else seed,
                     position=position, token_mask=token_mask, tuned=tuned, check=look)
    out = _call("verify", logits, p, draft_tokens, draft_lengths, method, -1 if draft is None else draft, logprobs,
                backend=backend)
    tokens, num_emitted, valid, lp, raw = out
    return VerifyOutput(tokens, num_emitted, valid, *((lp, raw) if logprobs else (None, None)))


def _check_draw(stream, slot, top_logprobs) -> tuple[int, int]:
    one_of("stream", stream, STREAM_NAMES)
    return (index("slot", slot, 0, (1 << 24) - 1, "an integer from 0 to 2^24 - 1"),
            index("top_logprobs", top_logprobs, 0, MAX_VOCAB, f"an integer from 0 to {MAX_VOCAB}"))


def _check_method(logits, method, draft) -> int | None:
    if logits[0].shape[1] < 1:
        raise ValueError("logits[0]: expected [B, K+1, V] with K >= 0, got 0 slots")
    one_of("method", method, METHODS)
    if draft is None:
        return None
    return index("draft", draft, 0, len(logits) - 1, f"None or the index of one of the {len(logits)} models")


def _integers(name: str, value, shape, device) -> torch.Tensor:
    value = from_host(name, value, device)
    if isinstance(value, torch.Tensor):
        value = dense(name, value)
    if not isinstance(value, torch.Tensor) or value.dtype not in INTEGERS or value.shape != shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected an int64 tensor {list(shape)}, got {got}")
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, the logits are on {device}; move it there")
    return value.to(torch.int64).contiguous()


def logprobs(logits: Sequence[torch.Tensor], weights: Weights | Sequence[float] | torch.Tensor, *, temperature=1.0,
             top_k=0, top_p=1.0, min_p=0.0, upscale_top_p=1.0, vocab_size: int | None = None,
             token_mask: torch.Tensor | None = None, tuned: int = 1, backend: str = "auto",
             check: bool = False) -> torch.Tensor:
    """Log-softmax of the emulated distribution, float32 [B, V], nats; arguments as in `sample`.

    With temperature or filters it is the processed distribution, -inf outside (greedy: 0 at one token). An invalid
    row is NaN.
    """
    logits, vocab_size = check_logits(logits, 2, vocab_size)
    p = check_params(logits, weights, logits[0].shape[0], vocab_size, temperature=temperature, top_k=top_k, top_p=top_p,
                     min_p=min_p, upscale_top_p=upscale_top_p, token_mask=token_mask, tuned=tuned,
                     check=check or _eager_cpu(logits[0].device))
    return _call("logprobs", logits, p, backend=backend)


def token_logprobs(logits: Sequence[torch.Tensor], weights: Weights | Sequence[float] | torch.Tensor,
                   ids: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, upscale_top_p=1.0,
                   vocab_size: int | None = None, token_mask: torch.Tensor | None = None, tuned: int = 1,
                   backend: str = "auto", check: bool = False) -> torch.Tensor:
    """Emulated log-probs of given tokens, float32 like ``ids`` ([B] or [B, n] int64), without [B, V] in memory.

    exp of minus their mean over a text is its perplexity under the emulated model. Otherwise as `logprobs`.
    """
    logits, vocab_size = check_logits(logits, 2, vocab_size)
    rows, device = logits[0].shape[0], logits[0].device
    ids = from_host("ids", ids, device)
    if not isinstance(ids, torch.Tensor) or dense("ids", ids).dim() not in (1, 2) or ids.shape[0] != rows:
        got = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"ids: expected an int64 tensor [{rows}] or [{rows}, n], got {got}")
    shape = ids.shape
    ids = _integers("ids", ids, shape, device).reshape(rows, shape[1] if len(shape) == 2 else 1)
    look = check or _eager_cpu(device)
    if look and ids.numel() and readable(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(f"ids: got an id outside 0 to {vocab_size - 1}")
    p = check_params(logits, weights, rows, vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                     upscale_top_p=upscale_top_p, token_mask=token_mask, tuned=tuned, check=look)
    return _call("token_logprobs", logits, p, ids, backend=backend).reshape(shape)
