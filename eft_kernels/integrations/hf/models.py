"""A transformers model as the decoding loops see it: with a cache of its own, and its adapter on or off.

Inputs go through the model's own `prepare_inputs_for_generation`, and what its `_update_model_kwargs_for_generation`
keeps is given back, because models do what their text needs there: Phi-3 drops its cache where its rotary embedding
changes, Mamba its mask after the prompt, OpenAI GPT reads the whole text at every step.

An adapter of PEFT changes its base module in place: the module that ``PeftModel.get_base_model()`` returns computes
with the adapter on. Off is a state of the layers, entered for the forwards of one of the models alone.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn, Protocol, TypeGuard, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.generic import ModelOutput

from ...decoding import Auto, Drafts
from .recurrent import Recurrence, StatesAndText, holds_states, with_text
from .texts import Place, TextLayer, Texts

# What models call their cache: transformers from 5.24 on, before it, and state-space models before it.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Models whose pass over several tokens is not several passes over one.
ONE_BY_ONE = {
    "cpmant": "it reads its text both ways",
    "flaubert": "it reads a mask token after its text",
    "git": "its mask is made for one token at a time",
    "prophetnet": "its cache takes one token at a time",
    "xlm": "it reads a mask token after its text",
}
# Models that take a 4D mask and do not keep to it, or whose cache is not one column a token.
NO_TREES = {
    "dory": "its layers share caches",
    "gpt_neo": "its local attention counts columns",
    "llama4_text": "its attention counts chunks of columns",
}
# Older versions find new tokens by `cache_position`, newer ones by their number.
CACHE_POSITION = "cache_position" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# What these do lies in PeftModel's own forward, not in layers of the module.
NOT_IN_LAYERS = {"ADAPTION_PROMPT", "POLY", "XLORA", "SHADOW"}
# Initialisations that leave the base weights as they were; any other may move part of them into the adapter.
PURE_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class GenerativeModel(Protocol):
    """A causal language model of transformers: what we rely on of it.

    Each is a PreTrainedModel and a GenerationMixin; transformers has no name for both together.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device: ...
    @property
    def base_model(self) -> nn.Module: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_decoder(self) -> nn.Module: ...
    def get_output_embeddings(self) -> nn.Module | None: ...
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]: ...
    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], is_encoder_decoder: bool
    ) -> dict[str, Any]: ...
    def _supports_default_dynamic_cache(self) -> bool: ...


def _is_generative(model: object) -> TypeGuard[GenerativeModel]:
    return isinstance(model, GenerationMixin) and hasattr(model, "config")


def generative(model: object, name: str) -> GenerativeModel:
    """``model``, a causal language model of transformers; ValueError for anything else."""
    if not _is_generative(model):
        raise ValueError(f"{name}: got {type(model).__name__}, allowed is a transformers causal language model")
    return model


