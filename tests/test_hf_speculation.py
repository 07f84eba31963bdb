"""Caches that never move, trees of drafts, and drafts chosen by arithmetic, in `eft.hf.generate`."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import eft_kernels as eft  # noqa: E402
from eft_kernels.decoding import target as target_module  # noqa: E402
from eft_kernels.integrations.hf import models as models_module  # noqa: E402
from eft_kernels.integrations.hf.texts import Place, TextLayer, Texts  # noqa: E402
from tests.test_hf import FAMILIES, PROMPTS, SAMPLED, V, full_logits, make, padded, run  # noqa: E402

TREES = [f for f in FAMILIES if f != "bloom"]  # which counts positions itself
SHAPES = [dict(draft_tokens=2, draft_width=2), dict(draft_tokens=3, draft_width=3, draft_budget=7)]


@pytest.fixture(scope="module")
def llamas():
    return [make("llama", s) for s in (1, 2, 3)]


# --- keys and values that stay where they are ------------------------------------------------------------------------


def states(*shape):
    return torch.randn(*shape), torch.randn(*shape)


def test_a_layer_writes_where_it_is_told():
    """Beside transformers' own layer, and rows that end in different columns."""
    torch.manual_seed(0)
    place = Place()
    layer, usual = TextLayer(place), transformers.cache_utils.DynamicLayer()
    for n in (5, 1, 300, 2):  # grows on the way
        new = states(3, 2, n, 4)
        for got, want in zip(layer.update(*new), usual.update(*new)):
            assert torch.equal(got, want)
        assert layer.get_seq_length() == usual.get_seq_length() == usual.keys.shape[2]
        assert torch.equal(layer.keys, usual.keys) and torch.equal(layer.values, usual.values)
    buffer = layer.buffers[0].data_ptr()
    place.columns, place.stop = torch.tensor([[308, 309], [300, 301], [250, 251]]), 310
    new = states(3, 2, 2, 4)
    keys, values = layer.update(*new)
    assert keys.shape[2] == 310 and layer.buffers[0].data_ptr() == buffer  # nothing else was copied
    for b, start in enumerate((308, 300, 250)):
        assert torch.equal(keys[b, :, start : start + 2], new[0][b]) and torch.equal(
            values[b, :, start : start + 2], new[1][b]
        )
        assert torch.equal(keys[b, :, :start], usual.keys[b, :, :start])
    layer.reorder_cache(torch.tensor([2, 0]))
    assert torch.equal(layer.keys[1, :, 308:310], new[0][0])
    layer.crop(-300)
    assert torch.equal(layer.keys[1], usual.keys[0, :, :10])
    layer.move(torch.tensor([[1, 2], [5, 7]]), torch.tensor([[0, 1], [7, 5]]))
    assert torch.equal(layer.keys[1, :, [7, 5]], usual.keys[0, :, [5, 7]])
    layer.clean(torch.tensor([3, 9]))
    assert not layer.buffers[0][0, :, 3:].any() and not layer.buffers[1][1, :, 9:].any()
    assert layer.buffers[1][1, :, :9].all()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None


