"""The decoding loops over table models, where every distribution is known exactly.

A table model's logits depend on the last two tokens. Its cache holds token ids, so a wrong rollback, mask or position
shows at once, and its logits are the same numbers however a text is split into forwards.
"""

import math
import subprocess
import sys

import pytest
import torch

import eft_kernels as eft
from eft_kernels.decoding import Columns, Drafts, Prompt, Target, Text, lookup, plain, speculative

V = 6
METHODS = ("coupled", "token", "block")


class Table:
    """logits = table[previous token or V at the text's start, token]; checks the layout it is called with."""

    def __init__(self, table, last_position=None):
        self.table, self.last_position, self.cache, self.calls, self.passes = table, last_position, None, [], []

    def __call__(self, ids, attention_mask, position_ids, keep):
        assert ids.shape == position_ids.shape and int(ids.min()) >= 0
        self.calls.append(ids.shape[1])
        self.cache = ids if self.cache is None else torch.cat([self.cache, ids], 1)
        width = self.cache.shape[1]
        self.passes.append((width - ids.shape[1], width))
        mask = torch.ones_like(self.cache) if attention_mask is None else attention_mask
        assert mask.shape == self.cache.shape
        usual = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        assert torch.equal(position_ids, usual.minimum(self.last_position[:, None]))
        columns = torch.arange(width - keep, width)
        before = torch.where(usual[:, -keep:] > 0, self.cache[:, (columns - 1).clamp(min=0)], V)
        return self.table[before, self.cache[:, columns]]

    def crop(self, count):
        self.cache = self.cache[:, :-count]

    def realign(self, columns):
        self.cache = self.cache.gather(1, columns)

    can_take_rows = True

    def take_rows(self, rows):
        self.cache, self.last_position = self.cache[rows], self.last_position[rows]


class InPlace(Table):
    """The same, whose texts never move: a row's nodes lie after its text, wherever that ends."""

    reads_nodes = True

    def __call__(self, ids, attention_mask, position_ids, keep):
        logits = super().__call__(ids, attention_mask, position_ids, keep)
        self.texts = [row[-int(n) - 1 :] for row, n in zip(ids.tolist(), position_ids[:, -1])]
        self.read = [[] for _ in self.texts]  # nodes: (token, the one before it)
        return logits

    def nodes(self, ids, depth, sees, keep):
        assert sees.shape == (ids.shape[1], len(self.read[0]) + ids.shape[1]) and sees.dtype == torch.bool
        self.calls.append(ids.shape[1])
        for b, text in enumerate(self.texts):
            for i, token in enumerate(ids[b].tolist()):
                seen = [j for j, s in enumerate(sees[i].tolist()) if s]
                assert seen[-1] == len(self.read[b])  # itself, last
                path = [*(self.read[b][j][0] for j in seen[:-1]), token]
                room = max(int(self.last_position[b]) - 1 - len(text), 0)  # the last token of all is never read
                assert int(depth[b, i]) == min(len(path) - 1, room)
                self.read[b].append((token, [*text[-2:], *path][-2]))
        new = [row[-keep:] for row in self.read]
        token, before = (torch.tensor([[pair[k] for pair in row] for row in new]) for k in (0, 1))
        return self.table[before, token]

    def accept(self, path, kept):
        for b, n in enumerate(kept):
            slots = range(n) if path is None else path[b, :n].tolist()
            self.texts[b] += [self.read[b][s][0] for s in slots]
        self.read = [[] for _ in self.texts]

    def take_rows(self, rows):
        super().take_rows(rows)
        self.texts = [self.texts[i] for i in rows.tolist()]
        self.read = [[] for _ in self.texts]

    def clean(self):
        self.cleaned = True


def tables(seed=0, scale=1.5):
    """[base, tuned, ref] whose combination is ``target`` and whose tuned model drafts its negation."""
    g = torch.Generator().manual_seed(seed)
    target, base = (torch.randn(V + 1, V, V, generator=g) * scale for _ in range(2))
    return target, [base, -target, base - target - target]


