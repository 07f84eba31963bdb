"""Where each row's tokens lie in the models' caches, and how rejected drafts leave them again.

All models share one layout: a plain left-padded batch. Row b's text fills columns ``left[b] .. width - 1``, so every
model family sees what it was trained on: a 2D mask and consecutive positions, whatever its attention does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Model(Protocol):
    """A language model and its own cache of columns. Optional attributes:

    can_realign: False where positions come from the column, so that rows must stay in step (default True).
    boundary: a pass that begins with at most so many columns may not end with more (default None).
    reads_nodes: it is a `NodeModel`, too (default False).
    can_take_rows: it has a method take_rows(rows), after which row i is what row rows[i] was (default False).
    keep_tokens(read, kept): called after a round, before tokens leave: of the ``read`` newest row b keeps ``kept[b]``.
    """

    def __call__(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """Appends ids [B, n] to the cache; logits [B, keep, V] of the last ``keep`` columns.

        attention_mask: int64 [B, cached + n], 0 on left padding (None: no padding); position_ids: int64 [B, n].
        """

    def crop(self, count: int) -> None:
        """Forgets the last ``count`` columns."""

    def realign(self, columns: torch.Tensor) -> None:
        """Cache column s of row b becomes what was column ``columns[b, s]``; columns int64 [B, S]."""


class NodeModel(Protocol):
    """A `Model` with reads_nodes = True: its cache holds each row's text and, after it, nodes, tokens that are tried.

    Rows keep what they like without anything else being moved, and nodes may be a tree. A call reads the prompt; of it
    all is text. Then the first node of each round is the text's newest token, and the others are drafts.
    """

    def nodes(self, ids: torch.Tensor, depth: torch.Tensor, sees: torch.Tensor, keep: int) -> torch.Tensor:
        """Reads n more nodes, after the prompt was read by a call; logits [B, keep, V] of the last ``keep``.

        ids: int64 [B, n]; depth: int64 [B, n], a node's position after the text (0: the next one), no larger than a row
        has tokens to come; sees: bool [n, m] on the CPU, which of all m nodes so far (these included) each of the n
        attends to, beside the text.
        """

    def accept(self, path: torch.Tensor | None, kept: list[int]) -> None:
        """Ends the round: the nodes path[b, :kept[b]] are row b's text now, in this order; the others are forgotten.

        path: int64 [B, P] (None: the first nodes).
        """

    def clean(self) -> None:
        """Removes what forgotten nodes left behind, which may be NaN."""


def take_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, heads, S, dim] with columns [B, S'] of every row: [B, heads, S', dim]."""
    index = columns.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)


class Columns:
    """The layout: ``width`` cached columns of which row b's first ``left[b]`` are padding."""

    def __init__(self, left: torch.Tensor, last_position: torch.Tensor):
        self.left = left  # [B]
        self.left_host = left.tolist()
        self.last_position = last_position  # [B], of the last token that a row may ever hold
        self.width = 0

    def inputs(self, count: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """attention_mask [B, width + count] (None without padding) and position_ids [B, count] of the next columns."""
        stop = self.width + count
        columns = torch.arange(stop, device=self.left.device)
        # drafts of a row past its own end count for nothing, but their positions must exist
        positions = (columns[self.width :] - self.left[:, None]).clamp(min=0).minimum(self.last_position[:, None])
        return (columns >= self.left[:, None]).long() if any(self.left_host) else None, positions

    def take_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what was row ``rows[i]``."""
        self.left, self.last_position = self.left[rows], self.last_position[rows]
        self.left_host = self.left.tolist()

    def rollback(self, models: Sequence[Model], count: int, kept: list[int], ended: list[bool]) -> None:
        """Of the ``count`` newest cached columns row b keeps the first ``kept[b]``; rows that ended do not matter.

        Rows that agree are cropped. Where they differ each row moves right until its text ends in the last column.
        """
        back = [count - k for k in kept]
        common = min(b for b, over in zip(back, ended) if not over)
        shift = [0 if over else b - common for b, over in zip(back, ended)]
        self.width -= common
        if not any(shift):
            if common:
                for model in models:
                    model.crop(common)
            return
        left = [a + b for a, b in zip(self.left_host, shift)]
        trim = min(a for a, over in zip(left, ended) if not over)  # padding that no row needs any more
        move = torch.tensor(shift, device=self.left.device)[:, None]
        columns = (torch.arange(trim, self.width, device=self.left.device) - move).clamp(min=0)
        for model in models:
            model.realign(columns)
        self.width -= trim
        self.left_host = [max(a - trim, 0) for a in left]
        self.left = torch.tensor(self.left_host, device=self.left.device)


class OwnPrompt:
    """A model that reads a prompt of its own before the text that all models share, as a `Model` of the shared layout.

    It has the same new tokens in columns of its own: every pass but the first is passed on, and rows go back and move
    by as much as in the shared layout.

    Args:
      shared: columns of the shared prompt, without those that are padding in every row.
      ids: int64 [B, P], the own prompt, 0 on its left padding; left: int64 [B], columns of it.
    """

    def __init__(self, model: Model, shared: int, ids: torch.Tensor, left: torch.Tensor, max_new_tokens: int):
        self.model, self.shared, self.max_new_tokens = model, shared, max_new_tokens
        spare = int(left.min())
        self.ids, self.left = ids[:, spare:], left - spare
        self.can_realign = getattr(model, "can_realign", True)
        self._reset()

    @property
    def can_take_rows(self) -> bool:
        return getattr(self.model, "can_take_rows", False)

    def _reset(self) -> None:
        self.width = 0  # columns of the shared layout
        self.columns = Columns(self.left, self.ids.shape[1] - self.left + self.max_new_tokens - 1)

    def __call__(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        new = ids if self.width else torch.cat([self.ids, ids[:, self.shared :]], 1)
        logits = self.model(new, *self.columns.inputs(new.shape[1]), keep)
        self.columns.width += new.shape[1]
        self.width += ids.shape[1]
        return logits

    def crop(self, count: int) -> None:
        self.width -= count
        self.model.crop(count if self.width else self.columns.width)
        if self.width:
            self.columns.width -= count
        else:
            self._reset()

    def realign(self, columns: torch.Tensor) -> None:
        raise AssertionError("rows that move have a `Reader`")

    def take_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what was row ``rows[i]``; the model has this method, too."""
        inner: Any = self.model
        inner.take_rows(rows)
        rows = rows.to(self.ids.device)
        self.ids, self.left = self.ids[rows], self.left[rows]
        self.columns.take_rows(rows)
