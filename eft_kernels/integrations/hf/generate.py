"""Emulated fine-tuning inside transformers' ``generate``.

    base.generate(**inputs, custom_generate=eft.hf.generate, tuned=tuned, ref=ref, beta=1.0,
                  draft_tokens=4, verify="token", do_sample=True, temperature=0.8, max_new_tokens=64)

transformers prepares the prompt, the logits processors and the stopping criteria and then calls `generate` here. It
forwards only arguments that `generate` names or that the model's forward takes; frames.py finds the others. Needs
transformers >= 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...checks import index, one_of
from ...combination import AnyWeights
from ...decoding import (
    Auto,
    Model,
    OnTokens,
    OwnPrompt,
    Prompt,
    Proposer,
    Speculation,
    Target,
    lookup,
    plain,
    speculative,
)
from ...ops import PerRow, sample
from ...parameters import GREEDY, METHODS, OFF, PARAMETERS
from .arguments import (
    OwnIds,
    check_context,
    check_inputs,
    check_options,
    combination_of,
    drafts_of,
    end_tokens,
    endings_of,
    free_combination_of,
    on_device,
    own_prompts,
    per_row,
    refuse_unless,
    seeds_of,
    stop_strings_of,
)
from .frames import current_call, meant_model
from .models import (
    CausalLM,
    check_boundaries,
    check_distinct,
    check_trees,
    device_of,
    logits_width,
    remembered,
    resolved,
)
from .processing import RowProcessors, hold_back, may_keep_a_state, sampling_of


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

    def __init__(self, failed: dict[int, int], output: torch.Tensor | EmulatedOutput):
        super().__init__(invalid_message(failed))
        self.failed, self.output = failed, output

    def __reduce__(self) -> tuple[Any, ...]:
        # an exception is made anew from its message alone, and a pool that waits for it hangs
        return type(self), (self.failed, self.output)


def invalid_message(failed: dict[int, int]) -> str:
    where = ", ".join(f"row {b} at step {n}" for b, n in failed.items())
    return f"invalid scores (NaN, +inf or no token left): {where}; their text ends there, other rows are complete"


def streaming(streamer: BaseStreamer) -> OnTokens:
    """Gives the new tokens of the one row to ``streamer``."""

    def on_tokens(tokens: torch.Tensor, kept: list[int]) -> None:
        for token in tokens[0, : kept[0]].cpu():
            streamer.put(token[None])

    return on_tokens


def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tuned: nn.Module | list[nn.Module] | tuple[nn.Module, ...] | None = None,
    ref: nn.Module | None = None,
    models: list[nn.Module] | tuple[nn.Module, ...] | None = None,
    weights: AnyWeights | None = None,
    prompts: Sequence[OwnIds] | Mapping[str, OwnIds] | None = None,
    mode: str | None = None,
    beta: PerRow = None,
    alpha: PerRow = None,
    lam: PerRow = None,
    # parameters: arguments of hf
    temperature: PerRow = None,
    top_k: PerRow = None,
    top_p: PerRow = None,
    min_p: PerRow = None,
    typical_p: PerRow = None,
    upscale_top_p: PerRow = 1.0,
    # parameters: end
    draft_tokens: int | str = 0,
    draft_width: int | None = None,
    draft_budget: int | None = None,
    verify: str = "coupled",
    draft: int | str | Proposer | None = None,
    seed: PerRow = None,
    vocab_size: int | None = None,
    tokenizers: Sequence[PreTrainedTokenizerBase] | None = None,
    on_invalid: str = "raise",
    streamer: BaseStreamer | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | EmulatedOutput:
    """Decodes as if ``model`` had been fine-tuned the way ``tuned`` was from ``ref`` (arXiv 2310.12962).

    Every strength and sampling parameter is a number or a tensor [rows], rows = batch * num_return_sequences.

    Args:
      tuned, ref: causal language models with the vocabulary of ``model``; ``tuned=[a, b]`` mixes two. With an adapter
        of PEFT in ``tuned`` (the active one counts), ref=None or its base module is the same weights with it off.
        Its layers are switched for each pass; calls from several threads wait for each other there, PEFT's own
        forward in another thread does not.
      models, weights: instead of tuned, ref and mode, any combination: up to 7 models beside ``model`` (which may be
        among them, with a prompt of its own), and a weight for each of [model, *models]. Contrastive decoding is
        ``models=[amateur], weights=[1 + a, -a]``.
      prompts: one for each of [*tuned, ref] or of ``models``: ids [n, columns], or a dict of input_ids and
        attention_mask (left padding), n dividing rows; None is the prompt of ``model``. Or a dict of those that differ,
        by the names "tuned" ("tuned[0]", "tuned[1]"), "ref", "models[0]". All go on with the same new tokens.
        Classifier-free guidance (arXiv 2306.17806) is ``models=[model], weights=[1 + g, -g], prompts=[negative]``.
      mode: "upscale": beta (model - ref) + tuned; "proxy": model + alpha (tuned - ref); "downscale": the same sum for
        a small model and large tuned and ref; "interpolate": model + lam tuned_a + (1 - lam) tuned_b - ref.
        Default: "interpolate" for two tuned models, else "upscale".
      beta, alpha (default 1), lam (default 0.5): the mode's own strength; another mode's is refused.
      The sampling parameters as in `eft_kernels.sample`. Those that are options of transformers, too, mean the same
        there: without do_sample=True decoding is greedy, and so is a temperature of 0; with it, one that is not given
        is the generation config's (top_k=50 by default).
      draft_tokens: K, drafted after each other in a round; 0 decodes one token a step. "auto": the number and tree that
        should give the most tokens a second, by measured times and acceptance, and none where a model or processor
        cannot take drafts back. The tokens of "coupled" stay the same.
      draft_width: of a tree of drafts, K levels deep, how many children a node has: the winner of the drafting model's
        draw and the next runners-up. 1 (the default but for "auto") is a chain. With verify="coupled" and models that
        take a 4D mask alone.
      draft_budget: the most drafts a round, K or more (so that a chain of K fits): of the tree those that are likeliest
        to be accepted, by what was accepted so far.
      verify: "coupled": the tokens of plain decoding where the logits are equal: float32 (a pass over K + 1 tokens
        rounds bfloat16 in another order than one over 1); "token", "block": the same distribution, more accepted, for
        draft_tokens > 0 alone.
      draft: which of [model, *tuned, ref] or [model, *models] drafts; default tuned (the first of two), in downscale
        and with ``models`` ``model``. "lookup": no model, but what followed the last time that the text had its newest
        three tokens, or two, or one. Or a function (texts, k) -> int64 [rows, k], -1 from where a row has no draft;
        texts: rows tensors int64 [n] on the CPU. A chain, no tree.
      seed: int (row 0 keeps it), tensor int64 [rows], or None: from torch's global generator.
      vocab_size: use ids below it only; needed where the models' logits differ in width.
      tokenizers: one per model of [model, *tuned, ref]: refused unless they agree; shows what a longer tail is.
      on_invalid: "raise" `InvalidRowError` at the end, or "warn" and return.
      streamer: as in transformers, for one row.
      stop_strings, tokenizer: as in transformers; ``tokenizers[0]`` serves where no tokenizer is given.
      model_kwargs: what transformers hands over (attention_mask, position_ids, its cache, which is not used).

    A row ends after any model's end token, by the models' generation configs (and ``tokenizers``): a chat model ends
    its turn with a token that its base may never use. ``eos_token_id`` in the call replaces them all.

    Processors and stopping criteria (options or the caller's) see each token with its own prefix, also under
    speculation; processors get the emulated scores, float32 [rows, V], drafts do not. The sampling parameters alone are
    the operation's own and never make scores [rows, V]. Under speculation a processor is a function of (input_ids,
    scores). xgrammar's own follows each row's drafts and back; another that keeps a state is refused where that shows,
    unless it declares ``stateless = True`` (the result depends on the arguments alone) or has
    ``process_rows(rows, input_ids, scores) -> scores``: the indices of n rows, their whole prefixes int64 [n, P + m],
    of which the last tokens may differ from the call before, and scores [n, V]. draft_tokens=0 takes all as they are.

    Returns: int64 [rows, P + T], or `EmulatedOutput` with ``return_dict_in_generate``.
    Raises: ValueError naming the argument, before anything is computed; unsupported options raise it, too.
    """
    call = current_call()
    arguments, options = (call.arguments, call.options) if call else ({}, {})
    device = device_of(model)
    # parameters: dict
    sampling = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        upscale_top_p=upscale_top_p,
    )
    # parameters: end
    strengths = {name: on_device(name, x, device) for name, x in dict(beta=beta, alpha=alpha, lam=lam).items()}
    streamer = arguments.get("streamer") if streamer is None else streamer
    config = generation_config if generation_config is not None else GenerationConfig()
    free = weights is not None or models is not None
    if free:
        unused = dict(tuned=tuned, ref=ref, mode=mode, **strengths)
        combination = free_combination_of(meant_model(model), models, weights, unused)
    else:
        combination = combination_of(meant_model(model), tuned, ref, mode, **strengths)
    names = combination.names
    terms, contexts, off = resolved(combination.models, names)  # J models
    base = terms[0]
    home, input_ids = input_ids.device, input_ids.to(device)

    one_of("verify", verify, METHODS)
    shape = drafts_of(draft_tokens, draft_width, draft_budget, verify)
    auto, speculate = isinstance(shape, Auto), shape.depth > 0
    if not speculate:
        refuse_unless("verify", verify, verify == "coupled", "'coupled' without draft_tokens")
        refuse_unless("draft", draft, draft is None, "None without draft_tokens")
    by: int | Proposer
    if draft == "lookup" or callable(draft):
        by = draft if callable(draft) else lookup()
        refuse_unless("draft_width", draft_width, draft_width in (None, 1), "1 where no model drafts")
        shape.width = 1
    else:
        allowed = f'0 to {len(terms) - 1}, "lookup" or a function'
        by = index("draft", combination.draft if draft is None else draft, 0, len(terms) - 1, allowed)
    one_of("on_invalid", on_invalid, ("raise", "warn"))
    check_options(config, call, model_kwargs, sees=base.config.get_text_config(decoder=True) is not base.config)
    left, vocab_size = check_inputs(terms, names, input_ids, model_kwargs, vocab_size, tokenizers)
    input_ids = input_ids.long()
    rows = input_ids.shape[0]
    if streamer is not None and rows != 1:
        raise ValueError(f"streamer: got {rows} rows, allowed is one")

    named = {name: per_row(name, x, rows, device) for name, x in sampling.items() if x is not None}
    combining = {p.name: named.pop(p.name, p.off) for p in PARAMETERS if p.stage == "combine"}
    for name, x in combining.items() if free or len(terms) == 4 else ():
        refuse_unless(
            name, x, not isinstance(x, torch.Tensor) and x == OFF[name], f"{OFF[name]} with weights or two tuned models"
        )
    pad: torch.Tensor | None = getattr(config, "_pad_token_tensor", None)
    own = own_prompts(prompts, names, rows, device, vocab_size, pad)
    if free:
        check_distinct(terms, off, own, names)
    tokenizer = tokenizer or options.get("tokenizer") or (tokenizers[0] if tokenizers else None)
    stops = stop_strings_of(terms[1:], names[1:], stop_strings, tokenizer)
    stopping: list[StoppingCriteria] = list(stopping_criteria or [])
    if stops:
        if tokenizer is None:
            raise ValueError(
                "stop_strings: needs a tokenizer; give tokenizer=... or tokenizers=[...], or put a "
                "StopStringCriteria among stopping_criteria"
            )
        stopping.append(StopStringCriteria(tokenizer, stops))
    max_new_tokens, eos, criteria = endings_of(stopping, input_ids.shape[1])
    chosen = "eos_token_id" in options or config.eos_token_id != base.generation_config.eos_token_id
    if not chosen:
        others = [getattr(t, "eos_token_id", None) for t in tokenizers or ()]
        ends = {*eos, *end_tokens(terms), *(i for i in others if i is not None)}
        if ends != set(eos):
            eos = sorted(ends)
            logits_processor = hold_back(logits_processor or [], config, eos, input_ids.shape[1], device)
    processors, filters = sampling_of(logits_processor or [], config, named, arguments.get("logits_processor"))
    speculate = speculate and not (auto and any(map(may_keep_a_state, processors)))
    process = RowProcessors(processors, rows, speculating=speculate) if processors else None
    temperature = filters.get("temperature", 1.0)
    greedy = not isinstance(temperature, torch.Tensor) and temperature < GREEDY
    seeds = seeds_of(seed, rows, device, greedy=greedy)
    nothing = torch.zeros(rows, 1, dtype=torch.float32, device=device)
    sample(
        [nothing] * len(terms), combination.weights, seed=seeds, position=0, logprobs=False, check=True
    )  # checks the weights

    lengths = [int((ids.shape[1] - pads).max()) for ids, pads in (p or (input_ids, left) for p in own)]
    check_context(terms, names, lengths, max_new_tokens)
    filler = int(pad) if pad is not None else eos[0] if eos else 0
    known = min(map(logits_width, terms))
    prompt = Prompt(input_ids, left, max_new_tokens, eos, filler, known, criteria or None)
    verbose = bool(config.return_dict_in_generate)
    target = Target(
        combination.weights,
        seeds,
        filters,
        combining,
        vocab_size,
        process,
        keep_logits=bool(verbose and config.output_logits),
        keep_scores=bool(verbose and config.output_scores),
    )
    longest = max(lengths) + max_new_tokens
    chunk: int | None = getattr(config, "prefill_chunk_size", None)
    if chunk is not None:
        chunk = index("prefill_chunk_size", chunk, 1, 1 << 40, "an integer above 0")
    causal: list[CausalLM] = []
    try:
        for m, name, context in zip(terms, names, contexts) if speculate else ():
            causal.append(CausalLM(m, name, rollback=True, context=context, longest=longest, chunk=chunk))
        check_boundaries(causal, rows, longest)
    except ValueError:
        if not auto:
            raise
        speculate = False  # a model that cannot go back writes one token a step
    if not speculate:
        causal = [
            CausalLM(m, name, rollback=False, context=c, longest=longest, chunk=chunk)
            for m, name, c in zip(terms, names, contexts)
        ]
    elif auto and draft_width is None and any(m.no_trees for m in causal):
        shape.width = 1
    check_trees(causal, shape.width if speculate else 1)
    shared = input_ids.shape[1] - int(left.min())
    decoders: list[Model] = [
        m if p is None else OwnPrompt(m, shared, *p, max_new_tokens=max_new_tokens) for m, p in zip(causal, own)
    ]

    on_tokens = None if streamer is None else streaming(streamer)
    if speculate:
        with remembered(causal, shape, rows, "function" if callable(draft) else draft, verify) as drafts:
            done = speculative(decoders, target, prompt, draft=by, drafts=drafts, method=verify, on_tokens=on_tokens)
    else:
        done = plain(decoders, target, prompt, on_tokens=on_tokens)
    if streamer is not None:
        streamer.end()
    output: torch.Tensor | EmulatedOutput = done.sequences.to(home)
    if verbose:
        # transformers annotates tuples of any length as those of one
        records: dict[str, Any] = dict(sequences=output, scores=done.scores, logits=done.logits)
        output = EmulatedOutput(**records, speculation=done.speculation, failed=done.failed or None)
    if done.failed and on_invalid == "raise":
        raise InvalidRowError(done.failed, output)
    if done.failed:
        warnings.warn(invalid_message(done.failed), RuntimeWarning, stacklevel=2)
    return output
