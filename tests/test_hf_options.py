"""What people bring to `generate`: adapters, grammars, models that can also see, leftovers of checkpoints, prompts.

The oracles are those of tests/test_hf.py: full forwards without a cache, one unpadded row at a time.
"""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
from test_hf import PAD, PROMPTS, SAMPLED, V, llamas, make, oracle, padded, run  # noqa: E402, F401

# --- adapters ------------------------------------------------------------------------------------------------------


def adapted(seed=2, **options):
    """(a PeftModel over a small llama, a copy of that llama as it was before)."""
    peft = pytest.importorskip("peft")
    small = make("llama", seed)
    plain = copy.deepcopy(small)
    options = dict(dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]), **options)
    model = peft.get_peft_model(small, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return model, plain


def merged(model):
    """A model of its own with the adapter's change in its weights."""
    return copy.deepcopy(model).merge_and_unload().eval()


def test_tuned_that_is_ref_is_refused(llamas):  # noqa: F811
    base, tuned, ref = llamas[0], llamas[1], llamas[3]
    with pytest.raises(ValueError, match="tuned: has the same weights as ref.*model alone"):
        run([base, tuned, tuned])
    shared = make("llama", 7)
    for a, b in zip(shared.parameters(), tuned.parameters()):
        a.data = b.data
    with pytest.raises(ValueError, match="tuned: has the same weights as ref"):
        run([base, shared, tuned])
    with pytest.raises(ValueError, match=r"tuned\[1\]: has the same weights as ref"):
        run([base, tuned, ref, ref])
    with pytest.raises(ValueError, match=r"tuned\[1\]: has the same weights as tuned\[0\]"):
        run([base, tuned, tuned, ref])
    out = run([base, copy.deepcopy(ref), ref], **SAMPLED)  # equal weights held twice are somebody's experiment
    assert torch.equal(out, run([base, copy.deepcopy(ref), ref], draft_tokens=3, **SAMPLED))


@pytest.mark.parametrize("k", [0, 3])
def test_an_adapter_on_and_off_is_tuned_and_ref(llamas, k):  # noqa: F811
    base = llamas[0]
    model, plain = adapted()
    want = run([base, merged(model), plain], draft_tokens=k, **SAMPLED)
    assert not torch.equal(want, base.generate(**padded(), max_new_tokens=12, pad_token_id=PAD))
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    for ref in (None, model.get_base_model(), model.base_model):
        assert torch.equal(run([base, model, ref], draft_tokens=k, **SAMPLED), want)
    assert grads == {n: p.requires_grad for n, p in model.named_parameters()}
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():  # the adapter is on again
        torch.testing.assert_close(model(ids).logits, merged(model)(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_without_a_peft_model(llamas):  # noqa: F811
    peft = pytest.importorskip("peft")
    model, plain = adapted()
    own = copy.deepcopy(plain)
    # as transformers' own from_pretrained loads an adapter
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
                                 own)
    state = {n.removeprefix("base_model.model."): p for n, p in model.state_dict().items()}
    own.load_state_dict(state)
    want = run([llamas[0], merged(model), plain], **SAMPLED)
    assert torch.equal(run([llamas[0], own.eval(), None], **SAMPLED), want)
    with pytest.raises(ValueError, match="tuned: has the same weights as ref.*ref=None"):
        run([llamas[0], own, own])


def test_an_adapter_counts_as_part_of_base_and_ref(llamas):  # noqa: F811
    tuned, ref = llamas[1], llamas[3]
    model, plain = adapted()
    want = run([merged(model), tuned, ref], **SAMPLED)
    assert torch.equal(run([model, tuned, ref], **SAMPLED), want)
    assert torch.equal(run([tuned, ref, model], **SAMPLED), run([tuned, ref, merged(model)], **SAMPLED))
    want = run([tuned, ref, merged(model)], **SAMPLED)
    assert torch.equal(run([tuned, ref, model.get_base_model()], **SAMPLED), want)
    # amplifying an adapter: the same PeftModel as base and tuned, its base as ref
    want = run([merged(model), merged(model), plain], **SAMPLED)
    assert torch.equal(run([model, model, None], **SAMPLED), want)
    # the base module on its own, beside the PeftModel, is the model without the adapter
    want = run([plain, merged(model), plain], mode="proxy", alpha=2.0, **SAMPLED)
    assert torch.equal(run([model.get_base_model(), model, None], mode="proxy", alpha=2.0, **SAMPLED), want)


def test_two_adapters_of_two_models(llamas):  # noqa: F811
    (a, plain), (b, _) = adapted(2), adapted(3)
    want = run([llamas[0], merged(a), merged(b), plain], lam=0.3, **SAMPLED)
    assert torch.equal(run([llamas[0], a, b, a.get_base_model()], lam=0.3, **SAMPLED), want)
    with pytest.raises(ValueError, match="ref: got None"):  # two bases: which?
        run([llamas[0], a, b, None])


def test_adapters_that_cannot_be_switched_off_are_refused(llamas):  # noqa: F811
    peft = pytest.importorskip("peft")
    base, tuned = llamas[0], llamas[1]
    for config in (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
                   peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)):
        prompt = peft.get_peft_model(make("llama", 2), config)
        for models in ([base, prompt, None], [base, tuned, prompt]):
            name = "tuned" if models[1] is prompt else "ref"
            with pytest.raises(ValueError, match=f"{name}: {config.peft_type.value}.*virtual tokens"):
                run(models)
        with pytest.raises(ValueError, match=f"model: {config.peft_type.value}"):
            run([prompt, tuned, base])
    with pytest.raises(ValueError, match="ref: .*bias='all'.*cannot be switched off"):
        run([base, adapted(bias="all")[0], None])
    with pytest.raises(ValueError, match="ref: .*init_lora_weights='pissa'.*cannot be switched off"):
        run([base, adapted(init_lora_weights="pissa")[0], None])
    run([base, adapted(bias="all")[0], llamas[3]])  # not switched off: any adapter made of layers is right
    model, _ = adapted()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="tuned: its adapter is switched off"):
        run([base, model, None])
    with pytest.raises(ValueError, match="ref: got None, allowed is the model"):
        run([base, tuned, None])
