"""`base.generate(..., custom_generate=eft.hf.generate)` over tiny random models of several families.

The oracles are slow and plain: full forwards without cache of one unpadded row at a time, the formula in PyTorch, and
transformers' own processors.
"""

import copy
import math
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)
from transformers.generation import logits_process as lp

import eft_kernels as eft
from eft_kernels.decoding import target as target_module
from eft_kernels.integrations.hf import arguments

V = 24
PAD, EOS = 0, 1
METHODS = ("coupled", "token", "block")
SMALL = dict(
    vocab_size=V, num_hidden_layers=2, initializer_range=0.3, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2
)
GQA = dict(
    SMALL,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": dict(GQA),
    "gpt2": dict(SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "qwen2": dict(GQA),
    "qwen3": dict(GQA),
    "gemma2": dict(GQA, sliding_window=4, query_pre_attn_scalar=4),  # alternates windows and full attention
    "gemma3_text": dict(GQA, sliding_window=4, query_pre_attn_scalar=4),
    "mistral": dict(GQA, sliding_window=4),
    "bloom": dict(SMALL, hidden_size=16, n_layer=2, n_head=2),  # position from the mask alone (alibi)
}


def make(family, seed, attn=None, **changes):
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.generation_config.eos_token_id = None  # rows run on unless a test says otherwise
    return model


PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16, 17, 18, 19, 20]]


def padded(prompts=PROMPTS):
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return dict(input_ids=ids, attention_mask=mask)


def run(models, inputs=None, **options):
    base, *tuned, ref = models
    options = {
        "custom_generate": eft.hf.generate,
        "tuned": tuned if len(tuned) > 1 else tuned[0],
        "ref": ref,
        "max_new_tokens": 12,
        "pad_token_id": PAD,
        "seed": 3,
        **options,
    }
    return base.generate(**(inputs or padded()), **options)


SAMPLED = dict(do_sample=True, temperature=0.9, top_k=0, top_p=0.95)


# --- caches and families -------------------------------------------------------------------------------------------


