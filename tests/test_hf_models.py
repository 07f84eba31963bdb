"""What models do in their own generation loop, and `eft.hf.generate` must not bypass; and when their text ends."""

import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import eft_kernels as eft  # noqa: E402
from tests.test_hf import PAD, PROMPTS, SAMPLED, V, full_logits, make, oracle, padded, run  # noqa: E402

GREEDY = dict(do_sample=False)
NEW = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)


def three(build, away=1.0):
    """base, and two models with the same weights: the emulated model is base alone. ``away``: how far they are."""
    out = []
    for seed in (1, 2, 2):
        torch.manual_seed(1)
        model = build().eval()
        model.generation_config.eos_token_id = None
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * p.std().nan_to_num() * away)
        out.append(model)
    return out


def base_alone(model, inputs, **options):
    return model.generate(**inputs, pad_token_id=PAD, max_new_tokens=12, **options)


# --- rotary embeddings that change with the length -----------------------------------------------------------------


def phi3(boundary=16):
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        original_max_position_embeddings=boundary,
        partial_rotary_factor=1.0,
        short_factor=[1.0] * 4,
        long_factor=[4.0, 8.0, 16.0, 32.0],
        factor=4.0,
    )
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            original_max_position_embeddings=boundary,
            rope_parameters=rope,
            initializer_range=0.3,
            pad_token_id=PAD,
            eos_token_id=None,
            bos_token_id=2,
        )
    )


def test_phi3_past_the_length_where_its_rotary_embedding_changes():
    """transformers drops the cache there, for its keys were made with other frequencies."""
    models = three(phi3)
    inputs = dict(input_ids=torch.arange(3, 13)[None])
    text = inputs["input_ids"][0].tolist()
    for _ in range(12):
        text.append(int(full_logits(models[0], text)[-1].argmax()))
    if NEW:  # older versions drop the cache and then read one token
        assert base_alone(models[0], inputs, **GREEDY)[0].tolist() == text
    for k in (0, 1, 3, 8):
        assert run(models, inputs, draft_tokens=k, **GREEDY)[0].tolist() == text, k
    sampled = run(models, inputs, **SAMPLED)
    for k in (1, 3, 8):
        assert torch.equal(run(models, inputs, draft_tokens=k, **SAMPLED), sampled), k


def test_rows_that_reach_another_rotary_embedding_in_different_rounds_are_refused():
    models = three(phi3)
    assert not NEW or torch.equal(run(models, **GREEDY), base_alone(models[0], padded(), **GREEDY))
    with pytest.raises(ValueError, match="draft_tokens: .*model.*Phi3ForCausalLM.*longer than 16 tokens"):
        run(models, draft_tokens=3)
    short = dict(max_new_tokens=10)  # 6 + 10 tokens stay below
    assert torch.equal(run(models, draft_tokens=3, **short), run(models, **short))
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
    moving = three(lambda: make("llama", 1, rope_parameters=rope))
    with pytest.raises(ValueError, match="draft_tokens: .*rotary embedding"):
        run(moving, padded(PROMPTS[:1]), draft_tokens=3, max_new_tokens=12)


# --- masks, caches and positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Mamba2"])
def test_state_space_models_with_left_padding(kind):
    config = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    config |= dict(num_heads=4, head_dim=8, n_groups=1) if kind == "Mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(**config)
    models = three(lambda: getattr(transformers, f"{kind}ForCausalLM")(config))
    for sampling in (GREEDY, SAMPLED):
        seeds = torch.tensor([7, 8, 9, 10])
        out = run(models, seed=seeds, **sampling)
        for b in range(4 if NEW else 0):  # older versions let padding into the state
            alone = run(models, padded(PROMPTS[b : b + 1]), seed=seeds[b : b + 1], **sampling)
            assert torch.equal(alone[0, -12:], out[b, -12:])
        if NEW:
            assert torch.equal(run(models, seed=seeds, draft_tokens=3, **sampling), out)
    assert torch.equal(run(models, **GREEDY), base_alone(models[0], padded(), **GREEDY))


def test_a_model_that_keeps_no_cache_reads_the_whole_text():
    config = transformers.OpenAIGPTConfig(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
    )
    models = three(lambda: transformers.OpenAIGPTLMHeadModel(config))
    out = run(models, padded(PROMPTS[:1]), **GREEDY)
    kernel = dict(temperature=0.9, top_p=0.95)
    assert torch.equal(out[0, 6:], oracle(models, PROMPTS[0], 12, {}))
    assert torch.equal(run(models, padded(PROMPTS[:1]), **SAMPLED)[0, 6:], oracle(models, PROMPTS[0], 12, kernel))
    with pytest.raises(ValueError, match="draft_tokens: model.*OpenAIGPTLMHeadModel.*keeps no cache"):
        run(models, padded(PROMPTS[:1]), draft_tokens=2)


