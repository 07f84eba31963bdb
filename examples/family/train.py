"""Train the six models of one seed on CPU: ref, tuned-a, tuned-b (small), base, large-a, large-b (large).

    python examples/family/data.py
    python examples/family/train.py --seed 0 --out examples/family/weights

Same settings for every seed; one thread makes a run repeatable on one kind of machine. A finished model is saved at
once (bf16), and a model that is already in --out is not trained again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from data import UNIT_END
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, CONTEXT, BATCH = 2048, 256, 8
SIZES = {
    "small": dict(
        hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3
    ),
    "large": dict(
        hidden_size=160, intermediate_size=448, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=5
    ),
}
MIX = {
    "a": 0.2,
    "b": 0.2,
    "c": 0.6,
}  # share of the windows in pre-training: c is the general text, the two styles are in it too


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (K. Jordan, 2024), in float32.

    torch.optim.Muon does the same in bf16, which is slow on CPUs.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(mean, group["momentum"])
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.T if tall else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def make_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train(
        [str(f) for f in files],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2 * CONTEXT
    )


def encode(tokenizer, path: Path) -> torch.Tensor:
    """All units of a file in a row, each closed by eos. [tokens]"""
    units = path.read_text(encoding="utf-8").rstrip("\n").split(UNIT_END)
    ids = [
        i
        for unit in units
        for i in tokenizer(unit, add_special_tokens=False, verbose=False).input_ids + [tokenizer.eos_token_id]
    ]
    return torch.tensor(ids)


def windows(ids: torch.Tensor, bos: int) -> torch.Tensor:
    """Non-overlapping windows, bos first: [n, 1 + CONTEXT]; the tail that fills no window is dropped."""
    n = len(ids) // CONTEXT
    return torch.cat([torch.full((n, 1), bos), ids[: n * CONTEXT].view(n, CONTEXT)], 1)


@torch.no_grad()
def loss_of(model, rows: torch.Tensor) -> float:
    losses = [
        cross_entropy(model(r[:, :-1], use_cache=False).logits.flatten(0, 1), r[:, 1:].flatten(), reduction="sum")
        for r in rows.split(16)
    ]
    return sum(losses).item() / rows[:, 1:].numel()


def train(model, texts: dict, mix: dict, bos: int, steps: int, lr: float, seed: int, name: str, muon: bool):
    """Muon for the matrices (if asked), AdamW for the rest; linear warm-up for 5% of the steps, then cosine to 0."""
    rng = torch.Generator().manual_seed(seed)
    names, chances = list(mix), torch.tensor(list(mix.values()))
    matrices = [p for n, p in model.named_parameters() if muon and p.ndim == 2 and "embed" not in n]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)] + (
        [Muon(matrices, lr)] if muon else []
    )
    warm = max(1, steps // 20)
    start = time.time()
    for step in range(steps):
        rate = lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        rows = []
        for pick in torch.multinomial(chances, BATCH, replacement=True, generator=rng).tolist():
            ids = texts[names[pick]]
            at = torch.randint(len(ids) - CONTEXT, (1,), generator=rng).item()
            rows.append(ids[at : at + CONTEXT])
        rows = torch.cat([torch.full((BATCH, 1), bos), torch.stack(rows)], 1)
        loss = cross_entropy(model(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 99:
            speed = (step + 1) * BATCH * CONTEXT / (time.time() - start)
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
    print(f"{name}: {time.time() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="folder written by data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small-steps", type=int, default=600, help="pre-training steps of 8 x 256 tokens")
    parser.add_argument("--large-steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--tune-lr", type=float, default=2e-3)
    parser.add_argument(
        "--tune-keep", type=float, default=0.5, help="share of the weights before fine-tuning in those that are saved"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    tokenizer = make_tokenizer([args.data / f"{name}.train.txt" for name in MIX])
    texts = {name: encode(tokenizer, args.data / f"{name}.train.txt") for name in MIX}
    valid = {name: windows(encode(tokenizer, args.data / f"{name}.valid.txt"), tokenizer.bos_token_id) for name in MIX}

    def make(name: str, model, keep: float, **settings):
        """Train and save; the saved weights are (1 - keep) x the trained ones + keep x those before."""
        if (args.out / name / "model.safetensors").exists():
            return
        before = [p.detach().clone() for p in model.parameters()]
        train(model, texts, bos=tokenizer.bos_token_id, name=name, **settings)
        with torch.no_grad():
            for p, old in zip(model.parameters(), before):
                p.lerp_(old, keep)
        print(f"{name}: validation " + " ".join(f"{k} {loss_of(model, v):.4f}" for k, v in valid.items()), flush=True)
        model.to(torch.bfloat16).save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        file = args.out / name / "tokenizer.json"  # without the indentation it is half as large
        file.write_text(
            json.dumps(json.loads(file.read_text(encoding="utf-8")), separators=(",", ":"), ensure_ascii=False),
            encoding="utf-8",
        )

    for name, size, steps in [("ref", "small", args.small_steps), ("base", "large", args.large_steps)]:
        config = LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=2 * CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SIZES[size],
        )
        torch.manual_seed(args.seed)
        make(name, LlamaForCausalLM(config), keep=0.0, mix=MIX, steps=steps, lr=args.lr, seed=args.seed, muon=True)
    for name, parent in [("tuned", "ref"), ("large", "base")]:
        for style in "ab":
            start = LlamaForCausalLM.from_pretrained(args.out / parent, dtype=torch.float32)
            make(
                f"{name}-{style}",
                start,
                keep=args.tune_keep,
                mix={style: 1.0},
                steps=args.tune_steps,
                lr=args.tune_lr,
                seed=args.seed + 1000,
                muon=False,
            )


if __name__ == "__main__":
    main()
