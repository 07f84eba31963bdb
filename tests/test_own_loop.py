"""What decoding stacks ask of the operations: models by name, scores, rows by index, ragged rounds, own buffers."""

import pytest
import torch

import eft_kernels as eft
from eft_kernels import dispatch, ops

B, V, K = 4, 300, 3
NOISE = dict(seed=torch.arange(B) * 11, position=torch.arange(B) + 2)


def models(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    shared = 2 * torch.randn(*shape, generator=g)
    return [(shared + torch.randn(*shape, generator=g)).to(dtype) for _ in range(3)]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def by_name(z):
    return dict(zip(("base", "tuned", "ref"), z))


# --- models by name ------------------------------------------------------------------------------------------------


def test_models_by_name(backend):
    """base, tuned and ref are the list; weights are upscale() where none are given."""
    z, zz = models(B, V), models(B, K + 1, V)
    args = dict(top_p=0.9, upscale_top_p=0.8, backend=backend)
    ids, drafts = torch.randint(0, V, (B, 2)), torch.randint(0, V, (B, K))
    for weights in (None, eft.upscale(1.5)):
        given = weights or eft.upscale()
        same(
            eft.sample(**by_name(z), weights=weights, diagnostics=True, **NOISE, **args),
            eft.sample(z, given, diagnostics=True, **NOISE, **args),
        )
        same(
            eft.verify(**by_name(zz), weights=weights, draft_tokens=drafts, method="block", **NOISE, **args),
            eft.verify(zz, given, drafts, method="block", **NOISE, **args),
        )
        same([eft.logprobs(**by_name(z), weights=weights, **args)], [eft.logprobs(z, given, **args)])
        same(
            [eft.token_logprobs(**by_name(z), weights=weights, ids=ids, **args)],
            [eft.token_logprobs(z, given, ids, **args)],
        )
        kwargs = dict(upscale_top_p=0.8, backend=backend)
        same([eft.combine(**by_name(z), weights=weights, **kwargs)], [eft.combine(z, given, **kwargs)])


@pytest.mark.parametrize("missing", ("base", "tuned", "ref"))
def test_a_model_that_is_missing_is_named(missing):
    given = by_name(models(B, V))
    del given[missing]
    with pytest.raises(ValueError, match=f"^{missing}: is missing"):
        eft.sample(**given, **NOISE)
    for call in (eft.sample, eft.logprobs, eft.combine):
        with pytest.raises(ValueError, match="^logits: got None"):
            call()
        with pytest.raises(ValueError, match="^weights: got None"):
            call(models(B, V))


# --- scores --------------------------------------------------------------------------------------------------------


def test_combine_is_the_weighted_sum(backend):
    z = models(B, V, dtype=torch.bfloat16)
    weights = torch.tensor([[1.0, 1.0, -1.0], [1.0, 0.5, -0.5], [0.3, 0.0, 0.0], [1.0, 2.0, -2.0]])
    want = sum(weights[:, j : j + 1] * z[j].float() for j in range(3))
    torch.testing.assert_close(eft.combine(z, weights, backend=backend), want, rtol=0, atol=1e-5)
    same([eft.combine(z, eft.upscale(), backend=backend)], [z[0].float() + z[1].float() - z[2].float()])
    allowed = torch.randint(-(1 << 31), 1 << 31, (B, 10)).to(torch.int32)
    got = eft.combine(z, weights, token_mask=allowed, backend=backend)
    token = torch.arange(V)
    is_allowed = (allowed[:, token // 32] >> (token % 32)) & 1 == 1
    assert torch.equal(got > -torch.inf, is_allowed)
    torch.testing.assert_close(got.log_softmax(1), eft.logprobs(z, weights, token_mask=allowed), rtol=0, atol=1e-4)


def test_combine_of_rows_that_fail(backend):
    z = [x.clone() for x in models(B, V)]
    z[1][2, 5] = float("nan")
    z[0][3] = float("-inf")
    got = eft.combine(z, eft.upscale(), backend=backend)
    assert got.isnan().all(1).tolist() == [False, False, True, True] and not got[:2].isnan().any()


def test_combine_under_the_up_scaling_filter(backend):
    """Log-probs of the filter but for a constant of each row, which makes the likeliest token's score its sum."""
    z, top_p = models(B, V), torch.tensor([0.5, 1.0, 0.8, 1.0])
    bias = (torch.tensor([[3, 7]]), torch.tensor([[2.0, -4.0]]))
    index = torch.tensor([2, 0, 1, 3])
    sums = eft.combine(z, eft.upscale(), backend=backend)
    got = eft.combine(z, eft.upscale(), upscale_top_p=top_p, backend=backend)
    lp = eft.logprobs(z, eft.upscale(), upscale_top_p=top_p, backend=backend)
    torch.testing.assert_close(got.log_softmax(1), lp, rtol=0, atol=1e-4)
    best = lp.argmax(1, keepdim=True)
    torch.testing.assert_close(got.gather(1, best), sums.gather(1, best), rtol=0, atol=1e-4)
    same([got[1]], [sums[1]])
    biased = eft.combine(z, eft.upscale(), upscale_top_p=top_p, token_bias=bias, backend=backend)
    want = got.clone()
    want[:, 3] += 2
    want[:, 7] -= 4
    torch.testing.assert_close(biased, want, rtol=0, atol=1e-4)
    rows = eft.combine(z, eft.upscale(), upscale_top_p=top_p[index], row_index=index, backend=backend)
    torch.testing.assert_close(rows, got[index], rtol=0, atol=0)


# --- rows by index -------------------------------------------------------------------------------------------------


def test_row_index(backend):
    """Every operation: the rows that it names, in its order, one more than once."""
    z, index = models(7, V), torch.tensor([6, 2, 2, 0])
    rows = [x[index] for x in z]
    args = dict(top_k=20, backend=backend)
    kwargs = dict(row_index=index, **args)
    full = dict(top_logprobs=3, diagnostics=True, **NOISE)
    same(eft.sample(z, eft.upscale(), **full, **kwargs), eft.sample(rows, eft.upscale(), **full, **args))
    same([eft.logprobs(z, eft.upscale(), **kwargs)], [eft.logprobs(rows, eft.upscale(), **args)])
    ids = torch.randint(0, V, (B,))
    same([eft.token_logprobs(z, eft.upscale(), ids, **kwargs)], [eft.token_logprobs(rows, eft.upscale(), ids, **args)])
    kwargs = dict(row_index=index, backend=backend)
    same([eft.combine(z, eft.upscale(), **kwargs)], [eft.combine(rows, eft.upscale(), backend=backend)])


def test_row_index_of_other_types():
    z = models(7, V)
    want = eft.sample(z, eft.upscale(), row_index=torch.tensor([6, 0, 1, 2]), **NOISE)
    for index in (
        [6, 0, 1, 2],
        torch.tensor([6, 0, 1, 2], dtype=torch.int32),
        torch.tensor([6, 9, 0, 9, 1, 9, 2])[::2],
    ):
        same(eft.sample(z, eft.upscale(), row_index=index, **NOISE), want)


# --- ragged rounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ops.METHODS)
def test_ragged_rounds(method, backend):
    """Rounds of 1 to K + 1 slots, one after the other, are those rounds padded; masks and biases go with the slots."""
    lengths = torch.tensor([3, 0, 2, 1])
    zz, drafts = models(B, K + 1, V), torch.randint(0, V, (B, K))
    drafts[0] = eft.combine([z[0, :K] for z in zz], eft.upscale()).argmax(1)
    there = torch.arange(K + 1) <= lengths[:, None]
    offsets = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0)) + 2  # two rows before the first round
    flat = [torch.cat([z.new_zeros(2, V), z[there], z.new_zeros(1, V)]) for z in zz]
    bits = torch.randint(-(1 << 31), 1 << 31, (B, K + 1, 10)).to(torch.int32) | 1
    ids, values = torch.randint(0, V, (B, K + 1, 5)), torch.randn(B, K + 1, 5)
    full = dict(method=method, temperature=0.2, logprobs=True, backend=backend, **NOISE)

    def rows(x):
        return torch.cat([x.new_zeros(2, x.shape[2]), x[there], x.new_zeros(1, x.shape[2])])

    for masks, of_rows in (
        ({}, {}),
        (dict(token_mask=bits), dict(token_mask=rows(bits))),
        (dict(token_bias=(ids, values)), dict(token_bias=(rows(ids), rows(values)))),
        (dict(token_mask=bits[:1, :1]), dict(token_mask=bits[0, :1])),
    ):
        want = eft.verify(zz, eft.upscale(), drafts, lengths, **full, **masks)
        same(eft.verify(flat, eft.upscale(), drafts, offsets=offsets, **full, **of_rows), want)
    one = torch.ones(B, dtype=torch.int64)
    want = eft.verify(zz, eft.upscale(), drafts, lengths.clamp(max=1), **full)
    same(eft.verify(flat, eft.upscale(), drafts.tolist(), one.tolist(), offsets=offsets.tolist(), **full), want)
    same(eft.verify(flat, eft.upscale(), drafts, one, offsets=offsets, **full), want)


def test_ragged_rounds_of_draft():
    """Outputs of `draft` say what they were drawn by, also where rounds are ragged."""
    zz, lengths = models(B, K + 1, V), torch.tensor([3, 0, 2, 1])
    drafts = [
        eft.draft(
            zz[1][:, i], slot=i, method="token", temperature=1.3, seed=NOISE["seed"], position=NOISE["position"] + i
        )
        for i in range(K)
    ]
    there = torch.arange(K + 1) <= lengths[:, None]
    offsets = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
    got = eft.verify([z[there] for z in zz], eft.upscale(), drafts, offsets=offsets, **NOISE)
    same(got, eft.verify(zz, eft.upscale(), drafts, lengths, **NOISE))
    with pytest.raises(ValueError, match=r"^draft_tokens\[0\]: was drawn with seed"):
        eft.verify([z[there] for z in zz], eft.upscale(), drafts, offsets=offsets, seed=1, position=NOISE["position"])


@pytest.mark.parametrize(
    "name, value",
    [
        ("token_mask", lambda n: torch.zeros(n, 10, dtype=torch.int32)),
        ("token_bias", lambda n: (torch.zeros(n, 2).long(), torch.zeros(n, 2))),
    ],
)
def test_ragged_masks_and_biases_have_a_row_for_each_of_the_logits(name, value):
    """One row for each round would be spread over the wrong slots."""
    z, drafts, offsets = models(7, V), torch.zeros(B, 2, dtype=torch.int64), torch.tensor([0, 3, 4, 6, 7])
    for rows in (B, 6, 8):
        with pytest.raises(ValueError, match=rf"^{name}.*a row for each row of the logits, \[7, size\]"):
            eft.verify(z, eft.upscale(), drafts, offsets=offsets, **{name: value(rows)}, **NOISE)


def test_ragged_lengths_are_checked():
    z, drafts, offsets = models(7, V), torch.zeros(B, 2, dtype=torch.int64), torch.tensor([0, 3, 4, 6, 7])
    for lengths in ([9, 0, 0, 0], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"^draft_lengths: got \[(9|-1), 0, 0, 0\], allowed is 0 to 2"):
            eft.verify(z, eft.upscale(), drafts, lengths, offsets=offsets, **NOISE)


def test_drafts_by_masks_of_slots_that_rows_do_not_have():
    """A row without a draft at a slot has no mask there that could be another."""
    zz, lengths = models(B, K + 1, V), torch.tensor([3, 0, 2, 1])
    there = torch.arange(K + 1) <= lengths[:, None]
    bits = torch.randint(-(1 << 31), 1 << 31, (B, K + 1, 10)).to(torch.int32) | 1
    drafts = [
        eft.draft(
            zz[1][:, i],
            slot=i,
            method="token",
            seed=NOISE["seed"],
            position=NOISE["position"] + i,
            token_mask=torch.where(there[:, i + 1, None], bits[:, i], -1),
        )
        for i in range(K)
    ]
    offsets = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))
    got = eft.verify([z[there] for z in zz], eft.upscale(), drafts, offsets=offsets, token_mask=bits[there], **NOISE)
    same(got, eft.verify(zz, eft.upscale(), drafts, lengths, token_mask=bits, **NOISE))
    bits[0, 1] ^= 8
    with pytest.raises(ValueError, match=r"^draft_tokens\[1\]: was drawn with token_mask another"):
        eft.verify([z[there] for z in zz], eft.upscale(), drafts, offsets=offsets, token_mask=bits[there], **NOISE)


