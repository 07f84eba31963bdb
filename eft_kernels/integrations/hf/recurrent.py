"""Taking tokens back from a model whose layers keep a state: Mamba, gated delta rules, short convolutions.

A state cannot be cropped: at the end of a pass it holds all tokens of the pass. But what a layer's projections make of a
token depends on that token alone, so the outputs that the pass computed serve again: from the states before the pass,
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
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import DynamicCache, cache_utils

# Early versions keep such states in caches of the models' own.
Linear: Any = getattr(cache_utils, "LinearAttentionLayer", None)
LinearAndFull: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
LinearAndSliding: Any = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None)

UPDATES = {"update_conv_state", "update_recurrent_state"}  # a cache's methods; who calls one is a mixer
FROM_ZERO = {"mamba_selective_scan"}  # scans over several tokens that begin with no state
LAST = ("out_proj", "o_proj")  # the projection whose output a mixer gives back


def without_window(layer: Any) -> Any:
    """A cache layer of states and a sliding window as one of states and all columns, others as they are."""
    if LinearAndSliding is not None and type(layer) is LinearAndSliding:
        return LinearAndFull(number_of_states=layer.number_of_states)
    return layer


def holds_states(layer: object) -> bool:
    """Whether a cache layer keeps states of the kind that `Recurrence` takes back."""
    kinds = [kind for kind in (Linear, LinearAndFull) if kind is not None]
    return type(layer) in kinds and isinstance(getattr(layer, "conv_states", None), dict)


def _code_names(module: nn.Module) -> set[str]:
    """The names that a module's forward uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else set(code.co_names)


def _one_by_one(mixer: nn.Module) -> bool:
    """Whether a mixer's call over several tokens is not several calls over one: it drops the state before them, or
    limits time steps as a call over one does not."""
    low, high = getattr(mixer, "time_step_limit", None) or (0.0, math.inf)
    return bool(_code_names(mixer) & FROM_ZERO) or low > 0 or high < math.inf


