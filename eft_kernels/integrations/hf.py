"""Emulated fine-tuning inside transformers' ``generate``.

    base.generate(**inputs, custom_generate=eft.hf.generate, tuned=tuned, ref=ref, beta=1.0,
                  draft_tokens=4, verify="token", do_sample=True, temperature=0.8, max_new_tokens=64)

transformers prepares the prompt, the logits processors and the stopping criteria and then calls `generate` here. It
forwards only arguments that `generate` names or that the model's forward takes. Needs transformers >= 5.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import dataclass

import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import logits_process as lp

from ..decoding import Prompt, Speculation, Target, plain, speculative, take_columns
from ..ops import METHODS, row_seeds, sample
from ..weights import Weights, downscale, interpolate, proxy, upscale

# name: the strength it takes, and its weights for [model, tuned, ref] (interpolate: two tuned models)
MODES = {"upscale": ("beta", upscale), "proxy": ("alpha", proxy), "downscale": (None, downscale),
         "interpolate": ("lam", interpolate)}

# What models call their cache: transformers from 5.24 on, before it, and state-space models before it.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# Options of GenerationConfig that are honoured; every other one must be unset or at its default.
HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "watermarking_config", "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate",
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "disable_compile",
    "transformers_version",
})
NEUTRAL = {"use_cache": True, "cache_implementation": "dynamic", "guidance_scale": 1}

# Processors that count their calls or keep a state of their own: they cannot look at several slots of a round.
STATEFUL = (lp.SynthIDTextWatermarkLogitsProcessor, lp.UnbatchedClassifierFreeGuidanceLogitsProcessor)

# transformers' order of what it appends after the caller's processors, and the filters of ours among them
ORDER = (lp.TemperatureLogitsWarper, lp.TopHLogitsWarper, lp.TopKLogitsWarper, lp.TopPLogitsWarper,
         lp.MinPLogitsWarper, lp.TypicalLogitsWarper, lp.EpsilonLogitsWarper, lp.EtaLogitsWarper,
         lp.WatermarkLogitsProcessor, lp.SynthIDTextWatermarkLogitsProcessor, lp.LogitNormalization)
WARPERS = {lp.TemperatureLogitsWarper: "temperature", lp.TopKLogitsWarper: "top_k", lp.TopPLogitsWarper: "top_p",
           lp.MinPLogitsWarper: "min_p"}
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass
class EmulatedOutput(GenerateDecoderOnlyOutput):
    """transformers' output: ``sequences``; ``scores``: emulated scores after processors, temperature and filters;
    ``logits``: before them (a row's entries after its end are a point mass on padding, and 0). And:

    speculation: counts of rounds, drafted, accepted and emitted tokens per row (None in plain decoding).
    failed: {row: step} of rows that became invalid (``on_invalid="warn"``).
    """

    speculation: Speculation | None = None
    failed: dict[int, int] | None = None


class InvalidRowError(RuntimeError):
    """Rows became invalid: a model gave NaN or +inf, or no token was left. ``failed`` is {row: step}, step 0 the
    first new token; ``output`` is all that was generated, those rows padded from that step on."""

    def __init__(self, failed: dict[int, int], output):
        super().__init__(_invalid_message(failed))
        self.failed, self.output = failed, output


def _invalid_message(failed: dict[int, int]) -> str:
    where = ", ".join(f"row {b} at step {n}" for b, n in failed.items())
    return f"invalid scores (NaN, +inf or no token left): {where}; their text ends there, other rows are complete"


def generate(
    model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, *, tuned=None, ref=None,
    mode=None, beta=None, alpha=None, lam=None, upscale_top_p=1.0, temperature=None, top_k=None, top_p=None,
    min_p=None, draft_tokens=0, verify="coupled", draft=None, seed=None, vocab_size=None, tokenizers=None,
    on_invalid="raise", streamer=None, **model_kwargs,
):
    """Decodes as if ``model`` had been fine-tuned the way ``tuned`` was from ``ref`` (arXiv 2310.12962).

    Every strength and sampling parameter is a number or a tensor [rows], rows = batch * num_return_sequences.

    Args:
      tuned, ref: causal language models with the vocabulary of ``model``; ``tuned=[a, b]`` mixes two.
      mode: "upscale": beta (model - ref) + tuned; "proxy": model + alpha (tuned - ref); "downscale": the same sum for
        a small model and large tuned and ref; "interpolate": model + lam tuned_a + (1 - lam) tuned_b - ref.
        Default: "interpolate" for two tuned models, else "upscale".
      beta, alpha (default 1), lam (default 0.5): the mode's own strength; another mode's is refused.
      upscale_top_p: nucleus of the tuned model outside which its own probabilities stay (1 is off).
      temperature, top_k, top_p, min_p: as transformers' options of that name; a temperature of 0 is greedy. As there,
        do_sample=True without top_k takes the generation config's (50 by default).
      draft_tokens: K, drafted per round; 0 decodes one token a step.
      verify: "coupled": the tokens of plain decoding; "token", "block": the same distribution, more accepted.
      draft: which of [model, *tuned, ref] drafts; default tuned (the first of two), in downscale ``model``.
      seed: int (row 0 keeps it), tensor int64 [rows], or None: from torch's global generator.
      vocab_size: use ids below it only; needed where the models' logits differ in width.
      tokenizers: one per model of [model, *tuned, ref]: refused unless they agree; shows what a longer tail is.
      on_invalid: "raise" `InvalidRowError` at the end, or "warn" and return.
      streamer: as in transformers, for one row.
      model_kwargs: what transformers hands over (attention_mask, position_ids, its cache, which is not used).

    Processors and stopping criteria (options or the caller's) see each token with its own prefix, also under
    speculation; processors get the emulated scores, float32 [rows, V], drafts do not. temperature, top_k, top_p and
    min_p alone are the operation's own and never make scores [rows, V].

    Returns: int64 [rows, P + T], or `EmulatedOutput` with ``return_dict_in_generate``.
    Raises: ValueError naming the argument, before anything is computed; an option that cannot be honoured is refused.
    """
    outer = _outer_arguments()
    streamer = outer.get("streamer") if streamer is None else streamer
    config = generation_config if generation_config is not None else GenerationConfig()
    models, names, weights, default_draft = _combination(model, tuned, ref, mode, beta, alpha, lam)
    draft = default_draft if draft is None else draft

    _refuse_unless("verify", verify, verify in METHODS, f"one of {', '.join(METHODS)}")
    _refuse_unless("draft_tokens", draft_tokens, _is_int(draft_tokens) and draft_tokens >= 0, "an integer >= 0")
    _refuse_unless("draft", draft, _is_int(draft) and 0 <= draft < len(models), f"0 to {len(models) - 1}")
    _refuse_unless("on_invalid", on_invalid, on_invalid in ("raise", "warn"), "'raise' or 'warn'")
    _check_options(config, outer, model_kwargs)
    left, vocab_size = _check_inputs(models, names, input_ids, model_kwargs, vocab_size, tokenizers)
    rows, device = input_ids.shape[0], input_ids.device
    if streamer is not None and rows != 1:
        raise ValueError(f"streamer: got {rows} rows, allowed is one")

    named = {k: v for k, v in dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).items()
             if v is not None}
    if len(models) == 4:
        _refuse_unless("upscale_top_p", upscale_top_p, _is_number(upscale_top_p) and upscale_top_p == 1,
                       "1.0 with two tuned models")
    processors, filters = _sampling(logits_processor or [], config, named, outer.get("logits_processor"))
    if draft_tokens and (bad := [type(p).__name__ for p in processors if isinstance(p, STATEFUL)]):
        raise ValueError(f"logits_processor: {bad[0]} keeps a state of its own and needs draft_tokens=0")
    seeds = _seeds(seed, rows, device, greedy=_is_number(t := filters.get("temperature", 1.0)) and t < 1e-5)
    sample([torch.zeros(rows, 1, device=device)] * len(models), weights, upscale_top_p=upscale_top_p, seed=seeds,
           logprobs=False, check=True, **named)  # the operation's own checks of every value

    max_new_tokens, eos, criteria = _endings(stopping_criteria or [], input_ids.shape[1])
    _check_context(models, names, int((input_ids.shape[1] - left).max()), max_new_tokens)
    pad = getattr(config, "_pad_token_tensor", None)
    prompt = Prompt(input_ids, left, max_new_tokens, eos, 0 if pad is None else int(pad), criteria or None)
    verbose = bool(config.return_dict_in_generate)
    target = Target(weights, seeds, filters, upscale_top_p, vocab_size, processors or None,
                    keep_logits=bool(verbose and config.output_logits),
                    keep_scores=bool(verbose and config.output_scores))
    adapters = [CausalLM(m, name, rollback=draft_tokens > 0) for m, name in zip(models, names)]
    on_tokens = None
    if streamer is not None:
        def on_tokens(tokens, kept):
            for token in tokens[0, : kept[0]].cpu():
                streamer.put(token[None])

    if draft_tokens:
        done = speculative(adapters, target, prompt, draft=draft, draft_tokens=draft_tokens, method=verify,
                           on_tokens=on_tokens)
    else:
        done = plain(adapters, target, prompt, on_tokens=on_tokens)
    if streamer is not None:
        streamer.end()
    output = done.sequences
    if verbose:
        output = EmulatedOutput(sequences=output, scores=done.scores, logits=done.logits,
                                speculation=done.speculation, failed=done.failed or None)
    if done.failed and on_invalid == "raise":
        raise InvalidRowError(done.failed, output)
    if done.failed:
        warnings.warn(_invalid_message(done.failed), RuntimeWarning, stacklevel=2)
    return output


def cache_name(model) -> str:
    """What the model calls its cache, as an argument and in its output."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in takes), "past_key_values")


class CausalLM:
    """A transformers causal language model as `eft_kernels.decoding.Model`, with a cache of its own."""

    def __init__(self, model, name: str, rollback: bool):
        self.model, self.name, self.takes = model, name, inspect.signature(model.forward).parameters
        self.width, self.cache_name = logits_width(model), cache_name(model)
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if rollback:
            # a window's layer forgets what a rollback needs; a full layer is masked to the window by the model
            self.cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
                                 for layer in self.cache.layers]
            # a DummyLayer reads another layer's cache; early 5.x has none to import
            fixed = {type(layer).__name__ for layer in self.cache.layers} - {"DynamicLayer", "DummyLayer"}
            if fixed or getattr(model, "_is_stateful", False):
                raise ValueError(f"draft_tokens: {name} ({type(model).__name__}) cannot take back rejected tokens "
                                 f"({', '.join(sorted(fixed)) or 'it is stateful'}); use draft_tokens=0")

    def __call__(self, ids, attention_mask, position_ids, keep):
        options = dict(attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=keep)
        options = {k: v for k, v in options.items() if k in self.takes}
        options[self.cache_name] = self.cache
        logits = self.model(input_ids=ids, use_cache=True, return_dict=True, **options).logits
        if logits.shape[-1] != self.width:
            raise ValueError(f"{self.name}: gives logits of width {logits.shape[-1]}, announces {self.width}")
        return logits[:, -keep:]

    def _layers(self):
        return [layer for layer in self.cache.layers if layer.keys is not None]

    def crop(self, count):
        for layer in self._layers():
            layer.crop(-count)

    def realign(self, columns):
        for layer in self._layers():
            layer.keys, layer.values = take_columns(layer.keys, columns), take_columns(layer.values, columns)


# --- arguments -----------------------------------------------------------------------------------------------------

def _refuse_unless(name: str, got, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got!r}, allowed is {allowed}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _outer_arguments() -> dict:
    """The arguments of the transformers ``generate`` that called us.

    transformers drops streamer, assistant_model, synced_gpus and the negative prompt on the way to a callable; to
    ignore them silently would be worse than to look. Empty where `generate` is called directly.
    """
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, sys._getframe(2)
    for _ in range(4):  # a wrapper around our generate may lie between
        if frame is None or frame.f_code is code:
            break
        frame = frame.f_back
    return dict(frame.f_locals) if frame is not None and frame.f_code is code else {}


def _combination(model, tuned, ref, mode, beta, alpha, lam):
    """(models, their names, weights, index of the model that drafts)."""
    two = isinstance(tuned, (list, tuple))
    if tuned is None or (two and (len(tuned) != 2 or any(t is None for t in tuned))):
        raise ValueError(f"tuned: got {'None' if tuned is None else f'{len(tuned)} models'}, allowed is a model or "
                         "a list of two")
    if ref is None:
        raise ValueError("ref: got None, allowed is the model that tuned was fine-tuned from")
    mode = ("interpolate" if two else "upscale") if mode is None else mode
    _refuse_unless("mode", mode, mode in MODES, f"one of {', '.join(MODES)}")
    if two != (mode == "interpolate"):
        raise ValueError(f"tuned: got {2 if two else 1} model(s) with mode={mode!r}; two go with 'interpolate'")
    own, preset = MODES[mode]
    given = {k: v for k, v in dict(beta=beta, alpha=alpha, lam=lam).items() if v is not None}
    for name in given:
        if name != own:
            owner = next(m for m, (strength, _) in MODES.items() if strength == name)
            raise ValueError(f"{name}: goes with mode={owner!r}, got mode={mode!r}")
    weights: Weights = preset(*given.values())
    models = [model, *(tuned if two else [tuned]), ref]
    names = ["model", "tuned[0]", "tuned[1]", "ref"] if two else ["model", "tuned", "ref"]
    return models, names, weights, 0 if mode == "downscale" else 1


def _check_options(config, outer: dict, model_kwargs: dict) -> None:
    defaults = {**vars(GenerationConfig()), **GenerationConfig._get_default_generation_params()}
    for name, default in defaults.items():
        value = getattr(config, name, None)
        if name.startswith("_") or name in HONOURED or value is None or value == default:
            continue
        if (value is False and name != "use_cache") or value == NEUTRAL.get(name, default):
            continue
        allowed = f"give {name}={NEUTRAL[name]!r}" if name in NEUTRAL else "leave it unset"
        raise ValueError(f"{name}: got {value!r}, which emulated decoding cannot honour; {allowed}")
    for name in ("assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask"):
        if outer.get(name) is not None and outer[name] is not False:
            raise ValueError(f"{name}: emulated decoding cannot honour it; leave it unset")
    # what transformers itself hands over: the mask, positions and a cache, empty and not used
    for name, value in model_kwargs.items():
        prepared = name in ("attention_mask", "position_ids", "use_cache") or (name == "logits_to_keep" and value == 1)
        if name in CACHE_NAMES:
            prepared = not getattr(value, "_is_user_defined", False)
        if not prepared and value is not None and value is not False:
            raise ValueError(f"{name}: emulated decoding cannot honour it for three models; leave it out")


def _check_inputs(models, names, input_ids, model_kwargs, vocab_size, tokenizers):
    """(columns of left padding [B], V)."""
    for m, name in zip(models, names):
        if not isinstance(m, GenerationMixin) or not hasattr(m, "config"):
            raise ValueError(f"{name}: got {type(m).__name__}, allowed is a transformers causal language model")
        if m.config.is_encoder_decoder:
            raise ValueError(f"{name}: got {type(m).__name__}, an encoder-decoder model; allowed are decoders")
        if not m._supports_default_dynamic_cache():
            raise ValueError(f"{name}: got {type(m).__name__}, whose cache is its own kind; allowed are DynamicCache's")
        if m.device != models[0].device:
            raise ValueError(f"{name}: is on {m.device}, model is on {models[0].device}; move them together")
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids: got {input_ids.dtype} {list(input_ids.shape)}, allowed is int64 [rows, columns]")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids: got {list(input_ids.shape)}, allowed is at least one row and one token")
    if input_ids.device != models[0].device:
        raise ValueError(f"input_ids: is on {input_ids.device}, the models on {models[0].device}; move it there")

    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: got {list(mask.shape)}, allowed is {list(input_ids.shape)}, as input_ids")
    real = mask != 0
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention_mask: allowed are zeros before a prompt (left padding), not after or inside it, "
                         "and at least one token per row")
    left = (~real).sum(1)
    positions = model_kwargs.get("position_ids")
    usual = (torch.arange(input_ids.shape[1], device=left.device) - left[:, None]).clamp(min=0)
    if positions is not None and (positions.shape[-1:] != usual.shape[1:] or bool((positions != usual).any())):
        raise ValueError("position_ids: allowed are those of the attention mask; leave it unset")

    widths = {name: logits_width(m) for m, name in zip(models, names)}
    shortest = min(widths.values())
    if vocab_size is not None:
        _refuse_unless("vocab_size", vocab_size, _is_int(vocab_size) and 0 < vocab_size <= shortest, f"1 to {shortest}")
    if tokenizers is not None:
        check_tokenizers(tokenizers, names, shortest if vocab_size is None else vocab_size, vocab_size is None)
    elif vocab_size is None and len(set(widths.values())) > 1:
        raise ValueError("vocab_size: the models' vocabularies differ in length (" +
                         ", ".join(f"{name} {w}" for name, w in widths.items()) +
                         f"); give vocab_size={shortest} if ids below it mean the same, or tokenizers=[...]")
    if int(input_ids.masked_fill(~real, 0).max()) >= shortest or int(input_ids.masked_fill(~real, 0).min()) < 0:
        raise ValueError(f"input_ids: got an id outside 0 to {shortest - 1}, the shortest model's vocabulary")
    return left, shortest if vocab_size is None else vocab_size


