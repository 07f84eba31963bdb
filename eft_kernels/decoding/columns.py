"""Where each row's tokens lie in the models' caches, and how rejected drafts leave them again.

All models share one layout: a plain left-padded batch. Row b's text fills columns ``left[b] .. width - 1``, so every
model family sees what it was trained on: a 2D mask and consecutive positions, whatever its attention does with them.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Model(Protocol):
    """A language model and its own cache of columns. Optional attributes:

    can_realign: False where positions come from the column, so that rows must stay in step (default True).
    boundary: a pass that begins with at most so many columns may not end with more (default None).
    """

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor,
                 keep: int) -> torch.Tensor:
        """Appends ids [B, n] to the cache; logits [B, keep, V] of the last ``keep`` columns.

        attention_mask: int64 [B, cached + n], 0 on left padding (None: no padding); position_ids: int64 [B, n].
        """

    def crop(self, count: int) -> None:
        """Forgets the last ``count`` columns."""

    def realign(self, columns: torch.Tensor) -> None:
        """Cache column s of row b becomes what was column ``columns[b, s]``; columns int64 [B, S]."""


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

    def rollback(self, models: list[Model], count: int, kept: list[int], ended: list[bool]) -> None:
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
