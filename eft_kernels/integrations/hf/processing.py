"""Between the models' scores and a token: transformers' processors, and ours.

The filters at the end of the list go to the fused operation (`sampling_of`); everything before them runs in PyTorch.
Under speculation a row is looked at slot by slot, with drafts that are taken back, so a processor is a function of
(input_ids, scores) there, unless it says or shows otherwise:

- ``stateless = True``: the result depends on the arguments alone, whatever the processor keeps (a memo, a record);
- ``process_rows(rows, input_ids, scores)``: called instead of it, with the rows of the batch that count (a list of n
  indices), their whole prefixes int64 [n, P + m] and scores float32 [n, V]; returns scores [n, V]. A row's prefix may
  be shorter than the one before, or go on differently: a matcher rolls back to what they share;
- what keeps a state without either is refused by name.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CellType
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as lp

from ...combination import Weights
from ...decoding import Target, Value
from ...parameters import OFF, PARAMETERS
from .arguments import refuse_unless

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (input_ids [n, P + m], scores [n, V]) -> scores

# transformers' order of what it appends after the caller's processors, and the filters of ours among them
ORDER = (
    lp.TemperatureLogitsWarper,
    lp.TopHLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.WatermarkLogitsProcessor,
    lp.SynthIDTextWatermarkLogitsProcessor,
    lp.LogitNormalization,
)
WARPERS: dict[type, str] = {getattr(lp, p.warper): p.name for p in PARAMETERS if p.warper}
# transformers' own that count their calls or keep a state
STATEFUL = (lp.SynthIDTextWatermarkLogitsProcessor, lp.UnbatchedClassifierFreeGuidanceLogitsProcessor)
# Objects of these hold no state of a text, or are looked into by themselves.
PLAIN = (
    "builtins",
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "re",
    "regex",
    "typing",
    "types",
    "functools",
    "collections",
    "abc",
    "enum",
    "pathlib",
    "datetime",
    "logging",
    "_thread",
    "threading",
    "weakref",
)


# --- filters of the operation ----------------------------------------------------------------------------------------


class _Filter:
    """A named sampling parameter, number or tensor [rows], in its place among transformers' processors."""

    def __init__(self, name: str, value: Value):
        self.name, self.value = name, value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return Target(Weights([1.0]), torch.zeros(len(scores)), {self.name: self.value}).filtered(scores)


def _warper(name: str) -> type | None:
    """The transformers class of a sampling parameter, if it has one."""
    return next((k for k, n in WARPERS.items() if n == name), None)


def _kind(processor: Processor) -> type | None:
    """The transformers class whose place a processor takes."""
    return _warper(processor.name) if isinstance(processor, _Filter) else type(processor)


def _value(processor: Processor) -> tuple[str, Value] | None:
    """(name, value) of a filter that the operation can apply itself, else None."""
    if isinstance(processor, _Filter):
        return processor.name, processor.value
    name = WARPERS.get(type(processor))
    usual = dict(min_tokens_to_keep=1, filter_value=-torch.inf)
    if name is None or any(getattr(processor, k, v) != v for k, v in usual.items()):
        return None
    return name, getattr(processor, name)


def sampling_of(
    processors: Iterable[Processor],
    config: GenerationConfig,
    named: Mapping[str, Value],
    callers: Iterable[Processor] | None,
) -> tuple[LogitsProcessorList, dict[str, Value]]:
    """(processors to apply to the scores in PyTorch, filters for the operation), in transformers' order.

    named: our own sampling arguments, which replace the warpers that transformers made from its config. callers: the
    processors that the caller gave. Only filters at the end of the list, in the operation's order, go to it.
    """
    processors = list(processors)
    if not config.do_sample:
        for name, value in named.items():
            off = (OFF[name], 0) if name == "temperature" else (OFF[name],)
            neutral = not isinstance(value, torch.Tensor) and value in off
            refuse_unless(name, value, neutral, "only with do_sample=True")
        return LogitsProcessorList(processors), {"temperature": 0.0}
    own = {id(p) for p in callers or ()}
    for name, value in named.items():
        kind = _warper(name)
        old = [i for i, p in enumerate(processors) if type(p) is kind and id(p) not in own]
        if old:
            del processors[old[-1]]
        at = len(processors)
        while (
            kind is not None  # one that transformers does not have comes last
            and at
            and id(processors[at - 1]) not in own
            and (before := _kind(processors[at - 1])) in ORDER
            and ORDER.index(before) > ORDER.index(kind)
        ):
            at -= 1
        processors.insert(at, _Filter(name, value))
    filters: dict[str, Value] = {}
    order = [*WARPERS.values(), *(name for name in OFF if name not in WARPERS.values())]
    while processors and (found := _value(processors[-1])) is not None:
        name, value = found
        if filters and order.index(name) >= min(order.index(n) for n in filters):
            break
        filters[name] = value
        processors.pop()
    return LogitsProcessorList(processors), filters