def test_drafts_of_logits_with_one_column():
    z, bits = models(B, V)[1], torch.full((B, 10), -1, dtype=torch.int32)
    one, two = (eft.draft(x, slot=0, method="token", seed=1, position=0, token_mask=bits) for x in (z, z[:, None]))
    assert two.vocab_size == V and torch.equal(one.token_mask, two.token_mask) and torch.equal(one.tokens, two.tokens)


# --- buffers of the caller's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", (dict(), dict(top_p=0.9), dict(top_p=[0.9] * B), dict(token_bias=([[3]], [[5.0]]))), ids=str
)
def test_out(args, backend):
    """Tokens are written where the caller wants them, on the quick way and on the careful one."""
    z, buffer = models(B, V), torch.full((B + 2,), -7)
    want = eft.sample(z, eft.upscale(), backend=backend, **NOISE, **args)
    out = eft.sample(z, eft.upscale(), out=buffer[1:-1], backend=backend, **NOISE, **args)
    assert out.tokens.data_ptr() == buffer[1:].data_ptr()
    same(out, want)
    assert buffer.tolist() == [-7, *want.tokens.tolist(), -7]


def test_out_is_written_by_the_kernel(compiled, monkeypatch):
    """No copy: `copy_` is not called."""
    if compiled != "cpu" or not dispatch.shortcut("try_sample", compiled, "cpu"):
        pytest.skip("only on the quick way")
    z, buffer = models(B, V), torch.zeros(B, dtype=torch.int64)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: pytest.fail("copied"))
    assert eft.sample(z, eft.upscale(), out=buffer, backend=compiled, **NOISE).tokens is buffer