def cache_name(model: GenerativeModel) -> str:
    """What the model calls its cache, as an argument and in its output."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in takes), "past_key_values")


class CausalLM:
    """A transformers causal language model as `eft_kernels.decoding.Model`, with a cache of its own.

    Args:
      name: what error messages call it.
      rollback: rejected tokens will be taken back; ValueError where the model's cache cannot do that.
      option: what asks for it.
      longest: tokens that a text may have (None: not known).
      chunk: reads its prompt so many columns at a time (None: at once); ValueError where the model cannot do that.
      context: gives what is entered for each of its passes, such as one that switches an adapter off.
    """

    def __init__(
        self,
        model: GenerativeModel,
        name: str,
        rollback: bool,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
        option: str = "draft_tokens",
        longest: int | None = None,
        chunk: int | None = None,
    ):
        self.model, self.name, self.rollback, self.context = model, name, rollback, context
        self.option = option
        self.device = device_of(model)
        self.takes = inspect.signature(model.forward).parameters
        self.width, self.cache_name = logits_width(model), cache_name(model)
        self.boundary, self.boundary_moves = rope_boundary(model)
        if self.boundary is not None and longest is not None and longest <= self.boundary:
            self.boundary = None
        self.can_realign = can_realign(model)
        self.drops_cache = self.cache_name in inspect.signature(model.prepare_inputs_for_generation).parameters
        self.ids = torch.zeros(0, 0, dtype=torch.int64)  # [B, S] of all columns
        self.positions: torch.Tensor | None = self.ids  # None: the model counts its own
        self.state: dict[str, Any] = {}  # what the model keeps from pass to pass, its cache among it
        self.recurrence: Recurrence | None = None  # what takes states in its cache back
        if model._supports_default_dynamic_cache():
            self.state[self.cache_name] = self._new_cache()
        elif rollback:
            self._refuse_rollback("its cache is of its own kind")
        self.texts: Texts | None = None  # made by the first nodes
        self.reads_nodes, self.no_trees = False, ""  # and why not
        if rollback:
            self._see_nodes()
        kind, self.chunk = model.config.model_type, chunk
        if chunk and (kind in ONE_BY_ONE or self.cache_name not in self.state or not self.can_take_rows):
            why = ONE_BY_ONE.get(kind, "its cache is of its own kind")
            raise ValueError(f"prefill_chunk_size: {name} ({type(model).__name__}) reads its prompt at once ({why})")
        if rollback and (kind in ONE_BY_ONE or (getattr(model, "_is_stateful", False) and self.recurrence is None)):
            self._refuse_rollback(ONE_BY_ONE.get(kind, "it is stateful"))

    def _refuse_rollback(self, why: str) -> NoReturn:
        raise ValueError(
            f"{self.option}: {self.name} ({type(self.model).__name__}) cannot take back rejected tokens ({why}); "
            + ("use draft_tokens=0" if self.option == "draft_tokens" else f"leave {self.option} out")
        )

    def _see_nodes(self) -> None:
        """Finds out whether the model takes nodes: a 4D mask for tokens at any position, in any column."""
        implementation = getattr(self.model.config, "_attn_implementation", None)
        self.mask_type = torch.bool if implementation == "sdpa" else self.model.dtype
        masks = masks_of(self.model, self.windows)
        self.masks = masks or {}
        if self.recurrence is not None:
            self.no_trees = "it keeps states"
        elif self.model.config.model_type in NO_TREES:
            self.no_trees = NO_TREES[self.model.config.model_type]
        elif masks is None:
            self.no_trees = "it makes its attention mask itself"
        elif implementation not in ("sdpa", "eager"):
            self.no_trees = f"attn_implementation={implementation!r}; sdpa and eager take one"
        elif "position_ids" not in self.takes:
            self.no_trees = "it counts positions itself"
        elif self.boundary is not None:
            self.no_trees = "its rotary embedding changes with the length"
        self.reads_nodes = not self.no_trees

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.place = Place()
        kinds: tuple[type[DynamicLayer], ...] = (DynamicLayer,)
        if self.rollback:
            self.windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
            # a window's layer forgets what a rollback needs; a full layer is masked to the window by the model
            kinds = (DynamicLayer, DynamicSlidingWindowLayer)
            cache.layers = [with_text(layer, self.place) for layer in cache.layers]
            states = [layer for layer in cache.layers if holds_states(layer)]
            # a DummyLayer reads another layer's cache; early 5.x has none to import
            fixed = {type(x).__name__ for x in cache.layers if type(x) not in kinds and x not in states}
            if fixed := fixed - {"DummyLayer"}:
                self._refuse_rollback(", ".join(sorted(fixed)))
            if states:
                try:
                    self.recurrence = Recurrence(cast(nn.Module, self.model), cache)
                except ValueError as e:
                    self._refuse_rollback(str(e))
                self.can_realign |= not any(isinstance(layer, (*kinds, StatesAndText)) for layer in cache.layers)
        cache.layers = [TextLayer(self.place) if type(layer) in kinds else layer for layer in cache.layers]
        return cache

    def __call__(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        """As `Model`; beside it, ``position_ids`` None leaves them to the model and ``keep`` 0 is all columns."""
        home, past, count = ids.device, self.ids.shape[1], ids.shape[1]
        if self.recurrence is not None and not past and count > 1 and keep != 1:
            # the prompt is a pass of its own: one that begins with no state cannot be gone back into
            first = count - (keep or count) + 1
            mask = None if attention_mask is None else attention_mask[:, :first]
            where = (None, None) if position_ids is None else (position_ids[:, :first], position_ids[:, first:])
            begun = self(ids[:, :first], mask, where[0], 1)
            return torch.cat([begun, self(ids[:, first:], attention_mask, where[1], count - first)], 1)
        ids = ids.to(self.device)
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        if not past and len(ids) > 1 and self.can_take_rows:
            rows, of = distinct_rows(ids if attention_mask is None else torch.cat([ids, attention_mask], 1))
            if len(rows) < len(ids):  # several texts of one prompt, which is read once
                mask = None if attention_mask is None else attention_mask[rows]
                positions = None if position_ids is None else position_ids.to(rows.device)[rows]
                logits = self(ids[rows], mask, positions, keep)
                self.take_rows(of)
                return logits[of].to(home)
        if not past and self.chunk and ids.shape[1] > self.chunk:
            for stop in range(self.chunk, ids.shape[1], self.chunk):
                start = stop - self.chunk
                mask = None if attention_mask is None else attention_mask[:, :stop]
                self(ids[:, start:stop], mask, None if position_ids is None else position_ids[:, start:stop], 1)
            ids, past = ids[:, stop:], stop
            position_ids = None if position_ids is None else position_ids[:, stop:]
        self.ids = torch.cat([self.ids, ids], 1) if past else ids
        if position_ids is not None:
            position_ids = position_ids.to(self.device)
            if past:
                position_ids = None if self.positions is None else torch.cat([self.positions, position_ids], 1)
        self.positions = position_ids
        inputs = self._inputs(past, attention_mask, keep)
        given = inputs["input_ids"].shape[1]
        if self.drops_cache and inputs.get(self.cache_name) is None and self.cache_name in self.state:
            # the model reads the whole text again
            self.state[self.cache_name] = self._new_cache()
            if given < self.ids.shape[1] and len(self.ids) == 1:  # some cut it to the newest tokens all the same
                inputs = self._inputs(0, attention_mask, keep)
            inputs[self.cache_name] = self.state[self.cache_name]
        elif past and given < self.ids.shape[1] and not self.state:
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} keeps no cache and reads {given} tokens of "
                f"{self.ids.shape[1]}; allowed are models that keep one or read the whole text"
            )
        return self._forward(inputs, keep).to(home)

    @property
    def can_take_rows(self) -> bool:
        """Whether `take_rows` can be used: all that it keeps are keys and values of each row."""
        cache = self.state.get(self.cache_name)
        kinds = (TextLayer, DynamicSlidingWindowLayer)
        if self.recurrence is not None:
            return False
        return isinstance(cache, DynamicCache) and all(isinstance(layer, kinds) for layer in cache.layers)

    def _forward(self, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        """The logits [B, keep, V] of one pass, whose cache is held on to."""
        count = inputs["input_ids"].shape[1]
        with self.context(), nullcontext() if self.recurrence is None else self.recurrence.reading(count):
            out = self.model(**inputs, return_dict=True)
        self._keep(out)
        if out.logits.shape[-1] != self.width:
            raise ValueError(f"{self.name}: gives logits of width {out.logits.shape[-1]}, announces {self.width}")
        logits: torch.Tensor = out.logits[:, -keep:]
        return logits.float() if logits.dtype is torch.float64 else logits

    def _inputs(self, past: int, attention_mask: torch.Tensor | None, keep: int) -> dict[str, Any]:
        """What the model's forward takes for the columns from ``past`` on."""
        columns = self.ids.shape[1]
        known = dict(attention_mask=attention_mask, position_ids=self.positions, logits_to_keep=keep)
        return self._prepared(self.ids, past, columns - past, **known)

    def _prepared(self, ids: torch.Tensor, past: int, new: int, **known: Any) -> dict[str, Any]:
        """What the model makes of ids of which the last ``new`` were not read yet, after ``past`` columns."""
        options = {k: v for k, v in known.items() if k in self.takes}
        if known["position_ids"] is None:
            options.pop("position_ids", None)
        if CACHE_POSITION:
            options["cache_position"] = torch.arange(past, past + new, device=ids.device)
        else:
            options["next_sequence_length"] = new if past else None
        inputs = self.model.prepare_inputs_for_generation(
            ids, is_first_iteration=past == 0, use_cache=True, **options, **self.state
        )
        if "logits_to_keep" in inputs and "logits_to_keep" in known:
            inputs["logits_to_keep"] = known["logits_to_keep"]  # some put their config's number there
        return inputs

    def _keep(self, out: ModelOutput) -> None:
        """Holds on to what the model wants back at its next pass."""
        given = self.state.get(self.cache_name)
        self.state = self.model._update_model_kwargs_for_generation(
            out,
            {**self.state, "use_cache": True, "cache_position": torch.zeros(1, dtype=torch.int64)},
            is_encoder_decoder=False,
        )
        for name in ("use_cache", "cache_position", "attention_mask", "position_ids"):
            self.state.pop(name, None)
        cache = self.state.get(self.cache_name)
        if isinstance(cache, DynamicCache) and not _holds_states(cache):
            del self.state[self.cache_name]  # nothing was put there: the model reads the whole text at every pass
            cache = None
        self.state = {k: v for k, v in self.state.items() if v is not None}
        if self.rollback and cache is not given:
            self._refuse_rollback("it keeps no cache" if cache is None else "it makes its own cache")

    def _layers(self) -> list[TextLayer]:
        """The cache's layers that hold keys and values."""
        return [layer for layer in self.state[self.cache_name].layers if isinstance(layer, TextLayer) and layer.buffers]

    def keep_tokens(self, read: int, kept: list[int]) -> None:
        if self.recurrence is not None:
            before = self.recurrence.pending - read
            with self.context():
                self.recurrence.keep([before + count for count in kept])

    def crop(self, count: int) -> None:
        if self.recurrence is not None and (pending := self.recurrence.pending):  # they were not kept yet
            self.keep_tokens(pending, [pending - count] * len(self.ids))
        left = self.ids.shape[1] - count
        self.ids = self.ids[:, :left]
        self.positions = None if self.positions is None else self.positions[:, :left]
        for layer in self._layers():
            layer.crop(count)

    def realign(self, columns: torch.Tensor) -> None:
        columns = columns.to(self.device)
        self.ids = self.ids.gather(1, columns)
        self.positions = None if self.positions is None else self.positions.gather(1, columns)
        for layer in self._layers():
            layer.realign(columns)

    # --- nodes, see `NodeModel` ---

    def nodes(self, ids: torch.Tensor, depth: torch.Tensor, sees: torch.Tensor, keep: int) -> torch.Tensor:
        home, ids = ids.device, ids.to(self.device)
        if self.texts is None:
            assert self.positions is not None
            left = self.ids.shape[1] - 1 - self.positions[:, -1]
            self.texts = Texts(self._layers(), self.place, left, self.masks, self.mask_type)
        past = max(self.texts.ends) + self.texts.pending
        positions, mask = self.texts.nodes(depth.to(self.device), sees)
        known = dict(attention_mask=mask, position_ids=positions, logits_to_keep=keep)
        inputs = self._prepared(ids, past, ids.shape[1], **known)
        return self._forward(inputs, keep).to(home)

    def accept(self, path: torch.Tensor | None, kept: list[int]) -> None:
        assert self.texts is not None
        self.texts.accept(path, kept)

    def clean(self) -> None:
        if self.texts is not None:
            self.texts.clean()

    def take_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what was row ``rows[i]``: beams that are reordered, repeated or dropped."""
        rows = rows.to(self.device)
        if self.texts is not None:
            self.texts.take_rows(rows)
        if self.recurrence is not None:
            self.recurrence.forget()
        self.ids = self.ids[rows]
        self.positions = None if self.positions is None else self.positions[rows]
        for name, held in self.state.items():
            if not hasattr(held, "reorder_cache"):
                raise ValueError(
                    f"num_beams: {self.name} ({type(self.model).__name__}) keeps {name} of its own kind, whose rows "
                    "cannot be reordered; use num_beams=1"
                )
            held.reorder_cache(rows)


def distinct_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of the different rows of x [B, n] is first, int64 [U], and which of these each row is, int64 [B]."""
    unique, of = torch.unique(x, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(x), device=x.device)
    return first.scatter_reduce(0, of, torch.arange(len(x), device=x.device), "amin"), of