def logits_width(model) -> int:
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or model.config.get_text_config(decoder=True).vocab_size


def check_tokenizers(tokenizers, names, vocab_size: int, tails: bool) -> None:
    """ids below vocab_size mean the same in all; with ``tails``, ids from there on are padding at most."""
    if not isinstance(tokenizers, (list, tuple)) or len(tokenizers) != len(names):
        raise ValueError(f"tokenizers: allowed is a list of {len(names)}: {', '.join(names)}")
    vocabularies = [t.get_vocab() for t in tokenizers]
    shared = [{token: i for token, i in v.items() if i < vocab_size} for v in vocabularies]
    for name, tokenizer, vocabulary, own in zip(names, tokenizers, vocabularies, shared):
        if own != shared[0]:
            token = min(t for t, _ in own.items() ^ shared[0].items())
            raise ValueError(f"tokenizers: {token!r} is {own.get(token)} for {name} and {shared[0].get(token)} for "
                             f"{names[0]}; allowed are models that share their ids")
        tail = {t for t, i in vocabulary.items() if i >= vocab_size} - {tokenizer.pad_token}
        if tails and tail:
            raise ValueError(f"tokenizers: {name} has tokens from id {vocab_size} on ({min(tail)!r}), which another "
                             "model's logits lack; give vocab_size to leave them out")


