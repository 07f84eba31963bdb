"""Base, tuned and ref as one model of transformers, for whatever takes a model: pipelines, evaluation, other loops."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...arguments import check_weights, scalar
from ...checks import is_real, shown
from ...combination import MODE_OF, MODES, STRENGTHS, AnyWeights, Weights
from ...decoding import Value
from ...ops import PerRow, combine
from ..composition import (
    ADAPTER,
    Composition,
    composed_config,
    part_names,
    write_composed,
)
from .arguments import (
    Models,
    OwnIds,
    check_models,
    combination_of,
    end_of_turn,
    end_tokens,
    free_combination_of,
    on_device,
    per_row,
    shared_vocabulary,
)
from .cache import CACHE, EmulatedCache
from .generate import EmulatedOutput, generate
from .models import CausalLM, GenerativeModel, device_of, layers_of, resolved, unwrapped

# What a call may not change; and what transformers' own strategies, such as beams, know nothing of.
PARTS = ("tuned", "ref", "models", "weights", "mode", "vocab_size", "tokenizers")
OURS = ("seed", "draft_tokens", "verify", "draft", "on_invalid")


class EmulatedConfig(PreTrainedConfig):
    """Puts `EmulatedModel` among transformers' causal language models; a model's own config is base's, changed."""

    model_type = "eft"