def _holds_states(cache: DynamicCache) -> bool:
    values = [x for layer in cache.layers for x in vars(layer).values()]
    values += [x for v in values if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
    return any(isinstance(x, torch.Tensor) and x.numel() > 0 for x in values)


# --- what a model says about itself ----------------------------------------------------------------------------------


def device_of(model: object) -> torch.device:
    """Where a model takes its ids: its embedding's device, or where a hook of accelerate brings them."""
    embeddings = getattr(model, "get_input_embeddings", None)
    embedding = None if embeddings is None else embeddings()
    weight = getattr(embedding, "weight", None)
    own = weight.device if isinstance(weight, torch.Tensor) else getattr(model, "device", torch.device("cpu"))
    device: torch.device = own
    if device.type == "meta":
        hooks = [getattr(m, "_hf_hook", None) for m in (embedding, model)]
        places = [getattr(hook, "execution_device", None) for hook in hooks]
        device = next((torch.device(place) for place in places if place is not None), torch.device("cpu"))
    return device


def logits_width(model: GenerativeModel) -> int:
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.get_text_config(decoder=True).vocab_size)


def masks_of(model: GenerativeModel, windows: Sequence[int | None]) -> dict[str, int | None] | None:
    """The masks that a model's forward takes, as for `Texts`; None where it makes them itself.

    windows: of each layer, how many positions back it attends to.
    """
    decoder = model.get_decoder()
    forward, module = inspect.unwrap(type(decoder).forward), sys.modules[type(decoder).__module__]
    if not hasattr(module, "create_causal_mask") and not hasattr(module, "create_sliding_window_causal_mask"):
        return None
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None):
        return None
    if "causal_mask_mapping" in forward.__code__.co_varnames:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds <= {"full_attention", "sliding_attention"}:
            window = next((w for w in windows if w), None)
            return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
        return None
    return {"": windows[0]} if len(set(windows)) == 1 else None


