"""`draft` and what `verify` makes of it: what was drawn how, and what is refused. (Laws: test_distribution.py.)"""

import pytest
import torch

import eft_kernels as eft
from eft_kernels import ops
from eft_kernels.parameters import OFF, DraftParams, Params

B, K, V = 5, 3, 300
METHODS = ops.METHODS
SEEDS, POSITION = eft.row_seeds(3, B), torch.arange(B) * 11
TARGET = dict(temperature=0.8, top_k=50, top_p=0.9)
OWN = dict(temperature=1.2, top_p=0.95)
NOISE = dict(seed=SEEDS, position=POSITION)


def logits(slots=K + 1, models=3):
    g = torch.Generator().manual_seed(0)
    common = torch.randn(B, slots, V, generator=g) * 2
    return [common + torch.randn(B, slots, V, generator=g) for _ in range(models)]


def mask(lead=(B, K + 1)):
    g = torch.Generator().manual_seed(1)
    return torch.randint(-(1 << 31), 1 << 31, (*lead, (V + 31) // 32), generator=g).to(torch.int32)


def drafts(z, method, seed=SEEDS, position=POSITION, params=OWN, **kwargs):
    return [
        eft.draft(z[1][:, i], slot=i, method=method, seed=seed, position=position + i, **params, **kwargs)
        for i in range(K)
    ]


def same(a, b):
    for x, y in zip(a, b):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_the_noise_is_the_one_that_verify_needs(backend):
    """ "coupled" draws by the target's noise; "token" and "block" by the draft stream's, in the draft's slot."""
    z = logits()[1][:, 0]
    for method in METHODS:
        for slot in (0, 2):
            out = eft.draft(z, slot=slot, method=method, logprobs=True, backend=backend, **OWN, **NOISE)
            stream = dict(stream="sample") if method == "coupled" else dict(stream="draft", slot=slot)
            want = eft.sample([z], [1.0], backend=backend, **stream, **OWN, **NOISE)
            same(out[:3], want[:3])
    first, third = (eft.draft(z, slot=i, method="block", temperature=3.0, **NOISE).tokens for i in (0, 2))
    assert not torch.equal(first, third)


def test_drafts_without_a_parameter_are_not_judged_by_the_targets(backend):
    z, off = logits(), dict(temperature=None, top_k=None, top_p=None, min_p=None, typical_p=None)
    outputs, usual = drafts(z, "token", params=off), drafts(z, "token", params={})
    assert outputs[0].params == usual[0].params == DraftParams(1.0, 0, 1.0, 0.0, 1.0)
    got, want = (
        eft.verify(z, eft.upscale(), round, method="token", logprobs=True, backend=backend, **TARGET, **NOISE)
        for round in (outputs, usual)
    )
    same(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_say_what_they_were_drawn_by(method, backend):
    """A list of outputs is their tokens with the same declared by hand."""
    z, lengths = logits(), torch.tensor([3, 2, 0, 1, 3])
    for params in (TARGET, OWN, OWN | dict(top_k=torch.tensor([0, 3, 0, 9, 1]))):
        for given in (None, lengths):
            args = dict(method=method, backend=backend, logprobs=True, **TARGET, **NOISE)
            ds = drafts(z, method, params=params)
            got = eft.verify(z, eft.upscale(), ds, given, **args)
            declared = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | params if method != "coupled" else {}
            want = eft.verify(
                z,
                eft.upscale(),
                torch.stack([d.tokens for d in ds], 1),
                given,
                **args,
                **{f"draft_{k}": v for k, v in declared.items()},
            )
            same(got, want)
            assert bool(got.valid.all())


def test_a_declaration_changes_the_judgement(backend):
    z = logits()
    ds = torch.stack([d.tokens for d in drafts(z, "token", params=dict(temperature=3.0))], 1)
    outs = [
        eft.verify(z, eft.upscale(), ds, method=m, backend=backend, **TARGET, **NOISE, **own)
        for m in ("token", "block")
        for own in ({}, dict(draft_temperature=3.0, draft_top_p=1.0, draft_top_k=0))
    ]
    assert not torch.equal(outs[0].tokens, outs[1].tokens) and not torch.equal(outs[2].tokens, outs[3].tokens)


def test_coupled_drafts_of_any_parameters_end_as_plain_decoding(backend):
    z = logits()
    plain = torch.stack(
        [
            eft.sample(
                [x[:, i] for x in z], eft.upscale(), backend=backend, seed=SEEDS, position=POSITION + i, **TARGET
            ).tokens
            for i in range(K + 1)
        ],
        1,
    )
    out = eft.verify(z, eft.upscale(), drafts(z, "coupled"), method="coupled", backend=backend, **TARGET, **NOISE)
    there = torch.arange(K + 1) < out.num_emitted[:, None]
    assert torch.equal(out.tokens[there], plain[there])


def test_a_row_s_drafts_end_at_its_first_invalid_one(backend):
    """A drafting model that fails in row 1 at slot 1, in row 3 at slot 0: nothing after that is judged."""
    z = logits()
    z[1][1, 1], z[1][3, 0] = float("nan"), float("nan")
    for method in METHODS:
        ds = drafts(z, method)
        assert [d.valid.tolist() for d in ds[:2]] == [[True, True, True, False, True], [True, False, True, True, True]]
        w = [1.0, 0.0, 0.5]  # the drafting model is no part of the target
        got = eft.verify(z, w, ds, method=method, backend=backend, **TARGET, **NOISE)
        assert bool(got.valid.all()) and got.num_emitted[1] <= 2 and got.num_emitted[3] == 1
        tokens = torch.stack([d.tokens for d in ds], 1)
        declared = {} if method == "coupled" else dict(draft_temperature=1.2, draft_top_p=0.95, draft_top_k=0)
        want = eft.verify(
            z, w, tokens, torch.tensor([3, 1, 3, 0, 3]), method=method, backend=backend, **TARGET, **NOISE, **declared
        )
        same(got, want)


def test_no_drafts_at_all(backend):
    z = logits(1)
    for method in METHODS:
        got = eft.verify(z, eft.upscale(), [], method=method, backend=backend, **TARGET, **NOISE)
        want = eft.sample([x[:, 0] for x in z], eft.upscale(), backend=backend, **TARGET, **NOISE)
        assert torch.equal(got.tokens[:, 0], want.tokens)


def test_one_seed_and_one_position_stand_for_all_rows():
    z = logits()
    for method in METHODS:
        args = dict(method=method, **OWN)
        ints = eft.verify(z, eft.upscale(), drafts(z, method, 3, 7), seed=3, position=7, **args)
        for seed, position, of_verify in ((SEEDS, torch.full((B,), 7), 3), (torch.tensor(3), 7, SEEDS)):
            ds = drafts(z, method, seed, position)
            same(ints, eft.verify(z, eft.upscale(), ds, seed=of_verify, position=7, **args))


def test_tensors_that_move_on_between_drafts():
    """A position tensor that its owner counts up in place, round after round."""
    z, position, ds = logits(), POSITION.clone(), []
    for i in range(K):
        ds.append(eft.draft(z[1][:, i], slot=i, method="block", seed=SEEDS, position=position, **TARGET))
        position += 1
    got = eft.verify(z, eft.upscale(), ds, method="block", **TARGET, **NOISE)
    same(got, eft.verify(z, eft.upscale(), drafts(z, "block", params=TARGET), method="block", **TARGET, **NOISE))


def test_a_shared_mask():
    z, m = logits(), mask()
    ds = [
        eft.draft(z[1][:, i], slot=i, method="token", seed=SEEDS, position=POSITION + i, token_mask=m[:, i])
        for i in range(K)
    ]
    out = eft.verify(z, eft.upscale(), ds, method="token", token_mask=m, **NOISE)
    tokens = torch.stack([d.tokens for d in ds], 1)
    same(out, eft.verify(z, eft.upscale(), tokens, method="token", token_mask=m, **NOISE))
    with pytest.raises(ValueError, match=r"draft_tokens\[0\]: was drawn with token_mask another"):
        eft.verify(z, eft.upscale(), ds, method="token", token_mask=m.flip(0), **NOISE)
    with pytest.raises(ValueError, match=r"draft_tokens\[0\]: was drawn with token_mask another"):
        eft.verify(z, eft.upscale(), ds, method="token", **NOISE)


def replaced(at, **fields):
    return lambda ds: [d._replace(**fields) if i == at else d for i, d in enumerate(ds)]


REFUSED = {
    # what is done to the outputs, what the message says, verify's other arguments
    "method": (replaced(1, method="token"), r"draft_tokens\[1\].*method 'token'.*'block'", {}),
    "verify's method": (list, r"draft_tokens\[0\].*method 'block'.*'coupled'", dict(method="coupled")),
    "slot": (replaced(2, slot=1), r"draft_tokens\[2\].*slot 1, allowed is 2", {}),
    "order": (lambda ds: ds[::-1], r"draft_tokens\[0\].*slot 2, allowed is 0", {}),
    "position": (replaced(1, position=POSITION), r"draft_tokens\[1\].*position \[0, 11, .*\+ 1, \[1, 12", {}),
    "one position": (replaced(0, position=4), r"draft_tokens\[0\].*position 4", {}),
    "verify's position": (list, r"draft_tokens\[0\].*position", dict(position=POSITION + 1)),
    "seed": (replaced(1, seed=SEEDS + 1), r"draft_tokens\[1\].*seed", {}),
    "one seed": (replaced(0, seed=4), r"draft_tokens\[0\].*seed 4", {}),
    "verify's seed": (list, r"draft_tokens\[0\].*seed", dict(seed=None)),
    "temperature": (
        replaced(1, params=ops.DraftParams(1.1, 0, 0.95, 0.0)),
        r"draft_tokens\[1\].*temperature 1.1, allowed is that of draft_tokens\[0\], 1.2",
        {},
    ),
    "top_p of a row": (
        replaced(2, params=ops.DraftParams(1.2, 0, torch.tensor([0.95] * 4 + [0.9]), 0.0)),
        r"draft_tokens\[2\].*top_p \[0.9",
        {},
    ),
    "vocab_size": (list, r"draft_tokens\[0\].*vocab_size 300, allowed is verify's, 290", dict(vocab_size=290)),
    "mask": (list, r"draft_tokens\[0\].*token_mask None", dict(token_mask=mask())),
    "too few": (lambda ds: ds[:2], r"draft_tokens: expected a list of 3 outputs.*4 slots.*got 2", {}),
    "none": (lambda ds: [], r"draft_tokens: expected a list of 3 outputs.*got 0", {}),
    "one alone": (lambda ds: ds[0], r"draft_tokens: expected a list of 3 outputs.*got one of them", {}),
    "rows": (replaced(1, tokens=torch.zeros(4, dtype=torch.int64)), r"draft_tokens\[1\]: expected .*\[5\].*\[4\]", {}),
    "tokens among outputs": (lambda ds: [ds[0], ds[1].tokens, ds[2]], "draft_tokens: expected", {}),
    "no draft model": (list, "draft: got None, allowed is the index", dict(draft=None)),
    "declared twice": (list, "draft_temperature: .*allowed is None: draft_tokens say", dict(draft_temperature=1.2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_judged_is_refused(name):
    change, words, kwargs = REFUSED[name]
    z = logits()
    ds = drafts(z, "block")
    assert bool(eft.verify(z, eft.upscale(), ds, method="block", **TARGET, **NOISE).valid.all())
    with pytest.raises(ValueError, match=words):
        eft.verify(z, eft.upscale(), change(ds), **dict(method="block", **TARGET, **NOISE) | kwargs)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(method="coupled", draft_temperature=1.0), "draft_temperature: .*allowed is None: coupled compares"),
        (dict(method="token", draft=None, draft_top_k=torch.zeros(B, dtype=torch.int64)), "draft_top_k: .*draft=None"),
        (dict(draft_temperature=-1.0), "draft_temperature: got -1.0, allowed is 0 to"),
        (dict(draft_top_p=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])), "draft_top_p: got .*allowed is in"),
        (dict(draft_min_p="x"), "draft_min_p: expected a number"),
        (dict(draft_top_k=torch.zeros(B)), "draft_top_k: expected an integer"),
        (dict(draft_top_k=torch.zeros(4, dtype=torch.int64)), r"draft_top_k: .*\[5\].*\[4\]"),
    ],
    ids=str,
)
def test_declarations_are_checked(kwargs, words):
    for noise in (NOISE, dict(seed=1, position=2)):
        with pytest.raises(ValueError, match=words):
            eft.verify(logits(), eft.upscale(), torch.zeros(B, K, dtype=torch.int64), **noise, **kwargs)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(logits=[torch.zeros(B, V)]), "logits: expected the drafting model's tensor"),
        (dict(logits=torch.zeros(B, 2, V)), r"logits\[0\]: expected a tensor \[B, V\]"),
        (dict(method="typical"), "method: got 'typical', allowed are coupled, token, block"),
        (dict(slot=-1), "slot: got -1"),
        (dict(slot=True), "slot: got True"),
        (dict(slot=1 << 24), "slot: got"),
        (dict(seed=None), "seed: got None"),
        (dict(position=None), "position: got None"),
        (dict(temperature=-1.0), "temperature: got -1.0"),
        (dict(vocab_size=V + 1), "vocab_size: got 301"),
    ],
    ids=str,
)
def test_bad_arguments_of_draft(kwargs, words):
    for method in ("coupled", "block"):
        args = dict(logits=torch.zeros(B, V), slot=0, method=method, **NOISE) | kwargs
        with pytest.raises(ValueError, match=words):
            eft.draft(args.pop("logits"), **args)


