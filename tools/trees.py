"""How many tokens a round of coupled speculation gains by trees of drafts.

Texts of the example family are written by plain decoding. At every position the drafting model then draws from its own
logits with the noise of that position; a draft is accepted where it is the text's token, so that the text says how far
every tree of drafts would have come.
"""

from __future__ import annotations

import torch

import eft_kernels as eft
from eft_kernels.cli.options import Parser
from eft_kernels.parameters import MAX_RUNNERS_UP

from .coupled import FAMILY, PROMPT, load, write

# children of a node on the drafting model's own path, and of the other nodes, which are leaves where it is 0
SHAPES = {
    "chain": (1, 1),
    "chain and one more leaf a position": (2, 0),
    "chain and two more leaves a position": (3, 0),
    "two children a node": (2, 2),
    "three children a node": (3, 3),
}


def nodes(k: int, own: int, others: int) -> int:
    """Drafts of a tree of k levels."""
    return own * k if not others else sum(own**level for level in range(1, k + 1))


def tokens_a_round(ranks: torch.Tensor, k: int, own: int, others: int) -> float:
    """``ranks`` [N, T]: the place of each token of the texts in the drafting model's draw, 0 its winner's."""
    tokens, rounds = 0, 0
    for row in ranks.tolist():
        at = 0
        while at < len(row):
            children, level = own, 0
            while level < k and at + level < len(row) and row[at + level] < children:
                if row[at + level] > 0:
                    children = others
                level += 1
            tokens += min(level + 1, len(row) - at)
            at += level + 1
            rounds += 1
    return tokens / rounds


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools trees", description=__doc__)
    p.add_argument("--texts", type=int, default=40)
    p.add_argument("--tokens", type=int, default=128)
    args = p.parse_args(argv)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FAMILY / "weights" / "base")
    ids = tokenizer((FAMILY / "heldout" / "a.txt").read_text(), verbose=False).input_ids
    prompts = torch.tensor(ids[: args.texts * 97]).view(args.texts, 97)[:, :PROMPT]
    models = load(torch.float32)
    texts, _ = write(models, prompts, args.tokens, 0)
    with torch.no_grad():
        logits = torch.cat([models[1](part).logits for part in texts[:, :-1].split(8)])[:, PROMPT - 1 :]
    seeds, ranks = torch.arange(args.texts), []
    for n in range(args.tokens):
        draws = eft.draft(
            logits[:, n].contiguous(),
            slot=0,
            method="coupled",
            seed=seeds,
            position=n,
            runners_up=MAX_RUNNERS_UP,
            vocab_size=len(tokenizer),
        )
        drawn = torch.cat([draws.tokens[:, None], draws.runners_up], 1)
        same = drawn == texts[:, PROMPT + n, None]
        ranks.append(torch.where(same.any(1), same.int().argmax(1), MAX_RUNNERS_UP + 1))
    place = torch.stack(ranks, 1)
    shares = ", ".join(f"{(place < m).float().mean():.2f}" for m in (1, 2, 3, 4))
    print(f"{args.texts} texts of {args.tokens} tokens, temperature 1.", end=" ")
    print(f"The text's token is among the first 1, 2, 3, 4 of the drafting model's draw in shares of {shares}.\n")
    print("| drafts | K = 4: drafts | tokens a round | K = 8: drafts | tokens a round |\n|---|--:|--:|--:|--:|")
    for name, (own, others) in SHAPES.items():
        cells = [
            x for k in (4, 8) for x in (f"{nodes(k, own, others)}", f"{tokens_a_round(place, k, own, others):.2f}")
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return 0
