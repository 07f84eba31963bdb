"""`eft-kernels generate`: prompts in, text as if the base model had been fine-tuned out."""

from __future__ import annotations

import argparse
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..combination import STRENGTHS
from ..parameters import DRAFTED, OFF
from .files import argument_text, check_text, read_stdin, read_text
from .models import Family, first_line, load_family, text_of, token_id
from .options import REQUEST_OPTIONS, mode_settings, option
from .term import BOLD, Refused, json_line, paint, table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from ..decoding import Speculation

SAMPLING = {p.name: p.off for p in DRAFTED}


@dataclass
class Request:
    """One prompt and the settings of its own (a line of --batch-file may carry some)."""

    prompt: str
    where: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None  # None: of the call's
    inputs: list[int] = field(default_factory=list)  # token ids
    ids: list[int] = field(default_factory=list)  # generated token ids
    text: str = ""
    error: str | None = None
    speculation: dict[str, float | None] = field(default_factory=dict)  # see `counts_of`
    done: bool = False


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("a name occurs twice")
    return given


def read_batch(path: str) -> list[Request]:
    """One request a line: a prompt as it is, or a JSON object with "prompt" and options of its own."""
    requests: list[Request] = []
    for number, line in enumerate(read_text(path, "--batch-file").split("\n"), 1):
        where, line = f"--batch-file {path}, line {number}", line.removeprefix("\ufeff")  # files joined by `cat`
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            requests.append(Request(line, where))
            continue
        try:
            given = json.loads(line, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
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


def read_requests(args: argparse.Namespace) -> list[Request]:
    if args.prompt and args.batch_file:
        raise Refused("--prompt and --batch-file: pass one of them")
    if args.batch_file:
        requests = [request for path in args.batch_file for request in read_batch(path)]
    elif args.prompt:
        names = [f"--prompt {i}" if len(args.prompt) > 1 else "--prompt" for i in range(1, len(args.prompt) + 1)]
        requests = [Request(argument_text(p, name), name) for p, name in zip(args.prompt, names)]
    elif sys.stdin is None or sys.stdin.isatty():
        raise Refused("no prompt: pass --prompt, --batch-file or text on standard input")
    else:
        requests = [Request(read_stdin().removesuffix("\n"), "standard input")]
    for r in requests:
        check_text(r.prompt, r.where)
        if not r.prompt.strip():
            raise Refused(f"{r.where}: the prompt is empty")
    return requests


def encode(requests: list[Request], tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    if chat and not getattr(tokenizer, "chat_template", None):
        raise Refused("--chat: the tokenizer has no chat template")
    for r in requests:
        if chat:
            try:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": r.prompt}], tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template may refuse what it likes, and needs jinja2
                raise Refused(f"--chat: the chat template fails: {first_line(error)}") from None
            r.inputs = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        else:
            r.inputs = tokenizer(r.prompt, verbose=False).input_ids
        if not r.inputs:
            raise Refused(f"{r.where}: the tokenizer makes no token of it")


def batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """At most ``size`` requests at a time, of one length limit; the shortest prompts together, to pad little."""
    order = sorted(requests, key=lambda r: (r.settings["max_new_tokens"], len(r.inputs)))
    while order:
        limit = order[0].settings["max_new_tokens"]
        batch = [r for r in order[:size] if r.settings["max_new_tokens"] == limit]
        del order[: len(batch)]
        yield batch


def run(args: argparse.Namespace) -> int:
    choose_models(args)
    requests = read_requests(args)
    mode = mode_settings(args)
    for name in ("verify", "draft_width", "draft_budget", "stats") if not args.draft_tokens else ():
        if value := getattr(args, name):
            raise Refused(f"{option(name)}{'' if value is True else f' {value}'}: goes with --draft-tokens")
    given = {name: value for name in OFF if (value := getattr(args, name)) is not None}
    for r, settings in [(None, given), *((r, r.settings) for r in requests)]:
        for name in SAMPLING if args.greedy else ():
            if settings.get(name) is not None and (name, settings[name]) != ("temperature", 0):
                raise Refused(f"{r.where + ': ' + name if r else option(name)}: goes without --greedy")
    defaults = {**OFF, **given, "max_new_tokens": args.max_new_tokens}
    for r in requests:
        own = {k: v for k, v in r.settings.items() if k != "seed"}
        for name in own.keys() & set(STRENGTHS):
            if name not in mode:
                raise Refused(f"{r.where}: {name} does not belong to mode {mode['mode']}")
        r.settings, r.seed = {**defaults, **mode, **own}, r.settings.get("seed")
    stream = not args.json and len(requests) == 1 and (args.stream or sys.stdout.isatty())
    if args.stream and not stream:
        raise Refused("--stream: goes with one prompt and without --json")

    from .. import row_seeds

    seed = args.seed if args.seed is not None else secrets.randbits(31)
    seeds = row_seeds(seed, len(requests)).tolist()
    for i, r in enumerate(requests):
        r.seed = seeds[i] if r.seed is None else r.seed
    seen: list[Speculation] = []
    if args.gguf:
        from . import gguf

        parts, decode_part = gguf.prepare(requests, args, stream, seen)
    else:
        parts, decode_part = prepare(requests, args, stream, seen)

    printed = 0
    try:
        for part in parts:
            decode_part(part)
            while printed < len(requests) and requests[printed].done:
                report(requests, printed, args, streamed=stream)
                printed += 1
    finally:  # also when it is interrupted: what is done is printed
        for i in range(printed, len(requests)):
            if requests[i].done:
                report(requests, i, args, streamed=stream)
    for r in requests:
        if r.error:
            print(f"eft-kernels generate: {r.where}: {r.error}", file=sys.stderr)
    if args.stats:
        print(told(seen, model_names(args)), file=sys.stderr)
    return 1 if any(r.error for r in requests) else 0


def choose_models(args: argparse.Namespace) -> None:
    """The models of --gguf or of --base, --tuned and --ref, and no option that belongs to the other kind."""
    folders = {"--base": args.base, "--tuned": args.tuned, "--ref": args.ref}
    theirs = {
        **folders,
        "--tokenizer": args.tokenizer,
        "--trust-remote-code": args.trust_remote_code,
        "--dtype": args.dtype != "auto",
        "--device": args.device != "auto",
        "--batch-size": args.batch_size,
    }
    if args.gguf:
        if len(args.gguf) not in (3, 4):
            raise Refused(f"--gguf: got {len(args.gguf)} files, allowed are 3 or 4: BASE TUNED [TUNED] REF")
        wrong = next((name for name, value in theirs.items() if value), None)
        if wrong:
            raise Refused(f"{wrong}: goes without --gguf")
        chain = {"--draft-tokens auto": args.draft_tokens == "auto"}
        chain |= {option(name): getattr(args, name) is not None for name in ("draft_width", "draft_budget")}
        wrong = next((name for name, value in chain.items() if value), None)
        if wrong:
            raise Refused(f"{wrong}: goes without --gguf; llama.cpp takes --draft-tokens K, a chain")
        args.base, *args.tuned, args.ref = args.gguf
        return
    missing = [name for name, value in folders.items() if not value]
    if missing:
        raise Refused(
            f"the following arguments are required: {', '.join(missing)} (or --gguf); see eft-kernels generate --help"
        )
    for name, value in (("--context", args.context), ("--gpu-layers", args.gpu_layers)):
        if value is not None:
            raise Refused(f"{name}: goes with --gguf")


Parts = tuple[Iterable[list[Request]], Callable[[list[Request]], None]]  # requests to decode at a time, and how


def prepare(requests: list[Request], args: argparse.Namespace, stream: bool, seen: list[Speculation]) -> Parts:
    """Loads the models, encodes the prompts and refuses what is too long, before anything is computed."""
    check_drafts(args)
    family = load_family(args)
    encode(requests, family.tokenizer, args.chat)
    check_lengths(requests, family.context)
    from ..integrations.hf import end_of_turn

    ends = {*family.ends, *(token_id(e, family.tokenizer, family.vocab_size) for e in args.eos)}
    family.ends = sorted(ends.union(end_of_turn(family.tokenizer) if args.chat else ()))
    streamer = until_end(family) if stream else None
    return batches(requests, args.batch_size or 8), lambda batch: decode(batch, family, args, seen, streamer)


def check_drafts(args: argparse.Namespace) -> None:
    """Refuses what `eft.hf.generate` would, in the words of the command line."""
    from ..integrations.hf.arguments import drafts_of

    try:
        drafts_of(args.draft_tokens, args.draft_width, args.draft_budget, args.verify or "coupled")
    except ValueError as error:
        words = re.sub(r"\b(draft_tokens|draft_width|draft_budget|verify)\b", lambda m: option(m[0]), str(error))
        raise Refused(words) from None


def check_lengths(requests: list[Request], context: int | None) -> None:
    for r in requests:
        new = r.settings["max_new_tokens"]
        if context and len(r.inputs) + new > context:
            raise Refused(
                f"{r.where}: the prompt has {len(r.inputs)} tokens and --max-new-tokens is {new}; allowed "
                f"are {context} together, the shortest context of the models"
            )


def until_end(family: Family) -> BaseStreamer:
    """Prints a text as it is written, without the token that ends it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or value.item() not in family.ends:
                TextStreamer.put(self, value)

    return Streamer(family.tokenizer, skip_prompt=True, skip_special_tokens=True)


def decode(
    batch: list[Request],
    family: Family,
    args: argparse.Namespace,
    seen: list[Speculation],
    streamer: BaseStreamer | None = None,
) -> None:
    """Generates for requests of one length limit and fills in their ids, text and error, and what was seen of
    speculation."""
    import torch

    from .. import hf

    tokenizer, device = family.tokenizer, family.base.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    longest, new = max(len(r.inputs) for r in batch), batch[0].settings["max_new_tokens"]
    ids = torch.tensor([[pad] * (longest - len(r.inputs)) + r.inputs for r in batch], device=device)
    mask = torch.tensor([[0] * (longest - len(r.inputs)) + [1] * len(r.inputs) for r in batch], device=device)
    settings: dict[str, Any] = {}
    for name, first in batch[0].settings.items():  # a tensor [rows] only where the requests differ
        values = [r.settings[name] for r in batch]
        settings[name] = first if values.count(first) == len(values) else torch.tensor(values, device=device)
    greedy = args.greedy or (isinstance(settings["temperature"], float) and settings["temperature"] == 0)
    if greedy:  # transformers refuses sampling options that greedy decoding does not read
        settings = {k: v for k, v in settings.items() if k not in SAMPLING}
    try:
        out = family.base.generate(
            input_ids=ids,
            attention_mask=mask,
            custom_generate=hf.generate,
            tuned=family.tuned if len(family.tuned) > 1 else family.tuned[0],
            ref=family.ref,
            draft_tokens=args.draft_tokens if args.draft_tokens == "auto" else min(args.draft_tokens, new),
            draft_width=args.draft_width,
            draft_budget=args.draft_budget,
            verify=args.verify or "coupled",
            vocab_size=family.vocab_size,
            do_sample=not greedy,
            seed=torch.tensor([r.seed for r in batch], dtype=torch.int64, device=device),
            pad_token_id=pad,
            eos_token_id=family.ends or None,
            streamer=streamer,
            return_dict_in_generate=True,
            **settings,
        )
    except hf.InvalidRowError as error:
        out, failed = error.output, error.failed
        for row, step in failed.items():
            batch[row].error = f"invalid scores (NaN, +inf or no token left) at step {step}; its text ends there"
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        where = batch[0].where if len(batch) == 1 else f"{batch[0].where} and {len(batch) - 1} more"
        raise Refused(f"{where}: {first_line(error)}") from None
    else:
        failed = {}
    if out.speculation is not None:
        seen.append(out.speculation)
    for i, (r, row) in enumerate(zip(batch, out.sequences[:, longest:].tolist())):
        stop = next((n for n, token in enumerate(row) if token in family.ends), len(row))
        r.ids = row[: failed.get(i, stop + 1)]
        r.text = text_of(r.ids[:stop], tokenizer)
        if out.speculation is not None:
            r.speculation = counts_of(out.speculation, i)
        r.done = True


def counts_of(speculation: Speculation, row: int) -> dict[str, float | None]:
    """What --json tells of a row's speculation."""
    counts = {name: int(getattr(speculation, name)[row]) for name in ("rounds", "drafted", "accepted")}
    rounds, drafted, accepted = counts.values()
    return {
        **counts,
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_round": int(speculation.emitted[row]) / max(1, rounds),
    }


def model_names(args: argparse.Namespace) -> list[str]:
    two = len(args.tuned) > 1
    return ["base", *([f"tuned {i}" for i in (1, 2)] if two else ["tuned"]), "ref"]


def told(seen: list[Speculation], names: list[str]) -> str:
    """What speculation did over all ``seen``, in tables for standard error."""
    if not seen:
        return "speculation: none, for a model cannot take drafts back; one token a step"
    rounds, drafted, accepted, emitted = (
        sum(int(getattr(s, name).sum()) for s in seen) for name in ("rounds", "drafted", "accepted", "emitted")
    )
    depth = max(len(s.ranks) for s in seen)  # they differ where max_new_tokens did
    ranks = [
        [sum(column) for column in zip(*(s.ranks[d].tolist() for s in seen if d < len(s.ranks)))] for d in range(depth)
    ]  # [K][1 + width]
    seconds = [sum(of_one) for of_one in zip(*(s.seconds for s in seen))]
    lines = [
        f"speculation: {emitted / max(1, rounds):.2f} tokens a round, {accepted} of {drafted} drafts accepted"
        + (f" ({accepted / drafted:.0%})" if drafted else "")
    ]
    if any(map(any, ranks)):
        runners_up = [f"runner-up {i}" for i in range(1, len(ranks[0]) - 1)]
        shares = [[f"{d}", f"{n}", *(f"{c / n:.0%}" for c in row)] for d, row in enumerate(ranks) if (n := sum(row))]
        lines.append(table(["accepted so far", "times", "then winner", *runners_up, "none"], shares, stream=sys.stderr))
    if whole := sum(seconds):
        times = [["seconds", *(f"{s:.3f}" for s in seconds)], ["share", *(f"{s / whole:.0%}" for s in seconds)]]
        lines.append(table(["time in", *names, "outside"], times, stream=sys.stderr))
    # of those that had a round without drafts: what its tokens would take in such rounds, and what they took
    known = [(s.speedup * sum(s.seconds), sum(s.seconds)) for s in seen if s.speedup is not None]
    plain, took = (sum(column) for column in zip(*known)) if known else (0.0, 0.0)
    speed = f"{plain / took:.2f} times measured" if took else "not measured, for no round was without drafts"
    if seen[-1].expected is not None:
        speed += f", {seen[-1].expected:.2f} expected of the drafts chosen last"
    return "\n".join([*lines, f"  speed over plain decoding: {speed}"])


def report(requests: list[Request], i: int, args: argparse.Namespace, streamed: bool) -> None:
    r = requests[i]
    if args.json:
        row = dict(prompt=r.prompt, text=r.text, token_ids=r.ids, prompt_tokens=len(r.inputs), seed=r.seed)
        print(json_line({**row, **r.speculation, **({"error": r.error} if r.error else {})}), flush=True)
    elif len(requests) > 1:
        print(("\n" if i else "") + paint(f"[{i + 1}] {r.prompt}", BOLD) + f"\n{r.text}", flush=True)
    elif not streamed:
        print(r.text, flush=True)
