"""Options that several commands share, and the numbers they allow (the same words as the Python functions use)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from ..combination import MODE_OF, MODES, STRENGTHS
from ..parameters import PARAMETERS, Parameter
from .term import Refused


class Once(argparse._StoreAction):
    """An option whose earlier value nobody should lose by giving it again."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: given twice")
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """Bad input is one line (`Refused`); ``action="once"`` refuses an option that is given twice."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("action", "once", Once)

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}; see {self.prog} --help", self.prog)


Convert = Callable[[Any], Any]  # an argparse type: of a text, or a number of JSON


def number(kind: type[int] | type[float], allowed: Callable[[Any], bool], words: str) -> Convert:
    """``kind`` of a text or number if ``allowed``, else a line with what is given and allowed."""

    def convert(text: Any) -> int | float:
        try:
            value = kind(text)
            whole = kind is float or isinstance(text, str) or value == text
            good = whole and not isinstance(text, bool) and allowed(value)
        except (ValueError, TypeError, OverflowError):
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is {words}")
        return value

    return convert


positive = number(int, lambda v: v > 0, "an integer > 0")
count = number(int, lambda v: v >= 0, "an integer >= 0")
count_or_auto = number(int, lambda v: v >= 0, "an integer >= 0 or auto")
finite = number(float, math.isfinite, "a finite number")
share = number(float, lambda v: 0 < v <= 1, "a number in (0, 1]")


def drafts(text: str) -> int | str:
    """The type of --draft-tokens."""
    return text if text == "auto" else int(count_or_auto(text))


def sampling_option(p: Parameter) -> Convert:
    """The type of a sampling parameter's option."""
    return number(p.type, lambda v: p.low <= v <= p.high, p.allowed)


# What a line of --batch-file may set for its own request.
REQUEST_OPTIONS: dict[str, Convert] = {
    **{p.name: sampling_option(p) for p in PARAMETERS},
    **dict.fromkeys(STRENGTHS, finite),
    "seed": number(int, lambda v: -(1 << 63) <= v < 1 << 63, "a 64-bit integer"),
    "max_new_tokens": positive,
}


def add_models(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_argument_group("models (folders or hub ids)")
    group.add_argument(
        "--base", required=required, action="once", metavar="MODEL", help="the large model that was not fine-tuned"
    )
    group.add_argument(
        "--tuned",
        required=required,
        metavar="MODEL",
        action="append",
        help="the small fine-tuned model; give it twice to mix two behaviours (see --lam)",
    )
    group.add_argument(
        "--ref", required=required, action="once", metavar="MODEL", help="the small model before fine-tuning"
    )
    group.add_argument(
        "--tokenizer",
        action="once",
        metavar="MODEL",
        help="whose tokenizer and chat template to use (default: the tuned model's)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a model (default: refuse such a model)",
    )
    group.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="the first N ids that the models share, where their vocabularies differ in length",
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="load the weights as this (default: as they were saved)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def add_combination(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the models are combined")
    group.add_argument(
        "--mode",
        choices=[name for name in MODES if name != "interpolate"],
        default=None,
        help="upscale (default): beta (base - ref) + tuned; proxy: base + alpha (tuned - ref); "
        "downscale: small base + large tuned - large ref",
    )
    doc = dict(
        beta="strength of the large model's knowledge",
        alpha="strength of the fine-tuning",
        lam="share of the first of two --tuned models",
    )
    for name, default in STRENGTHS.items():
        group.add_argument(option(name), type=finite, help=f"{doc[name]} ({MODE_OF[name]}; default {default:g})")
    add_parameters(group, (p for p in PARAMETERS if p.stage == "combine"))


def add_parameters(group: argparse._ArgumentGroup, parameters: Iterable[Parameter]) -> None:
    for p in parameters:
        group.add_argument(
            option(p.name),
            type=REQUEST_OPTIONS[p.name],
            metavar="X",
            help=f"{p.doc} (default {p.off:g})".replace("%", "%%"),
        )


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def mode_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The combination as keyword arguments of `eft.hf.generate`; an option of another mode is refused."""
    if len(args.tuned) > 2:
        raise Refused(f"--tuned: got {len(args.tuned)} models, allowed are one or two")
    mixed = len(args.tuned) == 2
    if mixed and args.mode:
        raise Refused("--mode: two --tuned models are interpolated; leave --mode out")
    mode = "interpolate" if mixed else args.mode or "upscale"
    for name, its_mode in MODE_OF.items():
        if getattr(args, name) is not None and its_mode != mode:
            needs = "two --tuned models" if name == "lam" else f"--mode {its_mode} and one --tuned model"
            raise Refused(f"--{name}: goes with {needs}")
    strength = MODES[mode].strength
    if strength is None:
        return {"mode": mode}
    given = getattr(args, strength)
    return {"mode": mode, strength: STRENGTHS[strength] if given is None else given}
