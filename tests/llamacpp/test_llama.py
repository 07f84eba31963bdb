"""EmulatedModel in llama.cpp itself, held against transformers on the same weights."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch

import eft_kernels as eft
from eft_kernels.integrations.llama_cpp import EmulatedModel, InvalidScoresError, Model
from eft_kernels.integrations.llama_cpp import library as library_module
from eft_kernels.integrations.llama_cpp.library import library

PROMPTS = ("And the king said unto", "It is a truth universally", "The", "In the beginning God created the heaven")
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}
# of the largest logit, about 12: a cache in float16 rounds keys and values to 11 bits
NEAR = {True: 5e-3, False: 5e-5}


def generated(theirs, prompt, names=("base", "tuned-a", "ref"), new=40, **settings):
    """`eft.hf.generate` on the same weights: the new ids."""
    models, tokenizer = theirs
    base, *tuned, ref = (models[n] for n in names)
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = settings.pop("temperature") if "temperature" in settings else 1.0
    own = {"do_sample": False} if sampling == 0 else {"do_sample": True, "temperature": sampling, "top_k": 0}
    out = base.generate(
        **inputs,
        custom_generate=eft.hf.generate,
        tuned=tuned if len(tuned) > 1 else tuned[0],
        ref=ref,
        max_new_tokens=new,
        **{**own, **settings},
    )
    return out[0, inputs.input_ids.shape[1] :].tolist()


def margin(model, ids, count):
    """How far the likeliest emulated score lies above the next after ``count`` new tokens."""
    logits = []
    for m in model.models:
        m.reset()
        logits.append(m.read(ids[:count]).clone())
    best = eft.logprobs(logits, eft.upscale()).topk(2).values[0]
    return float(best[0] - best[1])


# --- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["And the king", "naïve  €5 😀\n\tHe's", "</s> is text", "\0", "x" * 5000])
def test_tokens_are_the_tokenizers(model, theirs, text):
    _, tokenizer = theirs
    ids = model.tokenize(text)
    if "</s>" not in text:  # transformers takes the name of a special token for the token
        assert ids == tokenizer(text).input_ids
    assert model.text(ids) == text


def test_special_tokens_are_parsed_only_when_told(model):
    assert 2 not in model.tokenize("a</s>") and model.tokenize("a</s>", parse=True)[-1] == 2
    assert model.tokenize("a")[0] == 1 and model.tokenize("a", special=False)[0] != 1
    assert model.tokenizer.piece(2) == b"" and model.tokenizer.piece(2, special=True) == b"</s>"


def test_logits_are_the_models(model, theirs):
    models, tokenizer = theirs
    ids = tokenizer(PROMPTS[3]).input_ids
    for m, name in zip(model.models, ("base", "tuned-a", "ref")):
        m.reset()
        got = m.read(ids, len(ids))
        want = models[name](torch.tensor([ids])).logits[0].detach()
        assert want.abs().max() > 5
        assert (got - want).abs().max() < NEAR[library().fork]


def test_logits_are_llama_cpps_own_memory(model):
    m, lib = model.models[0], library()
    m.reset()
    z = m.read([1, 5, 6, 7], 3)
    assert z.shape == (3, m.n_vocab) and z.dtype == torch.float32
    assert [row.data_ptr() for row in z] == [lib.logits(m.context, i) for i in (1, 2, 3)]
    before = z.clone()
    m.read([8], 1)
    assert not torch.equal(z[0], before[0])  # overwritten by the next pass


def test_a_prompt_in_several_passes(files, exact):
    ids = list(range(3, 103))
    whole, parts = (Model(files("ref"), n_batch=n, **exact) for n in (512, 16))
    a, b = whole.read(ids, 10), parts.read(ids, 10)
    assert parts.tokens == ids and (a - b).abs().max() < NEAR[library().fork]


def test_forgotten_tokens_leave_nothing(model):
    m = model.models[0]
    m.reset()
    m.read([1, 50, 60])
    want = m.read([70, 80], 2).clone()
    m.forget(2)
    m.read([90, 91, 92])
    m.forget(3)
    with pytest.raises(ValueError, match="count: got 4, allowed is 0 to 3"):
        m.forget(4)
    assert m.tokens == [1, 50, 60] and torch.equal(m.read([70, 80], 2), want)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_greedy_texts_are_those_of_transformers(model, theirs):
    for prompt in PROMPTS:
        got, want = model.generate(prompt, max_new_tokens=40, **GREEDY).ids, generated(theirs, prompt, **GREEDY)
        if got != want:  # rounding may decide where the two likeliest tokens all but tie
            n = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
            ids = model.tokenize(prompt) + got
            assert n > 0 and margin(model, ids, len(ids) - len(got) + n) < 4 * NEAR[library().fork], (prompt, n)


@pytest.mark.parametrize(
    "settings",
    [
        SAMPLED,
        {"top_k": 20, "min_p": 0.02},
        {"typical_p": 0.9, "temperature": 1.1},
        {"upscale_top_p": 0.9},
    ],
    ids=str,
)
def test_seeded_texts_are_those_of_transformers(model, theirs, settings):
    equal = 0
    for seed, prompt in enumerate(PROMPTS):
        got = model.generate(prompt, max_new_tokens=40, seed=seed, **settings).ids
        want = generated(theirs, prompt, seed=seed, **settings)
        equal += got == want
        assert got[:4] == want[:4]
    assert equal >= len(PROMPTS) - 1  # rounding may decide one race


@pytest.mark.parametrize(
    "ours, strength", [(eft.upscale(1.4), {"beta": 1.4}), (eft.proxy(0.5), {"mode": "proxy", "alpha": 0.5})], ids=str
)
def test_strengths(model, theirs, ours, strength):
    got = model.generate(PROMPTS[0], weights=ours, seed=5, **SAMPLED).ids
    assert got == generated(theirs, PROMPTS[0], new=64, seed=5, **SAMPLED, **strength)
    assert got != model.generate(PROMPTS[0], seed=5, **SAMPLED).ids


def test_two_tuned_models(files, exact, theirs):
    with EmulatedModel(files("base"), [files("tuned-a"), files("tuned-b")], files("ref"), **exact) as model:
        got = model.generate(PROMPTS[0], weights=eft.interpolate(0.3), seed=2, **SAMPLED).ids
        assert model.generate(PROMPTS[0], seed=2, **SAMPLED).ids != got
    names = ("base", "tuned-a", "tuned-b", "ref")
    assert got == generated(theirs, PROMPTS[0], names, 64, seed=2, lam=0.3, mode="interpolate", **SAMPLED)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=str)
def test_base_alone_where_tuned_is_ref(files, exact, theirs, settings):
    """The same weights in another file: what tuned adds, ref takes away."""
    with EmulatedModel(files("base"), files("ref", eos=2, template="{{ 1 }}"), files("ref"), **exact) as model:
        for seed, prompt in enumerate(PROMPTS):
            got = model.generate(prompt, max_new_tokens=30, seed=seed, **settings).ids
            base, text = model.models[0], model.tokenize(prompt)
            base.reset()
            z, want = base.read(text), []
            while len(want) < 30 and (not want or want[-1] not in model.ends):
                step = eft.sample([z], [1.0], seed=seed, position=len(want), **settings)
                want.append(int(step.tokens))
                z = base.read(want[-1:])
            assert got == want


def test_quantised_weights(model, files, exact):
    """8-bit matrices: nearly the same logits, and speculation that changes nothing."""
    ids = model.tokenize(PROMPTS[3])
    with EmulatedModel(files("base", quantised=True), files("tuned-a"), files("ref", quantised=True), **exact) as other:
        model.models[0].reset()
        want, got = model.models[0].read(ids).clone(), other.models[0].read(ids)
        assert 1e-3 < (got - want).abs().max() < 0.5
        for seed, prompt in enumerate(PROMPTS):
            plain = other.generate(prompt, seed=seed, max_new_tokens=40, **SAMPLED).ids
            assert other.generate(prompt, seed=seed, max_new_tokens=40, draft_tokens=4, **SAMPLED).ids == plain


def test_penalties_are_those_of_transformers(model, theirs):
    got = model.generate(PROMPTS[0], seed=3, repetition=1.3, **SAMPLED).ids
    assert got == generated(theirs, PROMPTS[0], new=64, seed=3, repetition_penalty=1.3, **SAMPLED)
    assert got != model.generate(PROMPTS[0], seed=3, **SAMPLED).ids


def test_penalties_by_their_definition(model):
    used = model.generate(PROMPTS[0], max_new_tokens=30, **GREEDY).ids
    assert len(set(used)) < 30
    banned = dict.fromkeys(used, float("-inf"))
    assert not set(model.generate(PROMPTS[0], max_new_tokens=30, logit_bias=banned, **GREEDY).ids) & set(used)
    once = model.generate(PROMPTS[0], max_new_tokens=30, presence=1e4, **GREEDY).ids
    assert len(set(once)) == 30 and once[0] == used[0]
    assert model.generate(PROMPTS[0], max_new_tokens=30, frequency=1e4, **GREEDY).ids == once


# --- speculation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [1, 4, 9])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, {**SAMPLED, "repetition": 1.2}], ids=str)
def test_coupled_speculation_changes_nothing(model, settings, draft_tokens):
    accepted = 0
    for seed, prompt in enumerate(PROMPTS):
        plain = model.generate(prompt, max_new_tokens=50, seed=seed, **settings)
        fast = model.generate(prompt, max_new_tokens=50, seed=seed, draft_tokens=draft_tokens, **settings)
        assert fast.ids == plain.ids and fast.text == plain.text
        assert plain.speculation is None and int(fast.speculation.emitted) == len(fast.ids)
        accepted += int(fast.speculation.accepted)
    assert accepted > 10


@pytest.mark.parametrize("verify", ["token", "block"])
def test_the_other_rules(model, verify):
    plain = [model.generate(p, max_new_tokens=30, **GREEDY).ids for p in PROMPTS]
    fast = [model.generate(p, max_new_tokens=30, draft_tokens=4, verify=verify, **GREEDY).ids for p in PROMPTS]
    assert plain == fast
    out = model.generate(PROMPTS[0], draft_tokens=4, verify=verify, seed=1, **SAMPLED)
    assert out.speculation.acceptance > 0.1


@pytest.mark.parametrize("verify", ["token", "block"])
def test_the_distribution_of_the_other_rules(model, verify):
    """The second token, whose draft was verified in the first round, given a first token that is forced."""
    ids = model.tokenize(PROMPTS[0])
    first = model.generate(ids, max_new_tokens=1, **GREEDY).ids
    logits = []
    for m in model.models:
        m.reset()
        logits.append(m.read(ids + first).clone())
    want = eft.logprobs(logits, eft.upscale(), top_k=4)[0].exp()
    counts = dict.fromkeys(want.nonzero()[:, 0].tolist(), 0)
    draws = 0
    for seed in range(600):
        out = model.generate(ids, max_new_tokens=2, draft_tokens=1, verify=verify, seed=seed, top_k=4)
        if out.ids[0] == first[0]:
            counts[out.ids[1]] += 1
            draws += 1
    assert draws > 100
    chi = sum((n - draws * float(want[t])) ** 2 / (draws * float(want[t])) for t, n in counts.items())
    assert chi < 20  # three degrees of freedom: 0.02%


# --- streams and ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_streams_are_the_text(model, draft_tokens):
    for seed in range(3):
        arguments = dict(max_new_tokens=40, seed=seed, draft_tokens=draft_tokens, **SAMPLED)
        whole = model.generate(PROMPTS[seed], **arguments)
        assert list(model.tokens(PROMPTS[seed], **arguments)) == whole.ids
        pieces = list(model.stream(PROMPTS[seed], **arguments))
        assert len(pieces) > 5 and "".join(pieces) == whole.text
        told = []
        assert model.generate(PROMPTS[seed], on_text=told.append, **arguments).text == whole.text and told == pieces


def test_a_stream_comes_step_by_step(model):
    stream = model.tokens(PROMPTS[0], max_new_tokens=40, **GREEDY)
    next(stream)
    assert model.models[0].tokens == model.tokenize(PROMPTS[0])
    next(stream)
    assert len(model.models[0].tokens) == len(model.tokenize(PROMPTS[0])) + 1


def test_characters_that_span_tokens_come_whole(model, monkeypatch):
    text = "é€😀x"
    ids = model.tokenize(text, special=False)
    assert len(ids) == 10  # one byte a token
    monkeypatch.setattr(model, "tokens", lambda prompt, **_: (i for i in ids))
    assert list(model.stream("")) == ["é", "€", "😀", "x"]
    monkeypatch.setattr(model, "tokens", lambda prompt, **_: (i for i in [*ids[:2], ids[2], 2]))
    assert list(model.stream("")) == ["é", "\N{REPLACEMENT CHARACTER}"]  # cut off, and the end token is no text


def test_every_models_end_ends_a_text(model, files, exact):
    ids = model.generate(PROMPTS[0], max_new_tokens=30, **GREEDY).ids
    stop = next(i for i in ids[5:] if ids.index(i) > 4)
    for base, tuned, ref in ((stop, 2, 2), (2, stop, 2), (2, 2, stop)):
        paths = files("base", eos=base), files("tuned-a", eos=tuned), files("ref", eos=ref)
        with EmulatedModel(*paths, **exact) as other:
            assert {2, stop} <= set(other.ends)
            for draft_tokens in (0, 3):
                out = other.generate(PROMPTS[0], max_new_tokens=30, draft_tokens=draft_tokens, **GREEDY)
                assert out.ended and out.ids == ids[: ids.index(stop) + 1]
                assert out.text == model.text(out.ids[:-1])
    out = model.generate(PROMPTS[0], max_new_tokens=30, eos=[stop], **GREEDY)
    assert out.ended and out.ids == ids[: ids.index(stop) + 1]
    assert "".join(model.stream(PROMPTS[0], max_new_tokens=30, eos=[stop], **GREEDY)) == out.text
    assert not model.generate(PROMPTS[0], max_new_tokens=3, **GREEDY).ended


def test_seeds(model):
    a, b, c = (model.generate(PROMPTS[0], max_new_tokens=20, seed=s).ids for s in (7, 7, 8))
    assert a == b != c
    assert model.generate(PROMPTS[0], max_new_tokens=20).ids != model.generate(PROMPTS[0], max_new_tokens=20).ids
    big = (1 << 64) - 1  # the same 64 bits as -1
    assert model.generate("a", seed=big, max_new_tokens=9).ids == model.generate("a", seed=-1, max_new_tokens=9).ids


def test_chat(files, exact):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{{ bos_token }}"
    refusing = "{{ raise_exception('no system prompt') }}"
    for given in (template, refusing):
        with EmulatedModel(files("base"), files("tuned-a", template=given), files("ref"), **exact) as model:
            if given is template:
                ids = model.chat([{"role": "user", "content": "Hello"}])
                assert ids == [*model.tokenize("[user] Hello", special=False), 2, 1]
                assert model.generate(ids, max_new_tokens=3, **GREEDY).ids
            else:
                with pytest.raises(ValueError, match="chat template fails: no system prompt"):
                    model.chat([{"role": "user", "content": "Hello"}])


# --- vocabularies -----------------------------------------------------------------------------------------------------


def test_padding_changes_nothing(model, files, exact):
    want = [model.generate(p, seed=4, max_new_tokens=30, **SAMPLED).ids for p in PROMPTS]
    for padded in ({"base": 64}, {"tuned-a": 3, "ref": 5}):
        paths = [files(n, padding=padded.get(n, 0)) for n in ("base", "tuned-a", "ref")]
        with EmulatedModel(*paths, **exact) as other:
            assert other.vocab_size == 2048
            for draft_tokens in (0, 4):
                got = [
                    other.generate(p, seed=4, max_new_tokens=30, draft_tokens=draft_tokens, **SAMPLED).ids
                    for p in PROMPTS
                ]
                assert got == want


def test_tokens_that_one_model_lacks(model, files, exact):
    paths = [files("base", padding=4, rename={2050: "more"}, types={2050: 1}), files("tuned-a"), files("ref")]
    with pytest.raises(ValueError, match="vocabularies: base has tokens from id 2048 on .'more'."):
        EmulatedModel(*paths, **exact)
    with EmulatedModel(*paths, vocab_size=2000, **exact) as other:
        assert max(other.generate("a", seed=1, max_new_tokens=60).ids) < 2000
        with pytest.raises(ValueError, match="prompt: got 2001, allowed is an id from 0 to 1999"):
            other.generate([1, 2001])
    with pytest.raises(ValueError, match="vocab_size: got 2049, allowed is up to 2048"):
        EmulatedModel(files("base"), files("tuned-a"), files("ref"), vocab_size=2049, **exact)


def test_added_tokens_may_differ(files, exact):
    """A chat model's special token where the others have a reserved one; no other difference."""
    tuned = files("tuned-a", rename={0: "<|im_start|>"})
    EmulatedModel(files("base"), tuned, files("ref"), **exact).close()
    for rename in ({700: "quite_other"}, {0: "</s>", 2: "<pad>"}):
        with pytest.raises(ValueError, match="vocabularies: id .* for base and .* for tuned; allowed are models that"):
            EmulatedModel(files("base"), files("tuned-a", rename=rename), files("ref"), **exact)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"prompt": []}, "prompt: holds no token"),
        ({"prompt": [1, 2048]}, "prompt: got 2048, allowed is an id from 0 to 2047"),
        ({"prompt": [1, -1]}, "prompt: got -1"),
        ({"prompt": [1, True]}, "prompt: got True"),
        ({"prompt": [1] * 500, "max_new_tokens": 13}, "prompt: got 500 tokens and max_new_tokens=13, allowed are 512"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"top_a": 0.5}, "top_a: unknown; allowed are temperature, top_k"),
        ({"seed": 1 << 65}, "seed"),
        ({"weights": [1.0]}, "weights"),
        ({"draft_tokens": -1}, "draft_tokens: got -1"),
        ({"draft_tokens": 1.0}, "draft_tokens: got 1.0"),
        ({"draft_tokens": 512}, "draft_tokens: got 512, allowed is up to 511"),
        ({"draft_tokens": 2, "verify": "exact"}, "verify: got 'exact', allowed are coupled, token, block"),
        ({"verify": "token"}, "verify: got 'token', allowed is 'coupled' without draft_tokens"),
        ({"eos": [5000]}, "eos: got 5000"),
        ({"repetition": 0.0}, "repetition"),
        ({"presence": "much"}, "presence"),
        ({"logit_bias": [1]}, "logit_bias"),
    ],
    ids=str,
)
def test_bad_arguments_compute_nothing(model, arguments, words):
    for m in model.models:
        m.reset()
    with pytest.raises(ValueError, match=words):
        model.tokens(**{"prompt": "a", **arguments})  # the call itself, not the first token
    assert [m.tokens for m in model.models] == [[], [], []]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_ctx": 0}, "n_ctx: got 0"),
        ({"n_ctx": 513}, "n_ctx: got 513, allowed is up to 512"),
        ({"n_batch": 0}, "n_batch: got 0"),
        ({"n_threads": 1 << 20}, "n_threads: got 1048576"),
        ({"gpu_layers": "all"}, "gpu_layers: got 'all'"),
        ({"kv_type": "q3"}, "kv_type: got 'q3', allowed are f32, f16, q8_0"),
        ({"kv_type": "q8_0", "flash_attention": False}, "cannot make a context"),
    ],
    ids=str,
)
def test_bad_settings(files, settings, words):
    with pytest.raises(ValueError, match=words):
        Model(files("ref"), **settings)


