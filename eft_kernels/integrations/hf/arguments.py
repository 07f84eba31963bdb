"""What `generate` is given: the combination, options, inputs and endings, checked before anything is computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ...arguments import scalar_or_rows
from ...checks import from_host, index
from ...combination import MODE_OF, MODES, AnyWeights, Weights
from ...decoding import Auto, Drafts, Value
from ...decoding.drafts import MAX_DRAFTS
from ...decoding.trees import size
from ...ops import PerRow, row_seeds
from ...parameters import MAX_MODELS, MAX_RUNNERS_UP
from .frames import Call
from .models import CACHE_NAMES, GenerativeModel, Off, device_of, layers_of, logits_width, unwrapped

AUTO_WIDTH = 4  # of the trees of draft_tokens="auto"
Models = list[nn.Module] | tuple[nn.Module, ...]  # of transformers, or a PeftModel over one
# the prompt of one model: ids [n, columns], or a dict with an attention_mask, too; None: the prompt of all
OwnIds = torch.Tensor | Mapping[str, torch.Tensor] | None
T = TypeVar("T")

# Options of GenerationConfig that are honoured; every other one must be unset or at its default.
HONOURED = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "watermarking_config",
        "num_return_sequences",
        "prefill_chunk_size",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "disable_compile",
        "transformers_version",
    }
)
# Left in a checkpoint's generation config these mean nothing here: its cache is not used, there are no beams and no
# assistant. What the caller gives is refused all the same.
LEFTOVERS = frozenset(
    {
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "length_penalty",
        "early_stopping",
        "num_beam_groups",
        "diversity_penalty",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "max_matching_ngram_size",
    }
)
NEUTRAL: dict[str, object] = {"use_cache": True, "cache_implementation": "dynamic", "guidance_scale": 1}


def refuse_unless(name: str, got: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got!r}, allowed is {allowed}")


def on_device(name: str, value: T, device: torch.device) -> T | torch.Tensor:
    """A list or an array as a tensor on ``device``, a tensor there; anything else as it is."""
    found: T | torch.Tensor = from_host(name, value, device)
    return found.to(device) if isinstance(found, torch.Tensor) else found


def per_row(name: str, value: PerRow, rows: int, device: torch.device) -> Value:
    """A sampling parameter or seed, checked: a number, or a tensor [rows] on ``device``."""
    value = value.to(device) if isinstance(value, torch.Tensor) else value
    checked: Value = scalar_or_rows(name, value, rows, device, check=True)
    return checked


def seeds_of(seed: PerRow, rows: int, device: torch.device, greedy: bool) -> torch.Tensor:
    """int64 [rows]; None: from torch's global generator."""
    if seed is None:
        seed = 0 if greedy else int(torch.randint(1 << 62, ()))
    checked = per_row("seed", seed, rows, device)
    return checked if isinstance(checked, torch.Tensor) else row_seeds(int(checked), rows, device)


def drafts_of(draft_tokens: object, draft_width: object, draft_budget: object, verify: str) -> Drafts:
    """The drafts of each round; of none where draft_tokens is 0."""
    auto = draft_tokens == "auto"
    depth = 0 if auto else index("draft_tokens", draft_tokens, 0, MAX_DRAFTS, f'0 to {MAX_DRAFTS} or "auto"')
    trees = verify == "coupled" and (auto or depth > 0)
    given = (AUTO_WIDTH if auto and trees else 1) if draft_width is None else draft_width
    width = index("draft_width", given, 1, MAX_RUNNERS_UP + 1, f"1 to {MAX_RUNNERS_UP + 1}")
    refuse_unless("draft_width", width, width == 1 or auto or depth > 0, "1 without draft_tokens")
    refuse_unless("draft_width", width, width == 1 or trees, f"1 with verify={verify!r}")
    budget: int | None = None
    if draft_budget is not None:
        if not auto and width == 1:
            raise ValueError(
                f"draft_budget: got {draft_budget!r}; goes with draft_width above 1 or draft_tokens='auto'"
            )
        allowed = f"{max(depth, 1)} to {MAX_DRAFTS}" + ("" if auto else ", draft_tokens or more")
        budget = index("draft_budget", draft_budget, max(depth, 1), MAX_DRAFTS, allowed)
    if auto:
        return Auto(width=width, **({} if budget is None else {"budget": budget}))
    if budget is None and width > 1 and size(depth, width, MAX_DRAFTS) > MAX_DRAFTS:
        raise ValueError(
            f"draft_width: got {width} with draft_tokens={depth}, more drafts a round than the allowed {MAX_DRAFTS}; "
            "give draft_budget"
        )
    return Drafts(depth, width, budget)


