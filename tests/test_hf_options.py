"""What people bring to `generate`: adapters, grammars, models that can also see, leftovers of checkpoints, prompts.

The oracles are those of tests/test_hf.py: full forwards without a cache, one unpadded row at a time.
"""

import copy
import inspect
import itertools
import math
import re
import threading

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
from test_hf import EOS, METHODS, PAD, PROMPTS, SAMPLED, V, full_logits, make, oracle, padded, run
from transformers import LogitsProcessor, LogitsProcessorList

import eft_kernels as eft

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


def test_tuned_that_is_ref_is_refused(llamas):
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
def test_an_adapter_on_and_off_is_tuned_and_ref(llamas, k):
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


def test_an_adapter_in_several_threads(llamas):
    """A pass with the adapter off never meets one with it on."""
    base, (model, _) = llamas[0], adapted()
    want, got = run([base, model, None], **SAMPLED), []

    def call():
        for _ in range(4):
            got.append(torch.equal(run([base, model, None], **SAMPLED), want))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [True] * 12
    assert torch.equal(run([base, model, None], **SAMPLED), want)


def test_an_adapter_without_a_peft_model(llamas):
    peft = pytest.importorskip("peft")
    model, plain = adapted()
    own = copy.deepcopy(plain)
    # as transformers' own from_pretrained loads an adapter
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]), own
    )
    state = {n.removeprefix("base_model.model."): p for n, p in model.state_dict().items()}
    own.load_state_dict(state)
    want = run([llamas[0], merged(model), plain], **SAMPLED)
    assert torch.equal(run([llamas[0], own.eval(), None], **SAMPLED), want)
    with pytest.raises(ValueError, match="tuned: has the same weights as ref.*ref=None"):
        run([llamas[0], own, own])


def test_an_adapter_counts_as_part_of_base_and_ref(llamas):
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


def test_two_adapters_of_two_models(llamas):
    (a, plain), (b, _) = adapted(2), adapted(3)
    want = run([llamas[0], merged(a), merged(b), plain], lam=0.3, **SAMPLED)
    assert torch.equal(run([llamas[0], a, b, a.get_base_model()], lam=0.3, **SAMPLED), want)
    with pytest.raises(ValueError, match="ref: got None"):  # two bases: which?
        run([llamas[0], a, b, None])


def test_adapters_that_cannot_be_switched_off_are_refused(llamas):
    peft = pytest.importorskip("peft")
    base, tuned = llamas[0], llamas[1]
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
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


# --- processors that keep a state ----------------------------------------------------------------------------------


class Counter(LogitsProcessor):
    """Another token is forbidden at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.calls % V] = -math.inf
        return scores


class Hidden(LogitsProcessor):
    """As Counter, with its state where no attribute shows it."""

    def __init__(self):
        self.next = itertools.count(1)

    def __call__(self, input_ids, scores):
        scores[:, next(self.next) % V] = -math.inf
        return scores


class Flag(LogitsProcessor):
    """What outlines does: the first call is another, later ones take the newest token alone."""

    def __init__(self):
        self.is_first, self.state = True, itertools.count()

    def __call__(self, input_ids, scores):
        self.is_first = False
        return scores


class Late(LogitsProcessor):
    """Makes its state at the first call and tells calls apart by their lengths."""

    def __init__(self):
        self.sums = None

    def __call__(self, input_ids, scores):
        if self.sums is None:
            self.sums = {input_ids.shape[1]: input_ids.sum(1)}
        elif input_ids.shape[1] not in self.sums:
            self.sums[input_ids.shape[1]] = self.sums[input_ids.shape[1] - 1] + input_ids[:, -1]
        return scores.scatter(1, self.sums[input_ids.shape[1]][:, None] % V, -math.inf)


class Table(LogitsProcessor):
    """A function of its arguments with a table that is made at the first call."""

    def __init__(self):
        self.table = None

    def __call__(self, input_ids, scores):
        if self.table is None:
            self.table = torch.arange(V)
        return scores.scatter(1, self.table[(input_ids.sum(1) * 7 + 3) % V][:, None], -math.inf)


class Memo(Table):
    """Keeps every result by its prefix."""

    stateless = True

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __call__(self, input_ids, scores):
        self.seen[str(input_ids.tolist())] = out = super().__call__(input_ids, scores)
        return out


class Sums(LogitsProcessor):
    """The sum of a row's new tokens is forbidden; kept row by row, and taken back."""

    def __init__(self):
        self.texts = {}

    def __call__(self, input_ids, scores):
        return self.process_rows(range(len(scores)), input_ids, scores)

    def process_rows(self, rows, input_ids, scores):
        for i, row in enumerate(rows):
            text = self.texts.setdefault(row, [])
            new = input_ids[i, 6:].tolist()
            while text != new[: len(text)]:
                text.pop()
            text += new[len(text) :]
            scores[i, sum(text) % V] = -math.inf
        return scores