def can_realign(model: GenerativeModel) -> bool:
    """Whether a row may move to other columns of the cache: nothing but its mask and positions says where a token is.

    Without position_ids positions are counted from the cache's length (unless they come from the mask: BLOOM); chunked
    attention (Llama 4) counts its chunks in columns.
    """
    takes = inspect.signature(model.forward).parameters
    config = model.config.get_text_config(decoder=True)
    positions = "position_ids" in takes or hasattr(model.base_model, "build_alibi_tensor")
    return positions and not getattr(config, "attention_chunk_size", None)


def rope_boundary(model: GenerativeModel) -> tuple[int | None, bool]:
    """The length of text beyond which another rotary embedding is used for all of it (None: there is none), and
    whether it changes again with every token beyond: "longrope" has two sets of frequencies, "dynamic" many."""
    config = model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [r for r in (ropes, *ropes.values()) if isinstance(r, dict)]
    kinds = {r.get("rope_type") for r in ropes} & {"longrope", "dynamic"}
    if not kinds:
        return None, False
    lengths = [getattr(config, "original_max_position_embeddings", None)]
    lengths += [r.get("original_max_position_embeddings") for r in ropes]
    original = min((n for n in lengths if n), default=getattr(config, "max_position_embeddings", None))
    return original, "dynamic" in kinds


