"""Runners-up of a draw, and drafts that are trees: the same tokens as plain decoding, more of them a round."""

import pytest
import torch

import eft_kernels as eft

V = 300
FILTERS = [
    {},
    dict(temperature=0.7),
    dict(temperature=0.0),
    dict(top_p=0.8),
    dict(top_k=7, min_p=0.01),
    dict(typical_p=0.7),
    dict(upscale_top_p=0.8),
]
SHAPES = [(1,), (4, 1), (1, 1, 1, 1), (2, 2, 2), (3, 3, 1), (4, 2, 2, 1)]  # children of the nodes of each level


def models(seed=0, V=V):
    """Logits [V, V] of three models after each token; the tuned one says much of what the three say together."""
    g = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(V, V, generator=g) * 2, torch.randn(2, V, V, generator=g)
    return [shared + own[0], shared + own[0] + 0.5 * own[1], shared]


def plain(tables, weights, first, steps, seed, **options):
    tokens, out = first, []
    for n in range(steps):
        tokens = eft.sample([t[tokens] for t in tables], weights, seed=seed, position=n, **options).tokens
        out.append(tokens)
    return torch.stack(out, 1)


def draft_tree(table, newest, position, shape, seed, **options):
    """(drafts [B, N], parents [B, N]): the nodes of level d have shape[d] children, by one draw of each node."""
    options = {k: v for k, v in options.items() if k != "upscale_top_p"}
    tokens, parents, level = [newest], [], [0]
    for depth, children in enumerate(shape):
        following = []
        for slot in level:
            out = eft.draft(
                table[tokens[slot]],
                slot=depth,
                method="coupled",
                seed=seed,
                position=position + depth,
                runners_up=children - 1,
                **options,
            )
            drawn = [out.tokens] if children == 1 else [out.tokens, *out.runners_up.unbind(1)]
            for token in drawn:
                parents.append(slot)
                following.append(len(tokens))
                tokens.append(token.clamp(min=0))
        level = following
    drafts = torch.stack(tokens[1:], 1)
    return drafts, torch.tensor(parents).expand(len(newest), -1)


def by_trees(tables, weights, first, steps, seed, shape, **options):
    """(tokens [B, steps], rounds): speculative decoding of the Markov models ``tables``."""
    rows = torch.arange(len(first))
    out = torch.full((len(first), steps + len(shape) + 1), -1)
    length, newest, rounds = torch.zeros_like(first), first, 0
    while int(length.min()) < steps:
        drafts, parents = draft_tree(tables[1], newest, length, shape, seed, **options)
        slots = torch.cat([newest[:, None], drafts], 1)
        ver = eft.verify(
            [t[slots] for t in tables],
            weights,
            drafts,
            parents=parents,
            method="coupled",
            seed=seed,
            position=length,
            **options,
        )
        assert bool(ver.valid.all())
        assert torch.equal(ver.path >= 0, ver.tokens >= 0)
        followed = ver.path[:, 1:]  # the accepted drafts' own slots
        accepted = drafts.gather(1, (followed - 1).clamp(min=0))
        assert bool(((accepted == ver.tokens[:, :-1]) | (followed < 0)).all())
        for k in range(len(shape) + 1):
            here = (k < ver.num_emitted) & (length + k < steps + len(shape) + 1) & (length < steps)
            out[rows[here], length[here] + k] = ver.tokens[here, k]
        writing = length < steps
        newest = torch.where(writing, ver.tokens.gather(1, ver.num_emitted[:, None] - 1)[:, 0], newest)
        length = torch.where(writing, length + ver.num_emitted, length)
        rounds += int(writing.sum())
    return out[:, :steps], rounds


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trees_are_plain_decoding(shape, options):
    tables, weights, seed = models(), eft.upscale(), torch.arange(60) * 7 + 1
    first = torch.arange(60) % V
    want = plain(tables, weights, first, 12, seed, **options)
    got, _ = by_trees(tables, weights, first, 12, seed, shape, **options)
    assert torch.equal(got, want)


@pytest.mark.slow
def test_a_million_tokens_of_trees_are_plain_decoding():
    tables, weights, tokens = models(), eft.upscale(), 0
    for i in range(21):
        options, shape = FILTERS[i % len(FILTERS)], SHAPES[i % len(SHAPES)]
        rows = (1, 37, 1000)[i % 3] if i < 3 else 1400
        seed, first = torch.arange(rows) * 31 + i, torch.arange(rows) % V
        want = plain(tables, weights, first, 40, seed, **options)
        got, _ = by_trees(tables, weights, first, 40, seed, shape, **options)
        assert torch.equal(got, want)
        tokens += got.numel()
    print(f"{tokens} tokens")
    assert tokens > 10**6