def test_out_of_too_little_memory_is_refused():
    buffer = torch.zeros(B, dtype=torch.int64)
    buffer.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="^out: needs 32 bytes, its storage was resized to 8"):
        eft.sample(models(B, V), eft.upscale(), out=buffer, **NOISE)


# --- shapes that engines have --------------------------------------------------------------------------------------


def test_logits_of_the_newest_token(backend):
    """[B, 1, V] is [B, V], of masks, too."""
    z, bits = models(B, V), torch.randint(-(1 << 31), 1 << 31, (B, 10)).to(torch.int32)
    want = eft.sample(z, eft.upscale(), token_mask=bits, backend=backend, **NOISE)
    same(eft.sample([x[:, None] for x in z], eft.upscale(), token_mask=bits[:, None], backend=backend, **NOISE), want)


def test_masks_wider_than_needed(backend):
    """An engine's bitmask has room for the padded vocabulary."""
    z, bits = models(B, V), torch.randint(-(1 << 31), 1 << 31, (B, 12)).to(torch.int32)
    want = eft.sample(z, eft.upscale(), token_mask=bits[:, :10].contiguous(), backend=backend, **NOISE)
    same(eft.sample(z, eft.upscale(), token_mask=bits, backend=backend, **NOISE), want)
    zz, drafts = models(B, K + 1, V), torch.randint(0, V, (B, K))
    deep = bits[:, None].expand(-1, K + 1, -1)
    want = eft.verify(zz, eft.upscale(), drafts, token_mask=deep[..., :10], backend=backend, **NOISE)
    same(eft.verify(zz, eft.upscale(), drafts, token_mask=deep, backend=backend, **NOISE), want)


# --- torch.compile -------------------------------------------------------------------------------------------------


def test_compile():
    """Traced whole, functionalised, equal to eager: index, offsets, scores and out."""
    offsets, drafts = torch.tensor([0, 2, 3]), torch.tensor([[1, 2], [3, 4]])
    pair = dict(seed=NOISE["seed"][:2], position=1)

    def run(z, index, buffer):
        one = eft.sample(z, eft.upscale(), row_index=index, out=buffer, **NOISE)
        two = eft.verify(z, eft.upscale(), drafts, offsets=offsets, **pair)
        return one.tokens, buffer + 0, *two[:3], eft.combine(base=z[0], tuned=z[1], ref=z[2], row_index=index)

    args = models(5, V), torch.tensor([4, 0, 0, 2]), torch.zeros(B, dtype=torch.int64)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
    same(got, run(*args))
