"""In which precision coupled speculation gives the texts of plain decoding.

Texts of the example family, each written twice with the same seeds: one token a pass, and K drafts and a token a pass.
The logits of a pass over K + 1 tokens are rounded in another order than those of a pass over one; where two tokens are
nearly tied in the race, the text goes another way from there on.
"""

from __future__ import annotations

import time

import torch

import eft_kernels as eft
from eft_kernels.cli.options import Parser

from . import ROOT

FAMILY = ROOT / "examples" / "family"
PROMPT, BATCH = 24, 8  # tokens, rows


class Float32Head(torch.nn.Module):
    """A head whose logits are float32, below them all is as it was."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.out_features = torch.nn.Parameter(head.weight.float()), head.out_features

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden.float(), self.weight)


def load(dtype: torch.dtype, float32_head: bool = False) -> list:
    """[base, tuned, ref] of the family."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(FAMILY / "weights" / name, dtype=dtype).eval()
        for name in ("base", "tuned-a", "ref")
    ]
    if float32_head:
        for model in models:
            model.set_output_embeddings(Float32Head(model.get_output_embeddings()))
    return models


def write(models, prompts, tokens: int, k: int) -> tuple[torch.Tensor, float]:
    """Texts int64 [N, PROMPT + tokens], and seconds."""
    base, tuned, ref = models
    start, texts = time.perf_counter(), []
    for i, part in enumerate(prompts.split(BATCH)):
        seeds = torch.arange(i * BATCH, i * BATCH + len(part))
        texts.append(
            base.generate(
                part,
                attention_mask=torch.ones_like(part),
                custom_generate=eft.hf.generate,
                tuned=tuned,
                ref=ref,
                do_sample=True,
                top_k=0,
                seed=seeds,
                draft_tokens=k,
                max_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
    return torch.cat(texts), time.perf_counter() - start


def main(argv: list[str]) -> int:
    p = Parser(prog="python -m tools coupled", description=__doc__)
    p.add_argument("--texts", type=int, default=40)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--drafts", type=int, default=4)
    args = p.parse_args(argv)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FAMILY / "weights" / "base")
    ids = tokenizer((FAMILY / "heldout" / "a.txt").read_text(), verbose=False).input_ids
    prompts = torch.tensor(ids[: args.texts * 97]).view(args.texts, 97)[:, :PROMPT]
    print(f"{args.texts} texts of {args.tokens} tokens, K = {args.drafts}, temperature 1, one thread")
    print("| models | texts that differ from plain decoding's | seconds plain | seconds coupled |\n|---|--:|--:|--:|")
    for name, dtype, head in (
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("bfloat16, float32 head", torch.bfloat16, True),
    ):
        models = load(dtype, head)
        plain, t0 = write(models, prompts, args.tokens, 0)
        coupled, t1 = write(models, prompts, args.tokens, args.drafts)
        print(f"| {name} | {int((plain != coupled).any(1).sum())} | {t0:.1f} | {t1:.1f} |", flush=True)
    return 0