def what_nodes_see(texts, left, depths, sees, window):
    """[n, columns] of one row: column c of its text, then its nodes; by positions."""
    place = list(range(-left, texts - left))  # position of each column; below 0 on padding
    own = [texts - left + d for d in depths]
    rows = []
    for i, seen in enumerate(sees):
        at = own[len(own) - len(sees) + i]
        rows.append([p >= 0 and at - p < window for p in place] + [s and at - q < window for s, q in zip(seen, own)])
    return rows


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("left", [[0], [0, 2, 1]])
def test_what_a_node_attends_to(dtype, window, left):
    """Rounds of random trees, read in two passes, of rows that keep different numbers of nodes."""
    g = torch.Generator().manual_seed(len(left))
    rows, place = len(left), Place()
    layer = TextLayer(place)
    layer.update(*states(rows, 1, 6, 2))
    texts = Texts([layer], place, torch.tensor(left), {"": window}, dtype)
    tokens = [[float(100 * b + c) for c in range(6)] for b in range(rows)]  # what each column holds
    for turn in range(60):
        parents = [int(torch.randint(i + 1, (), generator=g)) for i in range(4)]  # of slots 1 to 4
        depth, sees = [0], torch.eye(5, dtype=torch.bool)
        for i, p in enumerate(parents):
            depth.append(depth[p] + 1)
            sees[i + 1] |= sees[p]
        place.start = place.columns = None
        for lo, hi in ((0, 2), (2, 5)):
            positions, mask = texts.nodes(torch.tensor([depth[lo:hi]] * rows), sees[lo:hi, :hi])
            new = torch.tensor([[1000.0 * turn + 10 * b + s for s in range(lo, hi)] for b in range(rows)])
            layer.update(*(new[:, None, :, None].expand(-1, 1, -1, 2) for _ in range(2)))
            assert mask.dtype is dtype and mask.shape == (rows, 1, hi - lo, layer.width)
            seen = mask if dtype is torch.bool else mask == 0
            assert dtype is torch.bool or bool((seen | (mask == torch.finfo(dtype).min)).all())
            for b in range(rows):
                end = len(tokens[b])
                want = what_nodes_see(end, left[b], depth[:hi], sees[lo:hi, :hi].tolist(), window or 10**6)
                assert seen[b, 0, :, : end + hi].tolist() == want and not seen[b, 0, :, end + hi :].any()
                assert positions[b].tolist() == [end - left[b] + d for d in depth[lo:hi]]
        leaf = int(torch.randint(5, (), generator=g))
        path = sees[leaf].nonzero()[:, 0]
        kept = [int(torch.randint(len(path) + 1, (), generator=g)) if turn else 0 for _ in range(rows)]
        texts.accept(path.expand(rows, -1), kept)
        for b in range(rows):
            tokens[b] += [1000.0 * turn + 10 * b + int(s) for s in path[: kept[b]]]
            if turn:
                held = layer.buffers[0][b, 0, 6 : len(tokens[b]), 0].tolist()
                assert held == tokens[b][6:]
    assert rows == 1 or len({len(t) for t in tokens}) > 1


def test_nothing_is_copied_but_what_is_new(llamas, monkeypatch):
    """Rows that accept differently: no pass and no round moves a text, however long it is."""
    made = []
    own = TextLayer.update

    def update(self, *new, **options):
        before = [x.data_ptr() for x in self.buffers]
        out = own(self, *new, **options)
        made.append(before != [x.data_ptr() for x in self.buffers])
        return out

    monkeypatch.setattr(TextLayer, "update", update)
    monkeypatch.setattr(models_module.CausalLM, "realign", lambda *_: pytest.fail("a text was moved"))
    long = [make("llama", s, max_position_embeddings=600) for s in (1, 2, 3)]
    options = dict(draft_tokens=3, max_new_tokens=300, return_dict_in_generate=True, **SAMPLED)
    out = run(long, **options)
    assert len(set(out.speculation.rounds.tolist())) > 1
    # of three models with two layers: the prompt, more room twice, and when rows ended
    assert sum(made) <= 3 * 2 * 5 < len(made) / 30


