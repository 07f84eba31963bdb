"""`generate` as it was, with two small models named: three requests of one batch, each with its own settings.

python examples/with_transformers.py [BASE TUNED REF]      # default: the example family
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eft_kernels as eft

FAMILY = Path(__file__).parent / "family" / "weights"
names = sys.argv[1:4] or [str(FAMILY / name) for name in ("base", "tuned-a", "ref")]
tokenizer = AutoTokenizer.from_pretrained(names[0], padding_side="left")
base, tuned, ref = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in names)

prompts = ["And the king said", "In the morning", "The young man was not"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
out = base.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    custom_generate=eft.hf.generate,
    tuned=tuned,
    ref=ref,
    beta=torch.tensor([1.0, 1.0, 1.3]),  # a number, or one for each request
    draft_tokens=4,
    verify="token",  # tuned drafts, base and ref check four at once
    do_sample=True,
    temperature=torch.tensor([0.7, 0.0, 1.0]),
    top_k=0,
    top_p=0.95,
    max_new_tokens=40,
    seed=1,
    return_dict_in_generate=True,
)
for prompt, row in zip(prompts, out.sequences[:, inputs.input_ids.shape[1] :]):
    print(f"{prompt} ...{tokenizer.decode(row, skip_special_tokens=True)}\n")
print(f"{out.speculation.acceptance:.0%} of the drafts accepted, {out.speculation.tokens_per_round:.1f} tokens a round")
