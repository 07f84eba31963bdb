"""Continuous batching: requests join and leave a running batch, and each gets the text that it would get alone.

python examples/continuous_batching.py

There is a fixed number of slots, with a preallocated KV cache for each of the three models. One step samples a token
for every slot by one call of `eft.sample` and runs base, tuned and ref once over all slots. A row's noise is a function
of its request's seed and of how many tokens the request has got, so no text depends on who else is in the batch. It is
the text of `eft.hf.generate` with that seed, where a request's first new token has position 0, too.
"""

from collections import deque
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

import eft_kernels as eft

FAMILY = Path(__file__).parent / "family" / "weights"


@dataclass(eq=False)  # two requests that ask for the same are two
class Request:
    prompt: list[int]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    beta: float = 1.0  # strength of the emulation
    tokens: list[int] = field(default_factory=list)  # the new ones
    finish: str | None = None  # "stop" at an end token, "length" at max_tokens, "error" at an invalid row


class SlotCache(Cache):
    """Keys and values of all slots; a pass writes each row at its own positions. For layers of full attention."""

    def __init__(self, model, slots: int, max_len: int):
        super().__init__(layers=[])
        c = model.config
        shape = (c.num_hidden_layers, slots, c.num_key_value_heads, max_len, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=model.dtype) for _ in range(2))

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Stores what the pass computed, [n, heads, columns, head_dim]; gives all that its rows hold, to max_len."""
        held = self.keys[layer_idx, self.slots], self.values[layer_idx, self.slots]  # views
        rows = torch.arange(len(keys))[:, None]
        for old, new in zip(held, (keys, values)):
            old[rows, :, self.positions] = new.transpose(1, 2)
        return held


class Batch:
    """The requests that run. Free slots are computed, too: a step's shapes and addresses never change."""

    def __init__(self, models, slots: int = 4, max_len: int = 256):
        self.models, self.max_len = models, max_len  # base, tuned, ref
        self.caches = [SlotCache(model, slots, max_len) for model in models]
        self.running: list[Request | None] = [None] * slots
        # a row for each slot: logits of its next token, tokens in the cache, new tokens so far, the request's settings
        self.logits = [torch.zeros(slots, model.config.vocab_size) for model in models]
        self.length, self.position, self.seed = (torch.zeros(slots, dtype=torch.int64) for _ in range(3))
        self.temperature, self.top_p, self.beta = (torch.ones(slots) for _ in range(3))
        eos = [model.generation_config.eos_token_id for model in models]
        self.ends = {i for x in eos for i in (x if isinstance(x, list) else [x])}  # any model's ends a text

    @torch.inference_mode()
    def forward(self, slots: slice, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """The models' passes over tokens [n, columns] of n slots; keeps the logits after the last column."""
        # A token sees its own row up to its own position. What an earlier request left in the slot lies behind that.
        mask = torch.arange(self.max_len) <= positions[:, None, :, None]  # [n, 1, columns, max_len]
        for model, cache, logits in zip(self.models, self.caches, self.logits):
            cache.slots, cache.positions = slots, positions
            name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # before 5.24
            out = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{name: cache})
            logits[slots] = out.logits[:, -1]

    def join(self, request: Request) -> None:
        """Gives the request a free slot: its prompt goes through the models into their caches, alone."""
        if not request.prompt or request.max_tokens < 1 or len(request.prompt) + request.max_tokens > self.max_len:
            raise ValueError(f"a prompt and its max_tokens, one at least each, may have {self.max_len} tokens together")
        if None not in self.running:
            raise ValueError("no slot is free")
        settings = dict(temperature=request.temperature, top_p=request.top_p, seed=request.seed, position=0)
        one = torch.zeros(1, 1)  # raises here what would stop everybody's next step
        eft.sample([one, one, one], eft.upscale(request.beta), check=True, **settings)
        slot, count = self.running.index(None), len(request.prompt)
        for cache in self.caches:  # a NaN that was left there would pass the mask: 0 times NaN is NaN
            cache.keys[:, slot], cache.values[:, slot] = 0, 0
        self.forward(slice(slot, slot + 1), torch.tensor([request.prompt]), torch.arange(count)[None])
        self.running[slot], self.length[slot], self.position[slot] = request, count, 0
        for name in ("seed", "temperature", "top_p", "beta"):
            getattr(self, name)[slot] = getattr(request, name)

    def leave(self, request: Request, finish: str) -> None:
        """Frees the slot."""
        self.running[self.running.index(request)], request.finish = None, finish

    def step(self) -> list[Request]:
        """One token for each running request. Those that end leave; returns all that were running."""
        out = eft.sample(
            self.logits,
            eft.upscale(self.beta),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            position=self.position,
        )
        served = list(self.running)
        for request, token in zip(served, out.tokens.tolist()):
            if request is None:
                continue
            if token < 0:  # a model gave NaN; the other rows are what they would be without this one
                self.leave(request, "error")
                continue
            request.tokens.append(token)
            if token in self.ends:
                self.leave(request, "stop")
            elif len(request.tokens) >= request.max_tokens:
                self.leave(request, "length")
        if any(self.running):
            self.forward(slice(None), out.tokens.clamp(min=0)[:, None], self.length[:, None])
            self.length += torch.tensor([request is not None for request in self.running])
            self.position += 1
        return [request for request in served if request is not None]


def load(names=("base", "tuned-a", "ref"), folder=FAMILY):
    """Three models of the example family in float32, and their tokenizer."""
    models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in names]
    return models, AutoTokenizer.from_pretrained(folder / names[0])


def alone(models, request: Request) -> list[int]:
    """The new tokens that `eft.hf.generate` writes for this request."""
    base, tuned, ref = models
    out = base.generate(
        torch.tensor([request.prompt]),
        custom_generate=eft.hf.generate,
        tuned=tuned,
        ref=ref,
        beta=request.beta,
        do_sample=True,
        temperature=torch.tensor([request.temperature]),
        top_k=0,
        top_p=request.top_p,
        seed=request.seed,
        max_new_tokens=request.max_tokens,
    )
    return out[0, len(request.prompt) :].tolist()


# prompt, max_tokens, temperature, top_p, beta
ASKED = [
    ("And the king said", 40, 1.0, 1.0, 1.0),
    ("In the morning", 12, 0.0, 1.0, 1.0),
    ("The young man was not", 25, 0.7, 0.9, 1.5),
    ("It is a truth", 8, 1.0, 0.8, 0.5),
    ("My dear", 30, 1.2, 0.95, 0.0),
    ("And it came to pass in those days", 20, 0.7, 1.0, 1.3),
]


def main() -> None:
    models, tokenizer = load()
    requests = [
        Request(tokenizer(prompt).input_ids, most, 100 + i, *settings)
        for i, (prompt, most, *settings) in enumerate(ASKED)
    ]
    batch, waiting, steps = Batch(models, slots=3, max_len=64), deque(requests), 0
    while waiting or any(batch.running):
        while waiting and None in batch.running:
            batch.join(waiting.popleft())
            print(f"step {steps}: slots hold", ["-" if r is None else requests.index(r) for r in batch.running])
        batch.step()
        steps += 1
    for i, request in enumerate(requests):
        assert request.tokens == alone(models, request), f"request {i} has another text than alone"
        print(
            f"\n{i}: {tokenizer.decode(request.prompt + request.tokens, skip_special_tokens=True)} [{request.finish}]"
        )
    count = sum(len(request.tokens) for request in requests)
    print(f"\n{count} tokens in {steps} steps, every text equal to that of eft.hf.generate alone")


if __name__ == "__main__":
    main()
