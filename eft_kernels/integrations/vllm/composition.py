"""What a model's config says under ``eft``, and what a request says: which models, and how they are combined."""

from __future__ import annotations

import json
import math
import numbers
import os
from dataclasses import dataclass

import eft_kernels as eft

STRENGTHS = {"upscale": "beta", "proxy": "alpha", "interpolate": "lam", "downscale": None}
DEFAULTS = {"beta": 1.0, "alpha": 1.0, "lam": 0.5, "upscale_top_p": 1.0}
MODE_OF = {strength: mode for mode, strength in STRENGTHS.items() if strength}


@dataclass(frozen=True)
class Strength:
    """How one request combines the models: a weight for each, and the up-scaling filter's mass."""

    weights: tuple[float, ...]
    upscale_top_p: float = 1.0


@dataclass(frozen=True)
class Composition:
    """The models of one emulation, [base, tuned, ref] or [base, tuned_a, tuned_b, ref], and their default combination.

    ``folders`` are local folders or hub ids; ``base_within`` says that base's is below the model's own folder.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    base_within: str | None
    mode: str
    default: Strength

    @classmethod
    def parse(cls, spec, folder: str) -> Composition:
        """Reads ``config.eft`` of the model in ``folder``; ValueError naming the key."""
        if not isinstance(spec, dict):
            raise ValueError(
                'eft: the config of an EftForCausalLM needs an object "eft" that names the models tuned and ref; make '
                "the folder with `eft-kernels compose`, or pass it in hf_overrides"
            )
        known = {"base", "tuned", "ref", "mode", "vocab_size", *DEFAULTS}
        if unknown := sorted(set(spec) - known):
            raise ValueError(f"eft: got the key {unknown[0]!r}, allowed are {', '.join(sorted(known))}")
        tuned = spec.get("tuned")
        tuned = [tuned] if isinstance(tuned, str) else tuned
        good = isinstance(tuned, (list, tuple)) and len(tuned) in (1, 2) and all(isinstance(t, str) for t in tuned)
        if not good or not isinstance(spec.get("ref"), str):
            raise ValueError(
                f"eft: tuned is one folder or two, ref one; got tuned={spec.get('tuned')!r}, ref={spec.get('ref')!r}"
            )
        names = ("base", *(["tuned"] if len(tuned) == 1 else ["tuned_a", "tuned_b"]), "ref")
        within = spec.get("base")
        folders = [_find(name, folder) for name in (within or "", *tuned, spec["ref"])]
        if within and not os.path.isdir(os.path.join(folder, within)):
            raise ValueError(f"eft: base: {within!r} is no folder in {folder}; leave it out where the model is base")
        same = {os.path.realpath(f) if os.path.isdir(f) else f for f in folders[1:]}
        if len(same) < len(folders) - 1:
            raise ValueError(f"eft: tuned and ref must be different models (equal ones cancel), got {folders[1:]}")
        mode = spec.get("mode", "upscale" if len(tuned) == 1 else "interpolate")
        if mode not in STRENGTHS or (mode == "interpolate") != (len(tuned) == 2):
            allowed = "interpolate" if len(tuned) == 2 else "upscale, proxy or downscale"
            raise ValueError(f"eft: mode: got {mode!r}, allowed is {allowed} for {len(tuned)} tuned model(s)")
        given = {key: spec[key] for key in DEFAULTS if key in spec}
        default = strength_of(given, mode, "eft")
        return cls(names, tuple(folders), within, mode, default)


def strength_of(given: dict, mode: str, where: str, default: Strength | None = None) -> Strength:
    """The combination that ``given`` asks for in a model of ``mode``; what it leaves out is ``default``'s.

    Any number is a strength: 0 takes the difference away, negative ones turn it round. ValueError naming the key.
    """
    allowed = [STRENGTHS[mode]] if STRENGTHS[mode] else []
    if mode in ("upscale", "proxy"):
        allowed = ["beta", "alpha"]
    for key, value in given.items():
        if key not in (*allowed, "upscale_top_p"):
            raise ValueError(
                f"{where}: got the key {key!r}, allowed are {', '.join((*allowed, 'upscale_top_p'))} (mode {mode})"
            )
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{where}: {key}: got {value!r}, allowed is a finite number")
    if "beta" in given and "alpha" in given:
        raise ValueError(f"{where}: got beta and alpha; give one (beta up-scales, alpha is proxy-tuning)")
    top_p = given.get("upscale_top_p", default.upscale_top_p if default else 1.0)
    if not 2.0**-126 <= top_p <= 1:
        raise ValueError(f"{where}: upscale_top_p: got {top_p!r}, allowed is a number in (0, 1] (1 is off)")
    key = next((key for key in allowed if key in given), None)
    if key is None and default is not None:
        return Strength(default.weights, float(top_p))
    mode = MODE_OF[key] if key else mode
    if mode == "downscale":
        return Strength(eft.downscale().values, float(top_p))
    strength = float(given[key]) if key else DEFAULTS[STRENGTHS[mode]]
    return Strength(getattr(eft, mode)(strength).values, float(top_p))


def request_of(extra_args: dict | None) -> dict:
    """What a request says under ``eft``: an object, or its JSON text (the OpenAI server takes no nested objects)."""
    given = (extra_args or {}).get("eft")
    if given is None:
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            pass
    if not isinstance(given, dict):
        raise ValueError(f'extra_args: eft: got {given!r}, allowed is an object such as {{"beta": 1.2}}')
    return given


def _find(name: str, folder: str) -> str:
    """``name`` below the model's folder where it is there, else as it is: a folder or a hub id."""
    below = os.path.join(folder, name)
    return below if os.path.isdir(below) else os.path.expanduser(name)
