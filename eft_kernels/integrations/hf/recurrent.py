"""Taking tokens back from a model whose layers keep a state: Mamba, gated delta rules, short convolutions.

A state cannot be cropped: at the end of a pass it holds all tokens of the pass. But what a layer's projections make of
a token depends on that token alone, so their outputs in that pass serve again: from the states before the pass,
convolution and scan alone are computed for the tokens that are kept. No large weight is read a second time.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import DynamicCache, cache_utils

from .texts import Place, TextLayer

# Early versions keep such states in caches of the models' own.
Linear: Any = getattr(cache_utils, "LinearAttentionLayer", None)

UPDATES = {"update_conv_state", "update_recurrent_state"}  # a cache's methods; a module that calls one is a mixer
FROM_ZERO = {"mamba_selective_scan"}  # scans over several tokens that begin with no state
PADDED = {"mamba2_chunk_scan"}  # on a CPU: a scan over hundreds of tokens, however few there are
LAST = ("out_proj", "o_proj")  # the projection whose output a mixer gives back


class _NoStates:
    """What `StatesAndText` is made of where there is no layer of states."""


class StatesAndText(Linear or _NoStates, TextLayer):  # type: ignore[misc]
    """States beside keys and values."""

    is_compileable = False  # keys and values grow

    def __init__(self, place: Place, number_of_states: int):
        TextLayer.__init__(self, place)
        Linear.__init__(self, number_of_states=number_of_states)

    crop = TextLayer.crop

    def reset(self) -> None:
        TextLayer.reset(self)
        Linear.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        TextLayer.reorder_cache(self, beam_idx)
        Linear.reorder_cache(self, beam_idx)


def with_text(layer: Any, place: Place) -> Any:
    """A cache layer of states and of keys and values, or a window of them, as `StatesAndText`; others as they are."""
    kinds = [
        getattr(cache_utils, f"LinearAttentionAnd{name}Layer", None)
        for name in ("FullAttention", "SlidingWindowAttention")
    ]
    states = isinstance(getattr(layer, "conv_states", None), dict)
    return StatesAndText(place, layer.number_of_states) if states and type(layer) in kinds else layer


def holds_states(layer: object) -> bool:
    """Whether a cache layer keeps states of the kind that `Recurrence` takes back."""
    return type(layer) in (Linear, StatesAndText) and isinstance(getattr(layer, "conv_states", None), dict)


class Recurrence:
    """The states in one model's cache, and what its passes since the last `keep` left to compute them again.

    Args:
      model: whose modules fill ``cache``. They may serve other models and other threads meanwhile.
      cache: its layers of states are empty.

    Raises: ValueError where that cannot be; the message says why.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache):
        self.cache = cache
        self.layers: list[Any] = [layer for layer in cache.layers if holds_states(layer)]
        self.mixers = [m for m in model.modules() if _names(m) & UPDATES]
        self.passes: list[_Pass] = []
        self.spare: list[list[torch.Tensor]] = []  # memory of states that are not needed any more
        if not self.mixers:
            raise ValueError("its states are not in its cache")

    @property
    def pending(self) -> int:
        """Tokens a row read since the last `keep`."""
        return sum(p.count for p in self.passes)

    @contextmanager
    def reading(self, count: int) -> Iterator[None]:
        """Around the model's forward over ``count`` tokens a row.

        The first pass, from no state, is not recorded: `keep` cannot go back into it.
        """
        now = _Pass(count, self._copied() if self._filled() else None)
        with _recording(now, self.mixers, self.cache):
            yield
        self.passes.append(now)

    @torch.no_grad()
    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens read since the last call, row b keeps the first ``counts[b]``.

        Raises: ValueError for a count below 0 or above `pending`; in the first pass, for one below its length unless
        all are 0.
        """
        passes, total = self.passes, self.pending
        if not all(0 <= count <= total for count in counts):
            raise ValueError(f"counts: got {list(counts)}, allowed are 0 to {total}, the tokens since the last call")
        starts = list(accumulate((p.count for p in passes), initial=0))
        back: dict[int, dict[int, list[int]]] = {}  # {pass: {tokens of it that are kept: rows}}
        for row, count in enumerate(counts):
            if count < total:
                j = max(j for j, start in enumerate(starts) if start <= count)
                back.setdefault(j, {}).setdefault(count - starts[j], []).append(row)
        if 0 in back and passes[0].before is None:
            if list(back[0]) != [0] or len(back[0][0]) < len(counts):
                raise ValueError(f"counts: got {list(counts)}, allowed are {starts[1]} to {total}, or 0 for all rows")
            for layer in self.layers:
                _empty(layer)
            back.clear()
        for j, kept in back.items():
            order = sorted(((n, row) for n, rows in kept.items() for row in rows), key=lambda each: -each[0])
            rows = _Rows([row for _, row in order], len(counts))
            after = self._after(passes[j], [n for n, _ in order], rows)
            for held, state in zip(self._states(), after):
                rows.put(held, state)
        self.spare += [p.before for p in passes if p.before is not None]
        self.passes = []

    def forget(self) -> None:
        """All tokens so far are kept; rows may be others from now on."""
        self.passes, self.spare = [], []

    def _filled(self) -> bool:
        return any(flag for layer in self.layers for flag in layer.has_previous_state.values())

    def _states(self) -> list[torch.Tensor]:
        """Every state [B, ...], in the order of the cache's layers."""
        kinds = [states for layer in self.layers for states in (layer.conv_states, layer.recurrent_states)]
        return [state for states in kinds for state in states.values() if state is not None]

    def _copied(self) -> list[torch.Tensor]:
        states = self._states()
        memory = self.spare.pop() if self.spare else [torch.empty_like(state) for state in states]
        torch._foreach_copy_(memory, states)
        return memory

    def _after(self, past: _Pass, counts: list[int], rows: _Rows) -> list[torch.Tensor]:
        """States [R, ...] of ``rows`` after the first ``counts`` tokens, which descend, of a pass.

        One token at a time, as while a model decodes; rows that keep fewer drop out at the end.
        """
        assert past.before is not None
        states = [rows.of(state) for state in past.before]
        steps = [call.steps(rows, counts[0]) for call in past.calls] if counts[0] else []
        scratch, held = self._cache_of(states), len(counts)
        for i in range(counts[0]):
            alive = sum(count > i for count in counts)
            if alive < held:
                scratch, held = self._cache_of([state[:alive] for state in states]), alive
            for step in steps:
                step(i, alive, scratch)
        return states

    def _cache_of(self, states: list[torch.Tensor]) -> DynamicCache:
        """A cache whose states are ``states``, which it changes in place."""
        cache, given = DynamicCache(), iter(states)
        copies: dict[int, Any] = {}
        for layer in self.layers:
            copy = copies[id(layer)] = Linear(number_of_states=layer.number_of_states)
            held = {name: x for name, x in vars(layer).items() if name in vars(copy)}
            vars(copy).update({name: dict(x) if isinstance(x, dict) else x for name, x in held.items()})
            for kind in (copy.conv_states, copy.recurrent_states):
                kind.update({k: next(given) for k, state in kind.items() if state is not None})
        cache.layers = [copies.get(id(layer), layer) for layer in self.cache.layers]
        return cache


