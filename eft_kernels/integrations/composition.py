"""A composed folder: one config that names base, tuned and ref, and how they are combined.

DIR/config.json              base's, with the architecture EftForCausalLM and the combination under "eft"
DIR/generation_config.json   special tokens, with the end tokens of all models
DIR/modeling_eft.py          the class for ``AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)``
DIR/base, DIR/tuned, DIR/ref the models' folders, or links to them

`eft-kernels compose` and `EmulatedModel.save_pretrained` write it; `EmulatedModel.from_pretrained` and serving engines
read it, all by what is here.
"""

from __future__ import annotations

import copy
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..combination import MODE_OF, MODES, STRENGTHS
from ..parameters import PER_ROW

ARCHITECTURE = "EftForCausalLM"
ADAPTER = "adapter_config.json"  # what makes a folder a PEFT adapter
SHARED_LENGTH = "max_position_embeddings"
MODULE = "modeling_eft"
CODE = f'''"""For AutoModelForCausalLM.from_pretrained(this folder, trust_remote_code=True); needs eft-kernels."""

from eft_kernels.integrations.hf import EmulatedModel as {ARCHITECTURE}
'''
SETTINGS = (*STRENGTHS, "upscale_top_p")


def part_names(tuned: int) -> tuple[str, ...]:
    """The models' names, and those of their folders, for one or two tuned ones."""
    return ("base", *(("tuned",) if tuned == 1 else ("tuned_a", "tuned_b")), "ref")


@dataclass(frozen=True)
class Strength:
    """How one request combines the models: a weight for each, and the up-scaling filter's mass."""

    weights: tuple[float, ...]
    upscale_top_p: float = 1.0