def closure(kind):
    calls = []

    def allowed(batch, ids):
        calls.append(batch)
        return [t for t in range(3, V) if t % 3 != (len(calls) if kind else int(ids.sum()) + batch) % 3]

    return allowed


def generated(models, k, processor, **options):
    return run(models, draft_tokens=k, logits_processor=LogitsProcessorList([processor]), **{**SAMPLED, **options})


@pytest.mark.parametrize(
    "kind, why",
    [
        (Counter, "`calls` changes"),
        (Hidden, "its result is another"),
        (Flag, "`is_first` changes"),
        (Late, "`sums` changes"),
    ],
)
def test_a_processor_that_keeps_a_state_is_refused_under_speculation(llamas, kind, why):
    models = [llamas[0], llamas[1], llamas[3]]
    with pytest.raises(ValueError, match=f"logits_processor: {kind.__name__} keeps a state.*{why}.*draft_tokens=0"):
        generated(models, 3, kind())
    out = generated(models, 0, kind())  # called once a step, in order, as transformers does
    for b, prompt in enumerate(PROMPTS if kind is Counter else ()):
        want = oracle(
            models,
            prompt,
            12,
            dict(temperature=0.9, top_p=0.95),
            processors=kind(),
            pads=6 - len(prompt),
            seed=int(eft.row_seeds(3, 4)[b]),
        )
        assert torch.equal(out[b, 6:], want)


@pytest.mark.parametrize("kind", [Table, Memo, Sums])
def test_a_processor_that_can_go_back_is_right_under_speculation(llamas, kind):
    models = [llamas[0], llamas[1], llamas[3]]
    want = generated(models, 0, kind())
    assert not torch.equal(want, run(models, **SAMPLED))
    for k in (1, 3, 8):
        assert torch.equal(generated(models, k, kind()), want)
    for method in ("token", "block"):
        generated(models, 3, kind(), verify=method)


