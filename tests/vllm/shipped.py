"""The shipped family in transformers, to compare vLLM's texts with, and requests to compare."""

from __future__ import annotations

import math
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


WEIGHTS = {"beta": lambda b: [b, 1.0, -b], "alpha": lambda a: [1.0, a, -a]}


class Loop:
    """One request, token by token: three passes over the whole text, the scores, what changes them, a draw."""

    def __init__(self, family, request: dict):
        self.family, self.request = family, request
        self.prompt = family.ids(request["prompt"])
        asked = (request.get("extra_args") or {}).get("eft", {})
        key = next((k for k in WEIGHTS if k in asked), None)
        self.weights = WEIGHTS[key](asked[key]) if key else [1.0, 1.0, -1.0]
        self.upscale_top_p = asked.get("upscale_top_p", 1.0)
        self.logprobs: list[torch.Tensor] = []  # of the scores before anything but a grammar, [V] a token

    @torch.no_grad()
    def scores(self, ids, mask=None) -> torch.Tensor:
        models = [self.family.models[name] for name in ("base", "tuned-a", "ref")]
        logits = [m(torch.tensor([ids])).logits[:, -1].float() for m in models]
        if self.upscale_top_p < 1:
            return eft.combine(logits, self.weights, upscale_top_p=self.upscale_top_p, token_mask=mask)
        return sum(w * z for w, z in zip(self.weights, logits))

    def changed(self, scores: torch.Tensor, new: list[int]) -> torch.Tensor:
        request, s = self.request, scores[0].clone()
        if allowed := request.get("allowed_token_ids"):
            banned = torch.ones_like(s, dtype=torch.bool)
            banned[allowed] = False
            s[banned] = -math.inf
        for i, bias in request.get("logit_bias", {}).items():
            s[int(i)] += bias
        if len(new) < request.get("min_tokens", 0):
            s[self.family.tokenizer.eos_token_id] = -math.inf
        seen = torch.tensor(sorted({*self.prompt, *new}))
        penalty = request.get("repetition_penalty", 1.0)
        s[seen] = torch.where(s[seen] > 0, s[seen] / penalty, s[seen] * penalty)
        counts = torch.bincount(torch.tensor(new, dtype=torch.int64), minlength=len(s))
        s -= request.get("frequency_penalty", 0.0) * counts
        s -= request.get("presence_penalty", 0.0) * (counts > 0)
        for text in request.get("bad_words", []):
            for word in self.family.bad_word(text):
                if new[len(new) - len(word) + 1 :] == word[:-1] or len(word) == 1:
                    s[word[-1]] = -math.inf
        return s[None]

    def run(self, matcher=None) -> list[int]:
        request, new = self.request, []
        mask = None
        while len(new) < request["max_tokens"]:
            if matcher is not None:
                mask = torch.full((1, (len(self.family.tokenizer) + 31) // 32), -1, dtype=torch.int32)
                matcher.fill_next_token_bitmask(mask)
            scores = self.scores(self.prompt + new, mask)
            allowed = eft.logprobs([scores], [1.0], token_mask=mask, tuned=0)
            self.logprobs.append(allowed[0])
            token = eft.sample(
                [self.changed(scores, new)],
                [1.0],
                temperature=request.get("temperature", 1.0),
                top_p=request.get("top_p", 1.0),
                top_k=request.get("top_k", 0),
                min_p=request.get("min_p", 0.0),
                token_mask=mask,
                seed=torch.tensor([request.get("seed", 0)]),
                position=len(new),
                tuned=0,
            ).tokens.item()
            new.append(token)
            if matcher is not None:
                matcher.accept_token(token)
            if token == self.family.tokenizer.eos_token_id:
                break
        return new


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