def test_texts_of_one_prompt_read_it_once(llamas):
    """num_return_sequences, and rows that are alike by chance, under the same padding."""
    read = []
    hooks = [
        m.register_forward_pre_hook(lambda m, a, o: read.append(tuple(o["input_ids"].shape)), with_kwargs=True)
        for m in llamas
    ]
    inputs = padded([PROMPTS[0], PROMPTS[1], PROMPTS[0], [PROMPTS[0][-1]]])
    seeds = torch.tensor([3, 4, 5, 6])
    for options in (dict(), dict(draft_tokens=2), SHAPES[0]):
        read.clear()
        out = run(llamas, inputs, seed=seeds, **options, **SAMPLED)
        assert read[:3] == [(3, 6)] * 3 and read[3][0] == 4
        for b in range(4):
            alone = {k: v[b : b + 1] for k, v in inputs.items()}
            assert torch.equal(run(llamas, alone, seed=seeds[b : b + 1], **SAMPLED)[0], out[b])
    several = run(llamas, padded(PROMPTS[:2]), num_return_sequences=3, seed=torch.arange(6), **SAMPLED)
    for b in range(6):
        alone = run(llamas, padded(PROMPTS[b // 3 : b // 3 + 1]), seed=torch.tensor([b]), **SAMPLED)
        assert torch.equal(alone[0, -12:], several[b, -12:])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_in_chunks(family):
    models, read = [make(family, s) for s in (1, 2, 3)], []
    models[0].register_forward_pre_hook(lambda m, a, o: read.append(o["input_ids"].shape[1]), with_kwargs=True)
    for options in (dict(), dict(draft_tokens=2)):
        want = run(models, **options, **SAMPLED)
        read.clear()
        for chunk, passes in ((2, [2, 2, 2]), (4, [4, 2]), (6, [6]), (99, [6])):
            read.clear()
            assert torch.equal(run(models, prefill_chunk_size=chunk, **options, **SAMPLED), want), chunk
            assert read[: len(passes)] == passes


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_ended_are_left_out(family):
    models, read = [make(family, s) for s in (1, 2, 3)], []
    inputs = padded([*PROMPTS, *([p[0] + 1] for p in PROMPTS)])
    options = dict(max_new_tokens=40, eos_token_id=[1, 3, 4], seed=torch.arange(8), **SAMPLED)
    hook = models[0].register_forward_pre_hook(lambda m, a, o: read.append(len(o["input_ids"])), with_kwargs=True)
    for shape in (dict(), dict(draft_tokens=3), *(SHAPES if family in TREES else [])):
        read.clear()
        out = run(models, inputs, **options, **shape)
        assert read[0] == 8 and read[-1] <= 4 and read == sorted(read, reverse=True)
        for b in range(8):
            alone = {k: v[b : b + 1] for k, v in inputs.items()}
            text = run(models, alone, **{**options, "seed": options["seed"][b : b + 1]})[0]
            assert torch.equal(text, out[b, : len(text)]) and bool((out[b, len(text) :] == 0).all())
    hook.remove()


# --- trees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TREES)
def test_trees_write_the_tokens_of_plain_decoding(family):
    models, seeds = [make(family, s) for s in (1, 2, 3)], torch.tensor([7, 8, 9, 10])
    for inputs, seed in ((padded(), seeds), (padded(PROMPTS[:1]), seeds[:1])):
        want = run(models, inputs, seed=seed, **SAMPLED)
        for shape in SHAPES:
            assert torch.equal(run(models, inputs, seed=seed, **shape, **SAMPLED), want), shape


@pytest.mark.parametrize(
    "family, attn", [(f, a) for f in TREES for a in ("eager", "sdpa") if (f, a) != ("gemma2", "sdpa")]
)
def test_every_slots_logits_are_those_of_its_own_text(family, attn, monkeypatch):
    models, seen = [make(family, s, attn) for s in (1, 2, 3)], []

    def spy(logits, weights, drafts, draft_lengths=None, parents=None, **options):
        out = eft.verify(logits, weights, drafts, draft_lengths, parents=parents, **options)
        if parents is not None:
            seen.append(([z.clone() for z in logits], drafts.clone(), parents, options["position"].clone()))
        return out

    monkeypatch.setattr(target_module, "verify", spy)
    out = run(models, **SHAPES[1], **SAMPLED)
    assert any(len(set(p.tolist())) > 1 for *_, p in seen)  # rows drifted apart
    compared = 0
    for logits, drafts, parents, position in seen[:8]:
        for b, prompt in enumerate(PROMPTS):
            n = int(position[b])
            paths = [[]]
            for i, p in enumerate(parents[b].tolist()):
                paths.append([*paths[p], int(drafts[b, i])])
            for slot, path in enumerate(paths):
                if n + len(path) >= 12 or -1 in path:
                    continue
                text = prompt + out[b, 6 : 6 + n].tolist() + path
                for z, model in zip(logits, models):
                    torch.testing.assert_close(z[b, slot].float(), full_logits(model, text)[-1], atol=2e-4, rtol=1e-3)
                    compared += 1
    assert compared > 200


def test_trees_with_processors_scores_and_criteria(llamas):
    """Each slot is processed with its own prefix, and what is recorded is that of plain decoding."""
    options = dict(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        bad_words_ids=[[5], [6, 7]],
        eos_token_id=[3, 4],
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **SAMPLED,
    )
    want = run(llamas, **options)
    for shape in SHAPES:
        got = run(llamas, **options, **shape)
        assert torch.equal(got.sequences, want.sequences)
        for a, b in zip(got.scores + got.logits, want.scores + want.logits):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_trees_of_models_with_prompts_of_their_own(llamas):
    own = dict(prompts={"tuned": dict(input_ids=torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]]).repeat(4, 1))})
    want = run(llamas, **own, **SAMPLED)
    for options in (*SHAPES, dict(draft_tokens=3), dict(draft_tokens=3, draft=0)):
        assert torch.equal(run(llamas, **own, **options, **SAMPLED), want)


