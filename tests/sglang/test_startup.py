"""What is refused before a model starts."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import stubs
from engine import Engine

from tests.vllm.shipped import FAMILY, override

stubs.install()

from sglang.srt.server_args import ServerArgs

from eft_kernels.integrations.sglang import startup


def args(**more) -> ServerArgs:
    given = dict(model_path=str(FAMILY / "base"), json_model_override_args=json.dumps(override()), device="cpu")
    return ServerArgs(**given | more)


def test_plain_start_passes():
    startup.check(args())


ON = {"speculative_algorithm": "STANDALONE", "lora_paths": ["a"], "disaggregation_mode": "prefill",
      "elastic_ep_backend": "mooncake", "dllm_algorithm": "LowConfidence", "cpu_offload_gb": 2,
      "offload_group_size": 4, "startup_weight_load_mode": "overlap", "custom_weight_loader": ["a"],
      "weight_cache_mode": "on"}  # fmt: skip


@pytest.mark.parametrize("name", startup.REFUSED)
def test_options_for_base_alone(name):
    off = startup.REFUSED[name][0]
    assert getattr(ServerArgs(model_path=""), name) == off, "SGLang has another default"
    on = ON.get(name, 2 if isinstance(off, int) and not isinstance(off, bool) else True)
    with pytest.raises(ValueError, match=f"{name}: got .*, allowed is {off!r}"):
        startup.check(args(**{name: on}))


@pytest.mark.parametrize(
    "changed,words",
    [
        (dict(gama=1), "got the key 'gama', allowed are"),
        (dict(tuned="ref"), "tuned and ref must be different models"),
        (dict(mode="interpolate"), "mode: got 'interpolate', allowed is upscale"),
    ],
)
def test_bad_combinations(changed, words):
    with pytest.raises(ValueError, match=words):
        startup.check(args(json_model_override_args=json.dumps(override(**changed))))


def test_other_tokenizers(tmp_path):
    shutil.copytree(FAMILY / "ref", tmp_path / "ref")
    file = tmp_path / "ref" / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    swapped = text.replace('"hat":304', '"hat":303').replace('"ot":303', '"ot":304')
    assert swapped != text
    file.write_text(swapped, encoding="utf-8")
    given = override()
    given["eft"]["ref"] = str(tmp_path / "ref")
    with pytest.raises(ValueError, match="tokenizers: 'hat' is 303 for ref and 304 for base"):
        startup.check(args(json_model_override_args=json.dumps(given)))


def test_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    given = override()
    given["eft"]["tuned"] = str(tmp_path)
    with pytest.raises(ValueError, match="tuned: is a PEFT adapter; .*compose --merge"):
        startup.check(args(json_model_override_args=json.dumps(given)))


def test_post_capture_sizing(monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1")
    with pytest.raises(ValueError, match="SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        startup.check(args())


def test_sampling_backend_of_other_models():
    with pytest.raises(ValueError, match="sampling_backend: got 'eft'"):
        startup.check(ServerArgs(model_path=str(FAMILY / "base"), device="cpu", sampling_backend="eft"))


def test_fused_sampling_on_policy():
    with pytest.raises(ValueError, match="rl_on_policy_target: goes with SGLang's own sampler"):
        startup.check(args(sampling_backend="eft", rl_on_policy_target="fsdp"))


def test_unknown_version(monkeypatch):
    monkeypatch.setattr("sglang.version.__version__", "0.5.24")
    with pytest.raises(ValueError, match="SGLang 0.5.24 is not known to work; allowed is SGLang 0.5.23"):
        startup.check(args())


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(enable_hierarchical_cache=True), "enable_hierarchical_cache: got True, allowed is False"),
        (dict(context_length=4096), "4096"),
    ],
)
def test_the_engine_says_why(options, words):
    given = dict(model_path=str(FAMILY / "base"), json_model_override_args=json.dumps(override()))
    with pytest.raises(RuntimeError, match=words):
        Engine(**given, **options)


def test_models_that_cannot_stand_side_by_side():
    from sglang.srt.configs.model_config import ModelConfig

    from eft_kernels.integrations.sglang.runner import check_models

    def config(**more):
        found = ModelConfig(str(FAMILY / "base"))
        for name, value in more.items():
            setattr(found, name, value)
        return found

    names, base = ("base", "tuned", "ref"), config()
    check_models(names, [base] * 3, base)
    for more, words in [
        (dict(attention_arch=None), "keeps other states"),
        (dict(is_hybrid_swa=True), "pass --disable-hybrid-swa-memory"),
        (dict(num_nextn_predict_layers=1), "has layers for speculation"),
        (dict(is_multimodal=True), "is not a language model of text alone"),
    ]:
        with pytest.raises(ValueError, match=f"tuned: LlamaForCausalLM .*{words}"):
            check_models(names, [base, config(**more), base], base)
    with pytest.raises(ValueError, match="vocab_size: got 2048, the models share 2000 ids"):
        check_models(names, [base, config(vocab_size=2000), base], SimpleNamespace(vocab_size=2048))


def test_the_memory_is_shared(monkeypatch):
    """Of what is free, base's cache takes the share that its tokens have of all."""
    from eft_kernels.integrations.sglang.runner import KVCacheConfigurator, SharedBudget

    monkeypatch.setattr(KVCacheConfigurator, "config_from_budget", lambda self, budget, cap_tokens=None: budget)
    configurator = SharedBudget.__new__(SharedBudget)
    configurator.share = (3840, 3840 + 2 * 1536)
    assert configurator.config_from_budget(6912 * 100) == 3840 * 100