def prompt(rows, max_new_tokens, **options):
    """The text (4, 2) after 0 to 3 columns of padding."""
    ids = torch.full((rows, 5), 5)
    left = torch.arange(rows) % 4
    ids[:, 3], ids[:, 4] = 4, 2
    options.setdefault("pad", 0)
    return Prompt(ids, left.clamp(max=3), max_new_tokens, **options)


@pytest.fixture(params=["moving", "in place"], autouse=True)
def kind(request, monkeypatch):
    """Both kinds of models that rounds of speculation can read."""
    monkeypatch.setattr(run, "kind", dict(zip(("moving", "in place"), (Table, InPlace)))[request.param], raising=False)


def run(models, target, start, method, k, draft=1):
    """k: the number of drafts, or `Drafts`."""
    last = start.ids.shape[1] - start.left + start.max_new_tokens - 1
    models = [run.kind(t, last) for t in models]
    if method == "plain":
        return plain(models, target, start)
    drafts = k if isinstance(k, Drafts) else Drafts(k)
    return speculative(models, target, start, draft=draft, drafts=drafts, method=method)


def critical(df):
    """chi-squared at p = 1e-4 (Wilson and Hilferty)."""
    return df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3


def assert_joint(tokens, first, second, what):
    """Pairs tokens [N, 2] against first [V] and second [V, V] probabilities."""
    expected = (first[:, None] * second).double().reshape(-1) * tokens.shape[0]
    seen = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V).double()
    assert seen[expected == 0].sum() == 0, f"{what}: a token of probability 0"
    rare = expected < 8
    cells = [(seen[~rare], expected[~rare]), (seen[rare].sum()[None], expected[rare].sum()[None])]
    cells = [torch.cat(c) for c in zip(*cells)]
    there = cells[1] > 0
    chi = ((cells[0] - cells[1]) ** 2 / cells[1])[there].sum()
    assert chi < critical(int(there.sum()) - 1), f"{what}: chi-squared {chi:.1f} over {int(there.sum())} cells"


def check_joint(method, k, target, models, process=None, bias=0.0, draft=1):
    rows = 8000
    filters = dict(temperature=0.9, top_k=5)
    logits = (target + bias) / 0.9
    p = torch.where(logits >= logits.topk(5).values[..., -1:], logits, -math.inf).softmax(-1)  # [before, token, V]
    first, second = p[4, 2], p[2]  # after the prompt (4, 2), then after (2, t)
    third = torch.einsum("i,ij,ijk->jk", first, second, p[:V])  # of tokens (2, 3)
    start = prompt(
        rows,
        max(getattr(k, "depth", k), 1) + 2,
        criteria=lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= 5 + 3),
    )
    seeds = eft.row_seeds(11 * getattr(k, "budget", k), rows)
    out = run(models, Target(eft.upscale(), seeds, filters, process=process), start, method, k, draft)
    new = out.sequences[:, 5:]
    assert new.shape[1] == 3
    what = f"{method} K={getattr(k, 'budget', k)}, tokens"
    assert_joint(new[:, :2], first, second, f"{what} 1 and 2")
    marginal = third.sum(1)
    assert_joint(new[:, 1:], marginal, third / marginal[:, None], f"{what} 2 and 3")

    for b in (1, 2):  # a batch of one gives the same tokens: the same distribution
        alone = Prompt(start.ids[b : b + 1], start.left[b : b + 1], start.max_new_tokens, criteria=start.criteria)
        one = run(models, Target(eft.upscale(), seeds[b : b + 1], filters, process=process), alone, method, k, draft)
        assert torch.equal(one.sequences, out.sequences[b : b + 1])


@pytest.mark.parametrize("method, k", [("plain", 0), *((m, k) for m in METHODS for k in (1, 2, 3, 8))])
def test_joint_distribution_by_enumeration(method, k):
    check_joint(method, k, *tables())


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_step_keep_the_joint_distribution(method, monkeypatch):
    """Where no row may move, tokens that a row has beyond the others are judged again, with fresh noise."""
    monkeypatch.setattr(Table, "can_realign", False, raising=False)
    monkeypatch.delattr(Table, "realign")
    check_joint(method, 3, *tables())


