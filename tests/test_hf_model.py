"""`eft.hf.EmulatedModel`: one model of transformers, in everything that takes a model.

The oracles are plain: sums of the models' own logits, loops over full forwards without caches, and transformers' own
strategies on a model that computes the sum anew at every step.
"""

import copy
import functools
import json
import math
import os
import re

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from test_hf import EOS, FAMILIES, GQA, PAD, PROMPTS, SAMPLED, V, full_logits, make, padded, run
from test_hf_options import NEGATIVE, adapted, guided, merged
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import eft_kernels as eft
from eft_kernels.cli import main
from eft_kernels.integrations.hf.cache import CACHE

FAMILY = os.path.join(os.path.dirname(__file__), "..", "examples", "family", "weights", "")
EmulatedModel = eft.hf.EmulatedModel


@pytest.fixture(scope="module")
def three(llamas):
    return [llamas[0], llamas[1], llamas[3]]


@pytest.fixture(scope="module")
def model(three):
    return EmulatedModel(*three)


class Naive(PreTrainedModel, GenerationMixin):
    """The sum of the models' logits, computed from the whole text at every step: what strategies are held against.

    own: a list of prompts for each model and row, read in the place of the first ``shared`` columns.
    """

    def __init__(self, models, weights=(1.0, 1.0, -1.0), own=None, shared=0):
        super().__init__(transformers.LlamaConfig(vocab_size=V))
        self.models, self.weights, self.own, self.shared = list(models), weights, own, shared
        self.generation_config = GenerationConfig(pad_token_id=PAD, use_cache=False)

    @property
    def device(self):
        return torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        rows = []
        for b, ids in enumerate(input_ids.tolist()):
            left = 0 if attention_mask is None else int((attention_mask[b] == 0).sum())
            texts = [ids[left:]] * len(self.models)
            if self.own is not None:
                beams = len(input_ids) // len(self.own)
                texts = [p + ids[self.shared :] for p in self.own[b // beams]]
            rows.append(sum(w * full_logits(m, t)[-1] for w, m, t in zip(self.weights, self.models, texts)))
        return CausalLMOutputWithPast(logits=torch.stack(rows)[:, None])

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return dict(input_ids=input_ids, attention_mask=attention_mask)


# --- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_is_the_sum_of_weights_times_logits(family):
    models = [make(family, s) for s in (1, 2, 3)]
    emulated = EmulatedModel(*models, beta=1.5)
    inputs = padded()
    each = [m(**inputs).logits for m in models]
    want = 1.5 * each[0] + each[1] - 1.5 * each[2]
    out = emulated(**inputs)
    assert torch.equal(out.logits, want) and out.logits.dtype is torch.float32 and getattr(out, CACHE) is None
    assert torch.equal(emulated(**inputs, logits_to_keep=2).logits, want[:, -2:])
    assert torch.equal(emulated(**inputs, logits_to_keep=torch.tensor([1, 4])).logits, want[:, [1, 4]])
    assert torch.equal(emulated(**inputs, return_dict=False)[0], want)
    beta = torch.tensor([1.0, 0.0, 2.0, 1.5])
    rows = each[0] * beta[:, None, None] + each[1] - each[2] * beta[:, None, None]
    torch.testing.assert_close(emulated(**inputs, beta=beta).logits, rows)


@torch.no_grad()
def test_forward_in_every_mode(llamas, model, three):
    inputs = padded()
    base, a, b, ref = (m(**inputs).logits for m in llamas)
    close = torch.testing.assert_close
    close(EmulatedModel(*three, mode="proxy", alpha=2.0)(**inputs).logits, base + 2 * a - 2 * ref)
    close(model(**inputs, alpha=0.5).logits, base + 0.5 * a - 0.5 * ref)
    mixed = EmulatedModel(llamas[0], [llamas[1], llamas[2]], llamas[3], lam=0.25)
    close(mixed(**inputs).logits, base + 0.25 * a + 0.75 * b - ref)
    free = EmulatedModel(llamas[0], models=[llamas[1]], weights=[1.5, -0.5])
    close(free(**inputs).logits, 1.5 * base - 0.5 * a)
    flat = [z.reshape(-1, V) for z in (base, a, ref)]
    want = eft.logprobs(flat, eft.upscale(), upscale_top_p=0.7).view_as(base)
    close(EmulatedModel(*three, upscale_top_p=0.7)(**inputs).logits.log_softmax(-1), want)
    assert not torch.allclose(want, (base + a - ref).log_softmax(-1))
    out = model(**inputs, upscale_top_p=torch.tensor([0.7, 1.0, 0.7, 1.0])).logits
    close(out[0].log_softmax(-1), want[0])
    close(out[1], (base + a - ref)[1])


UNUSUAL = {
    "mixtral": dict(GQA, num_local_experts=4, num_experts_per_tok=2),  # its config says how experts are computed
    "xlnet": dict(vocab_size=V, d_model=16, n_layer=2, n_head=2, d_inner=32),  # and this one holds no longest text
}


@pytest.mark.parametrize("family", UNUSUAL)
@torch.no_grad()
def test_unusual_configs(family):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **UNUSUAL[family])
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(3)]
    ids = torch.tensor(PROMPTS[:1])
    want = models[0](ids).logits + models[1](ids).logits - models[2](ids).logits
    emulated = EmulatedModel(*models)
    assert torch.equal(emulated(ids).logits, want)
    if family == "mixtral":
        options = dict(num_beams=2, max_new_tokens=4, pad_token_id=PAD)
        assert torch.equal(emulated.generate(ids, **options), Naive(models).generate(ids, **options))


