"""Which drafts a round has: trees, what was accepted, times of passes, and what follows from them."""

import itertools

import pytest
import torch

from eft_kernels.decoding import Auto, Drafts, Tree
from eft_kernels.decoding.drafts import Ranks
from eft_kernels.decoding.times import Times
from eft_kernels.decoding.trees import best, chain, size


def all_nodes(depth, width):
    return [n for d in range(1, depth + 1) for n in itertools.product(range(width), repeat=d)]


def likely(node, chances):
    p = 1.0
    for depth, rank in enumerate(node):
        p *= chances[depth][rank]
    return p


def expected(tree, chances):
    """Accepted drafts a round by these chances."""
    chance = [1.0]
    for parent, rank in zip(tree.parents, tree.ranks[1:]):
        chance.append(chance[parent] * chances[tree.depths[parent]][rank])
    return sum(chance[1:])


def test_a_trees_slots():
    tree = Tree((0, 0, 1, 1, 2, 3))  # slots 1, 2 follow the text; 3, 4 slot 1; 5 slot 2; 6 slot 3
    assert len(tree) == 6 and tree.depths == (0, 1, 1, 2, 2, 2, 3) and tree.ranks == (0, 0, 1, 0, 1, 0, 0)
    assert [list(level) for level in tree.levels] == [[0], [1, 2], [3, 4, 5], [6]]
    assert not tree.is_chain
    assert tree.ancestors[6].tolist() == [True, True, False, True, False, False, True]
    assert tree.drafts[6].tolist() == [0, 2, 5] and tree.drafts[5].tolist() == [1, 4, 0]
    assert tree.slots.tolist() == [[0, -1, -1], [1, 2, -1], [3, 4, 5], [6, -1, -1]]
    assert tree.cut(1) == Tree((0, 0)) and tree.cut(0) == chain(0) and tree.cut(9) is tree
    assert chain(3).is_chain and chain(0).is_chain and chain(3).parents == (0, 1, 2)


@pytest.mark.parametrize("depth, width", [(1, 4), (3, 2), (3, 3), (4, 2)])
def test_the_best_tree_is_the_best_of_all(depth, width):
    """Of every size: made of the likeliest nodes, whose sum no other tree of the size exceeds."""
    g = torch.Generator().manual_seed(depth * width)
    for _ in range(5):
        chances = (torch.rand(depth, width, generator=g).sort(1, descending=True).values / width).tolist()
        order = sorted((likely(n, chances) for n in all_nodes(depth, width)), reverse=True)
        for budget in (1, 2, 3, 5, 8, size(depth, width, 99999)):
            tree = best(depth, width, budget, chances)
            count = min(budget, size(depth, width, 99999))
            assert len(tree) == count and tree.parents == tuple(sorted(tree.parents)) and max(tree.ranks) < width
            assert expected(tree, chances) == pytest.approx(sum(order[:count]))
    assert size(4, 2, 999) == 30 and size(8, 3, 9999) == 9840 and size(5, 1, 9) == 5
    assert size(10**9, 2, 100) == size(10**9, 1, 100) == 101
    assert len(best(0, width, 5, chances)) == 0


def test_ranks():
    ranks = Ranks(2, 2, torch.device("cpu"))
    before = ranks.chances()
    assert before[0] == before[1] and before[0][0] > before[0][1] > 0
    drawn = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 6]])
    for _ in range(500):
        seen = torch.tensor([True, True, True, False])
        ranks.add(0, drawn, torch.tensor([5, 6, 7, 5]), seen)
    assert ranks.counts.tolist() == [[500, 500, 500], [0, 0, 0]]
    first, second = ranks.chances()
    assert first == pytest.approx([1 / 3, 1 / 3], abs=0.01)
    assert second == pytest.approx([1 / 3, 1 / 3], abs=0.01)  # where nothing was seen, what was seen elsewhere
    again = Ranks(2, 2, torch.device("cpu"), ranks.weighted())
    assert again.chances()[0] == pytest.approx([1 / 3, 1 / 3], abs=0.01) and again.weighted()[0].tolist() == [250.0] * 3


def test_times_between_and_beyond_those_seen():
    times = Times()
    for n, seconds in [(1, 10.0), (1, 12.0), (1, 50.0), (5, 14.0)]:
        times.add(n, seconds)
    assert times.at(1) == 12.0 and times.at(5) == 14.0  # medians
    assert times.at(3) == pytest.approx(13.0) and times.at(9) == pytest.approx(16.0)
    times.add(9, 2.0)  # a larger pass does not take less
    assert times.at(9) == 14.0 and times.at(13) == 14.0
    times.forget()
    assert sorted(times.seen) == [1]


# --- "auto" -----------------------------------------------------------------------------------------------------------


def planner(seconds, accepted, width=1, budget=32, outside=0.0, draft=1, rows_in_step=1):
    """An `Auto` that knows the times of passes seconds[j](n), and that so many of 1000 tokens were of each rank."""
    auto = Auto(width=width, budget=budget)
    auto.begin(len(seconds), draft, rows_in_step, torch.device("cpu"))
    for model, f in zip(auto.clock.of_model, seconds):
        for n in range(1, 40):
            model.add(n, f(n))
    for depth in range(auto.depth + 1):
        for _ in range(auto.PLAIN):
            auto.clock.outside.add(depth, outside)
    auto.ranks.counts += torch.tensor([*accepted, 1000 - sum(accepted)]) * 100
    return auto