@torch.no_grad()
def full_logits(model, ids):
    """Logits [n, V] of one unpadded row, without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_equal_full_recomputation_after_every_round(family, monkeypatch):
    """Every logit that verify or sample gets, of every model, slot and row, under ragged acceptance."""
    models, seen = [make(family, s) for s in (1, 2, 3)], []

    def spy(logits, weights, drafts, draft_lengths, **options):
        out = eft.verify(logits, weights, drafts, draft_lengths, **options)
        seen.append(([z.clone() for z in logits], drafts.clone(), draft_lengths.clone(), options["position"].clone()))
        return out

    monkeypatch.setattr(target_module, "verify", spy)
    out = run(models, draft_tokens=3, verify="token", **SAMPLED)
    assert len({tuple(p.tolist()) for *_, p in seen if len(set(p.tolist())) > 1}) > 2  # rows drifted apart
    compared = 0
    for logits, drafts, lengths, position in seen:
        for b, prompt in enumerate(PROMPTS):
            n = int(position[b])
            if n >= 12:
                continue
            text = prompt + out[b, 6 : 6 + n].tolist() + drafts[b, : int(lengths[b])].tolist()
            slots = int(lengths[b]) + 1
            for j, model in enumerate(models):
                want = full_logits(model, text)[-slots:]
                torch.testing.assert_close(logits[j][b, :slots].float(), want, atol=2e-4, rtol=1e-3)
                compared += slots
    assert compared > 200


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_is_the_row_in_a_batch_and_coupled_is_plain(family):
    # float32: forwards of different lengths round differently and could flip a near tie; these seeds have none
    models, seeds = [make(family, s) for s in (1, 2, 3)], torch.tensor([7, 8, 9, 10])
    want = run(models, seed=seeds, **SAMPLED)
    for k in (1, 8):
        assert torch.equal(run(models, seed=seeds, draft_tokens=k, **SAMPLED), want)
    for b in (1, 3):
        for k in (0, 3):
            alone = run(models, padded(PROMPTS[b : b + 1]), seed=seeds[b : b + 1], draft_tokens=k, **SAMPLED)
            assert torch.equal(alone[0, -12:], want[b, -12:])


def test_coupled_is_plain_for_every_k_and_batch(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    for sampling in (SAMPLED, dict(do_sample=False)):
        for prompts in (PROMPTS[:1], PROMPTS):
            want = run(models, padded(prompts), eos_token_id=[EOS, 3, 4], **sampling)
            for k in (1, 2, 3, 8):
                got = run(models, padded(prompts), eos_token_id=[EOS, 3, 4], draft_tokens=k, **sampling)
                assert torch.equal(got, want), (sampling, k)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_speculation_with_models_of_different_shapes(attn):
    models = [make("llama", 1, hidden_size=32, num_hidden_layers=3, attn=attn), make("qwen2", 2), make("gpt2", 3)]
    want = run(models, **SAMPLED)
    for draft in (0, 1, 2):
        assert torch.equal(run(models, draft_tokens=3, draft=draft, **SAMPLED), want)


def test_a_cache_without_rollback_is_refused_for_speculation_only():
    config = transformers.RwkvConfig(vocab_size=V, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    models = [transformers.RwkvForCausalLM(config).eval() for _ in range(3)]
    for m in models:
        m.generation_config.eos_token_id = None
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    out = run(models, inputs)
    assert torch.equal(out[0, 3:], oracle(models, [5, 6, 7], 12, {}))
    with pytest.raises(ValueError, match="draft_tokens.*model.*Rwkv.*its cache is of its own kind"):
        run(models, inputs, draft_tokens=2)


# --- what is computed ----------------------------------------------------------------------------------------------


def combined(models, weights, ids):
    return sum(w * full_logits(m, ids)[-1] for w, m in zip(weights, models))


def oracle(models, prompt, steps, sampling, weights=(1, 1, -1), processors=None, seed=3, eos=(), pads=0):
    """Slow emulation of one row; processors get the prompt with ``pads`` columns of padding, as generate gives it."""
    ids = list(prompt)
    for n in range(steps):
        scores = combined(models, weights, ids)[None].float()
        if processors:
            scores = processors(torch.tensor([[PAD] * pads + ids]), scores)
        out = eft.sample([scores], [1.0], seed=seed, position=n, **{"temperature": 0.0, **sampling})
        ids.append(int(out.tokens))
        if ids[-1] in eos:
            break
    return torch.tensor(ids[len(prompt) :])


@pytest.mark.parametrize(
    "mode, weights",
    [
        (dict(), (1, 1, -1)),
        (dict(beta=1.7), (1.7, 1, -1.7)),
        (dict(mode="proxy", alpha=0.4), (1, 0.4, -0.4)),
        (dict(mode="downscale"), (1, 1, -1)),
        (dict(lam=0.3), (1, 0.3, 0.7, -1)),
        (dict(mode="interpolate"), (1, 0.5, 0.5, -1)),
    ],
)
def test_modes(llamas, mode, weights):
    models = llamas if len(weights) == 4 else [llamas[0], llamas[1], llamas[3]]
    seeds = torch.tensor([3, 4, 5, 6])
    for sampling, k in ((SAMPLED, 0), (SAMPLED, 3), (dict(do_sample=False), 3)):
        out = run(models, draft_tokens=k, seed=seeds, **mode, **sampling)
        for b, prompt in enumerate(PROMPTS):
            kernel = dict(temperature=0.9, top_p=0.95) if sampling is SAMPLED else {}
            assert torch.equal(out[b, 6:], oracle(models, prompt, 12, kernel, weights, seed=int(seeds[b])))


def test_the_small_model_drafts(llamas):
    forwards = {}

    def count(name, model):
        return model.register_forward_hook(lambda *_: forwards.update({name: forwards.get(name, 0) + 1}))

    for mode, drafter in (("upscale", 1), ("proxy", 1), ("downscale", 0)):
        forwards.clear()
        hooks = [count(i, m) for i, m in enumerate((llamas[0], llamas[1], llamas[3]))]
        out = run(
            [llamas[0], llamas[1], llamas[3]],
            padded(PROMPTS[:1]),
            mode=mode,
            draft_tokens=3,
            return_dict_in_generate=True,
        )
        for hook in hooks:
            hook.remove()
        rounds = int(out.speculation.rounds)
        assert [forwards[i] > rounds for i in range(3)] == [i == drafter for i in range(3)]
        assert all(forwards[i] == rounds for i in range(3) if i != drafter)


def test_per_row_parameters(llamas):
    rows = dict(
        temperature=torch.tensor([0.0, 0.5, 1.0, 1.5]),
        top_k=torch.tensor([0, 3, 0, 5]),
        top_p=torch.tensor([1.0, 0.9, 0.7, 1.0]),
        min_p=torch.tensor([0.0, 0.1, 0.0, 0.02]),
        beta=torch.tensor([0.5, 1.0, 1.5, 2.0]),
        upscale_top_p=torch.tensor([1.0, 0.5, 0.9, 1.0]),
        seed=torch.tensor([5, 6, 7, 8]),
    )
    models = [llamas[0], llamas[1], llamas[3]]
    for k in (0, 3):
        out = run(models, do_sample=True, draft_tokens=k, **rows)
        for b, prompt in enumerate(PROMPTS):
            own = {name: v[b].item() for name, v in rows.items()}
            alone = run(models, padded([prompt]), do_sample=True, **own)
            assert torch.equal(alone[0, -12:], out[b, -12:])
    mixed = run(llamas, lam=torch.tensor([0.0, 0.3, 0.6, 1.0]), seed=rows["seed"], **SAMPLED)
    for b, lam in enumerate((0.0, 0.3, 0.6, 1.0)):
        alone = run(llamas, padded(PROMPTS[b : b + 1]), lam=lam, seed=rows["seed"][b : b + 1], **SAMPLED)
        assert torch.equal(alone[0, -12:], mixed[b, -12:])


@pytest.mark.parametrize("method", METHODS)
def test_distribution_of_the_first_token(llamas, method):
    """Through the whole path: 3000 rows of one prompt against the exact probabilities."""
    models, rows, prompt = [llamas[0], llamas[1], llamas[3]], 3000, [5, 6, 7]
    inputs = dict(input_ids=torch.tensor([prompt] * rows))
    out = run(models, inputs, do_sample=True, top_k=0, temperature=1.5, max_new_tokens=2, draft_tokens=1, verify=method)
    p = (combined(models, (1, 1, -1), prompt) / 1.5).softmax(-1).double() * rows
    seen = torch.bincount(out[:, 3], minlength=V).double()
    often = p >= 8
    assert int(often.sum()) > 4
    assert float(((seen - p) ** 2 / p)[often].sum()) < 2.5 * int(often.sum()) + 20


# --- processors, endings, outputs ----------------------------------------------------------------------------------


def test_without_tuning_it_is_transformers(llamas):
    """tuned = ref makes the emulated model the base model: every option must do what it does in transformers."""
    base, twin = llamas[0], copy.deepcopy(llamas[1])
    for options in (
        dict(),
        dict(repetition_penalty=1.7),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=9),
        dict(bad_words_ids=[[9], [8, 3]]),
        dict(suppress_tokens=[4, 5, 6]),
        dict(forced_eos_token_id=EOS),
        dict(begin_suppress_tokens=[20, 11]),
        dict(sequence_bias=[[[7], 4.0]]),
        dict(exponential_decay_length_penalty=(3, 1.5)),
        dict(encoder_repetition_penalty=1.5),
        dict(prefix_allowed_tokens_fn=lambda b, ids: list(range(b, V, 2))),
    ):
        for eos in (None, [EOS, 3]):
            if eos is None and {"min_new_tokens", "exponential_decay_length_penalty"} & options.keys():
                continue
            common = dict(options, max_new_tokens=14, pad_token_id=PAD, eos_token_id=eos)
            recorded = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
            want = base.generate(**padded(), **recorded, **common)
            for k in (0, 3):
                got = run([base, llamas[1], twin], draft_tokens=k, **recorded, **common)
                assert torch.equal(got.sequences, want.sequences), (options, eos, k)
                running = torch.ones(4, dtype=torch.bool)
                for n, (a, b) in enumerate(zip(got.scores, want.scores)):
                    torch.testing.assert_close(a[running], b[running], atol=1e-4, rtol=1e-4)
                    torch.testing.assert_close(got.logits[n][running], want.logits[n][running], atol=1e-4, rtol=1e-4)
                    if eos:
                        running = running & ~torch.isin(got.sequences[:, 6 + n], torch.tensor(eos))


SAMPLING_LISTS = [
    dict(temperature=0.7, top_k=6, top_p=0.8, min_p=0.05),
    dict(temperature=1.3, typical_p=0.7),
    dict(top_k=5, epsilon_cutoff=0.02),
    dict(temperature=0.8, eta_cutoff=0.05, top_p=0.9),
    dict(top_h=0.5, top_k=4),
    dict(temperature=0.9, repetition_penalty=1.4, top_p=0.9),
    dict(top_p=0.8, renormalize_logits=True),
    dict(temperature=0.0),
    dict(),  # top_k 50 is transformers' default
]


@pytest.mark.parametrize("options", SAMPLING_LISTS, ids=lambda o: "-".join(o) or "defaults")
def test_sampling_processors_against_transformers_order(llamas, options):
    if "repetition_penalty" in options and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("there the oracle cannot be told to leave padding out of the prompt")
    models, seeds = [llamas[0], llamas[1], llamas[3]], torch.tensor([3, 4, 5, 6])
    zero = options.get("temperature") == 0
    config = GenerationConfig(do_sample=True, **{"top_k": 50, **({} if zero else options)})
    config._eos_token_tensor = None
    theirs = llamas[0]._get_logits_processor(config, input_ids_seq_length=6, encoder_input_ids=padded()["input_ids"])
    temperature = 0.0 if zero else 1.0
    got = run(models, do_sample=True, seed=seeds, return_dict_in_generate=True, output_scores=True, **options)
    for b, prompt in enumerate(PROMPTS):
        if "repetition_penalty" in options:  # pads are part of what transformers penalises unless told not to
            theirs[0].prompt_ignore_length = torch.tensor([6 - len(prompt)])
        want = oracle(
            models,
            prompt,
            12,
            dict(temperature=temperature),
            processors=theirs,
            seed=int(seeds[b]),
            pads=6 - len(prompt),
        )
        assert torch.equal(got.sequences[b, 6:], want)
        if not zero:
            ids = torch.cat([padded()["input_ids"][b], want])[None]
            for n in (0, 5):
                raw = combined(models, (1, 1, -1), prompt + want[:n].tolist())[None]
                torch.testing.assert_close(got.scores[n][b : b + 1], theirs(ids[:, : 6 + n], raw), atol=1e-3, rtol=1e-3)
    again = run(
        models, do_sample=True, seed=seeds, draft_tokens=3, return_dict_in_generate=True, output_scores=True, **options
    )
    assert torch.equal(again.sequences, got.sequences)
    for a, b in zip(again.scores, got.scores):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    for method in ("token", "block"):
        run(models, do_sample=True, seed=seeds, draft_tokens=3, verify=method, **options)


class NoRepeat(LogitsProcessor):
    """Forbids the last token; remembers the prefixes it saw."""

    stateless = True

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores.scatter(1, input_ids[:, -1:], -math.inf)


@pytest.mark.parametrize("method", METHODS)
def test_callers_processor_sees_every_position_with_its_own_prefix(llamas, method):
    models = [llamas[0], llamas[1], llamas[3]]
    user = NoRepeat()
    out = run(models, draft_tokens=3, verify=method, logits_processor=LogitsProcessorList([user]), **SAMPLED)
    for b in range(4):
        text = out[b].tolist()
        assert all(x != y for x, y in zip(text[5:], text[6:]))
        prefixes = {tuple(s[b].tolist()) for s in user.seen}
        assert all(tuple(text[:n]) in prefixes for n in range(6, len(text)))
    if method == "coupled":
        plain = run(models, logits_processor=LogitsProcessorList([NoRepeat()]), **SAMPLED)
        assert torch.equal(out, plain)


def test_callers_warper_keeps_its_place(llamas):
    """A caller's temperature comes before the config's filters; a named one replaces the config's, not the caller's."""
    models, seeds = [llamas[0], llamas[1], llamas[3]], torch.tensor([3, 4, 5, 6])
    user = LogitsProcessorList([lp.TopKLogitsWarper(7), lp.TemperatureLogitsWarper(0.5)])
    config = GenerationConfig(do_sample=True, temperature=3.0, top_k=9, top_p=0.5, pad_token_id=PAD, max_new_tokens=12)
    out = run(models, generation_config=config, logits_processor=user, seed=seeds, temperature=2.0, min_p=0.02)
    want = LogitsProcessorList(
        [
            *user,
            lp.TemperatureLogitsWarper(2.0),
            lp.TopKLogitsWarper(9),
            lp.TopPLogitsWarper(0.5),
            lp.MinPLogitsWarper(0.02),
        ]
    )
    for b, prompt in enumerate(PROMPTS):
        slow = oracle(models, prompt, 12, dict(temperature=1.0), processors=want, seed=int(seeds[b]))
        assert torch.equal(out[b, 6:], slow)


def test_filters_alone_never_materialise_scores(llamas, monkeypatch):
    monkeypatch.setattr(target_module.Target, "scores", lambda *_: pytest.fail("scores [rows, V] were made"))
    for k in (0, 2):
        run([llamas[0], llamas[1], llamas[3]], draft_tokens=k, do_sample=True, temperature=0.7, top_k=9, top_p=0.9)
        run(
            [llamas[0], llamas[1], llamas[3]],
            draft_tokens=k,
            generation_config=GenerationConfig(
                do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1, max_new_tokens=5, pad_token_id=PAD
            ),
        )


class TwoEven(StoppingCriteria):
    """A row ends with its second even token."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 6:] % 2 == 0).sum(1) >= 2


