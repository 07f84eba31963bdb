"""Held-out losses of the six models and of the emulated ones, nats per token: writes results.json, prints tables.

    python examples/family/evaluate.py --runs examples/family/weights SEED1_FOLDER SEED2_FOLDER    # seeds 0, 1, 2

Each held-out text is cut into windows of 256 tokens behind a bos; every token of a window is scored. Everything is
float32 on the saved bf16 weights.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import torch
from train import encode, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
MODELS = ["ref", "tuned-a", "tuned-b", "base", "large-a", "large-b"]
STYLES = {"a": "King James Bible", "b": "Jane Austen"}
SLICE = 8  # windows of a text that tests/test_family.py evaluates again
# weights of (base, tuned, ref)
COMBINATIONS = {
    "emulated": (1.0, 1.0, -1.0),
    "beta 0.5": (0.5, 1.0, -0.5),
    "beta 1.5": (1.5, 1.0, -1.5),
    "alpha 0.5": (1.0, 0.5, -0.5),
    "alpha 1.5": (1.0, 1.5, -1.5),
}


def load(run: Path) -> dict:
    return {name: AutoModelForCausalLM.from_pretrained(run / name, dtype=torch.float32).eval() for name in MODELS}


def heldout(tokenizer, name: str) -> torch.Tensor:
    return windows(encode(tokenizer, HERE / "heldout" / f"{name}.txt"), tokenizer.bos_token_id)


def token_logprobs(logits: list[torch.Tensor], weights, ids: torch.Tensor) -> torch.Tensor:
    """log softmax(sum_j w_j z_j) at ids.  logits J x [B, T, V], ids [B, T] -> [B, T]"""
    combined = sum(w * z for w, z in zip(weights, logits))
    return combined.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@torch.no_grad()
def losses(models: dict, rows: torch.Tensor) -> dict:
    """Mean loss over rows [n, 1 + CONTEXT] of each model and, for each style, of each combination."""
    total = {}
    for part in rows.split(4):
        ids = part[:, 1:]
        logits = {name: model(part[:, :-1], use_cache=False).logits for name, model in models.items()}
        scores = {name: token_logprobs([z], [1.0], ids) for name, z in logits.items()}
        for style in STYLES:
            trio = [logits["base"], logits[f"tuned-{style}"], logits["ref"]]
            scores |= {f"{name} {style}": token_logprobs(trio, weights, ids) for name, weights in COMBINATIONS.items()}
        for name, score in scores.items():
            total[name] = total.get(name, 0.0) - score.double().sum().item()
    return {name: value / rows[:, 1:].numel() for name, value in total.items()}


def summary(values: list[float]) -> dict:
    return dict(mean=mean(values), stdev=stdev(values) if len(values) > 1 else 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="a folder of six models per seed, in the order of the seeds"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.runs[0] / "base")
    texts = {name: heldout(tokenizer, name) for name in "abc"}
    by_seed = [{text: losses(models, rows) for text, rows in texts.items()} for models in map(load, args.runs)]
    first = {text: losses(load(args.runs[0]), rows[:SLICE]) for text, rows in texts.items()}

    result = dict(
        unit="nats per token",
        tokens={name: rows[:, 1:].numel() for name, rows in texts.items()},
        seeds=by_seed,
        slice_of_seed_0=first,
        styles={},
    )
    for style in STYLES:
        rows = [
            dict(
                ref=x["ref"],
                tuned=x[f"tuned-{style}"],
                base=x["base"],
                emulated=x[f"emulated {style}"],
                large_tuned=x[f"large-{style}"],
            )
            for x in (seed[style] for seed in by_seed)
        ]
        for x in rows:
            x["recovered"] = (x["base"] - x["emulated"]) / (x["base"] - x["large_tuned"])
        result["styles"][style] = dict(seeds=rows, **{key: summary([x[key] for x in rows]) for key in rows[0]})
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")

    print("| held-out text | seed | ref | tuned | base | emulated | large tuned | gap recovered |")
    print("|---|---|---|---|---|---|---|---|")
    for style, title in STYLES.items():
        rows = result["styles"][style]
        keys = ["ref", "tuned", "base", "emulated", "large_tuned"]
        for seed, x in enumerate(rows["seeds"]):
            print(
                f"| {style}: {title} | {seed} | "
                + " | ".join(f"{x[k]:.4f}" for k in keys)
                + f" | {x['recovered']:.0%} |"
            )
        print(
            f"| {style} | mean ± sd | "
            + " | ".join(f"{rows[k]['mean']:.4f} ± {rows[k]['stdev']:.4f}" for k in keys)
            + f" | {rows['recovered']['mean']:.0%} ± {rows['recovered']['stdev']:.0%} |"
        )

    print("\n| model, mean over seeds | on a | on b | on c |\n|---|---|---|---|")
    for name in by_seed[0]["a"]:
        print(
            f"| {name} | " + " | ".join(f"{mean([seed[text][name] for seed in by_seed]):.4f}" for text in "abc") + " |"
        )


if __name__ == "__main__":
    main()
