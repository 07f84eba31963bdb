"""The drafts of a round as a tree: a node's children are the first tokens of one draw."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice

import torch


@dataclass(frozen=True)
class Tree:
    """Draft i, in slot i + 1, follows slot ``parents[i]``; slot 0 is the newest token of the text.

    Slots go level by level, those of one level in the order of their parents. The children of a slot are the winner of
    its draw and the runners-up, in this order.
    """

    parents: tuple[int, ...]

    def __len__(self) -> int:
        """Drafts, one less than slots."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each slot: how many drafts lead to it."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of each slot: its place among the children of its parent (slot 0: 0)."""
        seen = [0] * (len(self) + 1)
        ranks = [0]
        for parent in self.parents:
            ranks.append(seen[parent])
            seen[parent] += 1
        return tuple(ranks)

    @cached_property
    def levels(self) -> tuple[range, ...]:
        """The slots of each depth."""
        starts = [i for i, depth in enumerate(self.depths) if i == 0 or depth > self.depths[i - 1]]
        return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], len(self) + 1]))

    @property
    def is_chain(self) -> bool:
        return len(self.levels) == len(self) + 1

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """bool [N + 1, N + 1]: the slots on the way to each slot, and itself."""
        sees = torch.eye(len(self) + 1, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            sees[i + 1] |= sees[parent]
        return sees

    @cached_property
    def drafts(self) -> torch.Tensor:
        """int64 [N + 1, K]: the drafts that lead to each slot, by their index; 0 after the last."""
        found = torch.zeros(len(self) + 1, len(self.levels) - 1, dtype=torch.int64)
        for i, parent in enumerate(self.parents):
            depth = self.depths[parent]
            found[i + 1, :depth] = found[parent, :depth]
            found[i + 1, depth] = i
        return found

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [K + 1, W]: the slots of each depth, -1 after the last."""
        widest = max(map(len, self.levels))
        return torch.tensor([[*level, *[-1] * (widest - len(level))] for level in self.levels])

    def cut(self, depth: int) -> Tree:
        """Without what lies deeper."""
        return self if depth >= len(self.levels) - 1 else Tree(self.parents[: self.levels[depth].stop - 1])


@lru_cache(64)
def chain(length: int) -> Tree:
    return Tree(tuple(range(length)))


def size(depth: int, width: int, most: int) -> int:
    """Drafts of a tree whose slots have ``width`` children each, ``depth`` levels of them; no more than most + 1."""
    drafts, level = 0, 1
    for _ in range(depth if width > 1 else 0):
        level *= width
        drafts += level
        if drafts > most:
            return most + 1
    return drafts if width > 1 else min(depth, most + 1)


def likeliest(depth: int, width: int, chances: Sequence[Sequence[float]]) -> Iterator[tuple[tuple[int, ...], float]]:
    """The nodes of a tree by how likely they are accepted, likeliest first: (ranks on the way to it, how likely).

    chances[d][r]: how likely the target's token is the draw's r-th at a slot of depth d (r = 0 is the winner),
    independent of what lies elsewhere, and not rising with r. A draft is accepted if all on its way are.
    """
    found: list[tuple[float, tuple[int, ...]]] = [(-chances[0][0], (0,))] if depth else []  # a heap
    while found:
        likely, node = heapq.heappop(found)
        yield node, -likely
        level, rank = len(node), node[-1]
        if rank + 1 < width:
            sibling = likely / max(chances[level - 1][rank], 1e-30) * chances[level - 1][rank + 1]
            heapq.heappush(found, (sibling, (*node[:-1], rank + 1)))
        if level < depth:
            heapq.heappush(found, (likely * chances[level][0], (*node, 0)))


def best(depth: int, width: int, budget: int, chances: Sequence[Sequence[float]]) -> Tree:
    """The tree of at most ``budget`` drafts with the most expected accepted ones."""
    chosen = [node for node, _ in islice(likeliest(depth, width, chances), budget)]
    chosen.sort(key=lambda node: (len(node), node))
    slot = {(): 0, **{node: i + 1 for i, node in enumerate(chosen)}}
    return Tree(tuple(slot[node[:-1]] for node in chosen))