# --- the end of a text -----------------------------------------------------------------------------------------------


def hold_back(
    processors: Iterable[Processor],
    config: GenerationConfig,
    ends: list[int],
    prompt_length: int,
    device: torch.device,
) -> LogitsProcessorList:
    """``processors`` with those that forbid or favour the end of text knowing all of ``ends``.

    transformers made them for the end tokens of the model that `generate` was called on, and made none where it has
    none.
    """
    ids, place = torch.tensor(ends, device=device), str(device)
    held = LogitsProcessorList()
    for p in processors:
        if type(p) in (
            lp.MinLengthLogitsProcessor,
            lp.MinNewTokensLengthLogitsProcessor,
            lp.ExponentialDecayLengthPenalty,
        ):
            own: Any = copy.copy(p)
            own.eos_token_id = ids
            p = own
        held.append(p)
    kinds = {type(p) for p in held}
    if (config.min_new_tokens or 0) > 0 and lp.MinNewTokensLengthLogitsProcessor not in kinds:
        held.insert(0, lp.MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, ids, place))
    if (config.min_length or 0) > 0 and lp.MinLengthLogitsProcessor not in kinds:
        held.insert(0, lp.MinLengthLogitsProcessor(config.min_length, ids, place))
    return held


# --- rows and drafts -------------------------------------------------------------------------------------------------


