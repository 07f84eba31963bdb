"""The operations in a loop of your own: logits of any source in, tokens and log-probs out; then a verified draft.

python examples/own_loop.py
"""

import torch

import eft_kernels as eft

V, ROWS, K = 32000, 4, 3
generator = torch.Generator().manual_seed(0)


def model(rows: int, dtype=torch.bfloat16) -> torch.Tensor:
    """Stands for a forward pass: logits [rows, V]."""
    return (3 * torch.randn(rows, V, generator=generator)).to(dtype)


# One step of plain decoding. The noise is a function of (seed, position) alone, so give every row a seed of its own and
# count positions from its first new token: rows may then join, leave and move without changing anybody's text.
seeds = eft.row_seeds(7, ROWS)
for step in range(3):
    logits = [model(ROWS), model(ROWS), model(ROWS, torch.float32)]  # base, tuned, ref: any mix of dtypes
    out = eft.sample(
        logits, eft.upscale(torch.tensor([1.0, 1.0, 1.5, 0.5])), temperature=0.8, top_p=0.9, seed=seeds, position=step
    )
    print("step", step, "tokens", out.tokens.tolist(), "log-probs", [round(x, 2) for x in out.logprobs.tolist()])

# One speculative round: the tuned model drafts K tokens one by one, hotter than the target, and keeps its logits ...
position, drafts, tuned = 3, [], []
for j in range(K + 1):
    tuned.append(model(ROWS))
    if j < K:
        drafts.append(eft.draft(tuned[j], slot=j, method="block", temperature=0.9, seed=seeds, position=position + j))
# ... and base and ref score all K + 1 positions at once. The drafts say what they were drawn by.
tuned = torch.stack(tuned, 1)  # [ROWS, K + 1, V]
base, ref = (tuned + 0.5 * torch.randn(tuned.shape, generator=generator).bfloat16() for _ in range(2))
ver = eft.verify(
    [base, tuned, ref], eft.upscale(), drafts, method="block", draft=1, temperature=0.8, seed=seeds, position=position
)
for row in range(ROWS):
    n = int(ver.num_emitted[row])
    print(f"row {row}: {n - 1} of {K} drafts accepted, tokens {ver.tokens[row, :n].tolist()}")