class Recurrence:
    """The states of one model's cache, and what its passes since the last `keep` left to compute them again.

    Args:
      model: whose modules fill ``cache``; several may share modules, also in several threads.
      cache: its layers of states are empty.

    Raises: ValueError where a state is not kept by a module of its own; the message says why.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache):
        self.cache = cache
        self.layers: list[Any] = [layer for layer in cache.layers if holds_states(layer)]
        self.mixers = [m for m in model.modules() if _code_names(m) & UPDATES]
        self.passes: list[_Pass] = []
        self.spare: list[list[torch.Tensor]] = []  # memory of states that are not needed any more
        if not self.mixers:
            raise ValueError("its states are not in its cache")
        if any(p.device.type == "meta" for m in self.mixers for p in m.parameters()):
            raise ValueError("its weights are offloaded")

    @property
    def pending(self) -> int:
        """Tokens read since the last `keep`."""
        return sum(p.count for p in self.passes)

    @contextmanager
    def reading(self, count: int) -> Iterator[None]:
        """Around the model's forward over ``count`` tokens a row.

        The first pass is not recorded: of its tokens all are kept later, or none in any row.
        """
        before = self._kept() if self._filled() else None
        now = _Pass(count, before)
        if before is None or count == 1:
            yield
        else:
            with _called_here(self.mixers, now, self.cache):
                yield
        self.passes.append(now)

    @torch.no_grad()
    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens read since the last call, row b keeps the first ``counts[b]``.

        Raises: ValueError for a count below 0 or above `pending`, or within the tokens of the first pass.
        """
        passes, total = self.passes, self.pending
        if not all(0 <= c <= total for c in counts):
            raise ValueError(f"counts: got {list(counts)}, allowed are 0 to {total}, the tokens read since the last call")
        ends = list(accumulate(p.count for p in passes))
        taken: dict[int, list[int]] = {}  # pass: rows that go back to what was before it
        replayed: dict[int, list[tuple[int, int]]] = {}  # pass: (tokens of it, row)
        for row, count in enumerate(counts):
            j = next((j for j, end in enumerate(ends) if count <= end), 0)
            if count == 0 or count == ends[j]:
                if count < total:
                    taken.setdefault(j + 1 if count else 0, []).append(row)
            else:
                replayed.setdefault(j, []).append((count - ends[j] + passes[j].count, row))
        if passes and passes[0].before is None:
            if replayed.get(0) or 0 < len(taken.get(0, [])) < len(counts):
                raise ValueError(f"counts: got {list(counts)}, allowed are {ends[0]} to {total}, or 0 for all rows")
            if taken.pop(0, None):
                for layer in self.layers:
                    _empty(layer)
        for j, rows in taken.items():
            self._put([s[rows] for s in _given(passes[j].before)] if len(rows) < len(counts) else passes[j].before, rows)
        for j, found in replayed.items():
            found.sort(key=lambda each: -each[0])
            rows = [row for _, row in found]
            self._put(self._replay(passes[j], [count for count, _ in found], rows, len(counts)), rows)
        self.spare += [p.before for p in passes if p.before is not None]
        self.passes = []

    def forget(self) -> None:
        """All tokens so far are kept, and rows may change."""
        self.passes, self.spare = [], []

    # --- states ---

    def _filled(self) -> bool:
        return any(flag for layer in self.layers for flag in layer.has_previous_state.values())

    def _states(self) -> list[torch.Tensor]:
        """Every state [B, ...], in the order of the cache's layers."""
        groups = [states for layer in self.layers for states in (layer.conv_states, layer.recurrent_states)]
        return [state for states in groups for state in states.values() if state is not None]

    def _kept(self) -> list[torch.Tensor]:
        """A copy of the states."""
        states = self._states()
        memory = self.spare.pop() if self.spare else [torch.empty_like(s) for s in states]
        torch._foreach_copy_(memory, states)
        return memory

    def _put(self, states: list[torch.Tensor] | None, rows: list[int]) -> None:
        """``states`` [len(rows), ...] become those of ``rows``."""
        for held, new in zip(self._states(), _given(states)):
            if len(rows) == len(held) and rows == sorted(rows):
                held.copy_(new)
            else:
                held[rows] = new

    def _replay(self, past: _Pass, counts: list[int], rows: list[int], batch: int) -> list[torch.Tensor]:
        """States [R, ...] of ``rows`` after the first ``counts`` tokens (descending) of a pass.

        One token at a time, as the models themselves do while they decode: rows that need fewer drop out at the end.
        """
        states = _given(past.before)
        index = None if rows == list(range(batch)) else rows
        if index is not None:
            states = [s[index] for s in states]
        steps = [call.steps(batch, past.count, index, counts[0]) for call in past.calls]
        for i in range(counts[0]):
            alive = sum(count > i for count in counts)
            if i == 0 or alive < len(cache_rows):
                cache_rows = range(alive)
                cache = self._cache_of([s[:alive] for s in states])
            for step in steps:
                step(i, alive, cache)
        return states

    def _cache_of(self, states: list[torch.Tensor]) -> DynamicCache:
        """A cache with ``states`` as its own, which are changed in place."""
        cache, given = DynamicCache(), iter(states)
        cache.layers, cache.layer_class_to_replicate = [], None
        for layer in self.cache.layers:
            if not holds_states(layer):
                cache.layers.append(layer)
                continue
            copy = Linear(number_of_states=layer.number_of_states)
            copy.__dict__.update({k: dict(v) if isinstance(v, dict) else v for k, v in vars(layer).items()})
            for held in (copy.conv_states, copy.recurrent_states):
                held.update({k: next(given) for k, state in held.items() if state is not None})
            cache.layers.append(copy)
        return cache


def _given(states: list[torch.Tensor] | None) -> list[torch.Tensor]:
    assert states is not None  # the first pass has none, and is never gone back into
    return states


def _empty(layer: Any) -> None:
    """A layer of states as it was before its first pass."""
    new = type(layer)(number_of_states=layer.number_of_states)
    names = vars(Linear(number_of_states=1)).keys()
    layer.__dict__.update({k: v for k, v in vars(new).items() if k in names})


# --- what a pass leaves ----------------------------------------------------------------------------------------------


@dataclass
class _Pass:
    """``count`` tokens a row, the states before them (None: there were none), and the calls of mixers, in order."""

    count: int
    before: list[torch.Tensor] | None
    calls: list[_Call] = field(default_factory=list)