@torch.no_grad()
def test_labels_give_the_loss(model):
    ids = torch.tensor(PROMPTS[:1])
    out = model(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, want)


@torch.no_grad()
def test_excluded_tokens_stay_excluded(three):
    models = [copy.deepcopy(m) for m in three]
    for m in models:
        m.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    models[2].lm_head.bias.data[7] = -math.inf
    out = EmulatedModel(*models)(torch.tensor(PROMPTS[:1])).logits
    assert torch.equal(out[..., 7], torch.full_like(out[..., 7], -math.inf)) and not out.isnan().any()
    out = EmulatedModel(*models, beta=0.0)(torch.tensor(PROMPTS[:1])).logits
    assert out[..., 7].isfinite().all()  # a model of weight 0 excludes nothing


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_goes_on_where_the_text_was_left(family):
    emulated = EmulatedModel(*(make(family, s) for s in (1, 2, 3)))
    ids = torch.tensor([PROMPTS[0] * 2, PROMPTS[4 % len(PROMPTS)][:6] * 2])
    want = emulated(ids).logits
    out = emulated(ids[:, :5], use_cache=True)
    torch.testing.assert_close(out.logits, want[:, :5], atol=2e-4, rtol=1e-3)
    for i in range(5, 12):
        out = emulated(ids[:, i : i + 1], **{CACHE: out[CACHE]})
        torch.testing.assert_close(out.logits, want[:, i : i + 1], atol=2e-4, rtol=1e-3)
    assert out[CACHE].get_seq_length() == 12 and out[CACHE].batch_size == 2
    out[CACHE].batch_select_indices(torch.tensor([1]))
    out[CACHE].batch_repeat_interleave(2)
    again = emulated(ids[:1, :1].expand(2, 1), **{CACHE: out[CACHE]}).logits
    want = emulated(torch.cat([ids[1:], ids[:1, :1]], 1)).logits[0, -1]
    torch.testing.assert_close(again[:, 0], want.expand(2, -1), atol=2e-4, rtol=1e-3)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLED,
        dict(SAMPLED, draft_tokens=3),
        dict(SAMPLED, draft_tokens=3, verify="block", num_return_sequences=2),
        dict(SAMPLED, beta=torch.tensor([1.0, 0.0, 2.0, 1.5]), temperature=torch.tensor([0.0, 0.5, 1.0, 2.0])),
        dict(SAMPLED, alpha=0.5, mode="proxy"),
        dict(SAMPLED, upscale_top_p=0.5),
        dict(repetition_penalty=1.5, eos_token_id=7),
    ],
    ids=str,
)
def test_generate_is_hf_generate(model, three, options):
    own = {k: v for k, v in options.items() if k != "mode"}
    want = run(three, **options)
    out = model.generate(**padded(), max_new_tokens=12, pad_token_id=PAD, **{"seed": 3, **own})
    assert torch.equal(out, want)


def test_trees_of_drafts_arrive(model, three):
    tree = dict(SAMPLED, draft_tokens=3, draft_width=2, draft_budget=5, return_dict_in_generate=True)
    want = run(three, **tree)
    out = model.generate(**padded(), max_new_tokens=12, pad_token_id=PAD, seed=3, **tree)
    assert torch.equal(out.sequences, want.sequences)
    assert torch.equal(out.speculation.drafted, want.speculation.drafted)
    assert torch.equal(out.speculation.ranks, want.speculation.ranks) and out.speculation.ranks.shape == (3, 3)


def test_generate_in_every_way_that_it_is_called(model, three):
    ids = torch.tensor(PROMPTS[:1])
    want = run(three, dict(input_ids=ids), **SAMPLED)
    config = GenerationConfig(**{**SAMPLED, "max_new_tokens": 12, "pad_token_id": PAD})
    assert torch.equal(model.generate(ids, config, seed=3), want)
    assert torch.equal(model.generate(inputs=ids, generation_config=config, seed=3), want)
    assert torch.equal(model.generate(ids, config, seed=3, custom_generate=eft.hf.generate), want)
    out = model.generate(ids, config, seed=3, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, want) and len(out.scores) == 12 and isinstance(out, eft.hf.EmulatedOutput)
    assert torch.equal(EmulatedModel(*three, beta=2.0).generate(ids, config, seed=3, beta=1.0), want)
    assert not torch.equal(EmulatedModel(*three, beta=2.0).generate(ids, config, seed=3), want)


def test_end_tokens_of_all_models(three):
    models = [copy.deepcopy(m) for m in three]
    free = run(models, dict(input_ids=torch.tensor(PROMPTS[:1])))
    models[0].generation_config.eos_token_id = EOS
    models[1].generation_config.eos_token_id = [EOS, int(free[0, 9])]
    emulated = EmulatedModel(*models)
    assert emulated.generation_config.eos_token_id == sorted({EOS, int(free[0, 9])}) == emulated.config.eos_token_id
    out = emulated.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=12)
    assert torch.equal(out, free[:, : out.shape[1]]) and out[0, -1] == free[0, 9]
    emulated.generation_config.eos_token_id = EOS  # no model's own comes back
    longer = emulated.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=12)
    assert torch.equal(longer, free[:, : longer.shape[1]]) and longer[0, -1] == EOS and longer.shape[1] > out.shape[1]
    emulated.generation_config.eos_token_id = [EOS, int(free[0, 9])]
    beams = emulated.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=30, num_beams=3)
    assert beams.shape[1] < 36 and int(beams[0, -1]) in emulated.generation_config.eos_token_id