@pytest.mark.parametrize("boundary", [6, 9, 12])
def test_no_pass_crosses_a_boundary(boundary, monkeypatch):
    monkeypatch.setattr(Table, "boundary", boundary, raising=False)
    _, models = tables(13, scale=1.0)
    target, start = Target(eft.upscale(), eft.row_seeds(3, 1), {}), prompt(1, 13)  # one row, 5 columns
    want = run(models, target, start, "plain", 0).sequences
    for method in METHODS:
        models_now = [Table(t, start.ids.shape[1] - start.left + 12) for t in models]
        out = speculative(models_now, target, start, draft=1, drafts=Drafts(4), method=method)
        assert method != "coupled" or torch.equal(out.sequences, want)
        for model in models_now:
            assert all(end <= boundary or begin >= boundary for begin, end in model.passes)
        assert max(n for n in models_now[0].calls[1:]) > 2  # rounds with drafts


@pytest.mark.parametrize("method", ["plain", *METHODS])
def test_joint_distribution_with_a_processor(method):
    bias = torch.randn(V, V, generator=torch.Generator().manual_seed(2))  # by the prefix's last token
    check_joint(method, 3, *tables(), lambda ids, scores: scores + bias[ids[:, -1]], bias)


@pytest.mark.parametrize("method", ["token", "block"])
def test_every_round_draws_fresh_noise(method):
    """Block verification looks at drafts that it rejects. Where no logits depend on the context, a later round that
    used their noise again would draft the same tokens, by then known to be unlikely."""
    target = tables(scale=1.0)[0][:1, :1].expand(V + 1, V, V).contiguous()
    base = tables(1)[1][0]
    check_joint(method, 3, target, [base, 0.3 * target, base - 0.7 * target])


@pytest.mark.parametrize("filters", [dict(temperature=0.0), dict(temperature=0.8, top_p=0.9), dict(min_p=0.05)])
def test_coupled_is_plain(filters):
    _, models = tables(13, scale=1.0)
    for rows in (1, 9):
        target = Target(eft.upscale(torch.linspace(0.5, 1.5, rows)), eft.row_seeds(rows, rows), filters)
        start = prompt(rows, 13, eos=[1])
        want = run(models, target, start, "plain", 0)
        assert rows == 1 or filters.get("temperature") == 0 or len(set(want.lengths.tolist())) > 2
        for k in (1, 2, 3, 8):
            got = run(models, target, start, "coupled", k)
            assert torch.equal(got.sequences, want.sequences) and torch.equal(got.lengths, want.lengths)


@pytest.mark.parametrize("method", ["plain", *METHODS])
def test_rows_that_ended_are_not_read(method, monkeypatch):
    """Rows are left out once that halves the batch; the others' texts are as before."""
    _, models = tables(13, scale=1.0)
    target, start = Target(eft.upscale(), eft.row_seeds(9, 9)), prompt(9, 30, eos=[1])
    read = []
    own = run.kind.take_rows

    def take_rows(self, rows):
        read.append(len(rows))
        own(self, rows)

    monkeypatch.setattr(run.kind, "take_rows", take_rows)
    got = run(models, target, start, method, 3)
    fewer = [n for i, n in enumerate(read) if i % 3 == 0]
    assert read == [n for n in fewer for _ in range(3)] and 0 < fewer[-1] <= fewer[0] <= 4
    assert all(b <= a / 2 for a, b in zip([9, *fewer], fewer))
    monkeypatch.setattr(Table, "can_take_rows", False)
    read.clear()
    want = run(models, target, start, method, 3)
    assert torch.equal(got.sequences, want.sequences) and not read


# --- drafts of no model ----------------------------------------------------------------------------------------------