@pytest.mark.parametrize("method", METHODS)
def test_callers_stopping_criteria(llamas, method):
    models = [llamas[0], llamas[1], llamas[3]]
    for k in (0, 1, 4):
        out = run(
            models,
            draft_tokens=k,
            verify=method if k else "coupled",
            stopping_criteria=[TwoEven()],
            pad_token_id=21,
            **SAMPLED,
        )
        lengths = set()
        for row in out[:, 6:].tolist():
            evens = [i for i, t in enumerate(row) if t % 2 == 0]
            end = evens[1] + 1 if len(evens) > 1 else 12
            assert row[end:] == [21] * (len(row) - end)
            lengths.add(end)
        assert len(lengths) > 1 and out.shape[1] == 6 + max(lengths)
        if method == "coupled":
            plain = run(models, stopping_criteria=[TwoEven()], pad_token_id=21, **SAMPLED)
            assert torch.equal(out, plain)


def test_max_time_ends_at_once(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    for k in (0, 3):
        assert run(models, max_time=1e-9, draft_tokens=k).shape[1] == 7


def test_end_of_text_and_lengths(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    for method in METHODS:
        for k in (0, 1, 5):
            out = run(
                models,
                eos_token_id=[EOS, 3, 7],
                max_new_tokens=10,
                draft_tokens=k,
                verify=method if k else "coupled",
                **SAMPLED,
            )
            for row in out[:, 6:].tolist():
                ends = [i for i, t in enumerate(row) if t in (EOS, 3, 7)]
                assert not ends or row[ends[0] + 1 :] == [PAD] * (len(row) - ends[0] - 1)
    assert run(models, max_new_tokens=None, max_length=9).shape == (4, 9)
    assert run(models, max_new_tokens=1, draft_tokens=5).shape == (4, 7)


def test_num_return_sequences_and_seeds(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    options = dict(SAMPLED, temperature=1.5, num_return_sequences=3)
    want = run(models, seed=9, **options)
    assert want.shape == (12, 18) and len({tuple(r.tolist()) for r in want[:3]}) == 3
    assert torch.equal(run(models, seed=9, draft_tokens=3, **options), want)
    assert torch.equal(run(models, seed=eft.row_seeds(9, 12), **options), want)
    assert torch.equal(run(models, padded(PROMPTS[:1]), seed=9, **SAMPLED)[0], run(models, seed=9, **SAMPLED)[0])
    torch.manual_seed(5)
    a, b = run(models, seed=None, **options), run(models, seed=None, **options)
    torch.manual_seed(5)
    assert torch.equal(run(models, seed=None, **options), a) and not torch.equal(a, b)


class Collect:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.clone())

    def end(self):
        self.ended += 1


def test_streaming(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    calls = []
    for k in (0, 3):
        streamer = Collect()
        out = run(models, padded(PROMPTS[:1]), streamer=streamer, draft_tokens=k, eos_token_id=[EOS, 3], **SAMPLED)
        assert streamer.ended == 1 and torch.equal(streamer.puts[0], out[:, :6])
        assert torch.equal(torch.cat(streamer.puts[1:]), out[0, 6:]) and all(p.shape == (1,) for p in streamer.puts[1:])
        calls.append([p.tolist() for p in streamer.puts])
    assert calls[0] == calls[1]
    with pytest.raises(ValueError, match="streamer"):
        run(models, streamer=Collect())


def test_outputs(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    out = run(models, return_dict_in_generate=True, output_scores=True, **SAMPLED)
    assert out.speculation is None and out.failed is None and out.logits is None and len(out.scores) == 12
    scores = llamas[0].compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (4, 12) and bool((scores <= 1e-6).all()) and bool(torch.isfinite(scores).all())
    for method in METHODS:
        out = run(models, return_dict_in_generate=True, draft_tokens=4, verify=method, eos_token_id=[3], **SAMPLED)
        s = out.speculation
        ends = [(row.tolist().index(3) + 1 if 3 in row else 12) for row in out.sequences[:, 6:]]
        assert s.emitted.tolist() == ends and out.scores is None
        assert bool((s.accepted <= s.drafted).all()) and bool((s.emitted <= s.accepted + s.rounds).all())
        assert bool((s.rounds >= 1).all()) and 0 <= s.acceptance <= 1 <= s.tokens_per_round <= 5


def test_an_invalid_row_ends_and_the_others_go_on(llamas):
    base, tuned, ref = make("llama", 1), llamas[1], llamas[3]
    clean = run([base, tuned, ref], **SAMPLED)
    bad = int(clean[0, 9])  # row 0's fourth token
    assert not bool((clean[:, :6] == bad).any())
    with torch.no_grad():
        base.model.embed_tokens.weight[bad] = math.nan
    texts = clean[:, 6:].tolist()
    failed = {b: t.index(bad) + 1 for b, t in enumerate(texts) if bad in t[:-1]}
    assert 0 in failed and len(failed) < 4
    want = [t[: failed[b]] + [PAD] * (12 - failed[b]) if b in failed else t for b, t in enumerate(texts)]
    for k in (0, 3):
        with pytest.raises(eft.hf.InvalidRowError, match=f"row 0 at step {failed[0]}") as caught:
            run([base, tuned, ref], draft_tokens=k, **SAMPLED)
        assert caught.value.failed == failed and isinstance(caught.value, RuntimeError)
        assert caught.value.output[:, 6:].tolist() == want
        with pytest.warns(RuntimeWarning, match=f"row 0 at step {failed[0]}"):
            out = run([base, tuned, ref], draft_tokens=k, on_invalid="warn", return_dict_in_generate=True, **SAMPLED)
        assert out.failed == failed and out.sequences[:, 6:].tolist() == want
    with pytest.raises(eft.hf.InvalidRowError, match="row 0 at step 0"):  # nothing left to choose from
        run([llamas[0], tuned, ref], padded(PROMPTS[:1]), suppress_tokens=list(range(V)))


# --- bad input -----------------------------------------------------------------------------------------------------


class Tokenizer:
    def __init__(self, size, pad=None, **changes):
        self.vocabulary = {**{f"t{i}": i for i in range(size)}, **changes}
        self.pad_token = pad

    def get_vocab(self):
        return self.vocabulary


BAD = {
    "verify": (dict(verify="exact"), "verify.*'exact'.*coupled"),
    "verify without drafts": (dict(verify="block"), "verify: got 'block', allowed is 'coupled' without draft_tokens"),
    "draft without drafts": (dict(draft=1), "draft: got 1, allowed is None without draft_tokens"),
    "mode": (dict(mode="up"), "mode.*'up'.*upscale"),
    "beta in proxy": (dict(mode="proxy", beta=1.0), "beta.*upscale.*proxy"),
    "beta in downscale": (dict(mode="downscale", beta=1.0), "beta.*upscale"),
    "alpha in upscale": (dict(alpha=1.0), "alpha.*proxy.*upscale"),
    "lam with one": (dict(lam=0.5), "lam.*interpolate"),
    "interpolate with one": (dict(mode="interpolate"), "tuned.*1 model.*two"),
    "no ref": (dict(ref=None), "ref: got None"),
    "no tuned": (dict(tuned=None), "tuned: got None"),
    "three tuned": (dict(tuned=[1, 2, 3]), "tuned: got 3"),
    "not a model": (dict(tuned="gpt2"), "tuned: got str"),
    "beta nan": (dict(beta=math.nan), "weights.*nan"),
    "beta rows": (dict(beta=torch.ones(3)), "weights"),
    "draft_tokens": (dict(draft_tokens=-1), "draft_tokens: got -1"),
    "draft_tokens float": (dict(draft_tokens=2.0), "draft_tokens: got 2.0"),
    "draft": (dict(draft=3, draft_tokens=2), "draft: got 3.*0 to 2"),
    "on_invalid": (dict(on_invalid="ignore"), "on_invalid: got 'ignore'"),
    "seed rows": (dict(seed=torch.tensor([1, 2])), r"seed.*\[4\].*\[2\]"),
    "seed float": (dict(seed=1.5), "seed: got 1.5"),
    "temperature": (dict(do_sample=True, temperature=-1.0), "temperature: got -1.0"),
    "top_p": (dict(do_sample=True, top_p=0.0), "top_p: got 0.0"),
    "top_k rows": (dict(do_sample=True, top_k=torch.tensor([1, 2])), "top_k.*4"),
    "min_p": (dict(do_sample=True, min_p=2.0), "min_p: got 2.0"),
    "upscale_top_p": (dict(upscale_top_p=0), "upscale_top_p: got 0"),
    "greedy temperature": (dict(do_sample=False, temperature=0.5), "temperature: got 0.5.*do_sample"),
    "greedy top_k": (dict(do_sample=False, top_k=5), "top_k: got 5.*do_sample"),
    "beams": (dict(num_beams=2), "num_beams: got 2"),
    "contrastive": (dict(penalty_alpha=0.6, generation_config=GenerationConfig(top_k=4)), "penalty_alpha: got 0.6"),
    "guidance": (dict(guidance_scale=1.5), "guidance_scale: got 1.5"),
    "prompt lookup": (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens: got 3"),
    "dola": (dict(dola_layers="high"), "dola_layers: got 'high'"),
    "static cache": (dict(cache_implementation="static"), "cache_implementation: got 'static'"),
    "no cache": (dict(use_cache=False), "use_cache: got False"),
    "attentions": (dict(output_attentions=True), "output_attentions: got True"),
    "hidden states": (dict(output_hidden_states=True), "output_hidden_states: got True"),
    "prefill chunks": (dict(prefill_chunk_size=0), "prefill_chunk_size: got 0"),
    "length penalty": (dict(length_penalty=2.0), "length_penalty: got 2.0"),
    "cache": (dict(past_key_values=transformers.DynamicCache()), "past_key_values|cache"),
    "positions": (dict(position_ids=torch.arange(6)[None] + 1), "position_ids"),
    "all logits": (dict(logits_to_keep=3), "logits_to_keep"),
    "synced": (dict(synced_gpus=True), "synced_gpus"),
    "negative": (dict(negative_prompt_ids=torch.tensor([[1]])), "negative_prompt_ids"),
    "vocab_size": (dict(vocab_size=V + 1), f"vocab_size: got {V + 1}.*1 to {V}"),
    "too long": (dict(max_new_tokens=59), "input_ids: got 6 tokens and max_new_tokens=59.*64.*context of model"),
    "tokenizers": (dict(tokenizers=[Tokenizer(V)] * 2), "tokenizers.*list of 3"),
    "other ids": (
        dict(tokenizers=[Tokenizer(V), Tokenizer(V, t3=4), Tokenizer(V)]),
        "tokenizers: 't3' is 4 for tuned and 3 for model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_computed(llamas, case, monkeypatch):
    options, message = BAD[case]
    models = [llamas[0], llamas[1], llamas[3]]
    for m in models:
        monkeypatch.setattr(m, "forward", m.forward)  # keeps the signature visible
        hook = m.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
        monkeypatch.setattr(m, "_test_hook", hook, raising=False)
    try:
        with pytest.raises(ValueError, match=message):
            run(models, **options)
    finally:
        for m in models:
            m._test_hook.remove()


def test_bad_prompts(llamas):
    models = [llamas[0], llamas[1], llamas[3]]
    ids, mask = padded().values()
    for inputs, message in (
        (dict(input_ids=torch.zeros(0, 4, dtype=torch.int64)), "input_ids"),
        (dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)), "input_ids"),
        (dict(input_ids=ids + 15), "input_ids: got an id outside 0 to 23"),
        (dict(input_ids=ids, attention_mask=mask.flip(1)), "attention_mask.*left padding"),
        (dict(input_ids=ids, attention_mask=torch.tensor([1, 1, 0, 1, 1, 1]).expand(4, 6)), "attention_mask"),
        (dict(input_ids=ids, attention_mask=mask * torch.tensor([[1], [0], [1], [1]])), "attention_mask.*one token"),
        (dict(input_ids=ids, attention_mask=mask[:, 1:]), "attention_mask"),
        (dict(inputs_embeds=torch.zeros(1, 4, 16)), "input"),
    ):
        with pytest.raises(ValueError, match=message):
            run(models, inputs)


def test_models_that_do_not_fit(llamas):
    base, tuned, ref = llamas[0], llamas[1], llamas[3]
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    with pytest.raises(ValueError, match="tuned.*T5.*encoder-decoder"):
        run([base, t5, ref])
    short = make("llama", 5, max_position_embeddings=16)
    with pytest.raises(ValueError, match="16 together, the context of ref"):
        run([base, tuned, short])
    with pytest.raises(ValueError, match="assistant_model"):
        run([base, tuned, ref], assistant_model=tuned)
    with pytest.raises(ValueError, match="ref: is on meta, where weights have no values"):
        run([base, tuned, make("llama", 1).to("meta")])
    with pytest.raises(ValueError, match="SynthID.*draft_tokens=0"):
        run(
            [base, tuned, ref],
            draft_tokens=2,
            watermarking_config=transformers.SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3),
            **SAMPLED,
        )
    with pytest.raises(ValueError, match="stop_strings: needs a tokenizer.*StopStringCriteria"):
        run([base, tuned, ref], stop_strings="x")


def test_vocabularies_of_different_lengths(llamas):
    base, ref = llamas[0], llamas[3]
    wide = make("llama", 2, vocab_size=V + 3)
    models = [base, wide, ref]
    with pytest.raises(ValueError, match=f"vocab_size.*model {V}, tuned {V + 3}, ref {V}.*vocab_size={V}"):
        run(models)
    for k in (0, 2):
        for vocab in (
            dict(vocab_size=V),
            dict(tokenizers=[Tokenizer(V), Tokenizer(V), Tokenizer(V)]),
            dict(tokenizers=[Tokenizer(V), Tokenizer(V + 1, pad=f"t{V}"), Tokenizer(V)]),
        ):
            out = run(models, draft_tokens=k, **vocab, **SAMPLED)
            assert int(out.max()) < V
    with pytest.raises(ValueError, match=f"tokenizers: tuned has tokens from id {V} on"):
        run(models, tokenizers=[Tokenizer(V), Tokenizer(V + 1), Tokenizer(V)])
    out = run(models, vocab_size=9, draft_tokens=2, verify="token", temperature=3.0, do_sample=True)
    assert int(out[:, 6:].max()) < 9
    # the padding's own id may lie outside a smaller model's vocabulary
    inputs = padded()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, V + 2)
    out = run([wide, base, ref], inputs, vocab_size=V, **SAMPLED)
    assert torch.equal(out[:, 6:], run([wide, base, ref], vocab_size=V, **SAMPLED)[:, 6:])


def test_every_generation_option_is_honoured_or_refused(llamas):
    """Whatever field GenerationConfig has or gets: unknown to us means refused when set."""
    known = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    assert arguments.HONOURED | arguments.NEUTRAL.keys() <= known
    for name in known - arguments.HONOURED:
        config = GenerationConfig()
        object.__setattr__(config, name, "something")
        with pytest.raises(ValueError, match=f"^{name}: got 'something'"):
            arguments.check_options(config, None, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments.check_options(llamas[0].generation_config, None, {})