class RowProcessors:
    """Processors one after another, as `Target.process` of ``rows`` rows."""

    def __init__(self, processors: Iterable[Processor], rows: int, speculating: bool):
        self.processors: list[Any] = [
            XGrammar(p, rows) if _is_xgrammar(p) else _adapted(p) if speculating else p for p in processors
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Plain decoding: every row has one token more than at the call before."""
        for process in self.processors:
            scores = _checked(process, process(input_ids, scores), scores)
        return scores

    def of_rows(self, input_ids: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Under speculation: of the rows of the mask [B] ``input_ids`` is the prefix, and scores count."""
        index = rows.nonzero()[:, 0]
        for process in self.processors:
            if hasattr(process, "process_rows"):
                given = scores[index]
                own = _checked(process, process.process_rows(index.tolist(), input_ids[index], given), given)
                scores = scores.index_copy(0, index, own.to(scores.dtype))
            else:
                scores = _checked(process, process(input_ids, scores), scores)
        return scores


def _checked(processor: object, out: object, given: torch.Tensor) -> torch.Tensor:
    if not isinstance(out, torch.Tensor) or out.shape != given.shape:
        got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        name = type(getattr(processor, "processor", processor)).__name__
        raise ValueError(f"logits_processor: {name} returned {got}, expected scores {list(given.shape)}")
    return out


def may_keep_a_state(processor: Processor) -> bool:
    """Whether speculation has to watch a processor, or refuses it."""
    if _is_xgrammar(processor):
        return False
    try:
        return isinstance(_adapted(processor), _Watched)
    except ValueError:
        return True


def _is_xgrammar(processor: object) -> bool:
    xgrammar = sys.modules.get("xgrammar.contrib.hf")
    return xgrammar is not None and type(processor) is xgrammar.LogitsProcessor


def _adapted(processor: Processor) -> Processor | _Prefixes:
    if isinstance(processor, STATEFUL):
        raise ValueError(
            f"logits_processor: {type(processor).__name__} keeps a state of its own and needs draft_tokens=0"
        )
    if getattr(processor, "stateless", False) or hasattr(processor, "process_rows"):
        return processor
    if type(processor) is lp.PrefixConstrainedLogitsProcessor:
        return _Prefixes(processor)
    if type(processor).__module__ == lp.__name__ or isinstance(processor, _Filter):
        return processor
    return _Watched(processor)


class XGrammar:
    """``xgrammar.contrib.hf.LogitsProcessor`` with matchers that follow each row's own prefix."""

    def __init__(self, processor: Any, rows: int):
        self.grammars, self.vocab_size = processor.compiled_grammars, processor.full_vocab_size
        if len(self.grammars) not in (1, rows):
            raise ValueError(
                f"logits_processor: xgrammar's LogitsProcessor has {len(self.grammars)} grammars for "
                f"{rows} rows, allowed are one for all or one for each"
            )
        self.matchers: dict[int, Any] = {}  # by row
        self.accepted: dict[int, list[int]] = {}  # the tokens that a row's matcher has seen
        self.start: int | None = None  # columns of the prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.process_rows(range(len(input_ids)), input_ids, scores)

    def process_rows(self, rows: Sequence[int], input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import xgrammar

        self.start = input_ids.shape[1] if self.start is None else self.start
        bitmask = xgrammar.allocate_token_bitmask(len(rows), self.vocab_size)
        bitmask.fill_(-1)  # all bits
        for i, (row, text) in enumerate(zip(rows, input_ids[:, self.start :].tolist())):
            if row not in self.matchers:
                grammar = self.grammars[row if len(self.grammars) > 1 else 0]
                self.matchers[row], self.accepted[row] = xgrammar.GrammarMatcher(grammar), []
            matcher, accepted = self.matchers[row], self.accepted[row]
            if not self._follow(matcher, accepted, text):
                continue  # after a draft that the grammar forbids: no such slot is ever emitted
            if not matcher.is_terminated():
                matcher.fill_next_token_bitmask(bitmask, i)
            else:  # as xgrammar does: what was allowed before the end stays
                matcher.rollback(1)
                matcher.fill_next_token_bitmask(bitmask, i)
                matcher.accept_token(accepted[-1])
        scores = scores.cpu() if scores.device.type != "cuda" else scores
        xgrammar.apply_token_bitmask_inplace(scores, bitmask.to(scores.device))
        return scores.to(input_ids.device)

    @staticmethod
    def _follow(matcher: Any, accepted: list[int], text: list[int]) -> bool:
        """Brings a matcher from the tokens ``accepted`` to ``text``; whether the grammar allows that."""
        shared = next((n for n, (a, b) in enumerate(zip(accepted, text)) if a != b), min(len(accepted), len(text)))
        if shared < len(accepted):
            matcher.rollback(len(accepted) - shared)
            del accepted[shared:]
        for token in text[shared:]:
            if matcher.is_terminated():
                break
            if not matcher.accept_token(token):
                return False
            accepted.append(token)
        return True


class _Prefixes:
    """transformers' ``prefix_allowed_tokens_fn``, asked about the rows that count alone."""

    def __init__(self, processor: lp.PrefixConstrainedLogitsProcessor):
        self.allowed, self.beams, self.calls = processor._prefix_allowed_tokens_fn, processor._num_beams, 0

    def process_rows(self, rows: Sequence[int], input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for i, row in enumerate(rows):
            prefix = input_ids[i]
            allowed = self.allowed(row // self.beams, prefix)
            if self.calls == 1 and not _same(allowed, self._again(row // self.beams, prefix)):
                raise ValueError(
                    "prefix_allowed_tokens_fn: gives different tokens when it is asked again, so it keeps "
                    "a state of its own; use draft_tokens=0"
                )
            scores[i] = self._masked(allowed, prefix, scores[i])
        return scores

    @staticmethod
    def _masked(allowed: list[int], prefix: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [V] with those outside ``allowed`` masked as transformers does it."""
        masked: torch.Tensor = lp.PrefixConstrainedLogitsProcessor(lambda batch, ids: allowed, 1)(
            prefix[None], scores[None]
        )
        return masked[0]

    def _again(self, batch: int, prefix: torch.Tensor) -> list[int] | None:
        try:
            return self.allowed(batch, prefix)
        except Exception:
            return None


class _Watched:
    """A caller's processor, refused at its first calls if it shows that it keeps a state."""

    def __init__(self, processor: Processor):
        self.processor, self.calls = processor, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 2:
            return self.processor(input_ids, scores)
        before, given = _marks(self.processor), scores.clone()
        out = self.processor(input_ids, scores)
        out = out.clone() if self.calls == 1 else out
        after = _marks(self.processor)
        # what was None or missing at the first call may be a table that is made once
        changed = [
            k
            for k in {**before, **after}
            if before.get(k) != after.get(k) and not (self.calls == 1 and before.get(k, _mark(None)) == _mark(None))
        ]
        if self.calls == 1 and not changed:
            try:
                again = self.processor(input_ids, given)
                changed = [k for k, mark in after.items() if _marks(self.processor).get(k) != mark]
                same = _same(out, again)
            except Exception:
                same = False
            if not same and not changed:
                self._refuse("its result is another when it is called again")
        if changed:
            self._refuse(f"`{sorted(changed)[0]}` changes when it is called")
        if opaque := _opaque(self.processor):
            self._refuse(f"it holds a {opaque}, whose state cannot be looked at")
        return out

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(
            f"logits_processor: {type(self.processor).__name__} keeps a state of its own ({why}), which does not go "
            "back with rejected drafts; use draft_tokens=0, or set `stateless = True` on it if its result depends on "
            "its arguments alone, or give it `process_rows`"
        )


# --- does a processor keep a state? ----------------------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    try:
        return b is not None and list(a) == list(b)
    except (TypeError, ValueError, RuntimeError):
        return False


def _held(obj: object) -> dict[str, Any]:
    """What an object, its own classes and its call hold, or a function encloses, by name."""
    held: dict[str, Any] = {}
    for kind in reversed(type(obj).__mro__):
        if kind.__module__.partition(".")[0] not in ("builtins", "transformers", "torch", "abc"):
            held.update({k: v for k, v in vars(kind).items() if not k.startswith("__") and not callable(v)})
    held.update(getattr(obj, "__dict__", {}))
    if inspect.ismethod(obj):
        held["self"] = obj.__self__
    for function in (obj, inspect.getattr_static(type(obj), "__call__", None)):
        if inspect.isfunction(function):
            cells = zip(function.__code__.co_freevars, function.__closure__ or ())
            held.update({name: cell.cell_contents for name, cell in cells if _filled(cell)})
    return held


def _marks(obj: object, depth: int = 3) -> dict[str, object]:
    """attribute or enclosed variable: what tells one state of it from another."""
    return {k: _mark(v, depth) for k, v in _held(obj).items()}


def _opaque(obj: object, depth: int = 4) -> str | None:
    """The type of a compiled object that ``obj`` holds, such as a grammar's matcher."""
    if depth == 0 or isinstance(obj, (torch.Tensor, torch.nn.Module, type)):
        return None
    parts = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple, set, deque)) else ()
    for x in (*list(parts)[:64], *_held(obj).values()):
        kind = type(x)
        if kind.__module__.partition(".")[0] in PLAIN and not isinstance(x, (dict, list, tuple, set, deque)):
            continue
        looks = isinstance(x, (dict, list, tuple, set, deque)) or inspect.isfunction(x) or hasattr(x, "__dict__")
        if not looks:
            return f"{kind.__module__}.{kind.__qualname__}"
        if found := _opaque(x, depth - 1):
            return found
    return None


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _mark(x: Any, depth: int = 0) -> object:
    if x is None or isinstance(x, (bool, int, str, bytes)):
        return type(x).__name__, x
    if isinstance(x, float):
        return "float", repr(x)
    if isinstance(x, torch.Tensor):
        return id(x), tuple(x.shape), None if x.is_inference() else x._version
    if isinstance(x, np.ndarray):
        return id(x), x.tobytes() if x.nbytes <= 1 << 20 else None
    if isinstance(x, torch.nn.Module) or inspect.ismodule(x) or isinstance(x, type):
        return id(x)
    size = len(x) if hasattr(type(x), "__len__") else None
    if depth == 0:
        return id(x), size
    if isinstance(x, dict):
        return id(x), size, tuple((_mark(k), _mark(v, depth - 1)) for k, v in list(x.items())[:4096])
    if isinstance(x, (list, tuple, deque)):
        return id(x), size, tuple(_mark(v, depth - 1) for v in list(x)[:4096])
    return id(x), size, tuple(_marks(x, depth - 1).items())