@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
def test_beams_are_transformers_on_the_sum(family):
    """Of every kind of cache: attention, windows, states."""
    if family == "mamba":
        config = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3)
        config = transformers.AutoConfig.for_model("mamba", **config, pad_token_id=PAD, eos_token_id=EOS)
        models = []
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            models.append(AutoModelForCausalLM.from_config(config).eval())
            with torch.no_grad():
                for p in models[-1].parameters():
                    p.add_(torch.randn_like(p) * 0.2)
            models[-1].generation_config.eos_token_id = None
    else:
        models = [make(family, s) for s in (1, 2, 3)]
    options = dict(num_beams=3, num_return_sequences=2, max_new_tokens=8, pad_token_id=PAD, no_repeat_ngram_size=3)
    want = Naive(models).generate(**padded(PROMPTS[:2]), **options)
    emulated = EmulatedModel(*models)
    if family == "mamba" and not hasattr(transformers.cache_utils, "LinearAttentionLayer"):  # 5.0: no rows to move
        with pytest.raises(
            ValueError, match=r"num_beams: base \(MambaForCausalLM\) keeps cache_params of its own kind"
        ):
            emulated.generate(**padded(PROMPTS[:2]), **options)
        return
    assert torch.equal(emulated.generate(**padded(PROMPTS[:2]), **options), want)
    assert len(set(map(tuple, want.tolist()))) == 4


def test_beams_read_a_prompt_in_chunks(model):
    options = dict(num_beams=2, max_new_tokens=6, pad_token_id=PAD)
    want = model.generate(**padded(), **options)
    assert torch.equal(model.generate(**padded(), prefill_chunk_size=4, **options), want)


def test_beams_with_strengths_of_each_row(model, three):
    options = dict(num_beams=3, max_new_tokens=8, pad_token_id=PAD)
    out = model.generate(**padded(), beta=torch.tensor([1.0, 0.0, 2.0, 0.5]), **options)
    assert torch.equal(out, model.generate(**padded(), beta=[1.0, 0.0, 2.0, 0.5], **options))
    for b, beta in enumerate((1.0, 0.0, 2.0, 0.5)):
        want = Naive(three, (beta, 1.0, -beta)).generate(**padded([PROMPTS[b]]), **options)
        assert torch.equal(out[b, 6:], want[0, len(PROMPTS[b]) :]), b


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_assisted_decoding_and_prompt_lookup_are_greedy(family):
    models = [make(family, s) for s in (1, 2, 3)]
    emulated, ids = EmulatedModel(*models), torch.tensor([PROMPTS[0] * 2])
    options = dict(max_new_tokens=14, pad_token_id=PAD, eos_token_id=EOS)  # 5.0's prompt lookup needs one
    want = emulated.generate(ids, **options)
    assert torch.equal(emulated.generate(ids, prompt_lookup_num_tokens=3, **options), want)
    if family != "gemma2" or CACHE == "cache":  # until then an assistant's own cache could not leave a window
        assert torch.equal(emulated.generate(ids, assistant_model=models[1], **options), want)


def test_a_custom_generate_runs_over_the_forward(model, three):
    def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        for _ in range(5):
            cache = kwargs[CACHE]
            logits = model(input_ids[:, cache.get_seq_length() :], **{CACHE: cache}).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
        return input_ids

    ids = torch.tensor(PROMPTS[:1])
    want = model.generate(ids, max_new_tokens=5, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, custom_generate=greedy, max_new_tokens=5, pad_token_id=PAD), want)