def test_trees_accept_more(llamas):
    base, tuned, ref = llamas[0], copy.deepcopy(llamas[0]), copy.deepcopy(llamas[0])
    torch.manual_seed(4)
    with torch.no_grad():
        for p in (*tuned.parameters(), *ref.parameters()):
            p.add_(torch.randn_like(p) * 0.1)
    rates = []
    for shape in (dict(), dict(draft_width=2, draft_budget=8), dict(draft_width=3, draft_budget=20)):
        out = run(
            [base, tuned, ref],
            padded([[5 + b, 6, 7] for b in range(8)]),
            draft_tokens=4,
            max_new_tokens=40,
            return_dict_in_generate=True,
            **shape,
            **SAMPLED,
        )
        rates.append(out.speculation.tokens_per_round)
        assert out.speculation.ranks.shape == (4, 1 + shape.get("draft_width", 1))
    assert rates == sorted(rates) and rates[2] > 1.1 * rates[0]


def test_a_row_that_becomes_invalid_leaves_the_others(llamas):
    """NaN after one token, at drafts as well as in a text: rows that never emit it are as in plain decoding."""

    def poison(module, args, options, out):
        out.logits[options["input_ids"][:, -out.logits.shape[1] :] == 9] = float("nan")

    poisoned = copy.deepcopy(llamas[0])
    poisoned.register_forward_hook(poison, with_kwargs=True)
    # keys and values of the token are NaN, too
    base = copy.deepcopy(llamas[0])
    with torch.no_grad():
        base.get_input_embeddings().weight[9] = float("nan")
    for models in ([poisoned, *llamas[1:]], [base, *llamas[1:]]):
        options = dict(on_invalid="warn", return_dict_in_generate=True, max_new_tokens=24, **SAMPLED)
        inputs = padded([[5, 6, 7, 10 + b] for b in range(8)])
        with pytest.warns(RuntimeWarning, match="invalid scores"):
            want = run(models, inputs, **options)
        assert 0 < len(want.failed) < 8
        for shape in (*SHAPES, dict(draft_tokens=3)):
            with pytest.warns(RuntimeWarning, match="invalid scores"):
                got = run(models, inputs, **options, **shape)
            assert torch.equal(got.sequences, want.sequences) and got.failed == want.failed


# --- drafts chosen by arithmetic, and drafts of no model -------------------------------------------------------------


def test_auto_writes_the_same_tokens(llamas):
    for inputs in (padded(), padded(PROMPTS[:1])):
        want = run(llamas, inputs, max_new_tokens=40, **SAMPLED)
        for options in (dict(), dict(draft_width=1), dict(draft_width=2, draft_budget=5), dict(draft="lookup")):
            out = run(
                llamas,
                inputs,
                max_new_tokens=40,
                draft_tokens="auto",
                return_dict_in_generate=True,
                **options,
                **SAMPLED,
            )
            assert torch.equal(out.sequences, want)
            spec = out.speculation
            assert len(spec.seconds) == 4 and min(spec.seconds) >= 0 and spec.plain_seconds > 0 and spec.speedup > 0


def test_auto_remembers_what_it_learned(llamas):
    options = dict(draft_tokens="auto", max_new_tokens=30, return_dict_in_generate=True, **SAMPLED)
    models_module._remembered.clear()
    run(llamas, **options)
    [(key, auto)] = models_module._remembered[llamas[0]].items()
    counted = auto.ranks.weighted().sum()
    run(llamas, **options)
    assert models_module._remembered[llamas[0]][key] is auto
    assert 0 < float(auto.ranks.earlier.sum()) == float(counted)


def test_auto_without_drafts_where_none_can_be_taken_back(llamas):
    config = transformers.RwkvConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    models = [transformers.RwkvForCausalLM(config).eval() for _ in range(3)]
    inputs = dict(input_ids=torch.tensor([[5, 6, 7]]))
    for m in models:
        m.generation_config.eos_token_id = None
    out = run(models, inputs, draft_tokens="auto", return_dict_in_generate=True)
    assert torch.equal(out.sequences, run(models, inputs)) and out.speculation is None

    class Counting(transformers.LogitsProcessor):  # keeps a state
        calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            return scores

    options = dict(logits_processor=transformers.LogitsProcessorList([Counting()]), return_dict_in_generate=True)
    out = run(llamas, draft_tokens="auto", **options)
    assert out.speculation is None and torch.equal(out.sequences, run(llamas))


