"""`eft-kernels generate --gguf`: the models in llama.cpp, one prompt at a time."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .. import combination
from ..decoding import Speculation
from ..integrations.llama_cpp import EmulatedModel, InvalidScoresError
from .files import argument_text, expand
from .generate import Parts, Request, check_lengths, counts_of
from .models import first_line, set_threads
from .term import Refused


def prepare(requests: list[Request], args: argparse.Namespace, stream: bool, seen: list[Speculation]) -> Parts:
    """Loads the models, encodes the prompts and refuses what is too long, before anything is computed."""
    set_threads(args.threads)
    model = load(args)
    for r in requests:
        try:
            r.inputs = model.chat([{"role": "user", "content": r.prompt}]) if args.chat else model.tokenize(r.prompt)
        except ImportError as error:
            raise Refused(f"--chat: needs jinja2 ({error})") from None
        except ValueError as error:
            raise Refused(f"{'--chat' if args.chat else r.where}: {first_line(error)}") from None
        if not r.inputs:
            raise Refused(f"{r.where}: the tokenizer makes no token of it")
    check_lengths(requests, model.n_ctx)
    ends = [token_id(e, model) for e in args.eos]
    return ([r] for r in requests), lambda part: decode(part[0], model, ends, args, stream, seen)


def load(args: argparse.Namespace) -> EmulatedModel:
    base, *tuned, ref = (str(expand(path)) for path in args.gguf)
    given = {"n_ctx": args.context, "n_threads": args.threads, "gpu_layers": args.gpu_layers}
    try:
        return EmulatedModel(base, tuned, ref, vocab_size=args.vocab_size, **given)
    except (ImportError, ValueError) as error:
        raise Refused(f"--gguf: {first_line(error)}") from None


def token_id(given: str, model: EmulatedModel) -> int:
    """What --eos names: an id, a token as the vocabulary spells it, or a text that is one token."""
    given = argument_text(given, "--eos")
    spelled = given.encode("utf-8")
    if given.isdecimal() and len(given) < 19:
        found = int(given)
    elif spelled in model.tokenizer.texts:
        found = model.tokenizer.texts.index(spelled)
    else:
        ids = model.tokenize(given, special=False, parse=True)
        found = ids[0] if len(ids) == 1 else -1
    if not 0 <= found < model.vocab_size:
        raise Refused(
            f"--eos: got {given!r}, allowed is an id from 0 to {model.vocab_size - 1} or the text of one token"
        )
    return found


def decode(
    r: Request,
    model: EmulatedModel,
    ends: list[int],
    args: argparse.Namespace,
    stream: bool,
    seen: list[Speculation],
) -> None:
    """Writes the text of one request, on the terminal as well if it is streamed."""
    settings: dict[str, Any] = dict(r.settings)
    mode = settings.pop("mode")
    strengths = [settings.pop(name) for name in combination.STRENGTHS if name in settings]
    if args.greedy:
        settings["temperature"] = 0.0
    try:
        written = model.generate(
            r.inputs,
            weights=combination.MODES[mode].weights(*strengths),
            seed=r.seed,
            draft_tokens=args.draft_tokens,
            verify=args.verify or "coupled",
            eos=ends,
            on_text=show if stream else None,
            **settings,
        )
    except InvalidScoresError as error:
        written, r.error = error.written, str(error).replace("the text", "its text")
    except (ValueError, RuntimeError) as error:
        raise Refused(f"{r.where}: {first_line(error)}") from None
    if stream:
        print(flush=True)
    r.ids, r.text, r.done = written.ids, written.text, True
    if written.speculation is not None:
        r.speculation = counts_of(written.speculation, 0)
        seen.append(written.speculation)


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