def test_prefix_allowed_tokens_that_keep_a_state(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    want = run(models, prefix_allowed_tokens_fn=closure(False), **SAMPLED)
    assert torch.equal(run(models, draft_tokens=3, prefix_allowed_tokens_fn=closure(False), **SAMPLED), want)
    run(models, prefix_allowed_tokens_fn=closure(True), **SAMPLED)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn: gives different tokens.*draft_tokens=0"):
        run(models, draft_tokens=3, prefix_allowed_tokens_fn=closure(True), **SAMPLED)


GRAMMAR = 'root ::= ("a" | "b" "c" | "d")* "." | "x" "y" "z" "."'


def grammar():
    """(xgrammar's processor, the letters of the V tokens)."""
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib import hf

    letters = ["<pad>", "<eos>", "<bos>", *"abcdxyz.", "aa", "bc", "ad", "d.", "ab", "xy", *"efghi"][:V]
    info = xgrammar.TokenizerInfo(letters, vocab_size=V, stop_token_ids=[EOS])
    return hf.LogitsProcessor(xgrammar.GrammarCompiler(info).compile_grammar(GRAMMAR)), letters


@pytest.mark.parametrize("method", METHODS)
def test_xgrammar_under_speculation(llamas, method):
    models = [llamas[0], llamas[1], llamas[3]]
    options = dict(do_sample=True, top_k=0, temperature=2.0, eos_token_id=EOS)
    letters = grammar()[1]
    seeds = eft.row_seeds(5, 4 * 6)
    options.update(seed=seeds, num_return_sequences=6)
    want = generated(models, 0, grammar()[0], **options)
    for k in (1, 3, 8):
        processor = grammar()[0]
        out = generated(models, k, processor, verify=method, **options)
        if method == "coupled":
            assert torch.equal(out, want)
            assert torch.equal(generated(models, k, processor, **options), want)  # a processor serves twice
        ended = 0
        for row in out[:, 6:].tolist():
            text = "".join(letters[t] for t in row if t > 2)
            assert re.fullmatch(r"(a|bc|d|b$)*\.?|xyz\.|xyz?|x", text), text
            ended += EOS in row
            assert (EOS in row) <= text.endswith(".")
        assert 0 < ended


class LazyMatchers(LogitsProcessor):
    """A grammar of one's own: matchers made at the first call, whose state only C++ knows."""

    def __init__(self):
        xgrammar = pytest.importorskip("xgrammar")
        self.compiled, self.matchers = grammar()[0].compiled_grammars[0], None
        self.make = xgrammar.GrammarMatcher

    def __call__(self, input_ids, scores):
        if self.matchers is None:
            self.matchers = [self.make(self.compiled) for _ in input_ids]
        else:
            for matcher, row in zip(self.matchers, input_ids[:, -1].tolist()):
                matcher.is_terminated() or matcher.accept_token(row)
        return scores


class CountsInAClass(LogitsProcessor):
    """Acts from its fifth call on, and counts them in its class."""

    calls = 0

    def __call__(self, input_ids, scores):
        type(self).calls += 1
        if self.calls >= 5:
            scores[:, 7] = 50.0
        return scores


def counts_in_a_closure():
    calls = [0]

    class Late(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls[0] += 1
            if calls[0] >= 5:
                scores[:, 7] = 50.0
            return scores

    return Late()


@pytest.mark.parametrize("build", [LazyMatchers, CountsInAClass, counts_in_a_closure])
def test_states_that_do_not_show_in_the_processors_own_attributes(llamas, build):
    models = [llamas[0], llamas[1], llamas[3]]
    with pytest.raises(ValueError, match="logits_processor: .* keeps a state of its own.*draft_tokens=0"):
        run(models, draft_tokens=3, logits_processor=LogitsProcessorList([build()]))
    run(models, logits_processor=LogitsProcessorList([build()]))  # one call a step, as transformers


def test_a_grammar_serves_several_calls_and_the_rows_it_was_made_for(llamas):
    models, processor = [llamas[0], llamas[1], llamas[3]], grammar()[0]
    options = dict(do_sample=True, top_k=0, temperature=2.0, eos_token_id=EOS)
    want = run(models, logits_processor=LogitsProcessorList([processor]), **options)
    for k in (0, 3, 0):
        assert torch.equal(
            run(models, draft_tokens=k, logits_processor=LogitsProcessorList([processor]), **options), want
        )
    processor.compiled_grammars = processor.compiled_grammars * 3
    for k in (0, 3):
        with pytest.raises(ValueError, match="logits_processor: .*3 grammars for 4 rows"):
            run(models, draft_tokens=k, logits_processor=LogitsProcessorList([processor]), **options)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("result", [lambda scores: None, lambda scores: scores[:, :10]])
def test_what_a_processor_returns_is_looked_at(llamas, result, k):
    class Odd(LogitsProcessor):
        stateless = True

        def __call__(self, input_ids, scores):
            return result(scores)

    with pytest.raises(ValueError, match="logits_processor: Odd returned .*expected scores"):
        run([llamas[0], llamas[1], llamas[3]], draft_tokens=k, logits_processor=LogitsProcessorList([Odd()]))


def test_stop_strings_of_the_tuned_models_generation_config(llamas):
    models = [llamas[0], copy.deepcopy(llamas[1]), llamas[3]]
    models[1].generation_config.stop_strings = ["x"]
    with pytest.raises(ValueError, match="stop_strings: tuned's generation config ends texts with"):
        run(models)
    run(models, stop_strings=[])


def test_prompts_that_begin_with_padding_need_a_mask(llamas):
    ids = torch.tensor([[PAD, PAD, 5, 6]])
    options = dict(
        custom_generate=eft.hf.generate,
        models=[llamas[1]],
        weights=[2.0, -1.0],
        max_new_tokens=4,
        pad_token_id=PAD,
        seed=1,
    )
    with pytest.raises(ValueError, match=r"prompts\[0\]: begins with the padding id 0"):
        llamas[0].generate(**padded(), prompts=[ids], **options)
    a, b = (
        llamas[0].generate(**padded(), prompts=[p], **options)
        for p in (dict(input_ids=ids, attention_mask=(ids != PAD).long()), ids[:, 2:])
    )
    assert torch.equal(a, b)


def test_seeds_of_more_than_64_bits_are_refused(llamas):
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(ValueError, match="seed: got"):
            run([llamas[0], llamas[1], llamas[3]], seed=seed)
        with pytest.raises(ValueError, match="seed: got"):
            eft.row_seeds(seed, 2)


# --- text prompts on models that can also see ------------------------------------------------------------------------

TEXT = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    pad_token_id=PAD,
    bos_token_id=2,
    eos_token_id=EOS,
    initializer_range=0.3,
)
SIGHT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
SEEING = {
    "gemma3": dict(
        text_config=dict(TEXT, sliding_window=4, query_pre_attn_scalar=4),
        vision_config=SIGHT,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    ),
    "qwen2_5_vl": dict(
        text_config=dict(TEXT, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 0], rope_theta=1e4)),
        vision_config=dict(
            depth=1,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            patch_size=14,
            out_hidden_size=16,
            fullatt_block_indexes=[0],
        ),
        image_token_id=60,
        video_token_id=59,
        vision_start_token_id=61,
        vision_end_token_id=62,
    ),
    "llava": dict(
        text_config=dict(TEXT, model_type="llama"),
        image_token_index=60,
        vision_config=dict(SIGHT, projection_dim=16, model_type="clip_vision_model"),
    ),
    "mistral3": dict(
        text_config=dict(TEXT, model_type="mistral", sliding_window=None),
        image_token_index=60,
        vision_config=dict(SIGHT, model_type="pixtral"),
    ),
}