@pytest.mark.parametrize("method", ["coupled", "token", "block"])
def test_prompt_lookup_and_a_callers_own_drafts(llamas, method):
    seen = []

    def mine(texts, k):
        seen.append([t.tolist() for t in texts])
        return torch.stack([t[-1:].expand(k) for t in texts])

    inputs = padded([[5, 6, 7, 5, 6], [8, 9]])
    want = run(llamas, inputs, do_sample=False)
    for draft in ("lookup", mine):
        out = run(
            llamas,
            inputs,
            do_sample=False,
            draft_tokens=3,
            draft=draft,
            verify=method,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, want)
        sampled = run(llamas, inputs, draft_tokens=3, draft=draft, verify=method, **SAMPLED)
        assert method != "coupled" or torch.equal(sampled, run(llamas, inputs, **SAMPLED))
    assert seen[0][1][:2] == [8, 9] and len(seen[0][1]) == 3  # without padding


def test_what_is_refused(llamas):
    bloom = [make("bloom", s) for s in (1, 2, 3)]
    for options, message in [
        (dict(draft_tokens=2, draft_width=0), "draft_width: got 0"),
        (dict(draft_tokens=2, draft_width=17), "draft_width: got 17"),
        (dict(draft_tokens=2, draft_width=2.5), "draft_width"),
        (dict(draft_width=2), "draft_width: got 2, allowed is 1 without draft_tokens"),
        (dict(draft_tokens=2, draft_width=2, verify="token"), "draft_width: got 2, allowed is 1 with verify='token'"),
        (dict(draft_tokens=4, draft_width=2, draft_budget=3), "draft_budget: got 3, allowed is 4 to 1024"),
        (dict(draft_tokens=4, draft_width=2, draft_budget=2000), "draft_budget: got 2000"),
        (dict(draft_tokens=4, draft_budget=8), "draft_budget: got 8; goes with draft_width above 1"),
        (dict(draft_tokens=1025), "draft_tokens: got 1025, allowed is 0 to 1024"),
        (
            dict(draft_tokens=8, draft_width=3),
            "draft_width: got 3 with draft_tokens=8, more drafts a round than the allowed 1024; give draft_budget",
        ),
        (dict(draft_tokens=1000, draft_width=2), "draft_width: .*give draft_budget"),
        (dict(draft_tokens="most"), "draft_tokens: got 'most'"),
        (dict(draft_tokens=2, draft="me"), "draft: got 'me'"),
        (dict(draft_tokens=2, draft="lookup", draft_width=2), "draft_width: got 2, allowed is 1 where no model drafts"),
        (dict(draft="lookup"), "draft: .*None without draft_tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(llamas, **options)
    with pytest.raises(ValueError, match="draft_width: model .BloomForCausalLM. takes no tree of drafts"):
        run(bloom, draft_tokens=2, draft_width=2)
    with pytest.raises(ValueError, match="draft_width: model .BloomForCausalLM. takes no tree of drafts"):
        run(bloom, draft_tokens="auto", draft_width=2)
    assert torch.equal(run(bloom, draft_tokens="auto", **SAMPLED), run(bloom, **SAMPLED))
    for drafts, message in [
        ([[1, 1]] * 4, "draft: proposed list, expected a tensor of integers"),
        (torch.zeros(4, 2), "draft: proposed torch.float32"),
        (torch.zeros(4, 2, dtype=torch.bool), "draft: proposed torch.bool"),
        (torch.zeros(4, 3, dtype=torch.int64), r"draft: proposed torch.int64 \[4, 3\]"),
        (torch.full((4, 2), V), f"draft: proposed {V}, expected .* below {V}"),
        (torch.full((4, 2), -2), "draft: proposed -2"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(llamas, draft_tokens=2, draft=lambda texts, k, drafts=drafts: drafts)


def test_what_is_remembered_is_little(llamas):
    base, tuned, ref = llamas
    for _ in range(models_module.REMEMBERED + 4):
        run([base, copy.deepcopy(tuned), ref], draft_tokens="auto", max_new_tokens=2)
    assert len(models_module._remembered[base]) == models_module.REMEMBERED


def test_a_round_is_as_long_as_what_was_proposed(llamas):
    read = []
    hook = llamas[0].register_forward_pre_hook(lambda m, a, o: read.append(o["input_ids"].shape[1]), with_kwargs=True)
    propose = lambda texts, k: torch.where(torch.arange(k) < len(texts[0]) % 3, 5, -1)[None]  # noqa: E731
    options = dict(draft_tokens=8, draft=propose, return_dict_in_generate=True, **SAMPLED)
    out = run(llamas, padded(PROMPTS[:1]), **options)
    hook.remove()
    assert max(read[1:]) <= 3 and torch.equal(out.sequences, run(llamas, padded(PROMPTS[:1]), **SAMPLED))


def test_counts_are_those_of_the_text(llamas):
    """What was accepted beyond an end token is not in the text, and is not counted."""
    options = dict(max_new_tokens=40, eos_token_id=[1, 3, 4, 7], return_dict_in_generate=True, **SAMPLED)
    for shape in (dict(draft_tokens=7), *SHAPES):
        for draft in (1, 0) if "draft_width" not in shape else (1,):
            spec = run(llamas, draft=draft, **shape, **options).speculation
            assert bool((spec.accepted <= spec.emitted).all())
            # each round but one that an end token cuts gives one token beyond those accepted
            assert bool((spec.emitted <= spec.accepted + spec.rounds).all())
            assert bool((spec.emitted >= spec.accepted + spec.rounds - 1).all())
            assert shape.get("draft_width") or int(spec.ranks[:, 0].sum()) == int(spec.accepted.sum())


# --- models that the caller compiled ---------------------------------------------------------------------------------


def test_compiled_models():
    """A text is the same, and another one compiles nothing anew: no shape or number that changes is a constant."""
    from torch._dynamo.testing import CompileCounter

    models = [make("llama", s) for s in (1, 2, 3)]
    inputs = padded(PROMPTS[:1])
    options = dict(max_new_tokens=30, draft_tokens=2, draft_width=2, **SAMPLED)
    want = run(models, inputs, **options)
    counter = CompileCounter()
    for model in models:
        model.forward = torch.compile(type(model).forward.__get__(model), backend=counter)
    assert torch.equal(run(models, inputs, **options), want)
    compiled = counter.frame_count
    assert 0 < compiled <= 8
    assert torch.equal(run(models, inputs, **options), want) and counter.frame_count == compiled
    torch._dynamo.reset()


# --- a million tokens ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_million_tokens_of_trees_are_those_of_plain_decoding():
    """Families, depths, widths, budgets, batch sizes, filters and temperatures, in float64: logits that are rounded to
    float32 are then the same whatever a pass is made of, and so must be every token."""
    samplings = [
        dict(do_sample=False),
        dict(do_sample=True, temperature=1.0, top_k=0),
        dict(do_sample=True, temperature=0.7, top_k=5),
        dict(do_sample=True, temperature=1.4, top_k=0, top_p=0.8),
        dict(do_sample=True, temperature=1.0, top_k=0, min_p=0.1, repetition_penalty=1.2),
        dict(do_sample=True, temperature=1.0, top_k=0, typical_p=0.7),
    ]
    g, equal = torch.Generator().manual_seed(0), 0
    draw = lambda n: int(torch.randint(n, (), generator=g))  # noqa: E731
    families = [f for f in TREES if f != "gemma2"]  # its own attention has no answer for padding in float64
    models = {family: [make(family, s, "sdpa").double() for s in (1, 2, 3)] for family in families}
    while equal < 10**6:
        rows = (1, 3, 64, 64, 64)[draw(5)]
        prompts = [[3 + draw(V - 3) for _ in range(1 + draw(8))] for _ in range(rows)]
        family, sampling = families[draw(len(families))], samplings[draw(len(samplings))]
        options = dict(max_new_tokens=54, seed=draw(10**6), beta=1.0 + draw(3) / 4, **sampling)
        if draw(2):
            options["eos_token_id"] = [1, 7]
        want = run(models[family], padded(prompts), **options)
        for _ in range(3):
            depth, width = 1 + draw(6), 1 + draw(4)
            shape = dict(draft_tokens=depth, draft_width=width)
            if width > 1 and (draw(2) or sum(width**d for d in range(1, depth + 1)) > 60):
                shape["draft_budget"] = depth + draw(20)
            got = run(models[family], padded(prompts), **options, **shape)
            assert torch.equal(got, want), (family, options, shape)
            equal += int((got[:, -54:] != 0).sum()) if "eos_token_id" in options else rows * 54
    print(f"{equal} tokens")