def check_boundaries(models: Sequence[CausalLM], rows: int, longest: int) -> None:
    """Refuses speculation where plain decoding would use another rotary embedding than a round of several tokens.

    One row stops its rounds at the boundary (`CausalLM.boundary`); rows of a batch reach it in different rounds, and a
    pass has one embedding for all.
    """
    for m in models:
        if m.boundary is not None and longest > m.boundary and (rows > 1 or m.boundary_moves):
            raise ValueError(
                f"draft_tokens: the rotary embedding of {m.name} ({type(m.model).__name__}) changes where a text is "
                f"longer than {m.boundary} tokens, got up to {longest} in {rows} row(s); use draft_tokens=0"
                + ("" if m.boundary_moves else " or one row")
            )


def check_trees(models: Sequence[CausalLM], width: int) -> None:
    """Refuses trees of drafts where a model takes none."""
    for m in models if width > 1 else ():
        if m.no_trees:
            raise ValueError(
                f"draft_width: {m.name} ({type(m.model).__name__}) takes no tree of drafts ({m.no_trees}); "
                "use draft_width=1"
            )


REMEMBERED = 16  # for each base: other models, settings and batch sizes, the newest
_remembered: weakref.WeakKeyDictionary[nn.Module, dict[Any, Auto]] = weakref.WeakKeyDictionary()