def _check_context(models, names, prompt: int, max_new_tokens: int) -> None:
    for m, name in zip(models, names):
        limit = getattr(m.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < prompt + max_new_tokens:
            raise ValueError(f"input_ids: got {prompt} tokens and max_new_tokens={max_new_tokens}, allowed are "
                             f"{limit} together, the context of {name}")


def _seeds(seed, rows: int, device, greedy: bool) -> torch.Tensor:
    if isinstance(seed, torch.Tensor):
        if seed.shape != (rows,) or seed.is_floating_point() or seed.dtype == torch.bool:
            raise ValueError(f"seed: got {seed.dtype} {list(seed.shape)}, allowed is an int or int64 [{rows}]")
        return seed.to(device, torch.int64)
    if seed is None:
        seed = 0 if greedy else int(torch.randint(1 << 62, ()))
    _refuse_unless("seed", seed, _is_int(seed), f"an int, a tensor int64 [{rows}] or None")
    return row_seeds(seed, rows, device)


def _endings(stopping_criteria, prompt_length: int):
    """(max_new_tokens, end-of-text ids, the other criteria)."""
    limits, eos, others = [], [], StoppingCriteriaList()
    for criterion in stopping_criteria:
        if type(criterion) is MaxLengthCriteria:
            limits.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos += criterion.eos_token_id.reshape(-1).tolist()
        else:
            others.append(criterion)
    if not limits:
        raise ValueError("max_new_tokens: got None, allowed is a length to stop at")
    return max(1, min(limits) - prompt_length), eos, others


# --- processors and filters ----------------------------------------------------------------------------------------

class _Filter:
    """A named sampling parameter, number or tensor [rows], in its place among transformers' processors."""

    def __init__(self, name: str, value):
        self.name, self.value = name, value

    def __call__(self, input_ids, scores):
        return Target(Weights([1.0]), None, {self.name: self.value}).filtered(scores)


def _kind(processor) -> type | None:
    """The transformers class whose place a processor takes."""
    if isinstance(processor, _Filter):
        return next(k for k, name in WARPERS.items() if name == processor.name)
    return type(processor)


def _value(processor):
    """(name, value) of a filter that the operation can apply itself, else None."""
    if isinstance(processor, _Filter):
        return processor.name, processor.value
    name = WARPERS.get(type(processor))
    usual = dict(min_tokens_to_keep=1, filter_value=-torch.inf)
    if name is None or any(getattr(processor, k, v) != v for k, v in usual.items()):
        return None
    return name, getattr(processor, name)


def _sampling(processors, config, named: dict, callers) -> tuple[LogitsProcessorList, dict]:
    """(processors to apply to the scores in PyTorch, filters for the operation), in transformers' order.

    named: our own sampling arguments, which replace the warpers that transformers made from its config. callers: the
    processors that the caller gave. Only filters at the end of the list, in the operation's order, go to it.
    """
    processors = list(processors)
    if not config.do_sample:
        for name, value in named.items():
            neutral = _is_number(value) and (value == OFF[name] or (name == "temperature" and value == 0))
            _refuse_unless(name, value, neutral, "only with do_sample=True")
        return LogitsProcessorList(processors), {"temperature": 0.0}
    own = {id(p) for p in callers or ()}
    for name, value in named.items():
        kind = next(k for k, n in WARPERS.items() if n == name)
        old = [i for i, p in enumerate(processors) if type(p) is kind and id(p) not in own]
        if old:
            del processors[old[-1]]
        at = len(processors)
        while at and id(processors[at - 1]) not in own and _kind(processors[at - 1]) in ORDER and \
                ORDER.index(_kind(processors[at - 1])) > ORDER.index(kind):
            at -= 1
        processors.insert(at, _Filter(name, value))
    filters, order = {}, list(WARPERS.values())
    while processors and (found := _value(processors[-1])) is not None:
        name, value = found
        if filters and order.index(name) >= min(order.index(n) for n in filters):
            break
        filters[name] = value
        processors.pop()
    return LogitsProcessorList(processors), filters
