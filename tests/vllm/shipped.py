"""The shipped family in transformers, to compare vLLM's texts with, and requests to compare."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eft_kernels as eft

FAMILY = Path(__file__).parents[2] / "examples" / "family" / "weights"
PROMPTS = [
    "The king said unto", "It is a truth universally", "And God said, Let there", "My dear Mr. Bennet",
    "In the beginning", "She was", "And it came to pass in those days, that", "He walked", "The Lord is my",
    "There was no", "Behold, I", "Elizabeth", "The children of Israel", "What is", "I am happy to", "Then answered",
    "Thou shalt not", "Mrs. Bennet was", "A man of", "And the",
]  # fmt: skip


class Family:
    """base, tuned-a, tuned-b and ref, float32."""

    def __init__(self):
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(FAMILY / name, dtype=torch.float32)
            for name in ("base", "tuned-a", "tuned-b", "ref")
        }

    def ids(self, prompt) -> list[int]:
        return self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt

    def bad_word(self, text: str) -> list[list[int]]:
        """The spellings that vLLM bans: at the start of a text and behind a space."""
        spelled = [self.tokenizer(f"{space}{text}", add_special_tokens=False).input_ids for space in ("", " ")]
        return spelled[:1] if spelled[0] == spelled[1] else spelled

    def generate(self, request: dict, tuned=("tuned-a",), **more) -> list[int]:
        """The new tokens of one request by `eft.hf.generate`, without its end token's padding."""
        prompt = torch.tensor([self.ids(request["prompt"])])
        asked = (request.get("extra_args") or {}).get("eft", {})
        temperature = request.get("temperature", 1.0)
        options = dict(
            do_sample=temperature > 0,
            max_new_tokens=request["max_tokens"],
            seed=request.get("seed"),
            **asked,
            **more,
        )
        if temperature > 0:
            options |= dict(
                temperature=temperature,
                top_p=request.get("top_p", 1.0),
                top_k=request.get("top_k", 0),
                min_p=request.get("min_p"),
            )
        models = [self.models[name] for name in tuned]
        out = self.models["base"].generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            custom_generate=eft.hf.generate,
            tuned=models if len(models) > 1 else models[0],
            ref=self.models["ref"],
            **options,
        )
        return out[0, prompt.shape[1] :].tolist()


def override(tuned="tuned-a", **more) -> dict:
    """hf_overrides for the family's base."""
    names = [str(FAMILY / name) for name in (tuned if isinstance(tuned, tuple) else (tuned,))]
    return {
        "architectures": ["EftForCausalLM"],
        "eft": {"tuned": names if len(names) > 1 else names[0], "ref": str(FAMILY / "ref"), **more},
    }


def requests_of(count: int, **more) -> list[dict]:
    """Requests of different lengths; ``more`` are functions of the request's number, or values."""
    return [
        dict(
            prompt=PROMPTS[i % len(PROMPTS)],
            max_tokens=12 + i * 7 % 30,
            **{key: value(i) if callable(value) else value for key, value in more.items()},
        )
        for i in range(count)
    ]