# --- models and weights ----------------------------------------------------------------------------------------------


class Combination(NamedTuple):
    """J models and what they are combined by."""

    models: list[nn.Module | Off]
    names: list[str]  # what errors call them
    weights: Weights
    draft: int  # the model that drafts unless the call says otherwise


def combination_of(
    model: nn.Module,
    tuned: nn.Module | Models | None,
    ref: nn.Module | Off | None,
    mode: str | None,
    beta: PerRow,
    alpha: PerRow,
    lam: PerRow,
) -> Combination:
    two = isinstance(tuned, (list, tuple))
    several = [t for t in (tuned if isinstance(tuned, (list, tuple)) else [tuned]) if t is not None]
    if len(several) != (2 if two else 1) or (isinstance(tuned, (list, tuple)) and len(tuned) != 2):
        got = f"{len(tuned)} models" if isinstance(tuned, (list, tuple)) else "None"
        raise ValueError(f"tuned: got {got}, allowed is a model or a list of two")
    if ref is None:
        if two or not layers_of(unwrapped(several[0], "tuned")):
            raise ValueError(
                "ref: got None, allowed is the model that tuned was fine-tuned from"
                + ("" if two else ", or None where tuned is a model with an adapter (PEFT)")
            )
        ref = Off(several[0])  # the same weights, held once
    mode = ("interpolate" if two else "upscale") if mode is None else mode
    refuse_unless("mode", mode, mode in MODES, f"one of {', '.join(MODES)}")
    if two != (mode == "interpolate"):
        raise ValueError(f"tuned: got {2 if two else 1} model(s) with mode={mode!r}; two go with 'interpolate'")
    given = {k: v for k, v in dict(beta=beta, alpha=alpha, lam=lam).items() if v is not None}
    for name in given:
        if MODE_OF[name] != mode:
            raise ValueError(f"{name}: goes with mode={MODE_OF[name]!r}, got mode={mode!r}")
    names = ["model", "tuned[0]", "tuned[1]", "ref"] if two else ["model", "tuned", "ref"]
    return Combination(
        [model, *several, ref], names, MODES[mode].weights(*given.values()), 0 if mode == "downscale" else 1
    )


