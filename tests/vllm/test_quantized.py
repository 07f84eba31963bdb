"""Quantised models among those that are combined."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipped import FAMILY, PROMPTS, override

from benchmarks.vllm_engine import Engine

GROUP = 32  # inputs of an int4 weight that share a scale


def quantize(source, out, bits: int):
    """A checkpoint in the format of compressed-tensors: int8 weights and activations, or int4 weights alone."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors.pop(name).float()
        stem, groups = name.removesuffix(".weight"), w.shape[1] if bits == 8 else GROUP
        top = 2 ** (bits - 1) - 1
        w = w.view(len(w), -1, groups)
        scale = w.abs().amax(-1, keepdim=True) / top
        q = (w / scale).round().clamp(-top, top).flatten(1)
        tensors[f"{stem}.weight_scale"] = scale.squeeze(-1)
        if bits == 8:
            tensors[f"{stem}.weight"] = q.to(torch.int8)
        else:  # 8 of them in an int32, the first in the lowest bits, 8 added to each
            words = ((q + 8).to(torch.int64).view(len(q), -1, 8) << torch.arange(0, 32, 4)).sum(-1)
            tensors[f"{stem}.weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
            tensors[f"{stem}.weight_shape"] = torch.tensor(q.shape)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    weights = dict(num_bits=bits, type="int", symmetric=True, dynamic=False)
    weights |= dict(strategy="channel") if bits == 8 else dict(strategy="group", group_size=GROUP)
    activations = dict(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = dict(
        quant_method="compressed-tensors",
        format="int-quantized" if bits == 8 else "pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={
            "group_0": dict(targets=["Linear"], weights=weights, input_activations=activations if bits == 8 else None)
        },
    )
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out / name)
    return out


def logprobs(model, dtype: str, text: list[int], top: int, **options) -> list[dict]:
    """{token: log-prob} of each place of ``text`` but the first, by a model in vLLM."""
    with Engine("v1", model=str(model), dtype=dtype, max_logprobs=-1, **options) as engine:
        (output,) = engine.generate([dict(prompt=text, max_tokens=1, prompt_logprobs=top)])
    return output["prompt_logprobs"][1:]


@pytest.mark.parametrize(
    "quantized,dtype,near",
    # vLLM's int4 kernel for CPUs takes no float32
    [({"base": 8, "tuned": 8}, "float32", 1e-3), ({"base": 4}, "bfloat16", 0.1)],
    ids=["int8", "int4"],
)
def test_quantized_models(family, quantized, dtype, near, tmp_path):
    """The composite's log-probs are those of the sum of what its models say alone, and not the whole models'."""
    folders = {"base": FAMILY / "base", "tuned": FAMILY / "tuned-a", "ref": FAMILY / "ref"}
    text = [i for prompt in PROMPTS[:6] for i in family.ids(prompt)]
    whole, alone = {}, {}  # float32 [places, V] of each model
    for name, folder in folders.items():
        with torch.no_grad():
            whole[name] = alone[name] = family.models[folder.name](torch.tensor([text])).logits[0, :-1]
        if name in quantized:
            folders[name] = quantize(folder, tmp_path / name, quantized[name])
            rows = logprobs(folders[name], dtype, text, -1)
            alone[name] = torch.tensor([[row[str(i)] for i in range(len(row))] for row in rows])
    given = override()
    given["eft"] |= {name: str(folders[name]) for name in ("tuned", "ref")}
    rows = logprobs(folders["base"], dtype, text, 0, hf_overrides=given)
    got = torch.tensor([row[str(i)] for row, i in zip(rows, text[1:])])

    def distance(models) -> float:
        scores = (models["base"] + models["tuned"] - models["ref"]).log_softmax(-1)
        return (got - scores.gather(1, torch.tensor(text[1:])[:, None])[:, 0]).abs().max().item()

    assert distance(alone) < near
    assert distance(whole) > 2 * near, "quantisation changed nothing"