@pytest.mark.parametrize("family", SEEING)
def test_text_prompts_on_models_that_can_also_see(family):
    """tuned with ref's weights is base alone: transformers' own greedy text."""

    def seeing(seed):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(family, **copy.deepcopy(SEEING[family]))
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        model.generation_config.eos_token_id = None
        return model

    base, tuned = seeing(1), seeing(2)
    types = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}.get(family)
    if types not in inspect.signature(base.forward).parameters:
        types = None
    options = dict(padded(), max_new_tokens=12, pad_token_id=PAD)
    want = base.generate(**options)
    for k in (0, 3):
        for extra in ({}, {types: torch.zeros_like(options["input_ids"])} if types else {}):
            assert torch.equal(run([base, tuned, copy.deepcopy(tuned)], draft_tokens=k, **extra), want)
    pixels = {"gemma3": torch.zeros(1, 3, 28, 28), "llava": torch.zeros(1, 3, 28, 28)}.get(family)
    if pixels is not None:
        with pytest.raises(ValueError, match="pixel_values: emulated decoding"):
            run([base, tuned, copy.deepcopy(tuned)], pixel_values=pixels)
    if types:
        with pytest.raises(ValueError, match=f"{types}: emulated decoding"):
            run([base, tuned, copy.deepcopy(tuned)], **{types: torch.ones_like(options["input_ids"])})


# --- stop strings, devices, types and leftovers ----------------------------------------------------------------------