def propose(texts, k):
    """Drafts by a rule: some rows get fewer than k, some none."""
    drafts = torch.stack([(text[-1] + torch.arange(k) * text[-2]) % V for text in texts])
    count = torch.tensor([int(text.sum()) % (k + 1) for text in texts])
    return torch.where(torch.arange(k) < count[:, None], drafts, -1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draft", [propose, lookup()])
def test_the_joint_distribution_with_a_proposer(method, draft):
    check_joint(method, 3, *tables(), draft=draft)


def test_coupled_is_plain_with_a_proposer():
    _, models = tables(13, scale=1.0)
    target, start = Target(eft.upscale(), eft.row_seeds(9, 9)), prompt(9, 13, eos=[1])
    want = run(models, target, start, "plain", 0)
    for draft in (propose, lookup(), lookup(1)):
        got = run(models, target, start, "coupled", 4, draft)
        assert torch.equal(got.sequences, want.sequences)
        spec = got.speculation
        assert 0 < int(spec.accepted.sum()) < int(spec.drafted.sum())
        assert int(spec.ranks[:, 0].sum()) == int(spec.accepted.sum())


@pytest.mark.parametrize(
    "text, found", [([1, 2, 3, 1, 2], [3, 1, 2]), ([1, 2, 4, 3, 2], [4, 3, 2]), ([1, 2, 3], []), ([7], [])]
)
def test_lookup(text, found):
    """The longest suffix that occurred before; the last time that it did."""
    assert lookup()([torch.tensor(text)], 4).tolist() == [[*found, -1, -1, -1, -1][:4]]
    again = [5, 6, 1, 2, 8, 1, 2, 9, 6, 1, 2]
    assert lookup()([torch.tensor(again)], 2).tolist() == [[8, 1]]  # after 6, 1, 2
    assert lookup(2)([torch.tensor(again)], 2).tolist() == [[9, 6]]  # after the last 1, 2


@pytest.mark.parametrize("drafts", [torch.zeros(2, 3), torch.zeros(1, 3, dtype=torch.int64), [[1, 2, 3]] * 2])
def test_a_proposer_of_another_shape_is_refused(drafts):
    with pytest.raises(ValueError, match=r"draft: proposed .*integers \[2, 3\]"):
        run(tables()[1], Target(eft.upscale(), torch.arange(2)), prompt(2, 9), "coupled", 3, lambda texts, k: drafts)


# --- trees of drafts -----------------------------------------------------------------------------------------------

SHAPES = [(1, 2, None), (2, 2, None), (2, 3, 5), (3, 2, 9), (4, 3, 7), (1, 5, None)]
in_place = pytest.mark.parametrize("kind", ["in place"], indirect=True)


@in_place
@pytest.mark.parametrize("filters", [dict(temperature=0.0), dict(temperature=0.8, top_p=0.9), dict(top_k=2)])
def test_trees_write_what_plain_decoding_writes(filters, kind):
    _, models = tables(13, scale=1.0)
    for rows in (1, 9):
        target = Target(eft.upscale(torch.linspace(0.5, 1.5, rows)), eft.row_seeds(rows, rows), filters)
        start = prompt(rows, 13, eos=[1])
        want = run(models, target, start, "plain", 0)
        for shape in SHAPES:
            got = run(models, target, start, "coupled", Drafts(*shape))
            assert torch.equal(got.sequences, want.sequences) and torch.equal(got.lengths, want.lengths), shape


@in_place
@pytest.mark.parametrize("shape", [(2, 2, None), (3, 3, 8)])
def test_the_joint_distribution_of_trees(shape, kind):
    check_joint("coupled", Drafts(*shape), *tables())


@in_place
def test_trees_with_a_processor(kind):
    bias = torch.randn(V, V, generator=torch.Generator().manual_seed(2))  # by the prefix's last token
    check_joint("coupled", Drafts(3, 2, 6), *tables(), lambda ids, scores: scores + bias[ids[:, -1]], bias)


@in_place
def test_wider_trees_take_fewer_rounds(kind):
    target, (base, tuned, ref) = tables(14, scale=1.0)
    models, rows = [base, 0.5 * target, base - 0.5 * target], 200
    emulated, per_round = Target(eft.upscale(), eft.row_seeds(4, rows)), []
    for shape in [(3,), (3, 2, 6), (3, 3, 12), (3, 3)]:
        out = run(models, emulated, prompt(rows, 20), "coupled", Drafts(*shape))
        per_round.append(out.speculation.tokens_per_round)
        # of 19 tokens after the first, each is the draft's winner, a runner-up or none, where there was a draw
        ranks = out.speculation.ranks
        assert ranks.shape == (3, 1 + (shape[1] if len(shape) > 1 else 1)) and bool((ranks[0] > 0).all())
        assert int(ranks[:, :-1].sum()) >= int(out.speculation.accepted.sum()) > 0
    assert per_round == sorted(per_round) and per_round[-1] > 1.2 * per_round[0]


@in_place
def test_a_draft_that_fails_is_cleaned_away(kind, monkeypatch):
    """What is NaN at a draft is NaN at the slots that see it; the caches are told to remove it."""
    _, (base, tuned, ref) = tables(9)
    base = base.clone()
    base[:, 3] = math.nan
    models = [InPlace(t, torch.full((12,), 12)) for t in (base, tuned, ref)]
    start = Prompt(torch.tensor([[4, 2]]).expand(12, -1), torch.zeros(12, dtype=torch.int64), 11)
    speculative(
        models, Target(eft.upscale(), eft.row_seeds(2, 12)), start, draft=1, drafts=Drafts(2, 2), method="coupled"
    )
    assert all(getattr(model, "cleaned", False) for model in models)


@pytest.mark.parametrize("kind", ["moving"], indirect=True)
def test_a_tree_needs_models_that_take_one(kind):
    with pytest.raises(ValueError, match="drafts: got a tree"):
        run(tables()[1], Target(eft.upscale(), torch.tensor([1])), prompt(1, 5), "coupled", Drafts(2, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_is_the_row_in_a_batch(method):
    target, (base, tuned, ref) = tables(14, scale=1.0)
    models, rows = [base, 0.3 * target, base - 0.7 * target], 9  # drafts are often accepted
    start, seeds = prompt(rows, 10), eft.row_seeds(4, rows)
    batch = run(models, Target(eft.upscale(), seeds), start, method, 4)
    assert len({(int(r), int(d)) for r, d in zip(batch.speculation.rounds, batch.speculation.drafted)}) > 2
    for b in range(rows):
        one = Prompt(start.ids[b : b + 1], start.left[b : b + 1], 10)
        alone = run(models, Target(eft.upscale(), seeds[b : b + 1]), one, method, 4)
        assert torch.equal(alone.sequences[0], batch.sequences[b])
        for name in ("rounds", "drafted", "accepted", "emitted"):
            assert getattr(alone.speculation, name)[0] == getattr(batch.speculation, name)[b], name


def test_greedy_is_the_limit_of_all_methods():
    _, models = tables(4)
    target = Target(eft.upscale(), torch.arange(5), dict(temperature=0.0))
    want = run(models, target, prompt(5, 9), "plain", 0)
    for method in METHODS:
        for k in (1, 4):
            assert torch.equal(run(models, target, prompt(5, 9), method, k).sequences, want.sequences)


@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_draft_is_accepted(method):
    target, _ = tables(5)
    models = [torch.zeros_like(target), target, torch.zeros_like(target)]
    start = prompt(6, 17)
    out = run(models, Target(eft.upscale(), torch.arange(6)), start, method, 3)
    # 4 tokens a round, and in the last round of 17 the one that is left
    assert out.speculation.rounds.tolist() == [5] * 6 and out.speculation.drafted.tolist() == [12] * 6
    assert out.speculation.acceptance == 1.0 and out.speculation.emitted.tolist() == [17] * 6
    assert out.speculation.tokens_per_round == pytest.approx(17 / 5)


def test_block_accepts_at_least_as_much_as_token():
    target, _ = tables(6, scale=1.0)
    other, _ = tables(7, scale=0.5)
    models = [target - other, target, target - 2 * other]  # target + other, drafted from target
    accepted = {}
    for method in ("token", "block"):
        out = run(models, Target(eft.upscale(), eft.row_seeds(1, 3000)), prompt(3000, 9), method, 4)
        accepted[method] = float(out.speculation.emitted.sum() / out.speculation.rounds.sum())
    assert 1.5 < accepted["token"] < accepted["block"] < 5


def test_one_forward_per_model_and_round():
    _, models = tables(8)
    models = [Table(t, torch.tensor([13])) for t in models]
    start = Prompt(torch.tensor([[4, 2]]), torch.tensor([0]), 12)
    out = speculative(
        models, Target(eft.upscale(), torch.tensor([5])), start, draft=1, drafts=Drafts(3), method="token"
    )
    rounds = int(out.speculation.rounds[0])
    assert len(models[0].calls) == len(models[2].calls) == rounds
    assert models[0].calls[:2] == [2, 1 + 3] and models[1].calls[:5] == [2, 1, 1, 1, 1]


def test_a_row_that_becomes_invalid_ends_alone():
    target, (base, tuned, ref) = tables(9)
    base = base.clone()
    base[:, 3] = math.nan  # whatever follows token 3
    rows, seeds = 12, eft.row_seeds(2, 12)
    clean = run([base.nan_to_num(0), tuned, ref], Target(eft.upscale(), seeds), prompt(rows, 8), "plain", 0)
    want = run([base, tuned, ref], Target(eft.upscale(), seeds), prompt(rows, 8), "plain", 0)
    assert 0 < len(want.failed) < rows
    for b in range(rows):
        text = clean.sequences[b, 5:].tolist()
        step = text.index(3) + 1 if 3 in text[:-1] else None
        assert want.failed.get(b) == step
        assert want.sequences[b, 5:].tolist() == (text if step is None else text[:step] + [0] * (8 - step))
    for k in (1, 2, 5):
        got = run([base, tuned, ref], Target(eft.upscale(), seeds), prompt(rows, 8), "coupled", k)
        assert torch.equal(got.sequences, want.sequences) and got.failed == want.failed
        for method in ("token", "block"):
            got = run([base, tuned, ref], Target(eft.upscale(), seeds), prompt(rows, 8), method, k)
            for b in range(rows):
                text = got.sequences[b, 5:].tolist()
                assert got.failed.get(b) == (text.index(3) + 1 if 3 in text[:-1] else None)
    tuned = tuned.clone()
    tuned[:, 3] = math.inf  # the drafting model fails
    got = run([base, tuned, ref], Target(eft.upscale(), seeds), prompt(rows, 8), "token", 3)
    assert got.failed and all(got.sequences[b, 4 + n] == 3 for b, n in got.failed.items())


@pytest.mark.parametrize("method", ["plain", *METHODS])
def test_processors_and_criteria_see_each_token_with_its_own_prefix(method):
    _, models = tables(10)
    rows = 7

    def process(ids, scores):  # the sum of the prefix is forbidden as the next token
        left = start.left
        total = torch.stack([row[n:].sum() for row, n in zip(ids, left)]) % V
        assert ids.shape == (rows, 5 + n_new(ids))
        return scores.scatter(1, total[:, None], -math.inf)

    def n_new(ids):
        return ids.shape[1] - 5

    def total(b, new):
        return (5 * (3 - int(start.left[b])) + 4 + 2 + sum(new)) % V

    def criteria(ids, scores):
        assert scores is None or len(scores) == n_new(ids)
        return (ids[:, 5:] == 4).sum(1) >= 2

    start = prompt(rows, 9, criteria=criteria, eos=[1])
    target = Target(
        eft.upscale(),
        eft.row_seeds(3, rows),
        dict(temperature=1.1),
        process=process,
        keep_logits=True,
        keep_scores=True,
    )
    plain_out = run(models, target, start, "plain", 0)
    for k in (1, 3):
        out = plain_out if method == "plain" else run(models, target, start, method, k)
        if method == "coupled":
            assert torch.equal(out.sequences, plain_out.sequences)
            for a, b in zip(out.scores + out.logits, plain_out.scores + plain_out.logits):
                assert torch.equal(a, b)
        assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - 5
        for b in range(rows):
            text, n = out.sequences[b, 5:].tolist(), int(out.lengths[b])
            ends = [i + 1 for i in range(n) if text[i] == 1 or text[: i + 1].count(4) == 2 or i + 1 == 9]
            assert ends == [n] and text[n:] == [0] * (len(text) - n)
            for i in range(len(text)):
                if i < n:
                    assert text[i] != total(b, text[:i])
                    assert out.scores[i][b, text[i]] > -math.inf
                    assert out.scores[i][b, total(b, text[:i])] == -math.inf
                    assert bool(torch.isfinite(out.logits[i][b]).all()) and bool((out.logits[i][b] != 0).any())
                else:
                    assert out.logits[i][b].tolist() == [0] * V
                    assert out.scores[i][b].tolist() == [0] + [-math.inf] * (V - 1)


def test_scores_are_the_combination():
    g = torch.Generator().manual_seed(1)
    z = [torch.randn(4, V, generator=g) for _ in range(3)]
    w = torch.randn(4, 3, generator=g)
    z[1][0, 2] = -math.inf
    w[1, 2] = 0
    z[2][1] = math.nan  # weight 0: not read
    want = sum(torch.where(w[:, j : j + 1] == 0, 0, w[:, j : j + 1] * z[j]) for j in range(3))
    want[0, 2] = -math.inf
    torch.testing.assert_close(Target(eft.weights(w), torch.arange(4)).scores(z), want, atol=1e-5, rtol=1e-5)
    filters = dict(temperature=torch.tensor([0.0, 0.5, 1.0, 2.0]), top_k=3)
    scores = Target(eft.weights([1.0]), None, filters).filtered(z[0])
    assert torch.equal(scores[0], z[0][0])
    for b, t in ((1, 0.5), (2, 1.0), (3, 2.0)):
        top = z[0][b].topk(3).indices
        torch.testing.assert_close(scores[b, top], z[0][b, top] / t)
        assert int((scores[b] > -math.inf).sum()) == 3


def test_rollback_keeps_every_rows_text():
    g = torch.Generator().manual_seed(0)
    for rows in (1, 5):
        left = torch.arange(rows) % 3
        texts = [[100 * b + i for i in range(6 - int(left[b]))] for b in range(rows)]  # cached tokens, all distinct
        models = [Table(None), Table(None)]
        columns = Columns(left, torch.full((rows,), 10**6))
        columns.width = 6
        for m in models:
            m.cache = torch.tensor([[-1] * (6 - len(t)) + t for t in texts])
        ended = [False] * rows
        for step in range(40):
            count = int(torch.randint(1, 5, (), generator=g))
            new = torch.arange(count) + 1000 * (step + 1) + 100000 * torch.arange(rows)[:, None]
            for m in models:
                m.cache = torch.cat([m.cache, new], 1)
            columns.width += count
            kept = [0 if e else int(torch.randint(1, count + 1, (), generator=g)) for e in ended]
            columns.rollback(models, count, kept, ended)
            for b in range(rows):
                texts[b] += new[b, : kept[b]].tolist()
            live = [b for b in range(rows) if not ended[b]]
            for m in models:
                assert m.cache.shape[1] == columns.width
                for b in live:
                    assert m.cache[b, int(columns.left[b]) :].tolist() == texts[b]
            assert columns.left.tolist() == columns.left_host
            if columns.left_host != left.tolist() and rows > 1:
                assert columns.width >= max(len(texts[b]) for b in live)
            mask, positions = columns.inputs(2)
            for b in live:
                assert positions[b].tolist() == [len(texts[b]), len(texts[b]) + 1]
                assert mask is None or int(mask[b].sum()) == len(texts[b]) + 2
            if step == 20 and rows > 1:
                ended[2] = True
        assert rows == 1 or columns.width == max(len(texts[b]) for b in live)


def test_text_ends_where_it_should():
    text = Text(Prompt(torch.tensor([[9], [9], [9], [9]]), torch.zeros(4, dtype=torch.int64), 3, eos=[7, 8], pad=5), 4)
    tokens = torch.tensor([[1, 7, 1, 1], [1, 1, 1, 1], [8, 8, 8, 8], [1, 2, -1, -1]])
    valid = torch.tensor([True, True, True, False])
    kept = text.append(tokens, torch.tensor([4, 4, 1, 2]), valid)
    assert kept.tolist() == [2, 3, 1, 2] and text.ended.all()
    assert text.failed.tolist() == [-1, -1, -1, 2]  # the last row was invalid at its third token
    assert text.prefix(3).tolist() == [[9, 1, 7, 5], [9, 1, 1, 1], [9, 8, 5, 5], [9, 1, 2, 5]]
    assert text.append(tokens, torch.tensor([4, 4, 1, 2]), valid).tolist() == [0] * 4
    assert text.prefix(3)[1].tolist() == [9, 1, 1, 1] and text.failed.tolist() == [-1, -1, -1, 2]


def test_decoding_needs_torch_alone():
    code = "import sys, eft_kernels, eft_kernels.decoding; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