class Forgetful(transformers.LlamaForCausalLM):
    """Ignores its cache and is given one token at a time."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=False)


def test_a_model_that_drops_what_it_read_is_refused():
    models = [make("llama", s) for s in (1, 2, 3)]
    for m in models:
        m.__class__ = Forgetful
    with pytest.raises(ValueError, match="model: Forgetful keeps no cache and reads 1 tokens of 7"):
        run(models, padded(PROMPTS[:1]))


@pytest.mark.parametrize(
    "kind, config",
    [
        (
            "RoFormer",
            dict(
                hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, is_decoder=True
            ),
        ),
        (
            "Bart",
            dict(
                d_model=16,
                decoder_layers=2,
                decoder_attention_heads=2,
                decoder_ffn_dim=32,
                max_position_embeddings=64,
                init_std=0.3,
                scale_embedding=True,
                forced_eos_token_id=None,
            ),
        ),
        ("Mpt", dict(d_model=16, n_heads=2, n_layers=2, max_seq_len=64, use_cache=True)),
    ],
)
def test_rows_stay_in_step_where_positions_are_counted_from_the_cache(kind, config):
    if kind == "RoFormer" and not NEW:
        pytest.skip("its cached forward is not its full forward there")
    config = getattr(transformers, f"{kind}Config")(
        **dict(
            vocab_size=V,
            num_hidden_layers=2,
            initializer_range=0.3,
            pad_token_id=PAD,
            eos_token_id=None,
            bos_token_id=2,
        )
        | config
    )
    models = three(lambda: getattr(transformers, f"{kind}ForCausalLM")(config), away=0.1)
    inputs = dict(input_ids=torch.tensor([p[:2] for p in PROMPTS]))  # one length: their padding is not ours to mend
    accepted = []
    for sampling in (GREEDY, SAMPLED):
        want = run(models, inputs, **sampling)
        for k in (1, 3):
            out = run(models, inputs, draft_tokens=k, return_dict_in_generate=True, **sampling)
            assert torch.equal(out.sequences, want)
            accepted.append(out.speculation.accepted.tolist())
    assert len(set(map(tuple, want[:, 2:].tolist()))) == 4  # the rows differ
    assert min(map(min, accepted)) >= 1 and any(len(set(rows)) > 1 for rows in accepted)


# --- end of text ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    """Models that never end a text, and what they write."""
    models = three(lambda: make("llama", 1))
    free = run(models, padded(PROMPTS[:1]), **GREEDY)[0, 6:].tolist()
    return models, free


def ends(models, base, tuned, ref):
    for model, eos in zip(models, (base, tuned, ref)):
        model.generation_config.eos_token_id = eos


def test_any_models_end_token_ends_the_text(chat):
    models, free = chat
    at = next(n for n, t in enumerate(free) if n > 2 and t not in free[:n])
    unused = next(t for t in range(3, V) if t not in free)
    for own in ((unused, free[at], None), (None, [unused, free[at]], None), (None, None, [free[at]])):
        ends(models, *own)
        for k in (0, 3):
            out = run(models, padded(PROMPTS[:1]), draft_tokens=k, **GREEDY)
            assert out[0, 6:].tolist() == free[: at + 1], (own, k)
    assert eft.hf.end_tokens(models) == [free[at]]
    chosen = run(models, padded(PROMPTS[:1]), eos_token_id=unused, **GREEDY)
    assert chosen[0, 6:].tolist() == free  # the call's own end token replaces all
    ends(models, None, None, None)

    class Tokenizer:
        eos_token_id, pad_token = free[at], None

        def get_vocab(self):
            return {str(i): i for i in range(V)}

    out = run(models, padded(PROMPTS[:1]), tokenizers=[Tokenizer()] * 3, **GREEDY)
    assert out[0, 6:].tolist() == free[: at + 1]


def test_min_new_tokens_holds_back_every_end_token(chat):
    models, free = chat
    ends(models, None, free[3], None)
    for option in (dict(min_new_tokens=9), dict(min_length=6 + 9)):
        for k in (0, 3):
            out = run(models, padded(PROMPTS[:1]), draft_tokens=k, **option, **GREEDY)
            assert len(out[0]) >= 6 + 9 and free[3] not in out[0, 6 : 6 + 9]
    ends(models, None, None, None)


def test_padding_of_every_row_is_not_read(chat):
    models, free = chat
    ids = torch.tensor([[PAD] * 40 + PROMPTS[0]])  # 46 columns and 12 new ones are within the context, 64
    mask = (torch.arange(46) >= 40).long()[None]
    for k in (0, 3):
        out = run(models, dict(input_ids=ids, attention_mask=mask), draft_tokens=k, **GREEDY)
        assert out.shape == (1, 58) and out[0, 46:].tolist() == free


# --- processes and defaults ----------------------------------------------------------------------------------------


def test_an_invalid_row_error_crosses_processes(chat):
    error = eft.hf.InvalidRowError({1: 3}, torch.arange(4))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.failed == {1: 3}
    assert torch.equal(again.output, error.output)
    models, _ = chat
    out = run(models, return_dict_in_generate=True, output_scores=True, draft_tokens=2, **GREEDY)
    again = pickle.loads(pickle.dumps(eft.hf.InvalidRowError({0: 0}, out))).output
    assert torch.equal(again.sequences, out.sequences) and again.speculation.acceptance == out.speculation.acceptance


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_no_text(chat, dtype):
    models, _ = chat
    options = dict(repetition_penalty=1.3, top_k=0, do_sample=True, temperature=0.9, top_p=0.95)
    want = [run(models, draft_tokens=k, **options) for k in (0, 3)]
    torch.set_default_dtype(dtype)
    try:
        got = [run(models, draft_tokens=k, **options) for k in (0, 3)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_models_in_float64():
    models = [m.double() for m in three(lambda: make("llama", 1))]
    for k in (0, 3):
        assert torch.equal(run(models, draft_tokens=k, **GREEDY), base_alone(models[0], padded(), **GREEDY))