@contextmanager
def remembered(models: Sequence[CausalLM], drafts: Drafts, *of: object) -> Iterator[Drafts]:
    """``drafts``; of `Auto` the one that served the same models and settings ``of`` before, which knows their times."""
    if not isinstance(drafts, Auto):
        yield drafts
        return
    first, *others = (cast(nn.Module, m.model) for m in models)
    key = (*of, drafts.depth, drafts.width, drafts.budget, *map(weakref.ref, others), torch.get_num_threads())
    held = _remembered.setdefault(first, {})
    found = held.pop(key, drafts)  # of one text at a time
    yield found
    held[key] = found
    while len(held) > REMEMBERED:
        held.pop(next(iter(held)))


# --- adapters --------------------------------------------------------------------------------------------------------


class Off:
    """Stands for ``model`` with its adapters off, where a model is expected."""

    def __init__(self, model: nn.Module):
        self.model = model


def peft_models() -> tuple[type[nn.Module], ...]:
    """The classes that hold an adapted module; none unless PEFT is imported."""
    peft = sys.modules.get("peft")
    names = ("PeftModel", "PeftMixedModel")
    return tuple(getattr(peft, name) for name in names if hasattr(peft, name))


def layers_of(module: object) -> list[Any]:
    """The layers of a module that an adapter can be switched on and off in."""
    if "peft" not in sys.modules or not isinstance(module, nn.Module):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, other

    kinds = (BaseTunerLayer, ModulesToSaveWrapper, getattr(other, "AuxiliaryTrainingWrapper", BaseTunerLayer))
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock(module: nn.Module) -> threading.RLock:
    """One for each adapted module: whoever switches its adapters has it to himself until they are switched back."""
    with _locks_lock:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def switched(module: nn.Module, off: bool) -> Iterator[None]:
    """The adapters of ``module`` off for a while, or (off=False) left as they are while nobody else switches them.

    The state of the layers alone: PEFT's own switch also counts parameters and sets requires_grad.
    """
    with _lock(module):
        layers = layers_of(module) if off else []
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, state in zip(layers, before):
                layer._disable_adapters = state


def unwrapped(model: nn.Module, name: str) -> nn.Module:
    """The transformers module that an adapter sits in; ``model`` itself where it is none of PEFT's."""
    holders = peft_models()
    if not holders:
        return model
    from peft.tuners.tuners_utils import BaseTuner

    while isinstance(model, (*holders, BaseTuner)):
        held: Any = model
        for config in held.peft_config.values():
            kind = getattr(config.peft_type, "value", config.peft_type)
            if config.is_prompt_learning or kind in NOT_IN_LAYERS or getattr(config, "alora_invocation_tokens", None):
                what = "virtual tokens" if config.is_prompt_learning else "a forward of its own"
                raise ValueError(
                    f"{name}: {kind} works by {what}, which emulated decoding cannot honour; allowed are "
                    "adapters made of layers, such as LORA"
                )
        model = held.model if isinstance(model, BaseTuner) else held.get_base_model()
    return model


