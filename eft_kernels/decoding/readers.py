"""A model as rounds of speculation read it: each row's text and, after it, the round's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .columns import Columns, Model, OwnPrompt
from .text import Prompt
from .trees import Tree


class Reader(Protocol):
    """One of the J models, with the prompt that it begins with."""

    model: Any
    in_step: bool  # all rows must keep as many nodes
    trees: bool  # nodes may be a tree, not only a chain

    def begin(self) -> torch.Tensor:
        """Reads the prompt; logits [B, 1, V] after it."""

    def read(self, ids: torch.Tensor, tree: Tree, slots: range, remaining: torch.Tensor) -> torch.Tensor:
        """Logits [B, n, V] of nodes ids [B, n], the ``slots`` of a tree of which those before were read.

        remaining: int64 [B], tokens that may still follow each row's text, 0 or more: no position lies beyond them.
        """

    def accept(self, path: torch.Tensor | None, kept: list[int], ended: list[bool]) -> None:
        """Ends the round: row b keeps the nodes path[b, :kept[b]] (None: its first); rows that ended do not matter."""

    def clean(self) -> None:
        """Removes NaN that forgotten nodes may have left."""

    def room(self) -> int | None:
        """How many nodes a round may have (None: any number)."""

    def take_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what was row ``rows[i]``; int64, for models that `can_shrink` alone."""


class Batch:
    """The rows that models still read: rows that ended are left out once that halves the batch."""

    def __init__(self, models: Sequence[Model], rows: int, device: torch.device):
        self.held, self.device = list(range(rows)), device
        self.whole, self.fixed = True, not all(getattr(model, "can_take_rows", False) for model in models)
        self.index = self.place = torch.arange(rows, device=device)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Of x [B, ...] the rows that are read."""
        return x if self.whole else x[self.index]

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """x of the rows that are read as [B, ...]; rows that ended have what some other row has."""
        return x if self.whole else x[self.place]

    def shrink(self, ended: list[bool]) -> torch.Tensor | None:
        """Leaves out rows that ended: which of those held stay, int64, or None where all do."""
        stay = [i for i, b in enumerate(self.held) if not ended[b]]
        if self.fixed or 2 * len(stay) > len(self.held):
            return None
        self.held, self.whole = [self.held[i] for i in stay], False
        self.index = torch.tensor(self.held, device=self.device)
        self.place = torch.zeros(len(ended), dtype=torch.int64, device=self.device)
        self.place[self.index] = torch.arange(len(stay), device=self.device)
        return torch.tensor(stay, device=self.device)


def layout(prompt: Prompt) -> tuple[Columns, torch.Tensor]:
    """The layout of the caches, without columns that are padding in every row, and the prompts to begin with."""
    longest = prompt.ids.shape[1] - prompt.left + prompt.max_new_tokens
    spare = int(prompt.left.min())
    return Columns(prompt.left - spare, longest - 1), prompt.readable()[:, spare:]


def reader_of(model: Model, prompt: Prompt) -> Reader:
    if isinstance(model, OwnPrompt):
        columns, ids, model = model.columns, model.ids, model.model
    else:
        columns, ids = layout(prompt)
    kind = InPlace if getattr(model, "reads_nodes", False) else Moving
    return kind(model, columns, ids)


class InPlace:
    """A `NodeModel`: nothing moves but the nodes of a tree that are kept."""

    in_step, trees = False, True

    def __init__(self, model: Any, columns: Columns, ids: torch.Tensor):
        self.model, self.columns, self.ids = model, columns, ids

    def begin(self) -> torch.Tensor:
        logits: torch.Tensor = self.model(self.ids, *self.columns.inputs(self.ids.shape[1]), 1)
        return logits

    def read(self, ids: torch.Tensor, tree: Tree, slots: range, remaining: torch.Tensor) -> torch.Tensor:
        depth = torch.tensor(tree.depths[slots.start : slots.stop], device=ids.device)
        sees = tree.ancestors[slots.start : slots.stop, : slots.stop]
        logits: torch.Tensor = self.model.nodes(ids, torch.minimum(depth, remaining[:, None]), sees, len(slots))
        return logits

    def accept(self, path: torch.Tensor | None, kept: list[int], ended: list[bool]) -> None:
        self.model.accept(path, kept)

    def clean(self) -> None:
        self.model.clean()

    def room(self) -> None:
        return None

    def take_rows(self, rows: torch.Tensor) -> None:
        self.model.take_rows(rows)


class Moving:
    """Any other `Model`: rows move until their texts end in one column, and nodes are a chain."""

    trees = False

    def __init__(self, model: Model, columns: Columns, ids: torch.Tensor):
        self.model, self.columns, self.ids = model, columns, ids
        self.in_step = not getattr(model, "can_realign", True)
        self.boundary: int | None = getattr(model, "boundary", None)
        self.pending = 0  # nodes of this round

    def _append(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        logits = self.model(ids, *self.columns.inputs(ids.shape[1]), keep)
        self.columns.width += ids.shape[1]
        return logits

    def begin(self) -> torch.Tensor:
        return self._append(self.ids, 1)

    def read(self, ids: torch.Tensor, tree: Tree, slots: range, remaining: torch.Tensor) -> torch.Tensor:
        self.pending += len(slots)
        return self._append(ids, len(slots))

    def accept(self, path: torch.Tensor | None, kept: list[int], ended: list[bool]) -> None:
        if hasattr(self.model, "keep_tokens"):
            self.model.keep_tokens(self.pending, [self.pending if over else k for k, over in zip(kept, ended)])
        self.columns.rollback([self.model], self.pending, kept, ended)
        self.pending = 0

    def clean(self) -> None:
        """Columns that were forgotten are gone."""

    def room(self) -> int | None:
        width = self.columns.width
        return self.boundary - width if self.boundary is not None and self.boundary > width else None

    def take_rows(self, rows: torch.Tensor) -> None:
        model: Any = self.model
        model.take_rows(rows)
        self.columns.take_rows(rows)
