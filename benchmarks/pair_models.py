"""Pairs of models that behave like real ones, made from a seed: for benchmarks/pairs.py.

ref is a small random Llama, tuned is ref and a small perturbation. base is ref made larger: its embedding, its layer
and its head, then further layers. Where the residual branches of those are zero base is ref, and every draft is
accepted; one scalar on them (`STRENGTHS`) says how much base knows beyond ref, so how often the two agree.

As in a language model some tokens are followed by few others and some by many: a token's embedding has a share that the
head reads, and the scores spread as far as that share is large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

import eft_kernels as eft
from eft_kernels.cli.models import quiet_transformers

VOCAB = 32000
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)


class Size(NamedTuple):
    """Of ref: one layer, and what base has beyond it."""

    width: int
    inner: int
    layers: int  # of base
    heads: int = 6
    vocab: int = VOCAB

    def read(self, layers: int) -> int:
        """Weights that a pass reads."""
        return self.vocab * self.width + layers * (4 * self.width**2 + 3 * self.width * self.inner)

    @property
    def ratio(self) -> float:
        """Cost of a pass of base over that of ref, by the weights read."""
        return self.read(self.layers) / self.read(1)


# ratio: size; 0 is a small one for tests, of a ratio of 3
SIZES = {
    0: Size(96, 256, 9, heads=3, vocab=4000),
    4: Size(384, 6144, 9),
    10: Size(384, 6144, 24),
    20: Size(384, 6144, 50),
}
RATIOS = (4, 10, 20)
TINY = Size(128, 128, 4, heads=2)  # almost no weights: its time lies outside the models
# {ratio: {acceptance: scale of base's own branches}}; printed by `python -m benchmarks pairs --find`
STRENGTHS: dict[int, dict[float, float]] = {
    0: {0.6: 6.4304, 0.7: 4.7319, 0.8: 3.0699, 0.9: 1.3978},
    4: {0.6: 0.593, 0.7: 0.4245, 0.8: 0.2816, 0.9: 0.1368},
    10: {0.6: 0.3475, 0.7: 0.2525, 0.8: 0.1484, 0.9: 0.075},
    20: {0.6: 0.2404, 0.7: 0.173, 0.8: 0.1156, 0.9: 0.0533},
}
TINY_STRENGTH = 5.0

SPREAD = 7.5  # standard deviation of the scores after a token that the head reads fully
SHARES = (0.35, 1.0)  # how much of a token's embedding the head reads, least and most
BRANCH = 0.35  # root mean square of what the layer adds to a residual stream of 1
PERTURBATION = 0.08  # of tuned, relative to each matrix of ref


def branches(layer) -> tuple[torch.nn.Linear, ...]:
    """The projections by which a layer adds to the residual stream."""
    return layer.self_attn.o_proj, layer.mlp.down_proj


def level(ref) -> None:
    """Scales the branches of the one layer of ``ref`` so that each adds `BRANCH`."""
    added: dict[torch.nn.Module, torch.Tensor] = {}
    hooks = [p.register_forward_hook(lambda p, _, out: added.update({p: out})) for p in branches(ref.model.layers[0])]
    ref(torch.randint(ref.config.vocab_size, (4, 32)))
    for hook in hooks:
        hook.remove()
    for projection, out in added.items():
        projection.weight.mul_(BRANCH / out.float().square().mean().sqrt())


class Models:
    """base, tuned and ref of a size; `set` sets the scale of the branches that base has beyond ref."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32, seed: int = 0):
        transformers = quiet_transformers()

        self.size = size

        def llama(layers: int):
            config = transformers.LlamaConfig(
                vocab_size=size.vocab,
                hidden_size=size.width,
                intermediate_size=size.inner,
                num_hidden_layers=layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.heads,
                max_position_embeddings=1 << 15,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            self.ref, self.tuned = llama(1), llama(1)
            half = size.width // 2
            low, high = SHARES
            share = low + (high - low) * torch.rand(size.vocab, 1)  # of a token's embedding that the head reads
            embedding = torch.randn(size.vocab, size.width)
            embedding[:, :half] *= share * math.sqrt(2)
            embedding[:, half:] *= (2 - 2 * share**2).sqrt()
            self.ref.model.embed_tokens.weight.copy_(embedding)
            self.ref.model.norm.weight[half:] = 0
            self.ref.lm_head.weight.copy_(torch.randn(size.vocab, size.width) * (SPREAD / math.sqrt(2 * half)))
            level(self.ref)
            self.tuned.load_state_dict(self.ref.state_dict())
            for p in self.tuned.parameters():
                if p.dim() == 2:
                    p.add_(torch.randn(p.shape).to(p) * (PERTURBATION * p.std()))
            self.base = llama(size.layers)
            kept = self.ref.state_dict()
            self.base.load_state_dict(kept, strict=False)
        own = [p.weight for layer in self.base.model.layers[1:] for p in branches(layer)]
        self.own = [(weight, weight.detach().clone()) for weight in own]  # base's own branches, and they at scale 1
        self.set(0.0)

    def set(self, scale: float) -> Models:
        with torch.no_grad():
            for weight, whole in self.own:
                torch.mul(whole, scale, out=weight)
        return self

    def to(self, dtype: torch.dtype) -> Models:
        for model in self.all:
            model.to(dtype)
        self.own = [(weight, whole.to(dtype)) for weight, whole in self.own]
        return self

    @property
    def all(self):
        return self.base, self.tuned, self.ref


def prompts(rows: int, columns: int, vocab: int, seed: int) -> torch.Tensor:
    return torch.randint(vocab, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def agreement(models: Models, scale: float, rows: int = 16, tokens: int = 64, draws: int = 8) -> float:
    """How often a coupled draft is the target's token, over texts of plain decoding."""
    base, tuned, ref = models.set(scale).all
    ids = prompts(rows, 8, models.size.vocab, 1)
    ids = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=eft.hf.generate,
        tuned=tuned,
        ref=ref,
        do_sample=True,
        top_k=0,
        seed=1,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    logits = [model(ids[:, :-1], logits_to_keep=tokens).logits.flatten(0, 1) for model in models.all]
    same = 0.0
    for turn in range(draws):
        noise = dict(seed=eft.row_seeds(turn, rows * tokens), position=tokens)  # not the noise of the texts
        target = eft.sample(logits, eft.upscale(), logprobs=False, **noise).tokens
        draft = eft.draft(logits[1], slot=0, method="coupled", **noise).tokens
        same += float((target == draft).float().mean()) / draws
    return same


def strength(models: Models, wanted: float, near: float = 0.005) -> float:
    """The scale at which `agreement` is ``wanted``, to within ``near``."""
    low, high, scale = 0.0, math.inf, 0.5
    for _ in range(12):
        got = agreement(models, scale)
        if abs(got - wanted) <= near:
            break
        low, high = (scale, high) if got > wanted else (low, scale)
        guess = scale * math.log(wanted) / math.log(min(got, 0.999))  # -log of the agreement grows like the scale
        scale = guess if low < guess < high else (low + min(high, 2 * scale)) / 2
    return round(scale, 4)


def find(tell=print) -> dict[int, dict[float, float]]:
    """The table `STRENGTHS`, in minutes."""
    found = {}
    for ratio, size in SIZES.items():
        models = Models(size)
        found[ratio] = {a: strength(models, a) for a in ACCEPTANCES}
        tell(f"    {ratio}: {found[ratio]},")
    return found
