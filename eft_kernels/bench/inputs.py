"""Logits to measure with: peaked as language models', flat (the worst case for pruning), or the family's own."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from . import device as machine

KINDS = ("peaked", "family", "flat")
WEIGHTS = {1: (1.0,), 3: (1.0, 1.0, -1.0), 4: (1.0, 0.5, 0.5, -1.0)}  # one model; up-scaling; an interpolation
FAMILY = Path(__file__).resolve().parents[2] / "examples" / "family"  # in a checkout
FAMILY_VOCAB = 2048


def logits(
    kind: str,
    batch: int,
    vocab: int,
    models: int,
    dtype: str,
    seed: int,
    device: str = "cpu",
    positions: int | None = None,
) -> list[torch.Tensor]:
    """[base, tuned, (tuned,) ref] or [base], each [batch, vocab], or [batch, positions, vocab]."""
    rows = batch * (positions or 1)
    if kind == "family":
        z = family(rows, vocab, models, seed)
    else:
        g = torch.Generator(device).manual_seed(seed)

        def noise(std: float) -> torch.Tensor:
            return torch.randn(rows, vocab, generator=g, device=device) * std

        if kind == "flat":
            z = [noise(0.01) for _ in range(models)]
        else:  # Zipf-like peaks over noise of std 3; ref like base, tuned like ref
            shared, ranks = noise(3.0), min(4096, vocab // 4)
            peaks = 18.0 - 1.3 * torch.arange(1, ranks + 1, device=device).log()
            places = torch.rand(rows, vocab, generator=g, device=device).topk(ranks).indices
            shared.scatter_(1, places, peaks + torch.randn(rows, ranks, generator=g, device=device))
            ref = shared + noise(0.8)
            z = [shared + noise(0.5), *(ref + noise(0.5) for _ in range(models - 2)), ref][:models]
    shape = (batch, vocab) if positions is None else (batch, positions, vocab)
    return [x.reshape(shape).to(device, getattr(torch, dtype)).contiguous() for x in z]


def family(rows: int, vocab: int, models: int, seed: int) -> list[torch.Tensor]:
    """Consecutive places of held-out text, from a random one on."""
    if vocab != FAMILY_VOCAB:
        raise machine.Unavailable(f"vocab: got {vocab}, the family's logits have {FAMILY_VOCAB}")
    names = {1: ("base",), 3: ("base", "tuned-a", "ref"), 4: ("base", "tuned-a", "tuned-b", "ref")}[models]
    all_logits = [family_logits(name) for name in names]
    start = torch.randint(len(all_logits[0]), (1,), generator=torch.Generator().manual_seed(seed))
    at = (start + torch.arange(rows)) % len(all_logits[0])
    return [z[at] for z in all_logits]


@functools.cache
def family_logits(name: str) -> torch.Tensor:
    """[2048 places, V] of a model of examples/family over held-out text."""
    weights = FAMILY / "weights" / name
    if not (weights / "config.json").exists():
        raise machine.Unavailable(f"{weights} is not here (it comes with a checkout)")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise machine.Unavailable(f"the family's logits need transformers: {error}") from None
    text = (FAMILY / "heldout" / "a.txt").read_text(encoding="utf-8")[:40000]
    with machine.quiet(), torch.inference_mode():
        ids = AutoTokenizer.from_pretrained(weights)(text, verbose=False).input_ids[: 8 * 256]
        model = AutoModelForCausalLM.from_pretrained(weights)
        z: torch.Tensor = model(torch.tensor(ids).view(8, 256)).logits
        return z.flatten(0, 1).float().clone()