def test_compiled_whole():
    """torch.compile takes a round as it is; what only the host can compare is then left alone."""
    torch._dynamo.reset()

    def step(z, seeds, position):
        ds = [
            eft.draft(z[1][:, i], slot=i, method="block", seed=seeds, position=position + i, temperature=1.3)
            for i in range(K)
        ]
        out = eft.verify(z, eft.upscale(), ds, method="block", seed=seeds, position=position, **TARGET)
        return out.tokens, out.num_emitted, out.valid

    args = logits(), SEEDS, POSITION
    same(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((1, 4), -1, dtype=torch.int32),
        torch.full((3, 4), -1, dtype=torch.int32).view(torch.uint32),
    ],
    ids=("[1, W]", "uint32"),
)
def test_masks_of_drafts_are_those_of_verify_whatever_their_form(mask, backend):
    logits = [torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    seeds = torch.arange(3)
    drafts = [
        eft.draft(logits[1][:, 0], slot=0, method="token", seed=seeds, position=0, token_mask=mask, backend=backend)
    ]
    out = eft.verify(
        logits,
        eft.upscale(),
        drafts,
        seed=seeds,
        position=0,
        backend=backend,
        token_mask=torch.full((3, 2, 4), -1, dtype=torch.int32),
    )
    assert out.valid.all()


@pytest.mark.parametrize("method, draft", [("coupled", 1), ("token", -1)])
def test_the_operator_refuses_parameters_of_drafts_that_have_no_distribution(method, draft):
    z = torch.zeros(2, 2, 9)
    params = Params((1.0, 1.0), **OFF, seed=1, position=0, token_mask=None, token_bias=None, vocab_size=9, tuned=1)
    args = ops._flatten(
        params,
        torch.zeros(2, 1, dtype=torch.int64),
        torch.ones(2, dtype=torch.int64),
        None,
        method,
        draft,
        DraftParams(temperature=0.5),
        False,
    )
    with pytest.raises(ValueError, match="draft_temperature: got a value, allowed is None"):
        torch.ops.eft_kernels.verify([z, z], *args, "auto")


def test_a_list_of_tokens_is_no_list_of_drafts():
    logits = [torch.zeros(2, 3, 9)] * 3
    with pytest.raises(ValueError, match=r"draft_tokens: expected an int64 tensor \[2, 2\] \(torch.stack"):
        eft.verify(logits, eft.upscale(), [torch.zeros(2, dtype=torch.int64)] * 2, seed=1, position=0)