class _Rows:
    """Some rows, in some order, of tensors [batch, ...] on any device."""

    def __init__(self, rows: list[int], batch: int):
        self.rows, self.all = rows, rows == list(range(batch))
        self.index: dict[torch.device, torch.Tensor] = {}

    def _on(self, device: torch.device) -> torch.Tensor:
        if device not in self.index:
            self.index[device] = torch.tensor(self.rows, device=device)
        return self.index[device]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.all else x[self._on(x.device)]

    def put(self, x: torch.Tensor, new: torch.Tensor) -> None:
        if self.all:
            x.copy_(new)
        else:
            x[self._on(x.device)] = new


def _empty(layer: Any) -> None:
    """Makes a cache layer's states what they were before its first pass."""
    vars(layer).update(vars(Linear(number_of_states=layer.number_of_states)))


def _names(module: nn.Module) -> frozenset[str]:
    """The names that a module's forward uses."""
    return _names_in(type(module).forward)


@cache
def _names_in(forward: Callable[..., Any]) -> frozenset[str]:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return frozenset() if code is None else frozenset(code.co_names)


# --- what a pass leaves ----------------------------------------------------------------------------------------------


@dataclass
class _Pass:
    """``count`` tokens a row, the states before them (None: there were none), and what its mixers were called with."""

    count: int
    before: list[torch.Tensor] | None
    calls: list[_Call] = field(default_factory=list)