class Even(LogitsProcessor):
    """Structured output as outlines and guidance do it: a processor that masks the scores."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -math.inf)


@pytest.mark.parametrize("options", [{}, SAMPLED, dict(SAMPLED, draft_tokens=3), dict(num_beams=3)], ids=str)
def test_logits_processors(model, options):
    allowed = dict(prefix_allowed_tokens_fn=lambda batch, ids: [4, 8, 11, 12])
    out = model.generate(
        **padded(),
        max_new_tokens=8,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([Even()]),
        **options,
        **allowed,
    )
    assert set(out[:, 6:].flatten().tolist()) <= {4, 8, 12} and out[:, 6:].unique().numel() > 1


def test_a_grammar(model):
    xgrammar = pytest.importorskip("xgrammar")
    info = xgrammar.TokenizerInfo([f"<{i}>" for i in range(V)], vocab_size=V, stop_token_ids=[EOS])
    grammar = xgrammar.GrammarCompiler(info).compile_grammar('root ::= ("<5>" | "<6>") ("<7>" | "<8>") "<9>"')
    for options in ({}, dict(SAMPLED, draft_tokens=2)):
        processor = xgrammar.contrib.hf.LogitsProcessor(grammar)
        out = model.generate(
            torch.tensor(PROMPTS[:1]), max_new_tokens=6, pad_token_id=PAD, eos_token_id=EOS,
            logits_processor=LogitsProcessorList([processor]), **options,
        )  # fmt: skip
        a, b, c, end = out[0, 6:].tolist()
        assert a in (5, 6) and b in (7, 8) and (c, end) == (9, EOS)


# --- a prompt for each model ------------------------------------------------------------------------------------------

TUNED = [[9, 9, 5, 6], [4], [13, 14, 15, 16, 17, 18, 19, 20], [7, 8]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom"])
def test_a_prompt_of_the_tuned_models_own(family):
    """A system prompt that tuned alone reads, say; held against full forwards, row by row."""
    models = [make(family, s) for s in (1, 2, 3)]
    emulated = EmulatedModel(*models)
    own = list(zip(PROMPTS, TUNED, PROMPTS))
    sampled = dict(temperature=0.9, top_p=0.95)
    want = guided(models, (1.0, 1.0, -1.0), own, **sampled)
    options = dict(max_new_tokens=12, pad_token_id=PAD, seed=3, **SAMPLED)
    for extra in ({}, dict(draft_tokens=3)):
        out = emulated.generate(**padded(), prompts={"tuned": padded(TUNED)}, **extra, **options)
        assert torch.equal(out[:, 6:], want)
        assert torch.equal(emulated.generate(**padded(), prompts=[padded(TUNED), None], **extra, **options), out)
        assert torch.equal(run(models, prompts=[padded(TUNED), None], **extra, **SAMPLED), out)
    assert not torch.equal(want, emulated.generate(**padded(), **options)[:, 6:])
    options = dict(num_beams=3, max_new_tokens=8, pad_token_id=PAD)
    want = Naive(models, own=own, shared=6).generate(**padded(), **options)
    assert torch.equal(emulated.generate(**padded(), prompts={"tuned": padded(TUNED)}, **options), want)
    one = dict(input_ids=torch.tensor(PROMPTS[:1]))
    options = dict(prompts={"tuned": torch.tensor(TUNED[:1])}, max_new_tokens=12, eos_token_id=EOS)
    looked = emulated.generate(**one, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(looked, emulated.generate(**one, **options))


def test_guidance_is_one_model_with_two_prompts(llamas):
    emulated = EmulatedModel(llamas[0], models=[llamas[0]], weights=[2.5, -1.5])
    want = guided([llamas[0]] * 2, [2.5, -1.5], list(zip(PROMPTS, NEGATIVE)), temperature=0.9, top_p=0.95)
    options = dict(max_new_tokens=12, pad_token_id=PAD, seed=3, **SAMPLED)
    out = emulated.generate(**padded(), prompts={"models[0]": padded(NEGATIVE)}, **options)
    assert torch.equal(out[:, 6:], want)
    with pytest.raises(ValueError, match=r"models\[0\]: is model .*with the same prompt"):
        emulated.generate(**padded(), **options)


# --- adapters, devices, quantised weights -----------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_is_tuned_and_without_it_ref(llamas, tmp_path):
    peft_model, plain = adapted()
    emulated = EmulatedModel(llamas[0], peft_model)
    whole = EmulatedModel(llamas[0], merged(peft_model), plain)
    inputs = padded()
    torch.testing.assert_close(emulated(**inputs).logits, whole(**inputs).logits, atol=1e-4, rtol=1e-4)
    options = dict(max_new_tokens=8, pad_token_id=PAD)
    assert torch.equal(emulated.generate(**inputs, **options), whole.generate(**inputs, **options))
    beams = dict(options, num_beams=3)
    assert torch.equal(emulated.generate(**inputs, **beams), whole.generate(**inputs, **beams))
    adapter = sum(p.numel() for n, p in peft_model.named_parameters() if "lora_" in n)
    assert emulated.num_parameters() == llamas[0].num_parameters() + plain.num_parameters() + adapter  # held once

    emulated.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tuned" / "adapter_config.json").is_file()
    loaded = EmulatedModel.from_pretrained(tmp_path / "saved")
    assert loaded.ref is None and torch.equal(loaded(**inputs).logits, emulated(**inputs).logits)
    ref = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "ref")
    assert torch.equal(ref(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(ValueError, match="tuned: has an adapter over weights of its own; merge it"):
        EmulatedModel(llamas[0], peft_model, plain).save_pretrained(tmp_path / "other")


@torch.no_grad()
def test_models_that_hooks_move(three):
    """As device_map leaves them; a pipeline must not move them."""
    accelerate = pytest.importorskip("accelerate")
    held = [three[0], copy.deepcopy(three[1]), copy.deepcopy(three[2])]
    accelerate.cpu_offload(held[1], torch.device("cpu"))
    held[2] = accelerate.dispatch_model(held[2], {"": "cpu"}, main_device="cpu", force_hooks=True)
    emulated, plain = EmulatedModel(*held), EmulatedModel(*three)
    assert emulated.hf_device_map["ref"] == torch.device("cpu") and not hasattr(plain, "hf_device_map")
    assert torch.equal(emulated(**padded()).logits, plain(**padded()).logits)
    options = dict(num_beams=2, max_new_tokens=6, pad_token_id=PAD)
    assert torch.equal(emulated.generate(**padded(), **options), plain.generate(**padded(), **options))


@torch.no_grad()
def test_models_on_devices_of_their_own(three, monkeypatch):
    """ids go to each model's device (there is no second one here but meta, which computes nothing)."""
    from eft_kernels.integrations.hf import emulated as module

    places = {id(three[0]): "cpu", id(three[1]): "meta", id(three[2]): "cpu"}
    monkeypatch.setattr(module, "device_of", lambda m: torch.device(places.get(id(m), "cpu")))
    emulated = EmulatedModel(*three)
    assert emulated.hf_device_map["tuned"] == torch.device("meta")
    seen = {}
    for name, m in zip(("base", "tuned", "ref"), three):
        monkeypatch.setattr(m, "forward", _recording(m.forward, seen, name), raising=False)
    with pytest.raises(Exception, match="meta"):
        emulated(**padded())
    assert seen["base"] == {torch.device("cpu")} and seen["tuned"] == {torch.device("meta")}