class EmulatedModel(PreTrainedModel, GenerationMixin):
    """``base`` as if it had been fine-tuned the way ``tuned`` was from ``ref``, as one model of transformers.

    `forward` gives the emulated logits and one cache for all models. `generate` is `eft_kernels.hf.generate` where
    that has the say, greedy decoding and sampling; transformers' other strategies (beams, assisted decoding, prompt
    lookup, a ``custom_generate``) run over `forward`.

    Args:
      base: a causal language model of transformers, or a PeftModel over one.
      tuned, ref, mode, beta, alpha, lam, upscale_top_p: as in `eft_kernels.hf.generate`, here numbers. What `generate`
        and `forward` are given takes precedence.
      models, weights: instead of these, any combination, as there.
      vocab_size: use ids below it only; needed where the models' logits differ in width.
      tokenizers: one per model, [base, *tuned, ref]: refused unless they agree. Their end tokens, and what ends a turn
        in the first tuned model's chat template, end a text, too.

    The models stay where they are and as they are: on devices of their own (ids and logits are moved, once each),
    quantised, or with an adapter. Nothing is copied; ``ref=None`` with an adapter in ``tuned`` holds both once.

    ``config`` is base's with the shared vocabulary, the shortest context and the end tokens of all;
    ``generation_config`` has the special tokens alone. ``name_or_path`` is the tuned model's, whose tokenizer and chat
    template go with an emulated model.

    Raises: ValueError naming the argument, as `eft_kernels.hf.generate` does.
    """

    config_class = EmulatedConfig
    accepts_loss_kwargs = False  # a loss is the mean over its own tokens

    def __init__(
        self,
        base: nn.Module,
        tuned: nn.Module | Models | None = None,
        ref: nn.Module | None = None,
        *,
        models: Models | None = None,
        weights: AnyWeights | None = None,
        mode: str | None = None,
        beta: float | None = None,
        alpha: float | None = None,
        lam: float | None = None,
        upscale_top_p: float = 1.0,
        vocab_size: int | None = None,
        tokenizers: Sequence[PreTrainedTokenizerBase] | None = None,
    ):
        given = dict(beta=beta, alpha=alpha, lam=lam)
        strengths = {name: None if x is None else _number(name, x) for name, x in given.items()}
        upscale_top_p = scalar("upscale_top_p", _number("upscale_top_p", upscale_top_p), 1)
        free = weights is not None or models is not None
        if free:
            unused = dict(tuned=tuned, ref=ref, mode=mode, **strengths)
            combination = free_combination_of(base, models, weights, unused)
        else:
            combination = combination_of(base, tuned, ref, mode, **strengths)
        names = ["base", *combination.names[1:]]
        for name, model in zip(names, combination.models):
            if isinstance(model, EmulatedModel):
                raise ValueError(f"{name}: got an EmulatedModel, allowed are the models that it is made of")
        if combination.weights.values is None:
            raise ValueError(f"weights: got {combination.weights!r}, allowed are numbers")
        check_weights(combination.weights, len(names), 1, device_of(base), check=True)
        if upscale_top_p != 1 and (free or len(names) == 4):
            raise ValueError(f"upscale_top_p: got {upscale_top_p}, allowed is 1 with weights or two tuned models")
        terms, contexts, off = resolved(combination.models, names)
        check_models(terms, names)
        size, _ = shared_vocabulary(terms, names, vocab_size, tokenizers)

        settings: dict[str, Any] = {}
        if not free:
            settings["mode"] = mode or ("interpolate" if len(names) == 4 else "upscale")
            if key := MODES[settings["mode"]].strength:
                own = strengths[key]
                settings[key] = STRENGTHS[key] if own is None else own
            settings["upscale_top_p"] = upscale_top_p
        ends = {*end_tokens(terms), *(t.eos_token_id for t in tokenizers or () if t.eos_token_id is not None)}
        if tokenizers is not None:
            ends |= set(end_of_turn(tokenizers[0 if free else 1]))
        config = composed_config([m.config for m in terms], settings, size, sorted(i for i in ends if i < size))
        config.name_or_path = terms[0 if free else 1].config.name_or_path
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)  # base's own, and no matter of the whole
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.base = base
        if free:
            self.models = nn.ModuleList(models or ())
        else:
            self.tuned = nn.ModuleList(tuned) if isinstance(tuned, (list, tuple)) else tuned
            self.ref = ref
        self.names, self.settings, self.weights, self.vocab_size = names, settings, combination.weights, size
        # plain lists: the modules are registered above, as they were given
        self._terms, self._contexts, self._off = tuple(terms), tuple(contexts), tuple(off)
        self.training = any(m.training for m in self.children())
        self.is_quantized = any(getattr(m, "is_quantized", False) for m in terms)
        devices = [device_of(m) for m in terms]
        if len(set(devices)) > 1 or any(hasattr(m, "hf_device_map") for m in terms):
            self.hf_device_map = dict(zip(names, devices))  # tells a pipeline to leave the models where they are
        special = {k: v for k in ("bos_token_id", "pad_token_id") if (v := _first(terms, k)) is not None}
        self.generation_config = GenerationConfig(**special, eos_token_id=config.eos_token_id or None)

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> EmulatedModel:
        """Loads a folder made by ``eft-kernels compose`` or `save_pretrained`, or a hub id of one.

        Args:
          mode, beta, alpha, lam, upscale_top_p: instead of the folder's.
          kwargs: what ``AutoModelForCausalLM.from_pretrained`` takes (``device_map``, ``dtype``,
            ``quantization_config``, ``attn_implementation``, ...), for all models, or a dict by their names "base",
            "tuned" ("tuned_a", "tuned_b"), "ref": ``device_map={"base": "auto", "tuned": "cuda:1", "ref": "cuda:1"}``.

        A PEFT adapter in the folder of ``tuned`` is laid over ref, whose weights are held once.

        Raises: ValueError naming an argument that no model takes, or that is the folder's own (``config``,
        ``vocab_size`` and the like).
        """
        if model_args:
            raise ValueError(f"model_args: got {len(model_args)}, allowed is none")
        if kwargs.pop("output_loading_info", False):
            raise ValueError("output_loading_info: got True, allowed is False; load the models one by one for theirs")
        given = {k: kwargs.pop(k) for k in ("mode", *MODE_OF, "upscale_top_p") if k in kwargs}
        kwargs.pop("_from_auto", None)
        auto: dict[str, Any] = {k: kwargs.pop(k) for k in ("config", "adapter_kwargs") if k in kwargs}
        if len(auto) == 1:  # transformers' Auto class gives both, read in the folder
            unread, value = auto.popitem()
            got = type(value).__name__
            raise ValueError(f"{unread}: got {got}, allowed is none; the models of the folder have their own")
        for name in PARTS:
            if name in kwargs:
                raise ValueError(f"{name}: got {shown(kwargs[name])}, allowed is what the folder says; leave it out")
        hub = {k: kwargs.pop(k) for k in ("revision", "subfolder") if k in kwargs}
        folder = _local_folder(os.fspath(pretrained_model_name_or_path), kwargs, **hub)
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        composition = Composition.parse(config.get("eft"), folder)
        size = (config.get("text_config") or config)["vocab_size"]
        if auto and (got := auto["config"].get_text_config().vocab_size) != size:
            raise ValueError(f"vocab_size: got {got}, allowed is what the folder says, {size}")
        folders = (composition.folders[0] or folder, *composition.folders[1:])
        options = [_options_of(name, composition.names, kwargs) for name in composition.names]
        if composition.base_within is None:
            raise ValueError(f"{folder}: its config names no folder of base; make it with `eft-kernels compose`")

        adapters = [os.path.isfile(os.path.join(f, ADAPTER)) for f in folders]
        if adapters[0] or adapters[-1]:
            raise ValueError(f"{folder}: base and ref are whole models, and one of them is a PEFT adapter")
        once = adapters[1] and len(folders) == 3  # ref is tuned with its adapter off
        parts: list[Any] = []
        for path, adapter, own in zip(folders, adapters, options):
            whole = _loaded(folders[-1] if adapter else path, own)
            parts.append(_with_adapter(whole, path) if adapter else whole)
            if once and adapter:
                break
        base, tuned, ref = parts[0], parts[1:-1] or parts[1:], None if once else parts[-1]
        settings = {**composition.settings, **given}
        if key := next((k for k in MODE_OF if k in given), None):
            settings = {"mode": MODE_OF[key], "upscale_top_p": settings["upscale_top_p"], **given}
        elif given.get("mode", settings["mode"]) != composition.settings["mode"]:  # the folder's strength is another's
            settings = {"mode": given["mode"], "upscale_top_p": settings["upscale_top_p"], **given}
        model = cls(base, tuned if len(tuned) > 1 else tuned[0], ref, vocab_size=size, **settings)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        model.name_or_path = model.config.name_or_path = folder
        model.train(False)
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes a folder as ``eft-kernels compose`` makes it, with copies of the weights; without a tokenizer.

        ``kwargs`` go to each model's own `save_pretrained`.
        """
        if not self.settings:
            raise ValueError("save_pretrained: a folder holds base, tuned and ref; this model has weights of its own")
        if push_to_hub:
            raise ValueError("push_to_hub: save the folder, add the tokenizer, and upload it")
        tuned = list(self.tuned) if isinstance(self.tuned, nn.ModuleList) else [self.tuned]
        names, parts = part_names(len(tuned)), [self.base, *tuned, self.ref]
        adapted = [bool(layers_of(unwrapped(m, n))) for n, m in zip(names, parts) if m is not None]
        once = self._off[-1] and len(names) == 3
        if bad := [n for n, a in zip(names, adapted) if a and not (once and n in ("tuned", "ref"))]:
            raise ValueError(
                f"{bad[0]}: has an adapter over weights of its own; merge it (merge_and_unload) before saving"
            )
        out = Path(save_directory)
        write_composed(out, self.config, self.generation_config.to_diff_dict())
        for name, part in zip(names, parts):
            if (out / name).is_symlink():
                (out / name).unlink()  # a link leads to somebody's weights
            if once and name == "ref":
                _save_without_adapter(cast(Any, self._terms[-1]), out / name)
            else:
                cast(Any, part).save_pretrained(out / name, **kwargs)

    # --- the pass -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: EmulatedCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: EmulatedCache | None = None,
        beta: PerRow = None,
        alpha: PerRow = None,
        lam: PerRow = None,
        upscale_top_p: PerRow = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Emulated logits of ids [B, n]: float32 [B, n, V], ``sum_j w_j z_j`` of the models' own.

        As from `eft_kernels.combine`: -inf where a model of non-zero weight has it, and no gradient.

        Args:
          attention_mask, position_ids, labels, logits_to_keep: as for any causal language model; they go to each model.
          cache: what an earlier pass returned; ids are those that it has not read. attention_mask covers all.
          use_cache: True returns a cache for all models (default: where one is given).
          beta, alpha, lam, upscale_top_p: numbers or tensors [B] in the place of the model's own.

        Raises: ValueError for anything else that is given.
        """
        cache = past_key_values if cache is None else cache
        kwargs.pop("cache_position", None)  # of older versions' generate; the cache knows it
        if given := [k for k, v in kwargs.items() if v is not None and v is not False]:
            raise ValueError(f"{given[0]}: an emulated model has no such argument; leave it out")
        if cache is not None and not isinstance(cache, EmulatedCache):
            got = type(cache).__name__
            raise ValueError(f"{CACHE}: got {got}, allowed is what an earlier pass returned (use_cache=True)")
        home = device_of(self.base)
        ids = input_ids.to(home)
        weights, top_p = self._combined_by(dict(beta=beta, alpha=alpha, lam=lam), upscale_top_p, len(ids), home)
        if cache is None and use_cache:
            cache = self.new_cache()
        if cache is None:
            logits = [self._pass(j, ids, attention_mask, position_ids, logits_to_keep) for j in range(len(self.names))]
        else:
            every = cache(ids, attention_mask, position_ids, logits_to_keep if isinstance(logits_to_keep, int) else 0)
            logits = every if isinstance(logits_to_keep, int) else [z[:, logits_to_keep] for z in every]
        columns = logits[0].shape[1]
        combined = combine(
            [z.reshape(-1, z.shape[-1]) for z in logits],
            weights.repeat_interleave(columns),
            upscale_top_p=top_p.repeat_interleave(columns) if isinstance(top_p, torch.Tensor) else top_p,
            vocab_size=self.vocab_size,
        ).view(len(ids), columns, -1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=combined, labels=labels.to(home), vocab_size=self.vocab_size)
        held: dict[str, Any] = {CACHE: cache}
        out = CausalLMOutputWithPast(loss=loss, logits=combined, **held)
        return out.to_tuple() if return_dict is False else out

    def _pass(
        self,
        j: int,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        keep: int | torch.Tensor,
    ) -> torch.Tensor:
        """Model j's logits [B, n, V_j] without a cache, on the device of ``ids``."""
        model, takes = self._terms[j], inspect.signature(self._terms[j].forward).parameters
        known = dict(attention_mask=attention_mask, position_ids=position_ids)
        inputs = {k: v.to(device_of(model)) for k, v in known.items() if v is not None and k in takes}
        options: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in takes else {}
        if "use_cache" in takes:
            options["use_cache"] = False
        with self._contexts[j]():
            logits: torch.Tensor = model(ids.to(device_of(model)), **inputs, **options, return_dict=True).logits
        if "logits_to_keep" not in takes:
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        logits = logits.to(ids.device)
        return logits.float() if logits.dtype is torch.float64 else logits

    def _combined_by(
        self, strengths: Mapping[str, PerRow], upscale_top_p: PerRow, rows: int, device: torch.device
    ) -> tuple[Weights, Value]:
        """(weights, the up-scaling filter's mass) of a call, per row where it gives tensors."""
        weights = self.weights
        if name := self._own_strength(strengths, upscale_top_p):
            weights = MODES[MODE_OF[name]].weights(on_device(name, strengths[name], device))
            check_weights(weights, len(self.names), rows, device, check=True)
        top_p = self.settings.get("upscale_top_p", 1.0) if upscale_top_p is None else upscale_top_p
        return weights, per_row("upscale_top_p", top_p, rows, device)

    def _own_strength(self, strengths: Mapping[str, PerRow], upscale_top_p: PerRow) -> str | None:
        """The name of the strength that a call gives, if any; ValueError unless it goes with this model."""
        allowed = {"upscale": ("beta", "alpha"), "proxy": ("beta", "alpha"), "interpolate": ("lam",)}
        own = allowed.get(self.settings.get("mode", ""), ())
        given = [k for k, v in strengths.items() if v is not None]
        for name in given:
            if name not in own:
                why = f"goes with mode={MODE_OF[name]!r}; this model takes {' or '.join(own) or 'no strength'}"
                raise ValueError(f"{name}: got {shown(strengths[name])}, allowed is None; {why}")
        if len(given) > 1:
            raise ValueError(f"{given[1]}: got {shown(strengths[given[1]])} beside {given[0]}, allowed is one of them")
        if upscale_top_p is not None and (not self.settings or len(self.names) == 4):
            got = shown(upscale_top_p)
            raise ValueError(f"upscale_top_p: got {got}, allowed is None with weights or two tuned models")
        return given[0] if given else None

    def new_cache(
        self,
        prompts: Sequence[OwnIds] | Mapping[str, OwnIds] | None = None,
        shared: int | None = None,
        rollback: str | None = None,
    ) -> EmulatedCache:
        """An empty cache for all models.

        Args:
          prompts: own prompts of models, as in `eft_kernels.hf.generate`, which replace the first ``shared`` columns
            that are read (None: those of the first pass).
          rollback: the option that will take columns back; ValueError where a model's cache cannot do that.
        """

        def terms() -> list[CausalLM]:
            option: dict[str, Any] = {} if rollback is None else {"option": rollback}
            return [
                CausalLM(m, n, rollback=rollback is not None, context=c, **option)
                for m, n, c in zip(self._terms, self.names, self._contexts)
            ]

        return EmulatedCache(terms, self.names, self.vocab_size, prompts, shared, rollback is not None)

    # --- decoding -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | EmulatedOutput | Any:
        """As any model's, with the arguments of `eft_kernels.hf.generate` beside transformers'.

        Args:
          beta, alpha, lam, upscale_top_p: in the place of the model's own; numbers or tensors [rows].
          prompts: own prompts of models, in a list of all but base or a dict by name: ``{"tuned": ids}``.
          seed, draft_tokens, verify, draft, on_invalid: with greedy decoding and sampling alone.

        Returns and raises: as `eft_kernels.hf.generate`; with beams and the like as transformers.
        """
        named = inspect.signature(GenerationMixin.generate).bind_partial(self, inputs, generation_config, *args)
        call = {k: v for k, v in {**named.arguments, **kwargs}.items() if k not in ("self", "kwargs")}
        call = {k: v for k, v in call.items() if v is not None or k not in ("inputs", "generation_config")}
        for name in PARTS:
            if name in call:
                raise ValueError(f"{name}: is part of the model; make another EmulatedModel")
        own = self._own_strength({name: call.get(name) for name in MODE_OF}, call.get("upscale_top_p"))
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        for name, value in call.items():
            if hasattr(config, name) and not isinstance(value, torch.Tensor):
                setattr(config, name, value)
        strategy = _strategy(config, call)
        if strategy is None:
            if self.settings:
                tuned = list(self.tuned) if isinstance(self.tuned, nn.ModuleList) else self.tuned
                held = dict(self.settings)
                if own:
                    held = {"mode": MODE_OF[own], "upscale_top_p": held["upscale_top_p"]}
                given = {name for name, value in call.items() if value is not None}
                call |= dict(tuned=tuned, ref=self.ref, **{k: v for k, v in held.items() if k not in given})
            else:
                call |= dict(models=list(self.models), weights=self.weights)
            call |= dict(vocab_size=self.vocab_size, custom_generate=_of_parts)
            if generation_config is None and self.generation_config.eos_token_id is not None:
                call.setdefault("eos_token_id", self.generation_config.eos_token_id)  # these, and no model's own
            return super().generate(**call)
        for name in (*MODE_OF, "upscale_top_p"):
            if name in call:  # a list as a tensor: transformers repeats tensors for each beam
                call[name] = on_device(name, call[name], self.device)
        for name in OURS:
            if name in call:
                raise ValueError(f"{name}: goes with greedy decoding and sampling, got {strategy}; leave it out")
        if config.use_cache is False:
            raise ValueError("use_cache: got False, allowed is True; an emulated model keeps a cache")
        if config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: got {config.cache_implementation!r}, allowed is 'dynamic'")
        prompts = call.pop("prompts", None)
        if call.get("cache", call.get(CACHE)) is None:
            ids = call.get("inputs", call.get("input_ids"))
            drafts = "assistant_model" if call.get("assistant_model") is not None else "prompt_lookup_num_tokens"
            rollback = drafts if strategy == "assisted_generation" else None
            call[CACHE] = self.new_cache(prompts, None if ids is None else ids.shape[1], rollback)
        elif prompts is not None:
            raise ValueError(f"prompts: got a {CACHE}, too, which has read its prompts; leave one of the two out")
        return super().generate(**call)

    # --- what transformers asks a model -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where ids are taken and logits are given: base's."""
        return device_of(self.base)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, cast(Any, self.base).get_input_embeddings())

    def get_output_embeddings(self) -> None:
        return None  # logits are a combination, not a layer's

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("resize_token_embeddings: resize each of the models, then make the EmulatedModel")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        pass  # each model has tied its own

    def to(self, *args: Any, **kwargs: Any) -> EmulatedModel:  # type: ignore[override]
        """Each model's own `to`, which knows what it may not do (a dtype for quantised weights)."""
        for model in self._distinct():
            model.to(*args, **kwargs)
        return self

    def _distinct(self) -> list[Any]:
        return list({id(m): m for m in self._terms}.values())