def test_the_fork_has_no_float32_cache(files):
    if library().fork:
        with pytest.raises(ValueError, match="kv_type: f32 is not supported by ik_llama.cpp"):
            Model(files("ref"), kv_type="f32")
    else:
        Model(files("ref"), kv_type="f32").close()


def test_files_that_are_no_models(files, tmp_path):
    with pytest.raises(ValueError, match="nowhere.gguf: no such file"):
        Model(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="text.gguf: is not a GGUF file"):
        Model(tmp_path / "text.gguf")
    whole = files("ref").read_bytes()
    for size in (4, 100, 40000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf: llama.cpp cannot load it: .+"):
            Model(tmp_path / "cut.gguf")


def test_models_that_would_cancel_or_mix(files, exact, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(files("ref"))
    with pytest.raises(ValueError, match="tuned: .* is ref's file"):
        EmulatedModel(files("base"), link, files("ref"), **exact)
    one = Model(files("ref"), **exact)
    with pytest.raises(ValueError, match="a Model reads one text"):
        EmulatedModel(one, files("tuned-a"), one)
    with pytest.raises(ValueError, match="tuned: got 3 models"):
        EmulatedModel(files("base"), [files("tuned-a")] * 3, files("ref"))
    three = [one, Model(files("tuned-a"), **exact), Model(files("base"), **exact)]
    with pytest.raises(ValueError, match="n_ctx: goes with models given by their path"):
        EmulatedModel(three[2], three[1], three[0], n_ctx=64)
    with EmulatedModel(three[2], three[1], three[0]) as model:
        assert model.generate(PROMPTS[0], max_new_tokens=5, **GREEDY).ids


def test_recurrent_models_do_not_draft(files, exact, tmp_path):
    from gguf_files import write_mamba

    path = write_mamba(tmp_path / "mamba.gguf")
    if library().fork:
        with pytest.raises(ValueError, match="recurrent models are not supported by ik_llama.cpp"):
            Model(path, **exact)
        return
    with EmulatedModel(path, files("tuned-a"), files("ref"), **exact) as model:
        assert len(model.generate("a", max_new_tokens=9, seed=1).ids) > 1
        for m in model.models:
            m.reset()
        with pytest.raises(ValueError, match="draft_tokens: base .* is recurrent, .* use draft_tokens=0"):
            model.tokens("a", draft_tokens=1)
        model.models[0].read([1, 2, 3])
        with pytest.raises(RuntimeError, match="its memory cannot take back 1 tokens"):
            model.models[0].forget(1)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_invalid_scores_end_the_text(files, exact):
    with EmulatedModel(files("base", poison=61), files("tuned-a"), files("ref"), **exact) as model:
        for draft_tokens in (0, 3):
            with pytest.raises(InvalidScoresError, match="invalid scores .* at step 0") as error:
                model.generate([1, 61], draft_tokens=draft_tokens)
            assert error.value.written.ids == []
            # a token of the text itself: what came before it is told
            with pytest.raises(InvalidScoresError, match="at step 1") as error:
                model.generate([1, 60], draft_tokens=draft_tokens, logit_bias={61: 1e4}, **GREEDY)
            assert error.value.written.ids == [61]
        assert model.generate([1, 60], max_new_tokens=4, logit_bias={61: -math.inf}, **GREEDY).ids


def test_invalid_drafts_leave_nothing(model, files, exact):
    """Drafts for which base gives NaN are rejected, and the text goes on as without them."""
    plain = model.generate(PROMPTS[0], max_new_tokens=40, **GREEDY).ids
    ids, tuned = model.tokenize(PROMPTS[0]), model.models[1]
    tuned.reset()
    likeliest = tuned.read(ids + plain, len(plain) + 1).argmax(1).tolist()
    wrong = next(d for d, token in zip(likeliest, plain) if d != token and d not in ids + plain)
    with EmulatedModel(files("base", poison=wrong), files("tuned-a"), files("ref"), **exact) as other:
        assert other.generate(PROMPTS[0], max_new_tokens=40, **GREEDY).ids == plain
        assert other.generate(PROMPTS[0], max_new_tokens=40, draft_tokens=4, **GREEDY).ids == plain


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_closed_models_raise(files, exact, draft_tokens):
    model = EmulatedModel(files("base"), files("tuned-a"), files("ref"), **exact)
    stream = model.tokens(PROMPTS[0], draft_tokens=draft_tokens, **GREEDY)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="the model was closed"):
        list(stream)
    for call in (
        lambda: model.generate("a"),
        lambda: model.generate([1, 2]),
        lambda: model.tokenizer.piece(5),
        lambda: model.models[0].read([1]),
        lambda: model.models[0].forget(1),
        lambda: model.models[0].reset(),
        lambda: model.chat([]),
    ):
        with pytest.raises(ValueError, match="the model was closed"):
            call()


def test_a_second_text_ends_the_first(model):
    want = model.generate(PROMPTS[1], max_new_tokens=20, **GREEDY).ids
    first = model.tokens(PROMPTS[0], max_new_tokens=20, **GREEDY)
    next(first)
    second = model.tokens(PROMPTS[1], max_new_tokens=20, **GREEDY)
    with pytest.raises(RuntimeError, match="another text was begun"):
        next(first)
    assert list(second) == want
    late, second = (model.tokens(PROMPTS[1], max_new_tokens=20, **GREEDY) for _ in range(2))
    begun = [next(second)]
    with pytest.raises(RuntimeError, match="another text was begun"):
        next(late)  # before it empties the models
    assert begun + list(second) == want


def test_threads_take_turns(model):
    """Passes of several threads over one model never overlap in llama.cpp."""
    ids, errors = list(range(3, 43)), []

    def work():
        try:
            for _ in range(20):
                model.models[0].reset()
                model.models[0].read(ids)
        except ValueError as error:  # the others' tokens may fill the context
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all("the context of" in e for e in errors)
    assert model.generate(PROMPTS[0], max_new_tokens=5, **GREEDY).ids


def test_every_return_code_is_looked_at(model, monkeypatch):
    lib, want = library(), model.generate(PROMPTS[0], max_new_tokens=9, **GREEDY).ids
    decode = lib.decode
    for code, words in ((1, "no room in the KV cache"), (2, "aborted"), (-1, "invalid batch"), (-3, "failure")):
        calls = itertools.count()
        monkeypatch.setattr(lib, "decode", lambda *a, n=calls, c=code: c if next(n) == 5 else decode(*a))
        with pytest.raises(RuntimeError, match=f"llama_decode returned {code}, {words}"):
            model.generate(PROMPTS[0], max_new_tokens=9, **GREEDY)
    monkeypatch.undo()
    monkeypatch.setattr(lib, "logits", lambda context, i: None)
    with pytest.raises(RuntimeError, match="gives no logits"):
        model.generate(PROMPTS[0], max_new_tokens=9, **GREEDY)
    monkeypatch.undo()
    monkeypatch.setattr(lib, "seq_rm", lambda *a: False)
    with pytest.raises(RuntimeError, match="its memory cannot take back"):
        model.generate(PROMPTS[0], max_new_tokens=30, draft_tokens=4, **GREEDY)
    monkeypatch.undo()
    monkeypatch.setattr(lib, "tokenize", lambda *a: -(1 << 31))
    with pytest.raises(ValueError, match="cannot tokenize"):
        model.generate(PROMPTS[0])
    monkeypatch.undo()
    assert model.generate(PROMPTS[0], max_new_tokens=9, **GREEDY).ids == want


def test_logits_rows_apart_are_copied(model, monkeypatch):
    lib, m = library(), model.models[0]
    m.reset()
    m.read([1, 5, 6, 7], 3)
    rows = [lib.logits(m.context, i) for i in (1, 2, 3)]
    want = m.read([8, 9, 10, 11], 3).clone()
    monkeypatch.setattr(lib, "logits", lambda context, i: {2: rows[2], 3: rows[1]}.get(i, rows[0]))
    m.forget(4)
    got = m.read([8, 9, 10, 11], 3)
    assert torch.equal(got, want[[0, 2, 1]])


def test_without_llama_cpp(files, monkeypatch):
    monkeypatch.setattr(library_module, "STRUCTURES", {"absent_package": "absent_package.module"})
    library.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match="llama.cpp is needed: pip install llama-cpp-python"):
            Model(files("ref"))
    finally:
        library.cache_clear()


def test_a_version_that_lacks_a_function(monkeypatch):
    with pytest.raises(ImportError, match="has no llama_nothing; known to work are"):
        library()._bind(None, [], "llama_nothing")