def free_combination_of(
    model: nn.Module,
    models: Models | None,
    weights: AnyWeights | None,
    given: Mapping[str, object],
) -> Combination:
    """As `combination_of`, for any number of models with weights of their own: model drafts."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: goes with tuned and ref, got weights, too; give one of the two")
    models = [] if models is None else models
    if not isinstance(models, (list, tuple)) or len(models) >= MAX_MODELS or any(m is None for m in models):
        got = f"{len(models)} models" if isinstance(models, (list, tuple)) else type(models).__name__
        raise ValueError(f"models: got {got}, allowed is a list of up to {MAX_MODELS - 1} beside model")
    if weights is None:
        raise ValueError(f"weights: got None, allowed are {1 + len(models)} numbers, for model and each of models")
    device = device_of(model)
    if isinstance(weights, Weights):
        combined = weights if weights.tensor is None else Weights(weights.tensor.to(device))
    elif isinstance(weights, (list, tuple)):
        combined = Weights([on_device("weights", w, device) for w in weights])
    else:
        combined = Weights(on_device("weights", weights, device))
    if len(combined) != 1 + len(models):
        raise ValueError(f"weights: got {len(combined)} for {1 + len(models)} models, model and models")
    return Combination([model, *models], ["model", *(f"models[{j}]" for j in range(len(models)))], combined, 0)


# --- options ---------------------------------------------------------------------------------------------------------


def check_options(
    config: GenerationConfig, call: Call | None, model_kwargs: Mapping[str, Any], sees: bool = False
) -> None:
    """Refuses what cannot be honoured; ``sees``: the model is one for images, too, and its prompt is text.

    call: of transformers' generate; None: it was not called, so that every option is the caller's.
    """
    arguments, options = (call.arguments, call.options) if call else ({}, {})
    defaults = {**vars(GenerationConfig()), **GenerationConfig._get_default_generation_params()}
    for name, default in defaults.items():
        value = getattr(config, name, None)
        if name.startswith("_") or name in HONOURED or value is None or value == default:
            continue
        if name in LEFTOVERS and call and name not in call.given:
            continue
        if (value is False and name != "use_cache") or value == NEUTRAL.get(name, default):
            continue
        allowed = f"give {name}={NEUTRAL[name]!r}" if name in NEUTRAL else "leave it unset"
        raise ValueError(f"{name}: got {value!r}, which emulated decoding cannot honour; {allowed}")
    for name in ("assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask"):
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(f"{name}: emulated decoding cannot honour it; leave it unset")
    # pixels that transformers encoded are told by the name that they were given by
    encoded = {k: v for k, v in (model_kwargs.get("mm_encoder_outputs") or {}).items() if v is not None}
    for name in options if encoded else ():
        if name.startswith(("pixel_values", "image", "video")):
            raise ValueError(f"{name}: emulated decoding reads text alone; leave it out")
    # what transformers itself hands over: the mask, positions and a cache, empty and not used
    for name, value in model_kwargs.items():
        prepared = name in ("attention_mask", "position_ids", "use_cache") or (name == "logits_to_keep" and value == 1)
        if name == "mm_encoder_outputs":
            prepared = not encoded
        if name in ("token_type_ids", "mm_token_type_ids"):  # 0 is text; without images that is what None is, too
            prepared = sees and isinstance(value, torch.Tensor) and not bool(value.any())
        if name in CACHE_NAMES:
            prepared = not getattr(value, "_is_user_defined", False) and options.get(name) is None
        if not prepared and value is not None and value is not False:
            if call is None and hasattr(config, name):
                raise ValueError(
                    f"{name}: is an option of transformers' generate; call "
                    "model.generate(..., custom_generate=eft.hf.generate)"
                )
            raise ValueError(f"{name}: emulated decoding does not support it; leave it out")


# --- inputs ----------------------------------------------------------------------------------------------------------


def own_prompts(
    prompts: Sequence[OwnIds] | Mapping[str, OwnIds] | None,
    names: Sequence[str],
    rows: int,
    device: torch.device,
    vocab_size: int,
    pad: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(ids int64 [rows, P] with 0 on padding, left int64 [rows]) or None, for model (None) and each of the others.

    prompts: one for each of the others, or those that differ by the model's name.
    """
    if prompts is None:
        return [None] * len(names)
    if isinstance(prompts, Mapping):
        if unknown := [name for name in prompts if name not in names[1:]]:
            raise ValueError(f"prompts: got the key {unknown[0]!r}, allowed are {', '.join(names[1:])}")
        prompts = [prompts.get(name) for name in names[1:]]
    if not isinstance(prompts, (list, tuple)) or len(prompts) != len(names) - 1:
        got = len(prompts) if isinstance(prompts, (list, tuple)) else type(prompts).__name__
        raise ValueError(
            f"prompts: got {got}, allowed is a list of {len(names) - 1}, one for each of {', '.join(names[1:])} (None: "
            f"the prompt of {names[0]}), or a dict by these names"
        )
    out: list[tuple[torch.Tensor, torch.Tensor] | None] = [None]
    for j, given in enumerate(prompts):
        name = f"prompts[{j}]"
        if given is None:
            out.append(None)
            continue
        held = given if isinstance(given, Mapping) else {"input_ids": given}
        ids, mask = held.get("input_ids"), held.get("attention_mask")
        if (
            not isinstance(ids, torch.Tensor)
            or ids.dim() != 2
            or ids.is_floating_point()
            or ids.dtype == torch.bool
            or ids.numel() == 0
            or rows % ids.shape[0]
        ):
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(
                f"{name}: got {got}, allowed is int64 [n, columns] where {rows} rows are a multiple of n, "
                "or a dict of input_ids and attention_mask"
            )
        if mask is None and pad is not None and bool((ids[:, 0] == int(pad)).any()):
            raise ValueError(
                f"{name}: begins with the padding id {int(pad)} and has no attention_mask; give "
                "dict(input_ids=..., attention_mask=...)"
            )
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        left = left_padding(mask.to(device), ids.shape, f"{name}: attention_mask")
        ids = ids.to(device, torch.int64)
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=device) < left[:, None], 0)
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"{name}: got an id outside 0 to {vocab_size - 1}, the vocabulary")
        times = rows // ids.shape[0]
        out.append((ids.repeat_interleave(times, 0), left.repeat_interleave(times, 0)))
    return out