@dataclass
class _Call:
    """A mixer's call over several tokens, and what each of its projections gave [B, n, ...], in order."""

    mixer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: DynamicCache
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def read(self) -> Any:
        """Makes the call."""
        shape = _hidden(self.args, self.kwargs).shape[:2]
        if _one_by_one(self.mixer):
            return self._read_by_token(*shape)

        def recorded(name: str, child: nn.Module) -> Callable[..., Any]:
            def act(*args: Any, **kwargs: Any) -> Any:
                out = child(*args, **kwargs)
                if _per_token(args[0] if args else None, shape) and _per_token(out, shape, 4):
                    self.outputs.setdefault(name, []).append(out)
                elif self.outputs.get(name):
                    raise RuntimeError(f"{type(self.mixer).__name__}.{name} is called with tokens and with others")
                return out

            return act

        return _run(self.mixer, recorded, self.args, self.kwargs)

    def _read_by_token(self, batch: int, count: int) -> Any:
        """Makes the call one token at a time; what a projection makes of inputs is computed for all tokens at once."""
        inputs, options = (_by_token(x, self.cache, batch, count, None, count) for x in (self.args, self.kwargs))
        whole: dict[int, torch.Tensor] = {}  # id of one token's part: all of it
        split: dict[tuple[str, int], _Get] = {}
        last: dict[str, torch.Tensor] = {}
        parts: list[torch.Tensor] = []
        for i in range(count):
            calls: dict[str, int] = {}
            alive: list[torch.Tensor] = []  # ids of what is gone are given again

            def taken(name: str, child: nn.Module) -> Callable[..., Any]:
                def act(x: torch.Tensor, *args: Any) -> Any:
                    if name in LAST:
                        last[name] = x
                        return x
                    if id(x) not in whole or args:
                        return child(x, *args)
                    number = calls[name] = calls.get(name, -1) + 1
                    if (name, number) not in split:
                        out = child(whole[id(x)])
                        self.outputs.setdefault(name, []).append(out)
                        split[name, number] = _by_token(out, self.cache, batch, count, None, count)
                    token: torch.Tensor = split[name, number](i, batch, self.cache)
                    whole[id(token)] = self.outputs[name][number]
                    alive.append(token)
                    return token

                return act

            args, kwargs = inputs(i, batch, self.cache), options(i, batch, self.cache)
            hidden = _hidden(args, kwargs)
            whole[id(hidden)] = _hidden(self.args, self.kwargs)
            parts.append(_run(self.mixer, taken, args, kwargs))
            whole.clear()
        name = next(iter(last), "")
        if len(last) != 1 or parts[-1] is not last[name]:
            raise RuntimeError(f"{type(self.mixer).__name__} gives back something else than what {LAST} made")
        return getattr(self.mixer, name)(torch.cat(parts, 1))

    def steps(self, batch: int, count: int, rows: list[int] | None, most: int) -> Callable[[int, int, DynamicCache], None]:
        """Makes the call again for ``rows`` (None: all) of its ``batch``, up to ``most`` of its ``count`` tokens:
        step(i, r, cache) does it for token i of the first r of them, on the states of ``cache``."""
        inputs, options = (_by_token(x, self.cache, batch, count, rows, most) for x in (self.args, self.kwargs))
        known = {k: [_by_token(x, self.cache, batch, count, rows, most) for x in v] for k, v in self.outputs.items()}

        def step(i: int, alive: int, cache: DynamicCache) -> None:
            def known_output(name: str, child: nn.Module) -> Callable[..., Any] | None:
                if name in LAST:
                    return lambda x, *_, **__: x
                if name not in known:
                    return None
                outputs = iter(known[name])
                return lambda *_, **__: next(outputs)(i, alive, cache)

            _run(self.mixer, known_output, inputs(i, alive, cache), options(i, alive, cache))

        return step


_Get = Callable[[int, int, DynamicCache], Any]


