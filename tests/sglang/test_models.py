"""Other models, other strengths, other ways to start; and what is refused at start."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from engine import Engine
from test_engine import as_sglang, check, ids

from tests.vllm.shipped import FAMILY, Family, override, requests_of


def test_equal_tuned_and_ref_leave_base(compose, family, tmp_path):
    shutil.copytree(FAMILY / "ref", tmp_path / "copy")
    requests = ids(family, requests_of(8, temperature=0))
    with Engine(model_path=compose("base", [tmp_path / "copy"])) as engine:
        outputs = engine.generate(requests)
    for request, output in zip(requests, outputs):
        prompt = torch.tensor([request["prompt"]])
        alone = family.models["base"].generate(prompt, do_sample=False, max_new_tokens=request["max_tokens"])
        assert output["output_ids"] == alone[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options,asked",
    [
        (["--beta", "1.7"], dict(beta=1.7)),
        (
            ["--mode", "proxy", "--alpha", "1.5", "--upscale-top-p", "0.8"],
            dict(mode="proxy", alpha=1.5, upscale_top_p=0.8),
        ),
    ],
    ids=["beta", "proxy, up-scaling filter"],
)
def test_strengths_of_the_folder(compose, family, options, asked):
    requests = ids(family, requests_of(8, temperature=0))
    with Engine(model_path=compose("base", ["tuned-a"], "ref", *options)) as engine:
        check(family, requests, engine.generate(requests), **asked)


def test_two_tuned_models(compose, family):
    folder = compose("base", ["tuned-a", "tuned-b"], "ref", "--lam", "0.7")
    both = dict(tuned=("tuned-a", "tuned-b"))
    with Engine(model_path=folder, sampling_backend="eft") as engine:
        requests = requests_of(6, seed=lambda i: i, temperature=0.8)
        check(family, requests, engine.generate(as_sglang(family, requests)), lam=0.7, **both)
        requests = requests_of(4, seed=lambda i: i, extra_args={"eft": {"lam": 0.2}})
        check(family, requests, engine.generate(as_sglang(family, requests)), **both)


def test_without_a_folder(family):
    requests = ids(family, requests_of(6, temperature=0))
    with Engine(model_path=str(FAMILY / "base"), json_model_override_args=json.dumps(override(beta=1.3))) as engine:
        check(family, requests, engine.generate(requests), beta=1.3)


@pytest.fixture(scope="module")
def mixed(compose, tmp_path_factory, family):
    """A Qwen 2 and two Llamas, random, with other heads and vocabularies of different lengths: folder, models."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = dict(num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, initializer_range=0.3)
    qwen = transformers.Qwen2Config(
        vocab_size=2112, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, **sizes
    )
    llama = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, **sizes
    )
    models = {}
    for seed, (name, config) in enumerate([("base", qwen), ("tuned", llama), ("ref", llama)]):
        torch.manual_seed(seed)
        models[name] = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        models[name].save_pretrained(root / name)
        family.tokenizer.save_pretrained(root / name)
    folder = compose(root / "base", [root / "tuned"], root / "ref", "--beta", "0.7", "--vocab-size", "2048")
    theirs = Family.__new__(Family)
    theirs.tokenizer, theirs.models = family.tokenizer, models
    return folder, theirs


@pytest.mark.parametrize("options", [{}, {"tp_size": 2}], ids=["one rank", "tensor parallel"])
@pytest.mark.parametrize("sampler", ["pytorch", "eft"])
def test_mixed_architectures(mixed, options, sampler):
    folder, theirs = mixed
    requests = requests_of(8, temperature=0, seed=0)
    if sampler == "eft":
        requests = requests_of(8, temperature=0.8, top_k=20, seed=lambda i: i)
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"} if "tp_size" in options else {}
    with Engine(binding, model_path=folder, sampling_backend=sampler, **options) as engine:
        outputs = engine.generate(as_sglang(theirs, requests))
        check(theirs, requests, outputs, tuned=("tuned",), beta=0.7, vocab_size=2048)