def letters():
    """A tokenizer of the V ids: <pad>, <eos>, <bos> and letters."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", *"abcdefghijklmnopqrstu"[: V - 3]])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_stop_strings(llamas):
    models, tokenizer = [llamas[0], llamas[1], llamas[3]], letters()
    plain = run(models, **SAMPLED)
    stop = [tokenizer.decode(plain[0, 10:12]).replace(" ", ""), tokenizer.decode(plain[1, 8:9])]
    want = run(models, stopping_criteria=[transformers.StopStringCriteria(tokenizer, stop)], **SAMPLED)
    assert bool((want[:, -1] == PAD).any()) and not torch.equal(want, plain)
    for k in (0, 3):
        for how in (dict(tokenizer=tokenizer), dict(tokenizers=[tokenizer] * 3)):
            assert torch.equal(run(models, stop_strings=stop, draft_tokens=k, **how, **SAMPLED), want)
    with pytest.raises(ValueError, match="stop_strings: needs a tokenizer"):
        run(models, stop_strings=stop)


def test_leftovers_of_a_checkpoints_generation_config(llamas):
    models = [copy.deepcopy(llamas[0]), llamas[1], llamas[3]]
    want = run(models, do_sample=False)
    left = dict(
        use_cache=False,
        cache_implementation="hybrid",
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        num_beams=1,
        length_penalty=0.8,
        early_stopping=True,
        num_assistant_tokens=5,
    )
    for name, value in left.items():
        setattr(models[0].generation_config, name, value)
    for k in (0, 3):
        assert torch.equal(run(models, do_sample=False, draft_tokens=k), want)
    for name in ("use_cache", "length_penalty"):
        with pytest.raises(ValueError, match=f"{name}: got {left[name]}"):
            run(models, do_sample=False, **{name: left[name]})
    inputs, config = padded(), transformers.GenerationConfig(length_penalty=0.8, max_new_tokens=4, pad_token_id=PAD)
    options = dict(custom_generate=eft.hf.generate, tuned=models[1], ref=models[2])
    for given, more in (((config,), {}), ((), dict(generation_config=config))):  # by position and by name
        with pytest.raises(ValueError, match="length_penalty: got 0.8"):
            models[0].generate(inputs["input_ids"], *given, attention_mask=inputs["attention_mask"], **options, **more)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_and_masks_of_other_types(llamas, dtype):
    models, given = [llamas[0], llamas[1], llamas[3]], padded()
    want = run(models, **SAMPLED)
    for mask in (torch.bool, torch.float32, torch.int32):
        inputs = dict(input_ids=given["input_ids"].to(dtype), attention_mask=given["attention_mask"].to(mask))
        for k in (0, 3):
            out = run(models, inputs, draft_tokens=k, **SAMPLED)
            assert torch.equal(out, want) and out.dtype == torch.int64


def test_arrays_and_lists_of_parameters(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    rows = dict(
        temperature=[0.0, 0.5, 1.0, 1.5],
        top_k=[0, 3, -1, 5],
        top_p=[1.0, 0.9, 0.7, 1.0],
        min_p=[0.0, 0.1, 0.0, 0.02],
        beta=[0.5, 1.0, 1.5, 2.0],
        upscale_top_p=[1.0, 0.5, 0.9, 1.0],
        seed=[5, 6, 7, 8],
    )
    want = run(models, do_sample=True, **{k: torch.tensor(v).clamp(min=0) for k, v in rows.items()})
    for kind in (list, tuple, np.array):
        assert torch.equal(run(models, do_sample=True, draft_tokens=2, **{k: kind(v) for k, v in rows.items()}), want)
    large = torch.tensor([5, -6, 7, -8])
    want = run(models, do_sample=True, seed=large)
    assert torch.equal(run(models, do_sample=True, seed=large.numpy().view(np.uint64)), want)
    want = run(models, do_sample=True, seed=3, temperature=0.5, top_k=0)
    one = dict(seed=np.int64(3), temperature=np.float32(0.5))
    for top_k in (-1, np.int32(-1)):
        assert torch.equal(run(models, do_sample=True, top_k=top_k, **one), want)
    assert torch.equal(run(models, do_sample=True, top_k=None, **one), run(models, do_sample=True, top_k=50, **one))
    with pytest.raises(ValueError, match="seed: expected a number"):
        run(models, do_sample=True, seed=np.array(["a"] * 4))


def test_weights_that_hooks_bring(llamas):
    """accelerate's hooks, as device_map leaves them; several devices at once need several devices."""
    accelerate = pytest.importorskip("accelerate")
    models, want = [llamas[0], llamas[1], llamas[3]], None
    want = run(models, **SAMPLED)
    held = [copy.deepcopy(m) for m in models]
    held[0] = accelerate.dispatch_model(held[0], {"": "cpu"}, main_device="cpu", force_hooks=True)
    for model in held[1:]:
        accelerate.cpu_offload(model, torch.device("cpu"))  # its weights are on meta between passes
    assert held[1].lm_head.weight.device.type == "meta"
    for k in (0, 3):
        assert torch.equal(run(held, draft_tokens=k, **SAMPLED), want)
        assert torch.equal(
            run([held[1], held[0], held[2]], draft_tokens=k, **SAMPLED),
            run([models[1], models[0], models[2]], **SAMPLED),
        )


