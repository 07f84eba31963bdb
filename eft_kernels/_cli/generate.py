"""`eft-kernels generate`: prompts in, text as if the base model had been fine-tuned out."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .models import first_line, load_family
from .options import REQUEST_OPTIONS, mode_settings
from .term import BOLD, Refused, paint


@dataclass
class Request:
    """One prompt and the settings of its own (a line of --batch-file may carry some)."""

    prompt: str
    where: str
    settings: dict = field(default_factory=dict)
    seed: int = 0
    inputs: list[int] = field(default_factory=list)  # token ids
    ids: list[int] = field(default_factory=list)  # generated token ids
    text: str = ""
    error: str | None = None


def read_text(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Refused(f"{option} {path}: cannot read it: {reason}") from None


def read_batch(path: str) -> list[Request]:
    """One request a line: a prompt as it is, or a JSON object with "prompt" and options of its own."""
    requests = []
    for number, line in enumerate(read_text(path, "--batch-file").splitlines(), 1):
        where = f"--batch-file {path}, line {number}"
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            requests.append(Request(line, where))
            continue
        try:
            given = json.loads(line)
        except ValueError as error:
            raise Refused(f"{where}: not JSON: {error}") from None
        prompt = given.pop("prompt", None)
        if not isinstance(prompt, str):
            raise Refused(f'{where}: expected "prompt" with a text')
        for name, value in given.items():
            if name not in REQUEST_OPTIONS:
                raise Refused(f"{where}: unknown option {name!r}; allowed are prompt, {', '.join(REQUEST_OPTIONS)}")
            try:
                if isinstance(value, (bool, str)):
                    raise ValueError(f"got {value!r}, allowed is a number")
                given[name] = REQUEST_OPTIONS[name](value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise Refused(f"{where}: {name}: {error}") from None
        requests.append(Request(prompt, where, given))
    if not requests:
        raise Refused(f"--batch-file {path}: holds no prompt")
    return requests


def read_requests(args) -> list[Request]:
    if args.prompt and args.batch_file:
        raise Refused("--prompt and --batch-file: pass one of them")
    if args.batch_file:
        requests = read_batch(args.batch_file)
    elif args.prompt:
        requests = [Request(p, f"--prompt {i}" if len(args.prompt) > 1 else "--prompt")
                    for i, p in enumerate(args.prompt, 1)]
    elif sys.stdin is None or sys.stdin.isatty():
        raise Refused("no prompt: pass --prompt, --batch-file or text on standard input")
    else:
        requests = [Request(sys.stdin.read().removesuffix("\n"), "standard input")]
    for r in requests:
        if not r.prompt.strip():
            raise Refused(f"{r.where}: the prompt is empty")
    return requests


def encode(requests: list[Request], tokenizer, chat: bool) -> None:
    if chat and not getattr(tokenizer, "chat_template", None):
        raise Refused("--chat: the tokenizer has no chat template")
    for r in requests:
        if chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": r.prompt}], tokenize=False,
                                                 add_generation_prompt=True)
            r.inputs = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        else:
            r.inputs = tokenizer(r.prompt, verbose=False).input_ids
        if not r.inputs:
            raise Refused(f"{r.where}: the tokenizer makes no token of it")


def batches(requests: list[Request], size: int):
    """At most ``size`` requests at a time, of one length limit; the shortest prompts together, to pad little."""
    order = sorted(requests, key=lambda r: (r.settings["max_new_tokens"], len(r.inputs)))
    while order:
        limit = order[0].settings["max_new_tokens"]
        batch = [r for r in order[:size] if r.settings["max_new_tokens"] == limit]
        del order[: len(batch)]
        yield batch


def run(args) -> int:
    requests = read_requests(args)
    mode = mode_settings(args)
    defaults = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "upscale_top_p",
                                                       "max_new_tokens")}
    for r in requests:
        own = {k: v for k, v in r.settings.items() if k != "seed"}
        for name in own.keys() & {"beta", "alpha", "lam"}:
            if name not in mode:
                raise Refused(f"{r.where}: {name} does not belong to mode {mode['mode']}")
        r.settings = {**defaults, **mode, **own}, r.settings.get("seed")
    stream = not args.json and len(requests) == 1 and (args.stream or sys.stdout.isatty())
    if args.stream and not stream:
        raise Refused("--stream: goes with one prompt and without --json")

    family = load_family(args)
    import eft_kernels as eft

    seed = args.seed if args.seed is not None else secrets.randbits(31)
    row_seeds = eft.row_seeds(seed, len(requests)).tolist()
    for i, r in enumerate(requests):
        r.settings, own = r.settings
        r.seed = row_seeds[i] if own is None else own
    encode(requests, family.tokenizer, args.chat)

    streamer = None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(family.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for batch in batches(requests, args.batch_size):
        decode(batch, family, args, streamer)
    report(requests, args, streamed=stream)
    for r in requests:
        if r.error:
            print(f"eft-kernels generate: {r.where}: {r.error}", file=sys.stderr)
    return 1 if any(r.error for r in requests) else 0


def decode(batch: list[Request], family, args, streamer=None) -> None:
    """Generates for requests of one length limit and fills in their ids, text and error."""
    import torch

    import eft_kernels as eft

    tokenizer, device = family.tokenizer, family.base.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    longest = max(len(r.inputs) for r in batch)
    ids = torch.tensor([[pad] * (longest - len(r.inputs)) + r.inputs for r in batch], device=device)
    mask = torch.tensor([[0] * (longest - len(r.inputs)) + [1] * len(r.inputs) for r in batch], device=device)
    settings = {}
    for name, first in batch[0].settings.items():  # a tensor [rows] only where the requests differ
        values = [r.settings[name] for r in batch]
        settings[name] = first if values.count(first) == len(values) else torch.tensor(values, device=device)
    greedy = args.greedy or (isinstance(settings["temperature"], float) and settings["temperature"] == 0)
    if greedy:  # transformers refuses sampling options that greedy decoding does not read
        settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
    try:
        out = family.base.generate(
            input_ids=ids, attention_mask=mask, custom_generate=eft.hf.generate,
            tuned=family.tuned if len(family.tuned) > 1 else family.tuned[0], ref=family.ref,
            draft_tokens=args.draft_tokens, verify=args.verify, vocab_size=family.vocab_size, do_sample=not greedy,
            seed=torch.tensor([r.seed for r in batch], dtype=torch.int64, device=device), pad_token_id=pad,
            streamer=streamer, **settings)
    except eft.hf.InvalidRowError as error:
        out, failed = error.output, error.failed
        for row, step in failed.items():
            batch[row].error = f"invalid scores (NaN, +inf or no token left) at step {step}; its text ends there"
    except ValueError as error:
        where = batch[0].where if len(batch) == 1 else f"{batch[0].where} and {len(batch) - 1} more"
        raise Refused(f"{where}: {first_line(error)}") from None
    else:
        failed = {}
    ends = family.base.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    for i, (r, row) in enumerate(zip(batch, out[:, longest:].tolist())):
        stop = failed.get(i, next((n + 1 for n, token in enumerate(row) if token in ends), len(row)))
        r.ids = row[:stop]
        r.text = tokenizer.decode(r.ids, skip_special_tokens=True)


def report(requests: list[Request], args, streamed: bool) -> None:
    for i, r in enumerate(requests):
        if args.json:
            row = dict(prompt=r.prompt, text=r.text, token_ids=r.ids, prompt_tokens=len(r.inputs), seed=r.seed)
            print(json.dumps({**row, **({"error": r.error} if r.error else {})}, ensure_ascii=False), flush=True)
        elif len(requests) > 1:
            print(("\n" if i else "") + paint(f"[{i + 1}] {r.prompt}", BOLD) + f"\n{r.text}", flush=True)
        elif not streamed:
            print(r.text, flush=True)