def test_wider_trees_take_fewer_rounds():
    tables, rows = models(), torch.arange(V)
    shapes = [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
    rounds = [by_trees(tables, eft.upscale(), rows, 16, rows, shape)[1] for shape in shapes]
    assert rounds[1] < 0.9 * rounds[0] and rounds[2] < rounds[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_a_runner_up_is_drawn_where_those_before_it_are_not_allowed(temperature, backend):
    """The noise is a token's own, so the draw without the winner is the first runner-up's."""
    z = [torch.randn(9, V, generator=torch.Generator().manual_seed(j)) for j in range(3)]
    args = dict(temperature=temperature, seed=torch.arange(9), position=4, backend=backend)
    out = eft.sample(z, eft.upscale(), runners_up=3, **args)
    banned = out.tokens[:, None]
    for k in range(3):
        bias = eft.TokenBias(banned, torch.full(banned.shape, float("-inf")))
        again = eft.sample(z, eft.upscale(), token_bias=bias, **args)
        assert torch.equal(again.tokens, out.runners_up[:, k])
        banned = torch.cat([banned, again.tokens[:, None]], 1)


def test_fewer_tokens_than_runners_up(backend):
    z = torch.full((2, 40), float("-inf"))
    z[0, 7], z[0, 3], z[1, 5] = 1.0, 0.0, 0.0
    out = eft.sample([z], [1.0], seed=1, position=0, runners_up=3, backend=backend)
    assert sorted([int(out.tokens[0]), int(out.runners_up[0, 0])]) == [3, 7]
    assert out.runners_up.tolist() == [[int(out.runners_up[0, 0]), -1, -1], [-1, -1, -1]]
    wide = eft.sample([z], [1.0], seed=1, position=0, runners_up=15, vocab_size=8, backend=backend)
    assert wide.runners_up.shape == (2, 15) and bool((wide.runners_up[1] == -1).all())
    none = eft.sample([z], [1.0], seed=1, position=0, backend=backend)
    assert none.runners_up is None


def chain(rows=2, drafts=3, **kwargs):
    z = torch.randn(rows, drafts + 1, V, generator=torch.Generator().manual_seed(1))
    parents, tokens = torch.arange(drafts).expand(rows, -1), torch.ones(rows, drafts, dtype=torch.int64)
    given = dict(parents=parents, method="coupled", draft=None, seed=1, position=0)
    return eft.verify([z], [1.0], tokens, **given | kwargs)


def test_a_chain_is_a_tree(backend):
    tables, seed = models(), torch.arange(20)
    drafts, parents = draft_tree(tables[1], torch.arange(20), 0, (1, 1, 1), seed)
    logits = [t[torch.cat([torch.arange(20)[:, None], drafts], 1)] for t in tables]
    args = dict(method="coupled", seed=seed, position=0, logprobs=True, backend=backend)
    got = eft.verify(logits, eft.upscale(), drafts, parents=parents, **args)
    want = eft.verify(logits, eft.upscale(), drafts, **args)
    assert want.path is None
    for name in ("tokens", "num_emitted", "valid"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    torch.testing.assert_close(got.logprobs, want.logprobs, equal_nan=True)
    assert torch.equal(got.path, torch.where(got.tokens >= 0, torch.arange(4), -1))


def test_of_equal_paths_the_one_to_the_lowest_slot(backend):
    """Siblings with one token: the longer path, then the lower slot."""
    z = torch.randn(1, 5, V, generator=torch.Generator().manual_seed(2))
    args = dict(method="coupled", draft=None, seed=5, position=0, backend=backend)
    depths = (0, 1, 1, 2, 2)
    own = [int(eft.sample([z[:, s]], [1.0], seed=5, position=d).tokens) for s, d in enumerate(depths)]
    drafts = torch.tensor([[own[0], own[0], own[2], own[2]]])
    both = eft.verify([z], [1.0], drafts, parents=torch.tensor([[0, 0, 2, 2]]), **args)
    assert both.path.tolist() == [[0, 2, 3, -1, -1]] and both.tokens[0, :3].tolist() == [own[0], own[2], own[3]]
    flat = eft.verify([z], [1.0], drafts, torch.tensor([2]), parents=torch.tensor([[0, 0, 2, 2]]), **args)
    assert flat.path.tolist() == [[0, 1, -1, -1, -1]] and flat.num_emitted.tolist() == [2]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            dict(parents=torch.tensor([[0, 2, 1], [0, 1, 2]])),
            r"parents\[0, \d\]: got .*, allowed is 0 to \d: a slot before its own",
        ),
        (
            dict(parents=torch.tensor([[0, 1, 3], [0, 1, 2]])),
            r"parents\[0, \d\]: got .*, allowed is 0 to \d: a slot before its own",
        ),  # its own: a cycle
        (
            dict(parents=torch.tensor([[-1, 1, 2], [0, 1, 2]])),
            r"parents\[0, \d\]: got .*, allowed is 0 to \d: a slot before its own",
        ),
        (dict(parents=torch.zeros(2, 4, dtype=torch.int64)), r"parents: expected an int64 tensor \[2, 3\]"),
        (dict(parents=torch.zeros(2, 3)), r"parents: expected an int64 tensor \[2, 3\], got torch.float32"),
        (dict(parents="tree"), "parents: expected an int64 tensor"),
        (dict(method="token"), "parents: got a tree with method='token', allowed is 'coupled'"),
        (dict(method="block"), "parents: got a tree with method='block', allowed is 'coupled'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_tree_that_is_none(wrong, words, name):
    with pytest.raises(ValueError, match=words):
        chain(**wrong, backend=name)


def test_outputs_of_draft_are_a_chain():
    z, args = torch.randn(2, V), dict(method="coupled", draft=0, seed=1, position=0)
    out = eft.draft(z, slot=0, method="coupled", seed=1, position=0, runners_up=2)
    assert out.runners_up.shape == (2, 2)
    with pytest.raises(ValueError, match="draft_tokens: got outputs of eft.draft, allowed with parents is a tensor"):
        eft.verify([torch.randn(2, 2, V)], [1.0], [out], parents=torch.zeros(2, 1).long(), **args)
    with pytest.raises(ValueError, match="runners_up: got 1 with method='token', allowed is 0"):
        eft.draft(z, slot=0, method="token", seed=1, position=0, runners_up=1)


@pytest.mark.parametrize("runners_up", [-1, 16, 1.5, "2", None, True])
def test_runners_up_out_of_range(runners_up):
    with pytest.raises(ValueError, match="runners_up: got .*, allowed is an integer from 0 to 15"):
        eft.sample([torch.randn(2, V)], [1.0], seed=1, position=0, runners_up=runners_up)


def test_trees_that_nobody_has_checked(compiled):
    """Values of tensors that the operators do not look at: a draft whose parent is none is never accepted."""
    from eft_kernels.testing import unchecked

    z = [torch.randn(3, 4, V, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    low, high = -(1 << 63), (1 << 63) - 1
    for parents in ([3, low, high], [high, high, high], [-1, 5, 2], [0, 2, 2], [1, 0, 3]):
        call = unchecked(
            "verify",
            z,
            (1.0, -1.0),
            torch.tensor([[5, high, low]] * 3),
            torch.tensor([3, high, low]),
            torch.tensor([parents] * 3),
            "coupled",
            -1,
            True,
        )
        got, want = call.run(compiled), call.run("reference")
        for name in ("tokens", "num_emitted", "valid", "path"):
            assert torch.equal(got[name], want[name]), (parents, name)


def test_what_is_no_draft_may_be_anything(backend):
    """A draw with fewer runners-up gives -1; behind a row's drafts nothing counts."""
    tables, seed, rows = models(), torch.arange(30), torch.arange(30)
    drafts, parents = draft_tree(tables[1], rows, 0, (3, 2), seed)
    args = dict(method="coupled", seed=seed, position=0, backend=backend)
    logits = [t[torch.cat([rows[:, None], drafts], 1)] for t in tables]
    few = drafts.clone()
    few[:, 1:3] = -1
    got = eft.verify(logits, eft.upscale(), few, parents=parents, **args)
    want = eft.verify(logits, eft.upscale(), torch.where(few < 0, drafts * 0 + V - 1, few), parents=parents, **args)
    assert torch.equal(got.path, want.path) and torch.equal(got.tokens, want.tokens)
    lengths, junk, anything = torch.full((30,), 3), parents.clone(), drafts.clone()
    junk[:, 3:], anything[:, 3:] = 1 << 40, -5
    got = eft.verify(logits, eft.upscale(), anything, lengths, parents=junk, **args)
    want = eft.verify(logits, eft.upscale(), drafts, lengths, parents=parents, **args)
    assert torch.equal(got.path, want.path) and torch.equal(got.tokens, want.tokens)