def test_quantised_models(llamas):
    quantization = pytest.importorskip("torchao.quantization")
    models = [copy.deepcopy(llamas[0]).bfloat16(), copy.deepcopy(llamas[1]), llamas[3]]
    for model in models[:2]:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert not torch.equal(run(models, **SAMPLED), run([llamas[0], llamas[1], llamas[3]], **SAMPLED))
    for prompt in PROMPTS[:2]:
        want = oracle(models[1:], prompt, 8, dict(temperature=0.0), weights=(1.0, 0.0))
        out = run([models[1], copy.deepcopy(models[2]), models[2]], padded([prompt]), max_new_tokens=8)
        assert torch.equal(out[0, -8:], want)
    run(models, draft_tokens=3, **SAMPLED)


# --- any combination, and a prompt per model -------------------------------------------------------------------------

NEGATIVE = [[3, 4], [5, 6, 7, 8, 9, 10, 11, 12], [13], [14, 15, 16]]


def guided(models, weights, prompts, steps=12, seed=3, **sampling):
    """Slow: every model's full forward over its own prompt and the new tokens. prompts: [B][J] lists of ids."""
    rows, seeds = [], eft.row_seeds(seed, len(prompts))
    for b, own in enumerate(prompts):
        new = []
        for n in range(steps):
            scores = sum(w * full_logits(m, p + new)[-1] for w, m, p in zip(weights, models, own))[None].float()
            new.append(int(eft.sample([scores], [1.0], seed=seeds[b : b + 1], position=n, **sampling).tokens))
        rows.append(new)
    return torch.tensor(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom"])
def test_classifier_free_guidance_with_prompts_of_any_length(family, llamas):
    """Every row's prompt and negative prompt differ in length, both ways round."""
    model = llamas[0] if family == "llama" else make(family, 1)
    want = guided([model, model], [2.5, -1.5], list(zip(PROMPTS, NEGATIVE)), temperature=0.9, top_p=0.95)
    assert not torch.equal(want, model.generate(**padded(), max_new_tokens=12, pad_token_id=PAD)[:, 6:])
    options = dict(custom_generate=eft.hf.generate, max_new_tokens=12, pad_token_id=PAD, seed=3, **SAMPLED)
    free = dict(models=[model], weights=[2.5, -1.5], prompts=[padded(NEGATIVE)])
    for k, draft in ((0, None), (3, 0), (3, 1)):
        out = model.generate(**padded(), draft_tokens=k, draft=draft, **free, **options)
        assert torch.equal(out[:, 6:], want), (k, draft)
    out = model.generate(**padded(), draft_tokens=3, return_dict_in_generate=True, **free, **options)
    assert torch.equal(out.sequences[:, 6:], want) and len(set(out.speculation.accepted.tolist())) > 1  # rows go apart


def test_any_number_of_models_and_weights(llamas):
    base, a, b, ref = llamas
    options = dict(custom_generate=eft.hf.generate, max_new_tokens=12, pad_token_id=PAD, seed=3, **SAMPLED)
    want = run([base, a, ref], beta=1.5, **SAMPLED)
    for k, draft in ((0, None), (3, None), (3, 1)):
        for weights in (
            [1.5, 1.0, -1.5],
            eft.upscale(1.5),
            torch.tensor([1.5, 1.0, -1.5]),
            [torch.full((4,), 1.5), 1.0, [-1.5] * 4],
            np.array([1.5, 1.0, -1.5]),
        ):
            out = base.generate(**padded(), models=[a, ref], weights=weights, draft_tokens=k, draft=draft, **options)
            assert torch.equal(out, want)
    eight = [copy.deepcopy(m) for m in (*llamas, *llamas)][:7]
    weights = [1.0, 0.5, -0.25, 0.5, -0.5, 0.25, 0.75, -0.5]
    prompts = [None, padded(NEGATIVE), None, torch.tensor([[9, 8, 7]]), None, None, padded(NEGATIVE)]
    own = [[p, p, n, p, [9, 8, 7], p, p, n] for p, n in zip(PROMPTS, NEGATIVE)]
    want = guided([base, *eight], weights, own, temperature=0.9, top_p=0.95)
    for k in (0, 2):
        out = base.generate(**padded(), models=eight, weights=weights, prompts=prompts, draft_tokens=k, **options)
        assert torch.equal(out[:, 6:], want)


def test_a_negative_prompt_for_every_returned_sequence(llamas):
    base = llamas[0]
    options = dict(
        custom_generate=eft.hf.generate,
        max_new_tokens=12,
        pad_token_id=PAD,
        seed=3,
        num_return_sequences=2,
        models=[base],
        weights=[2.0, -1.0],
        prompts=[padded(NEGATIVE)],
        **SAMPLED,
    )
    want = guided(
        [base, base],
        [2.0, -1.0],
        [pair for pair in zip(PROMPTS, NEGATIVE) for _ in range(2)],
        temperature=0.9,
        top_p=0.95,
    )
    for k in (0, 3):
        assert torch.equal(base.generate(**padded(), draft_tokens=k, **options)[:, 6:], want)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(weights=[2.0, -1.0]), "weights: got 2 for 1 models"),
        (dict(models=[0]), "weights: got None, allowed are 2 numbers"),
        (dict(weights=[1.0], tuned="x"), "tuned: goes with tuned and ref"),
        (dict(models=["m"] * 8, weights=[1.0] * 8), "models: got 8 models"),
        (dict(models=["llama"], weights=[2.0, -1.0]), "models.0.: got str"),
        (dict(models=[0], weights=[2.0, -1.0]), "models.0.: is model .*same prompt"),
        (dict(models=[0], weights=[2.0, -1.0], prompts=[]), "prompts: got 0, allowed is a list of 1"),
        (
            dict(models=[0], weights=[2.0, -1.0], prompts=[torch.ones(3, 2).long()]),
            "prompts.0.: got torch.int64 .3, 2.",
        ),
        (dict(models=[0], weights=[2.0, -1.0], prompts=[[1, 2]]), "prompts.0.: got list"),
        (dict(models=[0], weights=[2.0, -1.0], prompts=[torch.full((1, 2), V)]), "prompts.0.: got an id outside"),
        (
            dict(
                models=[0],
                weights=[2.0, -1.0],
                prompts=[dict(input_ids=torch.ones(1, 2).long(), attention_mask=torch.tensor([[1, 0]]))],
            ),
            "prompts.0.: attention_mask.*left padding",
        ),
        (
            dict(models=[0], weights=[2.0, -1.0], prompts=[torch.ones(1, 60).long()]),
            "got 60 tokens.*64.*context of models.0.",
        ),
        (dict(prompts=[None], tuned=1, ref=2), "prompts: got 1, allowed is a list of 2"),
    ],
)
def test_bad_combinations(llamas, options, message):
    def model(x):
        return llamas[x] if isinstance(x, int) else x

    options = {
        k: [model(m) for m in v] if k == "models" else model(v) if k in ("tuned", "ref") else v
        for k, v in options.items()
    }
    with pytest.raises(ValueError, match=message):
        llamas[0].generate(**padded(), custom_generate=eft.hf.generate, max_new_tokens=12, pad_token_id=PAD, **options)


def test_a_filter_that_transformers_lacks_comes_last(llamas, monkeypatch):
    """min_p as if transformers had no class for it: it comes after top-p anyway, so the text is the same."""
    from transformers.generation import logits_process as lp

    from eft_kernels.integrations.hf import processing

    base, tuned, ref, *_ = llamas
    options = dict(tuned=tuned, ref=ref, do_sample=True, top_k=9, top_p=0.9, min_p=torch.tensor([0.1]), seed=3)
    ids = torch.tensor([[5, 6, 7]])

    def text():
        return base.generate(ids, custom_generate=eft.hf.generate, max_new_tokens=12, **options)

    want = text()
    monkeypatch.delitem(processing.WARPERS, lp.MinPLogitsWarper)
    assert torch.equal(text(), want)
