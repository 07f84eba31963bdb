"""`eft-kernels score`: perplexity of a text under base, tuned, ref and the emulated model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..parameters import OFF, PARAMETERS
from .files import read_text
from .models import first_line, load_family, load_model, load_tokenizer, shared_vocabulary
from .options import mode_settings
from .term import BOLD, Progress, Refused, json_line, paint, table

if TYPE_CHECKING:
    from ..combination import Weights
    from ..integrations.hf.models import GenerativeModel

Window = tuple[list[int], int]  # a row of ids, and the first of them whose prediction is counted
# names of the models, their weights, parameters of the combination
Emulation = tuple[Sequence[str], "Weights | Sequence[float]", Mapping[str, Any]]


@dataclass
class Score:
    tokens: int
    nats: float  # per token

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.nan if math.isnan(self.nats) else math.inf


def windows(ids: list[int], bos: int | None, context: int, stride: int) -> list[Window]:
    """``(row, first)`` pairs: a model reads ``row[:-1]`` and its predictions of ``row[first:]`` are counted.

    Every window holds ``context`` tokens of the text (fewer only when the text is shorter) behind ``bos`` if there
    is one, and counts those that no earlier window counted; each of these sees at least ``context - stride`` tokens.
    Without ``bos`` nothing predicts a window's first token: the text's first is not counted, ``context`` is at least 2.
    """
    head = [] if bos is None else [bos]
    stride = min(stride, context - 1 + len(head))
    out: list[Window] = []
    counted = 0
    while counted < len(ids):
        end = min(len(ids), counted + (stride if counted else context))
        begin = max(0, end - context)
        first = max(1, len(head) + counted - begin)
        out.append((head + ids[begin:end], first))
        counted = end
    return out


def combination(mode: Mapping[str, Any]) -> Weights:
    from .. import downscale, interpolate, proxy, upscale

    if mode["mode"] == "upscale":
        return upscale(mode["beta"])
    if mode["mode"] == "proxy":
        return proxy(mode["alpha"])
    return downscale() if mode["mode"] == "downscale" else interpolate(mode["lam"])


def score(
    models: Mapping[str, GenerativeModel],
    rows: list[Window],
    emulations: Mapping[str, Emulation],
    vocab_size: int | None = None,
    label: str = "scoring",
) -> dict[str, Score]:
    """Scores on windows, of each model and of each emulation ``name: (its models' names, weights, parameters)``."""
    import torch

    from .. import token_logprobs

    vocab = vocab_size or min(m.config.get_text_config().vocab_size for m in models.values())
    plans: dict[str, Emulation] = {**{name: ([name], [1.0], {}) for name in models}, **emulations}
    total, tokens = dict.fromkeys(plans, 0.0), 0
    at_once = max(1, min(16, (1 << 26) // (len(rows[0][0]) * vocab)))  # logits of a batch stay below ~256 MB a model
    groups: list[list[Window]] = []
    batch: list[Window] = []
    for row in rows:  # equal lengths together
        if batch and (len(batch) == at_once or len(row[0]) != len(batch[0][0])):
            groups.append(batch)
            batch = []
        batch.append(row)
    groups.append(batch)
    with torch.inference_mode(), Progress(label, len(groups) * len(models)) as progress:
        for batch in groups:
            device = next(iter(models.values())).device
            ids = torch.tensor([row for row, _ in batch], device=device)  # [n, T]
            target = ids[:, 1:].reshape(-1)  # [n * (T - 1)]
            counted = torch.tensor([[i >= first for i in range(1, len(row))] for row, first in batch], device=device)
            logits = {}
            for name, model in models.items():
                logits[name] = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)  # [n * (T - 1), V]
                progress.step()
            for name, (parts, weights, settings) in plans.items():
                lp = token_logprobs([logits[p] for p in parts], weights, target, vocab_size=vocab, **settings)
                total[name] -= lp.double()[counted.reshape(-1)].sum().item()
            tokens += int(counted.sum())
    return {name: Score(tokens, nats / tokens) for name, nats in total.items()}


def recovered(base: float, emulated: float, truth: float) -> float | None:
    """Share of the loss that true fine-tuning of the base model saves which emulation saves as well."""
    return (base - emulated) / (base - truth) if base > truth and math.isfinite(base - emulated) else None


def run(args: argparse.Namespace) -> int:
    texts = {path: read_text(path, "--text") for path in args.text}  # a file given twice counts once
    for path, text in texts.items():
        if not text.strip():
            raise Refused(f"--text {path}: the file is empty")
    mode = mode_settings(args)
    family = load_family(args)
    limit = family.context or 1024
    context = min(1024, limit) if args.context is None else args.context
    if context > limit:
        raise Refused(f"--context: got {context}, allowed is up to {limit}, the shortest context of the models")
    stride = max(1, context // 2) if args.stride is None else args.stride
    if stride > context:
        raise Refused(f"--stride: got {stride}, allowed is up to the context, {context}")

    tokenizer = family.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a").input_ids[:1] != [bos]:
        bos = None
    if context + (bos is not None) < 2:
        raise Refused(f"--context: got {context}, allowed is 2 and more (the tokenizer has no start token)")
    rows = {}
    for path, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < 2:
            raise Refused(f"--text {path}: too short: {len(ids)} token(s), at least 2 are needed")
        rows[path] = windows(ids, bos, context, stride)
    names = ["base", *(["tuned"] if len(family.tuned) == 1 else ["tuned 1", "tuned 2"]), "ref"]
    models = dict(zip(names, family.models))
    combining = {
        p.name: p.off if (x := getattr(args, p.name)) is None else x for p in PARAMETERS if p.stage == "combine"
    }
    emulations: dict[str, Emulation] = {"emulated": (names, combination(mode), combining)}
    if args.truth:
        models["truth"] = load_model(args.truth, "--truth", args.dtype, family.base.device, args.trust_remote_code)
        known = [tokenizer, load_tokenizer(args.truth, "--truth", args.trust_remote_code)]
        shared_vocabulary(
            ["the tokenizer", "--truth " + args.truth], [family.base, models["truth"]], known, family.vocab_size
        )

    settings = {k: v for k, v in mode.items() if k != "mode"} | combining
    told = ", ".join(f"{k} {v:g}" for k, v in settings.items() if OFF.get(k) != v)
    invalid = []
    for path in texts:
        try:
            scores = score(models, rows[path], emulations, family.vocab_size)
        except ValueError as error:
            raise Refused(f"--text {path}: {first_line(error)}") from None
        invalid += [(path, n) for n, s in scores.items() if math.isnan(s.nats)]
        share = recovered(*(scores[n].nats for n in ("base", "emulated", "truth"))) if args.truth else None
        if args.json:
            numbers = {
                n: {
                    k: v if v is None or math.isfinite(v) else None
                    for k, v in dict(tokens=s.tokens, nats_per_token=s.nats, perplexity=s.perplexity).items()
                }
                for n, s in scores.items()
            }
            print(
                json_line(
                    dict(
                        text=path,
                        context=context,
                        stride=stride,
                        bos=bos is not None,
                        mode=mode["mode"],
                        **settings,
                        scores=numbers,
                        **({"recovered": share} if args.truth else {}),
                    )
                ),
                flush=True,
            )
            continue
        best = min((n for n in scores if n != "truth"), key=lambda n: scores[n].nats)
        if len(texts) > 1:
            print(("\n" if path != args.text[0] else "") + paint(path, BOLD))
        print(
            table(
                ["model", "tokens", "nats/token", "perplexity"],
                [
                    ["base, fine-tuned" if n == "truth" else n, f"{s.tokens}", f"{s.nats:.4f}", f"{s.perplexity:.3f}"]
                    for n, s in scores.items()
                ],
                best=list(scores).index(best),
            )
        )
        print(
            f"  {mode['mode']}{' ' + told if told else ''}; windows of {context} tokens, stride {stride}"
            f"{', each behind the start token' if bos is not None else ', the first token not counted'}",
            flush=True,
        )
        if args.truth:
            print(
                "  gap recovered: "
                + (
                    f"{share:.0%} of (base -> fine-tuned base)"
                    if share is not None
                    else "none (the fine-tuned base model is no better than the base model here)"
                ),
                flush=True,
            )
    for path, name in invalid:
        print(f"eft-kernels score: --text {path}: {name}: invalid scores (NaN, +inf or no token left)", file=sys.stderr)
    return 1 if invalid else 0