def _recording(forward, seen, name):
    @functools.wraps(forward)
    def recorded(input_ids=None, attention_mask=None, **kwargs):
        seen[name] = {input_ids.device, attention_mask.device}
        return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    return recorded


@torch.no_grad()
def test_quantised_models_stay_as_they_are(three):
    quantization = pytest.importorskip("torchao.quantization")
    held = [copy.deepcopy(three[0]).bfloat16(), copy.deepcopy(three[1]), three[2]]
    for m in held[:2]:
        quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
    each = [m(**padded()).logits.float() for m in held]
    emulated = EmulatedModel(*held)
    assert torch.equal(emulated(**padded()).logits, each[0] + each[1] - each[2])
    emulated.generate(**padded(), num_beams=2, max_new_tokens=6, pad_token_id=PAD)


def test_to_is_each_models_own(three):
    held = [copy.deepcopy(m) for m in three]
    asked = []
    for m in held:
        m.to = lambda *args, m=m: asked.append(m)
    emulated = EmulatedModel(*held)
    assert emulated.to("cpu") is emulated and asked == held
    held[0].is_quantized = True
    with pytest.raises(ValueError, match="not supported for quantized"):
        EmulatedModel(*held).half()


# --- folders ----------------------------------------------------------------------------------------------------------


def compose(out, *options):
    arguments = ["compose", "--base", FAMILY + "base", "--tuned", FAMILY + "tuned-a", "--ref", FAMILY + "ref"]
    assert main([*arguments, "--out", str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def shipped():
    models = [AutoModelForCausalLM.from_pretrained(FAMILY + n, dtype="float32") for n in ("base", "tuned-a", "ref")]
    return models, AutoTokenizer.from_pretrained(FAMILY + "base", padding_side="left")


@torch.no_grad()
def test_a_composed_folder_is_a_model(tmp_path, shipped):
    folder = compose(tmp_path / "eft", "--beta", "1.5")
    models, tokenizer = shipped
    ids = tokenizer("And the king said", return_tensors="pt").input_ids
    want = EmulatedModel(*models, beta=1.5)(ids).logits
    loaded = EmulatedModel.from_pretrained(folder, dtype="float32")
    assert torch.equal(loaded(ids).logits, want) and loaded.settings["beta"] == 1.5 and not loaded.training
    assert loaded.generation_config.eos_token_id == [2] and loaded.name_or_path == str(folder)
    auto = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=True)
    assert type(auto) is EmulatedModel and torch.equal(auto(ids).logits, want)
    with pytest.raises(OSError, match="model.safetensors"):  # not silently something else
        AutoModelForCausalLM.from_pretrained(folder)
    other = EmulatedModel.from_pretrained(
        folder, dtype={"base": "float32", "tuned": "bfloat16", "ref": "float32"}, alpha=0.5
    )
    assert [m.dtype for m in (other.base, other.tuned, other.ref)] == [torch.float32, torch.bfloat16, torch.float32]
    assert other.settings == {"mode": "proxy", "alpha": 0.5, "upscale_top_p": 1.0}

    for option, message in (
        (dict(betta=1.5), "betta: is neither an option of from_pretrained nor in the config of .*base"),
        (dict(vocab_size=10), "vocab_size: got 10, allowed is what the folder says"),
        (dict(weights=[1, 1, -1]), r"weights: got \[1, 1, -1\], allowed is what the folder says"),
        (dict(config=auto.config), "config: got LlamaConfig, allowed is none; the models of the folder have their own"),
        (dict(adapter_kwargs={}), "adapter_kwargs: got dict, allowed is none"),
    ):
        with pytest.raises(ValueError, match=message):
            EmulatedModel.from_pretrained(folder, **option)
    with pytest.raises(ValueError, match="vocab_size: got 10, allowed is what the folder says, 2048"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, vocab_size=10)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path, llamas):
    emulated = EmulatedModel(llamas[0], [llamas[1], llamas[2]], llamas[3], lam=0.25)
    emulated.save_pretrained(tmp_path / "saved", max_shard_size="2KB")
    assert len(list((tmp_path / "saved" / "base").glob("*.safetensors"))) > 1
    loaded = EmulatedModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(**padded()).logits, emulated(**padded()).logits)
    assert loaded.config.eft == emulated.config.eft and loaded.settings == emulated.settings
    assert loaded.config.eft["tuned"] == ["tuned_a", "tuned_b"] and loaded.config.eft["lam"] == 0.25
    # over links to other people's weights
    origin = tmp_path / "origin"
    llamas[3].save_pretrained(origin)
    before = (origin / "model.safetensors").read_bytes()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "base").symlink_to(origin, target_is_directory=True)
    EmulatedModel(llamas[0], llamas[1], llamas[3]).save_pretrained(tmp_path / "linked")
    assert (origin / "model.safetensors").read_bytes() == before