@dataclass
class _Call:
    """A mixer's call over several tokens, and what its projections gave [B, n, ...], in order."""

    mixer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: DynamicCache
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens."""
        batch, count = _hidden(self.args, self.kwargs).shape[:2]
        return batch, count

    def read(self) -> Any:
        """Makes the call."""
        if _one_by_one(self.mixer):
            return _OneByOne(self).read()
        return _run(self.mixer, lambda name, child: partial(self._recorded, name, child), self.args, self.kwargs)

    def _recorded(self, name: str, child: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A projection's call; its output is kept where it is one of tokens."""
        out = child(*args, **kwargs)
        tokens = [isinstance(x, torch.Tensor) and x.dim() > 2 and x.shape[:2] == self.shape for x in (*args[:1], out)]
        if tokens == [True, True] and args[0].dim() == 3:
            self.outputs.setdefault(name, []).append(out)
        elif name in self.outputs:
            raise RuntimeError(f"{type(self.mixer).__name__}.{name} is called with tokens, and with something else")
        return out

    def steps(self, rows: _Rows, most: int) -> Callable[[int, int, DynamicCache], None]:
        """The call made again: step(i, r, cache) for token i, below ``most``, of the first r of ``rows``, on the states
        of ``cache``."""
        split = partial(_by_token, own=self.cache, shape=self.shape, rows=rows, most=most)
        args, kwargs = split(self.args), split(self.kwargs)
        known = {name: [split(out) for out in outputs] for name, outputs in self.outputs.items()}

        def step(i: int, r: int, cache: DynamicCache) -> None:
            def instead(name: str, child: nn.Module) -> Callable[..., Any] | None:
                if name in LAST:
                    return lambda x, *_, **__: x
                outputs = iter(known.get(name, ()))
                return (lambda *_, **__: next(outputs)(i, r, cache)) if name in known else None

            _run(self.mixer, instead, args(i, r, cache), kwargs(i, r, cache))

        return step