@functools.wraps(generate)
def _of_parts(model: EmulatedModel, *args: Any, **kwargs: Any) -> torch.Tensor | EmulatedOutput:
    """`generate` of the models that ``model`` holds; transformers looks at its arguments' names."""
    return generate(model.base, *args, **kwargs)


def _strategy(config: GenerationConfig, call: Mapping[str, Any]) -> str | None:
    """What transformers calls the strategy of a call; None where `eft_kernels.hf.generate` decodes."""
    if (custom := call.get("custom_generate")) not in (None, generate):
        return f"custom_generate={getattr(custom, '__name__', custom)}"
    mode = config.get_generation_mode(call.get("assistant_model"))
    name = str(getattr(mode, "value", mode))
    return None if name in ("greedy_search", "sample") else name


def _first(models: Sequence[GenerativeModel], name: str) -> Any:
    return next((v for m in models if (v := getattr(m.generation_config, name, None)) is not None), None)


# --- folders ---------------------------------------------------------------------------------------------------------


def _local_folder(name: str, options: Mapping[str, Any], revision: str | None = None, subfolder: str = "") -> str:
    if not os.path.isdir(name):
        from huggingface_hub import snapshot_download

        hub = {k: options[k] for k in ("cache_dir", "force_download", "local_files_only", "token") if k in options}
        name = snapshot_download(name, revision=revision, **hub)
    return os.path.join(name, subfolder) if subfolder else name