@dataclass(frozen=True)
class Composition:
    """The models of one emulation, [base, tuned, ref] or [base, tuned_a, tuned_b, ref], and their default combination.

    ``folders`` are local folders or hub ids; ``base_within`` says that base's is below the model's own folder.
    ``settings`` is the combination as keyword arguments of `eft.hf.generate`.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    base_within: str | None
    mode: str
    default: Strength
    settings: dict[str, Any]

    @classmethod
    def parse(cls, spec: object, folder: str) -> Composition:
        """Reads ``config.eft`` of the model in ``folder``; ValueError naming the key."""
        if not isinstance(spec, dict):
            raise ValueError(
                f'eft: the config of an {ARCHITECTURE} needs an object "eft" that names the models tuned and ref; make '
                "the folder with `eft-kernels compose`, or pass it in hf_overrides"
            )
        known = {"base", "tuned", "ref", "mode", "vocab_size", *SETTINGS}
        if unknown := sorted(set(spec) - known):
            raise ValueError(f"eft: got the key {unknown[0]!r}, allowed are {', '.join(sorted(known))}")
        tuned = spec.get("tuned")
        tuned = [tuned] if isinstance(tuned, str) else tuned
        if (
            not isinstance(tuned, (list, tuple))
            or len(tuned) not in (1, 2)
            or not all(isinstance(t, str) for t in (*tuned, spec.get("ref")))
        ):
            raise ValueError(
                f"eft: tuned is one folder or two, ref one; got tuned={spec.get('tuned')!r}, ref={spec.get('ref')!r}"
            )
        within = spec.get("base")
        folders = [_find(name, folder) for name in (within or "", *tuned, spec["ref"])]
        if within and not os.path.isdir(os.path.join(folder, within)):
            raise ValueError(f"eft: base: {within!r} is no folder in {folder}; leave it out where the model is base")
        same = {os.path.realpath(f) if os.path.isdir(f) else f for f in folders[1:]}
        if len(same) < len(folders) - 1:
            raise ValueError(f"eft: tuned and ref must be different models (equal ones cancel), got {folders[1:]}")
        mode = spec.get("mode", "upscale" if len(tuned) == 1 else "interpolate")
        if mode not in MODES or (mode == "interpolate") != (len(tuned) == 2):
            allowed = "interpolate" if len(tuned) == 2 else "upscale, proxy or downscale"
            raise ValueError(f"eft: mode: got {mode!r}, allowed is {allowed} for {len(tuned)} tuned model(s)")
        given = {key: spec[key] for key in SETTINGS if key in spec}
        default = strength_of(given, mode, "eft")
        key = next((key for key in MODE_OF if key in given), None)
        settings = {"mode": MODE_OF[key], key: float(given[key])} if key else {"mode": mode}
        settings["upscale_top_p"] = default.upscale_top_p
        return cls(part_names(len(tuned)), tuple(folders), within, mode, default, settings)


def strength_of(given: Mapping[str, Any], mode: str, where: str, default: Strength | None = None) -> Strength:
    """The combination that ``given`` asks for in a model of ``mode``; what it leaves out is ``default``'s.

    Any number is a strength: 0 takes the difference away, negative ones turn it round. ValueError naming the key.
    """
    own = MODES[mode].strength
    allowed = [own] if own else []
    if mode in ("upscale", "proxy"):
        allowed = ["beta", "alpha"]
    for name, value in given.items():
        if name not in (*allowed, "upscale_top_p"):
            raise ValueError(
                f"{where}: got the key {name!r}, allowed are {', '.join((*allowed, 'upscale_top_p'))} (mode {mode})"
            )
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{where}: {name}: got {value!r}, allowed is a finite number")
    if "beta" in given and "alpha" in given:
        raise ValueError(f"{where}: got beta and alpha; give one (beta up-scales, alpha is proxy-tuning)")
    top_p = given.get("upscale_top_p", default.upscale_top_p if default else 1.0)
    if not PER_ROW["upscale_top_p"].low <= top_p <= 1:
        raise ValueError(f"{where}: upscale_top_p: got {top_p!r}, allowed is a number in (0, 1] (1 is off)")
    key = next((key for key in allowed if key in given), None)
    if key is None and default is not None:
        return Strength(default.weights, float(top_p))
    weights = MODES[MODE_OF[key]].weights(float(given[key])) if key else MODES[mode].weights()
    return Strength(weights.values or (), float(top_p))


def request_of(extra_args: Mapping[str, Any] | None, where: str = "extra_args") -> dict[str, Any]:
    """What a request says under ``eft``: an object, or its JSON text (vLLM's OpenAI server takes no nested objects)."""
    given = (extra_args or {}).get("eft")
    if given is None:
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            pass
    if not isinstance(given, dict):
        raise ValueError(f'{where}: eft: got {given!r}, allowed is an object such as {{"beta": 1.2}}')
    return given


def refuse_adapters(composition: Composition) -> None:
    """ValueError for an engine that loads whole models alone, where ``tuned`` is a PEFT adapter."""
    for name, folder in zip(composition.names, composition.folders):
        if os.path.isfile(os.path.join(folder, ADAPTER)):
            raise ValueError(f"eft: {name}: is a PEFT adapter; make the folder with `eft-kernels compose --merge`")


def composed_config(configs: Sequence[Any], settings: Mapping[str, Any], vocab_size: int, ends: Sequence[int]) -> Any:
    """The config of the whole: a copy of base's, with the sizes that all models share.

    Args:
      configs: of base, tuned (one or two) and ref, as transformers reads them.
      settings: the combination, as keyword arguments of `eft.hf.generate`; none for one that no folder can hold.
      vocab_size: ids that the models share.
      ends: ids that end a text.
    """
    config = copy.deepcopy(configs[0])
    text = config.get_text_config()
    text.vocab_size = vocab_size
    lengths = [n for c in configs if (n := _length_of(c.get_text_config()))]
    if lengths and _length_of(text) != min(lengths):
        setattr(text, SHARED_LENGTH, min(lengths))
    config.eos_token_id = list(ends) or None
    if settings:
        names = part_names(len(configs) - 2)
        tuned = list(names[1:-1]) if len(names) > 3 else "tuned"
        config.architectures = [ARCHITECTURE]
        config.eft = {"base": "base", "tuned": tuned, "ref": "ref", **settings}
    return config


def write_composed(folder: Path, config: Any, special: Mapping[str, Any]) -> None:
    """The files of a composed folder beside the models and the tokenizer; ``special``: ids of special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    written["auto_map"] = {"AutoModelForCausalLM": f"{MODULE}.{ARCHITECTURE}"}
    for name, value in (("config.json", written), ("generation_config.json", dict(special))):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / f"{MODULE}.py").write_text(CODE, encoding="utf-8")


def _length_of(config: Any) -> int | None:
    length = getattr(config, SHARED_LENGTH, None)
    return length if isinstance(length, int) and length > 0 else None  # XLNet's is -1: there is no limit


def _find(name: str, folder: str) -> str:
    """``name`` below the model's folder where it is there, else as it is: a folder or a hub id."""
    below = os.path.join(folder, name)
    return below if os.path.isdir(below) else os.path.expanduser(name)