class _OneByOne:
    """Makes a mixer's call one token at a time, but its first projections of all tokens at once, and so its last."""

    def __init__(self, call: _Call):
        self.call = call
        self.token = 0
        self.whole: dict[int, torch.Tensor] = {}  # id of this token's part: of all tokens
        self.parts: list[torch.Tensor] = []  # whose ids these are
        self.made: list[str] = []  # projections that this token's call has used
        self.outputs: dict[tuple[str, int], _Get] = {}
        self.last: tuple[nn.Module, torch.Tensor] | None = None  # the last projection, and what it is called with

    def read(self) -> torch.Tensor:
        call, results = self.call, []
        args, kwargs = self._split(call.args), self._split(call.kwargs)
        for self.token in range(call.shape[1]):
            now = self._part(args), self._part(kwargs)
            self.whole, self.parts, self.made = {id(_hidden(*now)): _hidden(call.args, call.kwargs)}, [], []
            results.append(_run(call.mixer, self._instead, *now))
            if self.last is None or results[-1] is not self.last[1]:
                raise RuntimeError(f"{type(call.mixer).__name__} gives back something else than the output of {LAST}")
        assert self.last is not None
        out: torch.Tensor = self.last[0](torch.cat(results, 1))
        return out

    def _split(self, value: Any) -> _Get:
        batch, count = self.call.shape
        return _by_token(value, self.call.cache, self.call.shape, _Rows(list(range(batch)), batch), count)

    def _part(self, get: _Get) -> Any:
        return get(self.token, self.call.shape[0], self.call.cache)

    def _instead(self, name: str, child: nn.Module) -> Callable[..., torch.Tensor]:
        return partial(self._deferred, child) if name in LAST else partial(self._projected, name, child)

    def _deferred(self, child: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.last = child, x
        return x

    def _projected(self, name: str, child: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if id(x) not in self.whole or args or kwargs:
            out: torch.Tensor = child(x, *args, **kwargs)
            return out
        key = name, self.made.count(name)
        self.made.append(name)
        if key not in self.outputs:
            out = child(self.whole[id(x)])
            self.call.outputs.setdefault(name, []).append(out)
            self.outputs[key] = self._split(out)
        part: torch.Tensor = self._part(self.outputs[key])
        self.whole[id(part)] = self.call.outputs[name][key[1]]
        self.parts.append(part)
        return part


_Get = Callable[[int, int, DynamicCache], Any]


def _by_token(value: Any, own: DynamicCache, shape: tuple[int, int], rows: _Rows, most: int) -> _Get:
    """get(i, r, cache) stands for ``value`` in a call over token i, below ``most``, of the first r of ``rows``.

    Tensors [B, n, ...] of ``shape`` are cut, ``own`` is replaced by ``cache``, anything else stays.
    """
    split = partial(_by_token, own=own, shape=shape, rows=rows, most=most)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] in (shape, (1, shape[1])):
        chosen = rows.of(value) if len(value) == shape[0] else value
        tokens = chosen[:, :most].transpose(0, 1).contiguous()[:, :, None]  # [most, R, 1, ...]
        return lambda i, r, cache: tokens[i, :r]
    if isinstance(value, (tuple, list)):
        kind, items = type(value), [split(x) for x in value]
        return lambda i, r, cache: kind(item(i, r, cache) for item in items)
    if isinstance(value, dict):
        named = {name: split(x) for name, x in value.items()}
        return lambda i, r, cache: {name: item(i, r, cache) for name, item in named.items()}
    return lambda i, r, cache: cache if value is own else value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states [B, n, D] that a mixer is called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _one_by_one(mixer: nn.Module) -> bool:
    """Whether a mixer's call over several tokens is made one by one: it would drop the state before them, limit time
    steps as a call over one does not, or take longer."""
    names, on_cpu = _names(mixer), next(mixer.parameters()).device.type == "cpu"
    low, high = getattr(mixer, "time_step_limit", None) or (0.0, math.inf)
    return bool(names & FROM_ZERO) or low > 0 or high < math.inf or (on_cpu and bool(names & PADDED))


# --- calling a mixer with other projections --------------------------------------------------------------------------


class _Instead:
    """Stands for a module in its parent: its attributes, but another call."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]):
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _run(
    mixer: nn.Module,
    instead: Callable[[str, nn.Module], Callable[..., Any] | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The mixer's forward, with ``instead(name, child)`` called in place of its projections (None: the child).

    The mixer itself stays as it is, for whoever else calls it: a copy with the same parameters is called.
    """
    children: dict[str, Any] = dict(mixer._modules)
    for name, child in mixer.named_children():
        if _is_projection(child) and (call := instead(name, child)) is not None:
            children[name] = _Instead(child, call)
    copy = object.__new__(type(mixer))
    vars(copy).update(vars(mixer), _modules=children)
    hook: Any = getattr(mixer, "_hf_hook", None)  # accelerate's, which brings arguments to the weights' device
    if hook is not None:
        args, kwargs = hook.pre_forward(mixer, *args, **kwargs)
    out = type(mixer).forward(copy, *args, **kwargs)
    return out if hook is None else hook.post_forward(mixer, out)


_projections: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_projection(module: nn.Module) -> bool:
    """Whether a mixer's child has weights and reads each token alone: it has no convolution and no mixer in it."""
    found = _projections.get(module)
    if found is None:
        within = list(module.modules())
        weights = any(True for m in within for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        mixes = any(isinstance(m, _ConvNd) or _names(m) & UPDATES for m in within)
        called = type(module).forward is not nn.Module.forward  # a list of modules is not
        found = _projections[module] = called and weights and not mixes
    return found


_here = threading.local()  # .now: the pass that this thread records, and the cache that its calls go to
_patched: weakref.WeakKeyDictionary[nn.Module, tuple[int, Any]] = weakref.WeakKeyDictionary()
_patched_lock = threading.Lock()


@contextmanager
def _recording(now: _Pass, mixers: Sequence[nn.Module], cache: DynamicCache) -> Iterator[None]:
    """This thread's calls of ``mixers`` with ``cache`` are recorded in ``now``, if it can be gone back into."""
    if now.before is None or now.count == 1:
        yield
        return
    with _patched_lock:
        for mixer in mixers:
            users, own = _patched.get(mixer, (0, mixer.__dict__.get("forward")))
            _patched[mixer] = users + 1, own  # threads that record, and a forward that was the module's own before
            if not users:
                mixer.__dict__["forward"] = partial(_forward, mixer, mixer.forward)
    _here.now = now, cache
    try:
        yield
    finally:
        _here.now = None
        with _patched_lock:
            for mixer in mixers:
                users, own = _patched.pop(mixer)
                if users > 1:
                    _patched[mixer] = users - 1, own
                elif own is None:
                    del mixer.__dict__["forward"]
                else:
                    mixer.__dict__["forward"] = own


def _forward(mixer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A mixer's forward while some thread records: of that thread's calls."""
    now: tuple[_Pass, DynamicCache] | None = getattr(_here, "now", None)
    if now is None:
        return forward(*args, **kwargs)
    call = _Call(mixer, args, kwargs, now[1])
    now[0].calls.append(call)
    return call.read()
