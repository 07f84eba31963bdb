"""Other architectures, padded vocabularies, two ranks, compiled graphs; and what is refused at start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from shipped import FAMILY, PROMPTS, override, requests_of
from test_engine import check

from benchmarks.vllm_engine import Engine


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, family):
    """A Qwen 2 and two Llamas of one config, random, with vocabularies of different lengths; composed."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = dict(num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, initializer_range=0.3)
    qwen = transformers.Qwen2Config(
        vocab_size=2112, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, **sizes
    )
    llama = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, **sizes
    )
    for seed, (name, config) in enumerate([("base", qwen), ("tuned", llama), ("ref", llama)]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(root / name)
        family.tokenizer.save_pretrained(root / name)
    models = [x for name in ("base", "tuned", "ref") for x in (f"--{name}", str(root / name))]
    command = [sys.executable, "-m", "eft_kernels", "compose", *models, "--out", str(root / "eft")]
    subprocess.run([*command, "--beta", "0.7", "--vocab-size", "2048"], check=True)
    return root


class Mixed:
    """The same models in transformers."""

    def __init__(self, root, family):
        self.tokenizer, self.ids = family.tokenizer, family.ids
        self.models = {
            name: transformers.AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
            for name in ("base", "tuned", "ref")
        }

    def generate(self, request):
        from shipped import Family

        family = Family.__new__(Family)
        family.tokenizer, family.models = self.tokenizer, self.models
        return family.generate(request, tuned=("tuned",), beta=0.7, vocab_size=2048)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": False},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    ],
    ids=["eager", "compiled", "tensor parallel"],
)
def test_mixed_architectures(mixed, family, options, tmp_path):
    requests = requests_of(12, temperature=0)
    environment = {"VLLM_CACHE_ROOT": str(tmp_path)}
    for _ in range(2 if "enforce_eager" in options else 1):  # cold and warm compile caches
        with Engine("v1", environment, model=str(mixed / "eft"), **options) as engine:
            check(Mixed(mixed, family), requests, engine.generate(requests))


def test_mixed_architectures_on_v2(mixed, family):
    requests = requests_of(8, temperature=0.8, top_k=20, seed=lambda i: i)
    with Engine("v2", model=str(mixed / "eft")) as engine:
        check(Mixed(mixed, family), requests, engine.generate(requests))


def test_v1_scores_with_the_up_scaling_filter(family):
    with Engine("v1", model=str(FAMILY / "base"), hf_overrides=override(mode="proxy", alpha=1.5)) as engine:
        requests = requests_of(4, temperature=0)
        check(family, requests, engine.generate(requests), mode="proxy", alpha=1.5)
    with Engine("v1", model=str(FAMILY / "base"), hf_overrides=override(upscale_top_p=0.7)) as engine:
        check(family, requests, engine.generate(requests), upscale_top_p=0.7)
        with pytest.raises(RuntimeError, match="a request's own weights need vLLM's V2 model runner"):
            engine.generate([dict(prompt=PROMPTS[0], max_tokens=2, extra_args={"eft": {"beta": 1.0}})])


DRAFT = {"method": "draft_model", "model": str(FAMILY / "tuned-a"), "num_speculative_tokens": 2}


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(hf_overrides={"architectures": ["EftForCausalLM"]}), "needs an object .eft. that names the models"),
        (dict(hf_overrides=override(gama=1)), "got the key 'gama', allowed are"),
        (dict(hf_overrides=override("ref")), "tuned and ref must be different models"),
        (dict(hf_overrides=override(mode="interpolate")), "mode: got 'interpolate', allowed is upscale"),
        (dict(hf_overrides=override(), speculative_config=DRAFT), "speculative_config: needs vLLM's V2 model runner"),
    ],
)
def test_refused_at_start(options, words):
    with pytest.raises(RuntimeError, match=words):
        Engine("v1", model=str(FAMILY / "base"), **options)


def test_other_tokenizer_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(FAMILY / "ref" / name)
    tokenizer = json.loads((FAMILY / "ref" / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = override()
    given["eft"]["ref"] = str(tmp_path)
    with pytest.raises(RuntimeError, match="tokenizers: .* allowed are models that share their ids"):
        Engine("v1", model=str(FAMILY / "base"), hf_overrides=given)


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(FAMILY / "ref")})
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    models = ["--base", str(FAMILY / "base"), "--tuned", str(tmp_path / "adapter"), "--ref", str(FAMILY / "ref")]
    subprocess.run(
        [sys.executable, "-m", "eft_kernels", "compose", *models, "--out", str(tmp_path / "eft")], check=True
    )
    with pytest.raises(RuntimeError, match="eft: tuned: is a PEFT adapter; .*compose --merge"):
        Engine(model=str(tmp_path / "eft"))


def test_tensors_between_pipeline_stages():
    """vLLM's CPU engine has no pipelines (its own models fail too): what is sent there comes apart as it was put in."""
    from vllm.sequence import IntermediateTensors

    from eft_kernels.integrations.vllm.model import joined, part_of

    parts = {
        name: IntermediateTensors({"hidden_states": torch.full((3, width), width), "residual": torch.zeros(3, width)})
        for name, width in (("base", 8), ("tuned", 4), ("ref", 4))
    }
    for name, part in parts.items():
        assert part_of(joined(parts), name) == part
    assert part_of(None, "base") is None


def test_unknown_version_is_refused(monkeypatch):
    import vllm

    from eft_kernels.integrations.vllm.startup import check_version

    check_version()
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(ValueError, match="vLLM 0.31.2 is not known to work; allowed is vLLM 0.32"):
        check_version()