def left_padding(mask: torch.Tensor, shape: Sequence[int], name: str) -> torch.Tensor:
    """Columns of padding before each row's prompt [B], by its mask."""
    if mask.shape != shape:
        raise ValueError(f"{name}: got {list(mask.shape)}, allowed is {list(shape)}, as input_ids")
    real = mask != 0
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(
            f"{name}: allowed are zeros before a prompt (left padding), not after or inside it, "
            "and at least one token per row"
        )
    return (~real).sum(1)


def check_models(models: Sequence[GenerativeModel], names: Sequence[str]) -> None:
    for m, name in zip(models, names):
        if m.config.is_encoder_decoder:
            raise ValueError(f"{name}: got {type(m).__name__}, an encoder-decoder model; allowed are decoders")
        if m.device.type == "meta" and not hasattr(m, "_hf_hook"):
            raise ValueError(f"{name}: is on meta, where weights have no values; load it on a device")


def shared_vocabulary(
    models: Sequence[GenerativeModel],
    names: Sequence[str],
    vocab_size: int | None,
    tokenizers: Sequence[PreTrainedTokenizerBase] | None,
) -> tuple[int, int]:
    """(how many ids are used, how many the shortest model has); ValueError unless they mean the same in all."""
    widths = {name: logits_width(m) for m, name in zip(models, names)}
    shortest = min(widths.values())
    if vocab_size is not None:
        vocab_size = index("vocab_size", vocab_size, 1, shortest, f"1 to {shortest}")
    if tokenizers is not None:
        check_tokenizers(tokenizers, names, shortest if vocab_size is None else vocab_size, vocab_size is None)
    elif vocab_size is None and len(set(widths.values())) > 1:
        raise ValueError(
            "vocab_size: the models' vocabularies differ in length ("
            + ", ".join(f"{name} {w}" for name, w in widths.items())
            + f"); give vocab_size={shortest} if ids below it mean the same, or tokenizers=[...]"
        )
    return shortest if vocab_size is None else vocab_size, shortest


def check_inputs(
    models: Sequence[GenerativeModel],
    names: Sequence[str],
    input_ids: torch.Tensor,
    model_kwargs: Mapping[str, Any],
    vocab_size: int | None,
    tokenizers: Sequence[PreTrainedTokenizerBase] | None,
) -> tuple[torch.Tensor, int]:
    """(columns of left padding [B], V)."""
    check_models(models, names)
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: got {input_ids.dtype} {list(input_ids.shape)}, allowed is int64 [rows, columns]")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids: got {list(input_ids.shape)}, allowed is at least one row and one token")

    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    left = left_padding(mask.to(input_ids.device), input_ids.shape, "attention_mask")
    real = torch.arange(input_ids.shape[1], device=left.device) >= left[:, None]
    positions = model_kwargs.get("position_ids")
    usual = (torch.arange(input_ids.shape[1], device=left.device) - left[:, None]).clamp(min=0)
    positions = positions if positions is None else positions.to(input_ids.device)
    if positions is not None and (positions.shape[-1:] != usual.shape[1:] or bool(((positions != usual) & real).any())):
        raise ValueError("position_ids: allowed are those of the attention mask; leave it unset")

    vocab_size, shortest = shared_vocabulary(models, names, vocab_size, tokenizers)
    if int(input_ids.masked_fill(~real, 0).max()) >= shortest or int(input_ids.masked_fill(~real, 0).min()) < 0:
        raise ValueError(f"input_ids: got an id outside 0 to {shortest - 1}, the shortest model's vocabulary")
    return left, vocab_size