@torch.no_grad()
def test_compose_links_or_merges_an_adapter(tmp_path, shipped, capsys):
    peft = pytest.importorskip("peft")
    models, tokenizer = shipped
    small = AutoModelForCausalLM.from_pretrained(FAMILY + "ref", dtype="float32")
    held = peft.get_peft_model(small, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for name, p in held.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    held.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("And the king said", return_tensors="pt").input_ids
    want = models[0](ids).logits + merged(held)(ids).logits - models[2](ids).logits
    arguments = ["compose", "--base", FAMILY + "base", "--tuned", str(tmp_path / "adapter"), "--ref"]
    assert main([*arguments, FAMILY + "ref", "--out", str(tmp_path / "linked")]) == 0
    assert "vLLM and SGLang need --merge" in capsys.readouterr().out
    assert main([*arguments, FAMILY + "ref", "--out", str(tmp_path / "merged"), "--merge"]) == 0
    assert "vllm serve" in capsys.readouterr().out
    for name in ("linked", "merged"):
        loaded = EmulatedModel.from_pretrained(tmp_path / name, dtype="float32")
        torch.testing.assert_close(loaded(ids).logits, want, atol=2e-2, rtol=1e-2)  # the weights are bfloat16
        assert (loaded.ref is None) == (name == "linked")
    from eft_kernels.integrations.composition import Composition, refuse_adapters

    def composition(name):
        folder = tmp_path / name
        return Composition.parse(json.loads((folder / "config.json").read_text())["eft"], str(folder))

    refuse_adapters(composition("merged"))
    with pytest.raises(
        ValueError, match="tuned: is a PEFT adapter; make the folder with `eft-kernels compose --merge`"
    ):
        refuse_adapters(composition("linked"))

    (tmp_path / "linked" / "base").unlink()
    (tmp_path / "linked" / "base").symlink_to(tmp_path / "adapter", target_is_directory=True)
    with pytest.raises(ValueError, match="base and ref are whole models"):
        EmulatedModel.from_pretrained(tmp_path / "linked")

    assert main([*arguments, FAMILY + "tuned-b", "--out", str(tmp_path / "x")]) == 2
    assert "is a PEFT adapter of" in capsys.readouterr().err
    arguments = ["compose", "--base", str(tmp_path / "adapter"), "--tuned", FAMILY + "tuned-a", "--ref", FAMILY + "ref"]
    assert main([*arguments, "--out", str(tmp_path / "x")]) == 2
    assert "--base" in capsys.readouterr().err


# --- what takes a model -----------------------------------------------------------------------------------------------


def test_pipeline(shipped, caplog):
    models, tokenizer = shipped
    emulated = EmulatedModel(*models)
    writes = transformers.pipeline("text-generation", model=emulated, tokenizer=tokenizer, device="cpu")
    assert "not supported" not in caplog.text
    texts = ["And the king said unto", "The young man"]
    out = writes(texts, max_new_tokens=8, do_sample=False, batch_size=2)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    want = models[0].generate(
        **inputs, custom_generate=eft.hf.generate, tuned=models[1], ref=models[2], max_new_tokens=8
    )
    assert [o[0]["generated_text"] for o in out] == tokenizer.batch_decode(want, skip_special_tokens=True)


def test_chat_has_the_tuned_models_template_and_end(shipped, tmp_path):
    """The tuned model's folder has a template whose end of turn base does not know as an end."""
    models, tokenizer = shipped
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{{ '<pad>' }}{% endfor %}"
    models[1].save_pretrained(tmp_path / "tuned")
    chat.save_pretrained(tmp_path / "tuned")
    arguments = ["compose", "--base", FAMILY + "base", "--tuned", str(tmp_path / "tuned"), "--ref", FAMILY + "ref"]
    assert main([*arguments, "--out", str(tmp_path / "eft")]) == 0
    writes = transformers.pipeline(
        "text-generation", model=str(tmp_path / "eft"), trust_remote_code=True, device="cpu", dtype="float32"
    )
    assert type(writes.model) is EmulatedModel and writes.tokenizer.chat_template == chat.chat_template
    end = tokenizer.convert_tokens_to_ids("<pad>")
    assert end in writes.model.generation_config.eos_token_id
    made = EmulatedModel(*models, tokenizers=[tokenizer, chat, tokenizer])
    assert made.generation_config.eos_token_id == writes.model.generation_config.eos_token_id
    messages = [{"role": "user", "content": "And the king said"}]
    answer = writes(messages, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    ids = chat.apply_chat_template(messages, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    out = made.generate(**ids, max_new_tokens=8)
    new = chat.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == {"role": "assistant", "content": new}


def test_lm_eval(shipped, tmp_path):
    """A task from a local file: log-likelihoods of choices, and a text that is generated."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    models, tokenizer = shipped
    emulated = EmulatedModel(*models)
    folder = str(compose(tmp_path / "eft"))
    loaded = HFLM(pretrained=folder, trust_remote_code=True, device="cpu")  # as its command line does
    assert type(loaded.model) is EmulatedModel and loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    questions = [
        ("And the king said unto", [" him", " the algorithm"], 0),
        ("And it came to", [" hacker", " pass"], 1),
        ("the children of", [" Israel", " Unix", " the"], 0),
    ]
    rows = [dict(question=q, choices=c, answer=a) for q, c, a in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "choices.yaml").write_text(
        "task: choices" + shared + 'output_type: multiple_choice\ntarget_delimiter: ""\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n',
        encoding="utf-8",
    )
    (tmp_path / "texts.yaml").write_text(
        "task: texts" + shared + 'output_type: generate_until\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n",
        encoding="utf-8",
    )
    result = simple_evaluate(
        model=HFLM(pretrained=emulated, tokenizer=tokenizer, batch_size=2, max_length=128),
        tasks=["choices", "texts"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    for sample in result["samples"]["choices"]:
        row = sample["doc"]
        for (got, _), choice in zip(sample["filtered_resps"], row["choices"]):
            context, whole = (tokenizer(t).input_ids for t in (row["question"], row["question"] + choice))
            new = len(whole) - len(context)
            logits = sum(w * full_logits(m, whole) for w, m in zip((1, 1, -1), models))
            want = logits.log_softmax(-1)[-new - 1 : -1].gather(1, torch.tensor(whole[-new:])[:, None]).sum()
            assert math.isclose(float(got), float(want), rel_tol=1e-3, abs_tol=1e-3)
    for sample in result["samples"]["texts"]:
        ids = tokenizer(sample["doc"]["question"], return_tensors="pt")
        out = emulated.generate(**ids, max_new_tokens=6)
        want = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == want.split("\n")[0]
    assert result["results"]["choices"]["acc,none"] > 0.5


def test_outlines(shipped):
    """Its processors, greedy and sampled; they keep a state, so that speculation refuses them by name."""
    outlines = pytest.importorskip("outlines")
    models, tokenizer = shipped
    writes = outlines.Generator(
        outlines.from_transformers(EmulatedModel(*models), tokenizer),
        outlines.types.Regex(r" (Moses|Aaron|David)( and (Moses|Aaron|David))?,"),
    )
    for options in ({}, dict(do_sample=True, seed=3, top_k=0)):
        text = writes("And the king said unto", max_new_tokens=20, **options)
        assert re.fullmatch(r" (Moses|Aaron|David)( and (Moses|Aaron|David))?,", text)
    with pytest.raises(ValueError, match="OutlinesCoreLogitsProcessor keeps a state of its own"):
        writes("And the king said unto", max_new_tokens=20, draft_tokens=3)


@torch.no_grad()
def test_trainer_evaluates(shipped, tmp_path):
    pytest.importorskip("accelerate")
    models, emulated = shipped[0], EmulatedModel(*shipped[0])
    tokenizer = AutoTokenizer.from_pretrained(FAMILY + "base")  # pads on the right
    data = [tokenizer(t) for t in ("And the king said unto the people of the land.", "The children of Israel.")]
    options = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = transformers.Trainer(model=emulated, args=options, eval_dataset=data, data_collator=collate)
    found, tokens = trainer.evaluate()["eval_loss"], 0.0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        logits = sum(w * m(ids).logits for w, m in zip((1, 1, -1), models))[0, :-1]
        tokens -= logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert math.isclose(found, tokens / sum(len(row["input_ids"]) - 1 for row in data), rel_tol=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_models_are_refused_at_start(llamas, shipped):
    base, tuned, other, ref = llamas
    for arguments, message in (
        ((base, tuned, tuned), "tuned: has the same weights as ref .*the result would be model alone"),
        ((base, ref, copy.copy(ref)), "tuned: has the same weights as ref"),
        ((base, tuned), "ref: got None, allowed is the model that tuned was fine-tuned from"),
        ((base, None, ref), "tuned: got None"),
        ((base, torch.nn.Linear(2, 2), ref), "tuned: got Linear, allowed is a transformers causal language model"),
        ((EmulatedModel(base, tuned, ref), tuned, ref), "base: got an EmulatedModel"),
        ((base, make("llama", 5, vocab_size=30), ref), r"vocab_size: .*\(base 24, tuned 30, ref 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            EmulatedModel(*arguments)
    for options, message in (
        (dict(mode="sum"), "mode: got 'sum'"),
        (dict(lam=0.5), "lam: goes with mode='interpolate'"),
        (dict(beta=torch.ones(4)), r"beta: got a tensor \[4\], allowed is a finite number; values per row go to"),
        (dict(beta=math.nan), "beta: got nan, allowed is a finite number"),
        (dict(mode="proxy", alpha="a"), "alpha: got 'a', allowed is a finite number"),
        (dict(beta=1e39), "weights: got 1e[+]39, allowed are finite float32"),
        (dict(upscale_top_p=0.0), r"upscale_top_p: got 0.0, allowed is in \(0, 1\]"),
        (dict(upscale_top_p="a"), "upscale_top_p: got 'a', allowed is a finite number"),
        (dict(upscale_top_p=None), "upscale_top_p: got None, allowed is a finite number"),
        (dict(vocab_size=25), "vocab_size: got 25, allowed is 1 to 24"),
        (dict(weights=[1, 1, -1]), "tuned: goes with tuned and ref, got weights"),
    ):
        with pytest.raises(ValueError, match=message):
            EmulatedModel(base, tuned, ref, **options)
    models, tokenizer = shipped
    bad = AutoTokenizer.from_pretrained(FAMILY + "base")
    bad.get_vocab = lambda: {**tokenizer.get_vocab(), "the": 5, "e": 6}
    with pytest.raises(ValueError, match=r"tokenizers: .* for tuned and .* for base"):
        EmulatedModel(*models, tokenizers=[tokenizer, bad, tokenizer])
    wide = EmulatedModel(base, make("llama", 5, vocab_size=30), ref, vocab_size=24)
    assert wide(**padded()).logits.shape[-1] == 24 == wide.config.vocab_size


def test_bad_calls_are_refused(model, tmp_path):
    inputs = padded()
    for options, message in (
        (dict(tuned=model.tuned), "tuned: is part of the model"),
        (dict(weights=[1, 2, 3]), "weights: is part of the model"),
        (dict(num_beams=2, seed=1), "seed: goes with greedy decoding and sampling, got beam_search"),
        (dict(num_beams=2, draft_tokens=2), "draft_tokens: goes with greedy"),
        (dict(num_beams=2, draft_width=2), "draft_width: goes with greedy"),
        (dict(num_beams=2, draft_budget=2), "draft_budget: goes with greedy"),
        (dict(draft_width=2), "draft_width: got 2, allowed is 1 without draft_tokens"),
        (dict(num_beams=2, use_cache=False), "use_cache: got False"),
        (dict(num_beams=2, cache_implementation="static"), "cache_implementation: got 'static'"),
        (dict(generation_config=GenerationConfig(num_beams=2, use_cache=False)), "use_cache: got False"),
        (
            dict(num_beams=2, prefill_chunk_size=4, prompts={"tuned": padded(NEGATIVE)}),
            "prompts: the first pass reads 4 of 6 columns, .* leave prefill_chunk_size out",
        ),
        (dict(num_beams=2, lam=0.3), "lam: got 0.3, allowed is None; .*'interpolate'; this model takes beta or alpha"),
        (dict(lam=0.3), "lam: got 0.3, allowed is None; .*'interpolate'; this model takes beta or alpha"),
        (dict(beta=1.0, alpha=1.0), "alpha: got 1.0 beside beta, allowed is one of them"),
        (dict(verify="token"), "verify: got 'token', allowed is 'coupled' without draft_tokens"),
        (dict(draft=0), "draft: got 0, allowed is None without draft_tokens"),
        (dict(num_beams=2, beta=torch.ones(3)), r"weights: expected \[8, 3\], got \[6, 3\]"),
        (dict(num_beams=2, upscale_top_p=2.0), "upscale_top_p: got 2.0"),
        (dict(num_beams=2, output_attentions=True, return_dict_in_generate=True), "output_attentions: "),
        (dict(prompts={"base": inputs["input_ids"]}), "prompts: got the key 'base', allowed are tuned, ref"),
        (dict(num_beams=2, prompts={"x": inputs["input_ids"]}), "prompts: got the key 'x', allowed are tuned, ref"),
        (dict(prompts=[None]), "prompts: got 1, allowed is a list of 2, one for each of tuned, ref"),
        (dict(use_cache=False), "use_cache"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, max_new_tokens=4, pad_token_id=PAD, **options)
    for options, message in (
        (dict(inputs_embeds=torch.zeros(4, 6, 16)), "inputs_embeds: an emulated model has no such argument"),
        ({CACHE: transformers.DynamicCache()}, f"{CACHE}: got DynamicCache"),
        (dict(beta=1.0, alpha=1.0), "alpha: got 1.0 beside beta, allowed is one of them"),
        (dict(beta=[1.0, 2.0]), r"weights: expected \[4, 3\], got \[2, 3\]"),
        (dict(beta=math.nan), "weights: got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **options)
    free = EmulatedModel(model.base, models=[model.ref], weights=[2, -1])
    down = EmulatedModel(model.base, model.tuned, model.ref, mode="downscale")
    for other in (free, down):
        for call in (other, functools.partial(other.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match="beta: got 2.0, allowed is None; .* takes no strength"):
                call(**inputs, beta=2.0)
    with pytest.raises(ValueError, match="upscale_top_p: got 0.5, allowed is None with weights"):
        free(**inputs, upscale_top_p=0.5)
    with pytest.raises(ValueError, match="resize each of the models"):
        model.resize_token_embeddings(30)
    with pytest.raises(ValueError, match=r"num_beams: base \(Rwkv.* keeps state of its own kind"):
        rwkv = transformers.AutoConfig.for_model(
            "rwkv", vocab_size=V, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, context_length=64
        )
        state = [AutoModelForCausalLM.from_config(rwkv).eval() for _ in range(3)]
        EmulatedModel(*state).generate(torch.tensor(PROMPTS[:1]), num_beams=2, max_new_tokens=4, pad_token_id=PAD)
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: base \(Rwkv.* leave prompt_lookup_num_tokens out"):
        EmulatedModel(*state).generate(torch.tensor(PROMPTS[:1]), prompt_lookup_num_tokens=2, max_new_tokens=4)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match='needs an object "eft"'):
        EmulatedModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_pretrained: a folder holds base, tuned and ref"):
        free.save_pretrained(tmp_path)