def _number(name: str, value: object) -> float:
    """``value`` as a finite float; ValueError. A model has one for all rows."""
    if isinstance(value, torch.Tensor) and not value.dim():
        value = value.item()
    if not is_real(value) or not math.isfinite(value):
        raise ValueError(
            f"{name}: got {shown(value)}, allowed is a finite number; values per row go to generate or forward"
        )
    return float(value)


def _loaded(folder: str, options: Mapping[str, Any]) -> Any:
    """The model of a folder; ValueError for an option that is none, which transformers hands to the model."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in options:
            raise
        raise ValueError(f"{found[1]}: is neither an option of from_pretrained nor in the config of {folder}") from None


def _options_of(name: str, names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own options: a dict whose keys are models' names has one for each that it names."""
    own = {}
    for key, value in options.items():
        if isinstance(value, dict) and value and set(value) <= set(names):
            if name in value:
                own[key] = value[name]
        else:
            own[key] = value
    return own


def _with_adapter(model: nn.Module, folder: str) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(f"{folder}: is a PEFT adapter; pip install peft") from None
    return cast(nn.Module, PeftModel.from_pretrained(cast(Any, model), folder))


def _save_without_adapter(model: Any, folder: Path) -> None:
    """The weights of a module with PEFT layers in it, as they are with its adapters off."""
    from safetensors.torch import save_file

    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    with torch.device("meta"):
        wanted = set(type(model)(model.config).state_dict())
    for key, value in model.state_dict().items():
        key = key.replace(".base_layer.", ".").replace(".original_module.", ".")
        if key in wanted and value.data_ptr() not in seen:  # tied ones once
            seen.add(value.data_ptr())
            plain[key] = value.contiguous()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


AutoModelForCausalLM.register(EmulatedConfig, EmulatedModel)
