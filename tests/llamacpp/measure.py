"""How far llama.cpp is from transformers on the same weights; docs/llama.cpp.md says how to run it.

Texts of 64 tokens from the beginnings of 50 held-out lines, a seed each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from gguf_files import WEIGHTS, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import eft_kernels as eft
from eft_kernels.integrations.llama_cpp import EmulatedModel
from eft_kernels.integrations.llama_cpp.library import library

NAMES = ("base", "tuned-a", "ref")
HELDOUT = WEIGHTS.parent / "heldout" / "a.txt"


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = [AutoModelForCausalLM.from_pretrained(WEIGHTS / n, dtype=torch.float32).eval() for n in NAMES]
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "base")
    caches = {"f16": {}} if library().fork else {"f16": {}, "f32": {"kv_type": "f32", "flash_attention": False}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = [write_llama(Path(folder) / f"{n}.gguf", n) for n in NAMES]
        for cache, settings in caches.items():
            with EmulatedModel(*paths, n_threads=1, **settings) as model:
                print(f"{library().package}, cache {cache}:")
                compare(model, models, tokenizer)


def compare(model, models, tokenizer) -> None:
    text = HELDOUT.read_text(encoding="utf-8")
    ids = tokenizer(text).input_ids[:500]
    apart = largest = 0.0
    for ours, theirs in zip(model.models, models):
        want = theirs(torch.tensor([ids])).logits[0]
        apart = max(apart, float((ours.read(ids, len(ids)) - want).abs().max()))
        largest = max(largest, float(want.abs().max()))
    print(f"  logits of 500 tokens: within {apart:.1e}, the largest {largest:.1f}")

    lines = [line for line in text.splitlines() if len(line) > 40]
    prompts = [" ".join(line.split()[:6]) for line in lines[:: len(lines) // 50]][:50]
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}):
        same = coupled = 0
        for seed, prompt in enumerate(prompts):
            plain = model.generate(prompt, seed=seed, **sampling).ids
            same += plain == generate(models, tokenizer(prompt, return_tensors="pt"), seed, sampling)
            coupled += plain == model.generate(prompt, seed=seed, draft_tokens=4, **sampling).ids
        print(f"  {sampling}: of {len(prompts)} texts equal to transformers {same}, coupled equal to plain {coupled}")


def generate(models, inputs, seed: int, sampling: dict[str, float]) -> list[int]:
    base, tuned, ref = models
    how = {"do_sample": True, "top_k": 0, "seed": seed, **sampling} if sampling["temperature"] else {"do_sample": False}
    out = base.generate(**inputs, custom_generate=eft.hf.generate, tuned=tuned, ref=ref, max_new_tokens=64, **how)
    return out[0, inputs.input_ids.shape[1] :].tolist()


if __name__ == "__main__":
    main()