def _by_token(value: Any, own: DynamicCache, batch: int, count: int, rows: list[int] | None, most: int) -> _Get:
    """What stands for ``value`` in a call over token i of the first r of ``rows`` with another cache: get(i, r, cache).

    Tensors [B, n, ...] are cut to rows and tokens; others, of no row or token, are given as they are.
    """
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == count and value.shape[0] in (1, batch):
        chosen = value if rows is None or len(value) < batch else value[rows]
        tokens = chosen[:, :most].transpose(0, 1).contiguous()  # [most, R, ...]: a token's part is contiguous
        return lambda i, r, cache: tokens[i, :r, None]
    if isinstance(value, (tuple, list)):
        kind, items = type(value), [_by_token(x, own, batch, count, rows, most) for x in value]
        return lambda i, r, cache: kind(x(i, r, cache) for x in items)
    if isinstance(value, dict):
        named = {k: _by_token(x, own, batch, count, rows, most) for k, x in value.items()}
        return lambda i, r, cache: {k: x(i, r, cache) for k, x in named.items()}
    return lambda i, r, cache: cache if value is own else value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states [B, n, D] that a mixer is called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _per_token(x: object, shape: torch.Size, most: int = 3) -> bool:
    """Whether x is a tensor [B, n, ...] of at most so many dimensions."""
    return isinstance(x, torch.Tensor) and 3 <= x.dim() <= most and x.shape[:2] == shape


# --- calling a mixer with other projections --------------------------------------------------------------------------


class _Instead:
    """Stands for a module in its parent: its attributes, another call."""

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
    """The mixer's forward, with what ``instead(name, child)`` gives in the place of its projections (None: the child).

    The mixer itself stays as it is, for whoever else calls it: a copy with the same parameters is called.
    """
    children: dict[str, Any] = {}
    for name, child in mixer.named_children():
        if _is_projection(child) and (call := instead(name, child)) is not None:
            children[name] = _Instead(child, call)
    copy = object.__new__(type(mixer))
    copy.__dict__.update(vars(mixer), _modules={**mixer._modules, **children})
    hook: Any = getattr(mixer, "_hf_hook", None)  # accelerate's, which brings arguments to the weights' device
    if hook is not None:
        args, kwargs = hook.pre_forward(mixer, *args, **kwargs)
    out = type(mixer).forward(copy, *args, **kwargs)
    return out if hook is None else hook.post_forward(mixer, out)


_projections: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_projection(module: nn.Module) -> bool:
    """Whether a mixer's child has weights and reads each token alone: it is no convolution and holds none, nor states."""
    found = _projections.get(module)
    if found is None:
        within = list(module.modules())
        found = _projections[module] = (
            type(module).forward is not nn.Module.forward  # a list of modules is not called
            and any(True for m in within for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
            and not any(isinstance(m, _ConvNd) or _code_names(m) & UPDATES for m in within)
        )
    return found


_here = threading.local()  # .now: the pass that this thread records, and its cache
_forwards: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()  # passes, own forward or None
_forwards_lock = threading.Lock()


def _dispatch(mixer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A mixer's forward while any thread records: that thread's calls are recorded, others go on."""
    now: tuple[_Pass, DynamicCache] | None = getattr(_here, "now", None)
    if now is None or not any(x is now[1] for x in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    call = _Call(mixer, args, kwargs, now[1])
    now[0].calls.append(call)
    return call.read()


@contextmanager
def _called_here(mixers: Sequence[nn.Module], now: _Pass, cache: DynamicCache) -> Iterator[None]:
    """This thread's calls of ``mixers`` with ``cache`` are recorded in ``now``."""
    with _forwards_lock:
        for mixer in mixers:
            held = _forwards.setdefault(mixer, [0, mixer.__dict__.get("forward")])
            held[0] += 1
            if held[0] == 1:
                forward = mixer.forward
                mixer.forward = lambda *args, m=mixer, f=forward, **kwargs: _dispatch(m, f, *args, **kwargs)
    _here.now = now, cache
    try:
        yield
    finally:
        _here.now = None
        with _forwards_lock:
            for mixer in mixers:
                held = _forwards[mixer]
                held[0] -= 1
                if not held[0]:
                    del _forwards[mixer], mixer.__dict__["forward"]
                    if held[1] is not None:
                        mixer.forward = held[1]