def check_tokenizers(
    tokenizers: Sequence[PreTrainedTokenizerBase], names: Sequence[str], vocab_size: int, tails: bool
) -> None:
    """ids below vocab_size mean the same in all; with ``tails``, ids from there on are padding at most.

    A token that was added to one tokenizer (a chat model's) may be missing in another, or have the place of another
    added token there (a reserved one): the models' logits cover its id, whatever it is called.
    """
    if not isinstance(tokenizers, (list, tuple)) or len(tokenizers) != len(names):
        raise ValueError(f"tokenizers: allowed is a list of {len(names)}: {', '.join(names)}")
    vocabularies = [t.get_vocab() for t in tokenizers]
    shared = [{token: i for token, i in v.items() if i < vocab_size} for v in vocabularies]
    added = [set(t.get_added_vocab()) if hasattr(t, "get_added_vocab") else set() for t in tokenizers]
    for a, b in itertools.combinations(range(len(names)), 2):
        differing = {token for token, _ in shared[a].items() ^ shared[b].items()}
        own = {shared[x][token] for x in (a, b) for token in differing if token in shared[x] and token not in added[x]}
        for token in sorted(differing):
            places = [shared[x].get(token) for x in (b, a)]
            if None not in places or own.intersection(places):
                raise ValueError(
                    f"tokenizers: {token!r} is {places[0]} for {names[b]} and {places[1]} for "
                    f"{names[a]}; allowed are models that share their ids"
                )
    for name, tokenizer, vocabulary in zip(names, tokenizers, vocabularies):
        tail = {t for t, i in vocabulary.items() if i >= vocab_size} - {tokenizer.pad_token}
        if tails and tail:
            raise ValueError(
                f"tokenizers: {name} has tokens from id {vocab_size} on ({min(tail)!r}), which another "
                "model's logits lack; give vocab_size to leave them out"
            )


def check_context(
    models: Sequence[GenerativeModel], names: Sequence[str], prompts: Sequence[int], max_new_tokens: int
) -> None:
    for m, name, prompt in zip(models, names, prompts):
        limit = getattr(m.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < prompt + max_new_tokens:
            raise ValueError(
                f"input_ids: got {prompt} tokens and max_new_tokens={max_new_tokens}, allowed are "
                f"{limit} together, the context of {name}"
            )


# --- the end of a text -----------------------------------------------------------------------------------------------


def end_tokens(models: Iterable[GenerativeModel]) -> list[int]:
    """Ids that end a text for any of the models, by their generation configs, ascending.

    A chat model ends its turn with a token that the model it was trained from may never use.
    """
    ends: set[int] = set()
    for model in models:
        own = getattr(model.generation_config, "eos_token_id", None)
        ends |= {own} if isinstance(own, int) else set(own or ())
    return sorted(ends)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template puts behind an answer, if it does."""
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template may refuse what it likes
        return []
    after: list[int] = tokenizer(text.rpartition(answer)[2].strip(), add_special_tokens=False).input_ids[:1]
    return after if set(after) & {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} else []


def stop_strings_of(
    models: Sequence[GenerativeModel],
    names: Sequence[str],
    given: str | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[str]:
    """Texts that end a row: ``given`` (a text, a list or None) or, where the call gives none, those of the generation
    configs of ``models``, beside the model that transformers looked at itself."""
    if given is not None:
        return [given] if isinstance(given, str) else list(given)
    found: list[str] = []
    for model, name in zip(models, names):
        own = getattr(model.generation_config, "stop_strings", None) or []
        own = [own] if isinstance(own, str) else list(own)
        if own and not tokenizer:
            raise ValueError(
                f"stop_strings: {name}'s generation config ends texts with {own}; give tokenizer=..., or "
                "stop_strings=[] to go without"
            )
        found += own
    return found


def endings_of(
    stopping_criteria: Iterable[StoppingCriteria], prompt_length: int
) -> tuple[int, list[int], StoppingCriteriaList]:
    """(max_new_tokens, end-of-text ids, the other criteria)."""
    limits: list[int] = []
    eos: list[int] = []
    others = StoppingCriteriaList()
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