def flat(t):
    return lambda n: t


def rate(tree, seconds, chances, draft=1):
    """Expected tokens a second."""
    time = sum(f(len(tree) + 1) for j, f in enumerate(seconds) if j != draft)
    return (1 + expected(tree, chances)) / (time + sum(seconds[draft](len(level)) for level in tree.levels))


@pytest.mark.parametrize("ratio", [1, 4, 10, 20])
@pytest.mark.parametrize("accepted", [(600,), (700, 120), (600, 150, 70)])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.3])
def test_auto_takes_the_fastest_shape(ratio, accepted, slope):
    width = len(accepted)
    seconds = [lambda n: ratio * (1 + slope * (n - 1)), lambda n: 1 + slope * (n - 1), lambda n: 1 + slope * (n - 1)]
    auto = planner(seconds, accepted, width)
    tree, chances = auto.tree(99), auto.ranks.chances()
    plain = rate(chain(0), seconds, chances)
    others = [best(d, width, n, chances) for d in range(1, 13) for n in range(d, 33)]
    fastest = max(rate(t, seconds, chances) for t in others)
    if fastest > auto.GAIN * plain:
        assert rate(tree, seconds, chances) == pytest.approx(fastest)
        assert auto.expected == pytest.approx(fastest / plain)
    else:
        assert len(tree) == 0 and auto.expected == 1.0


def test_auto_and_what_speculation_costs():
    seconds, accepted = [flat(10.0), flat(1.0), flat(1.0)], (700,)
    assert len(planner(seconds, accepted).tree(99)) >= 4
    assert len(planner(seconds, (20,)).tree(99)) == 0  # next to nothing is accepted
    assert len(planner([flat(1.0)] * 3, (300,)).tree(99)) == 0  # a draft costs what it saves
    assert len(planner(seconds, accepted, outside=100.0).tree(99)) > len(planner(seconds, accepted).tree(99))
    assert len(planner([lambda n: 10.0 * n, flat(1.0), flat(1.0)], accepted).tree(99)) == 0  # passes that cost by token
    assert len(planner(seconds, accepted, rows_in_step=8).tree(99)) < len(planner(seconds, accepted).tree(99))
    assert len(planner(seconds, accepted, budget=3).tree(99)) == 3
    assert len(planner(seconds, accepted).tree(2)) == 2  # no more than a row may have
    free = planner([flat(10.0), flat(1.0), flat(1.0)], accepted, draft=None)
    assert len(free.tree(99)) == free.depth  # drafts that no model draws cost nothing


def test_auto_begins_without_drafts_and_grows():
    """Rounds of twice the tokens of any so far are the largest that are tried, and times that were seen too few times
    to be sure of are forgotten after a while."""
    auto = Auto(width=1)
    auto.begin(3, 1, 1, torch.device("cpu"))
    sizes = []
    for _ in range(40):
        shape = auto.tree(99)
        sizes.append(len(shape))
        for j in range(3):
            for n in [len(level) for level in shape.levels] if j == 1 else [len(shape) + 1]:
                auto.clock.of_model[j].add(n, 10.0 if j == 0 else 1.0)
        auto.clock.outside.add(len(shape.levels) - 1, 0.1)
        for depth in range(12):
            auto.ranks.add(depth, torch.tensor([[1]]), torch.tensor([1 if _ % 5 else 0]), torch.tensor([True]))
    assert sizes[:4] == [0, 0, 0, 3] and all(b <= 2 * (max(sizes[: i + 4]) + 1) for i, b in enumerate(sizes[4:]))
    assert sizes[-1] >= 6
    auto.begin(3, 1, 1, torch.device("cpu"))
    assert len(auto.tree(99)) >= 6  # the next text begins with what is known


def test_drafts_of_a_fixed_shape():
    drafts = Drafts(2, 3)
    drafts.begin(3, 1, 1, torch.device("cpu"))
    assert len(drafts.tree(9)) == size(2, 3, 99) == 12 and len(drafts.tree(1)) == 3
    fewer = Drafts(3, 2, 5)
    fewer.begin(3, 1, 1, torch.device("cpu"))
    assert len(fewer.tree(9)) == 5 and Drafts(1, 2, 50).budget == 2


@pytest.mark.parametrize(
    "shape, message",
    [
        ((-1,), "depth: got -1, allowed is 0 to 1024"),
        ((2.5,), "depth: got 2.5"),
        ((3, 0), "width: got 0, allowed is 1 to 16"),
        ((3, 17), "width: got 17"),
        ((3, 2, 2), "budget: got 2, allowed is 3 to 1024"),
        ((8, 3), "width: got 3 with depth 8, more than 1024 drafts; give a budget"),
    ],
)
def test_drafts_that_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Drafts(*shape)


def test_auto_forgets_times_it_is_not_sure_of():
    """A pass that took long once, for another reason, is tried again."""
    auto = planner([flat(10.0), flat(1.0), flat(1.0)], (700,))
    for model in auto.clock.of_model:
        for n in range(2, 40):
            model.seen.pop(n)
        model.add(4, 1000.0)
    shapes = []
    for _ in range(80):
        shapes.append(len(auto.tree(99)))
    assert shapes[0] == 0 and shapes[-1] > 0 and shapes.index(shapes[-1]) >= auto.FORGET - 1