def resolved(
    models: Sequence[nn.Module | Off], names: Sequence[str]
) -> tuple[list[GenerativeModel], list[Callable[[], AbstractContextManager[None]]], list[bool]]:
    """(transformers modules, a context for the forwards of each, whether its adapter is off there).

    The base module on its own, beside a PeftModel over it, stands for the same weights with the adapter off.
    """
    held = [isinstance(m, peft_models()) for m in models]
    inner = [unwrapped(m.model if isinstance(m, Off) else m, name) for m, name in zip(models, names)]
    found = [generative(module, name) for module, name in zip(inner, names)]
    adapted = {id(module) for module, holder in zip(inner, held) if holder}
    off = [
        isinstance(m, Off) or (id(module) in adapted and not holder) for m, module, holder in zip(models, inner, held)
    ]
    contexts: list[Callable[[], AbstractContextManager[None]]] = [nullcontext] * len(models)
    for j, name in enumerate(names):
        if off[j]:
            _check_switch(inner[j], name)
        if off[j] or layers_of(inner[j]):
            contexts[j] = partial(switched, inner[j], off[j])
    for j, name in enumerate(names):
        if not name.startswith("tuned"):
            continue
        with contexts[j]() if not off[j] else nullcontext():
            on = any(layer.active_adapters and not layer.disable_adapters for layer in layers_of(inner[j]))
        if off[-1] and inner[j] is inner[-1] and not on:
            raise ValueError(f"{name}: its adapter is switched off, so it has the weights of ref; switch it on")
        for i in (*range(1, j), len(names) - 1):  # other tuned models, and ref
            if off[i] == off[j] and same_weights(inner[i], inner[j]):
                what = "the result would be model alone" if names[i] == "ref" else "two models are expected"
                raise ValueError(
                    f"{name}: has the same weights as {names[i]} (one module, or shared memory), so "
                    f"{what}; give another model, or one with an adapter (PEFT) and ref=None"
                )
    return found, contexts, off


def check_distinct(
    models: Sequence[object], off: Sequence[bool], prompts: Sequence[object], names: Sequence[str]
) -> None:
    """No two terms of a combination may be one: the same weights, adapter and prompt."""
    for j in range(1, len(models)):
        for i in range(j):
            if prompts[i] is None and prompts[j] is None and same_weights(models[i], models[j]) and off[i] == off[j]:
                raise ValueError(
                    f"{names[j]}: is {names[i]} (one module, or shared memory) with the same prompt; give "
                    "it another prompt in prompts, or add their weights"
                )


def _check_switch(module: nn.Module, name: str) -> None:
    pure = {"bias": (None, "none"), "init_lora_weights": PURE_INITS, "layer_replication": (None,)}
    for config in getattr(module, "peft_config", {}).values():
        for option, allowed in pure.items():
            value = getattr(config, option, None)
            if value not in allowed:
                raise ValueError(
                    f"{name}: an adapter with {option}={value!r} changes its base and cannot be switched "
                    "off; load the model that it was trained from as ref"
                )


def _storage(parameter: torch.Tensor) -> object:
    """What tells one parameter's memory from another's."""
    try:
        address = parameter.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own
        address = 0
    return (address, tuple(parameter.shape), tuple(parameter.stride())) if address else id(parameter)


def same_weights(a: object, b: object) -> bool:
    """Whether two models are one: the same module, or every parameter in the same memory."""
    if a is b:
        return True
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        return False
    ours, theirs = ({_storage(p) for p in m.parameters()} for m in (a, b))
    return bool(ours) and ours == theirs
