"""Keys and values of texts that never move: a pass writes its own columns and copies nothing else.

Row b's text lies in columns ``left[b]`` to ``end[b] - 1`` of every layer, its nodes (`eft_kernels.decoding.NodeModel`)
after it. Rows end in different columns, so what a node may attend to is given to the model as a 4D mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ...decoding import take_columns

GROWTH = 256  # columns, at least, that a layer is made larger by


class Place:
    """Where the next pass writes, for all layers of a cache."""

    def __init__(self) -> None:
        self.start: int | None = None  # its first column (None: after those that a layer has)
        self.columns: torch.Tensor | None = None  # int64 [B, n] where rows differ
        self.stop = 0  # columns after the pass, where rows differ


class TextLayer(DynamicLayer):
    """Keys and values [B, heads, columns, dim] at the front of larger buffers."""

    def __init__(self, place: Place):
        self.place, self.width = place, 0
        self.buffers: list[torch.Tensor] = []  # keys, values
        super().__init__()  # type: ignore[no-untyped-call]

    # what transformers reads and writes as a layer's tensors

    def _get(self, i: int) -> torch.Tensor | None:
        return self.buffers[i][:, :, : self.width] if self.buffers else None

    def _replace(self, i: int, states: torch.Tensor | None) -> None:
        if states is None:
            self.buffers, self.width = [], 0
        else:
            self.buffers[i] = states

    keys = property(lambda self: self._get(0), lambda self, states: self._replace(0, states))
    values = property(lambda self: self._get(1), lambda self, states: self._replace(1, states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, heads, n, dim] of n new tokens; keys and values of all columns."""
        place, new = self.place, (key_states, value_states)
        if not self.buffers:
            self.buffers = [x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in new]
            self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True
        start = self.width if place.start is None else place.start
        stop = start + key_states.shape[2] if place.columns is None else place.stop
        if self.buffers[0].shape[2] < stop:
            # zeros, for what was never written is attended to with weight 0
            capacity = stop + max(GROWTH, self.width // 4)
            larger = [x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in self.buffers]
            for x, old in zip(larger, self.buffers):
                x[:, :, : self.width] = old[:, :, : self.width]
            self.buffers = larger
        for buffer, x in zip(self.buffers, new):
            if place.columns is None:
                buffer[:, :, start:stop] = x
            else:
                write(buffer, place.columns, x)
        self.width = stop
        return self.buffers[0][:, :, :stop], self.buffers[1][:, :, :stop]

    def get_seq_length(self) -> int:
        return self.width

    def reset(self) -> None:
        self.buffers, self.width, self.is_initialized = [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        self.width -= abs(tokens_to_remove)  # transformers gives it as a negative number

    def realign(self, columns: torch.Tensor) -> None:
        """Row b's column s becomes what its column columns[b, s] is; int64 [B, S]."""
        self.width = columns.shape[1]
        for buffer in self.buffers:
            buffer[:, :, : self.width] = take_columns(buffer, columns)

    def move(self, columns: torch.Tensor, to: torch.Tensor) -> None:
        """Row b's column to[b, i] becomes what its column columns[b, i] is; int64 [B, n] each."""
        for buffer in self.buffers:
            write(buffer, to, take_columns(buffer, columns))

    def clean(self, ends: torch.Tensor) -> None:
        """Zeros from column ends[b] on."""
        for buffer in self.buffers:
            after = (
                torch.arange(buffer.shape[2], device=buffer.device) >= ends.to(buffer.device)[:, None]
            )  # [B, columns]
            buffer.masked_fill_(after[:, None, :, None], 0)


def write(buffer: torch.Tensor, columns: torch.Tensor, new: torch.Tensor) -> None:
    """Puts new [B, heads, n, dim] into the columns [B, n] of a buffer [B, heads, columns, dim], on whatever device."""
    columns = columns.to(buffer.device)
    rows = torch.arange(len(columns), device=buffer.device)[:, None]
    buffer.transpose(1, 2)[rows, columns] = new.transpose(1, 2)


Masks = torch.Tensor | dict[str, torch.Tensor | None] | None


class Texts:
    """Where the texts of a batch end, and what its nodes may attend to.

    Args:
      layers: those of the cache, after the pass over the prompts.
      place: theirs.
      left: int64 [B], columns of padding before each prompt.
      windows: by the name that the model's forward has for a mask, how many positions back it reaches (None: to the
        text's start). The name "" is the only mask of a model that takes one.
      dtype: of masks: that of the model, or bool.
    """

    def __init__(
        self,
        layers: list[TextLayer],
        place: Place,
        left: torch.Tensor,
        windows: dict[str, int | None],
        dtype: torch.dtype,
    ):
        self.layers, self.place, self.left, self.windows, self.dtype = layers, place, left, windows, dtype
        self.ends = [layers[0].width] * len(left)  # by row, one column after its text
        self.end = torch.full_like(left, layers[0].width)  # int64 [B], the same
        self.padded = bool((left > 0).any())
        self.pending = 0  # nodes read in this round
        self.depths = left.new_zeros(len(left), 0)  # int64 [B, pending], where there are windows
        self.off: float = False if dtype is torch.bool else torch.finfo(dtype).min
        self.on: float = True if dtype is torch.bool else 0.0
        # what the i-th node of a pass attends to: [B, 1, n, columns], the text, and this round's nodes when they come
        self.mask = torch.zeros(len(left), 1, 0, 0, dtype=dtype, device=left.device)

    @property
    def uniform(self) -> bool:
        """All texts end in one column."""
        return min(self.ends) == max(self.ends)

    def nodes(self, depth: torch.Tensor, sees: torch.Tensor) -> tuple[torch.Tensor, Masks]:
        """Of n further nodes: position_ids [B, n], and their mask or masks [B, 1, n, columns] (None: all of it).

        The next pass writes their columns. depth: int64 [B, n]; sees: bool [n, m] on the CPU, see `NodeModel`.
        """
        count, start = depth.shape[1], self.pending
        self.pending += count
        stop = max(self.ends) + self.pending
        if self.uniform:
            self.place.start, self.place.columns = self.ends[0] + start, None
        else:
            new = torch.arange(start, self.pending, device=depth.device)
            self.place.columns, self.place.stop = self.end[:, None] + new, stop
        positions = (self.end - self.left)[:, None] + depth
        windowed = any(self.windows.values())
        if windowed:
            self.depths = torch.cat([self.depths, depth], 1)
        if self.uniform and not self.padded and count == 1 and not windowed and bool(sees.all()):
            return positions, None
        self._reserve(count, stop)
        self._mark(
            count, torch.where(sees.to(depth.device), self.on, self.off).to(self.dtype).expand(len(depth), -1, -1)
        )
        full = self.mask[:, :, :count, :stop]
        if not windowed:
            return positions, full if "" in self.windows else dict.fromkeys(self.windows, full)
        back = positions[:, :, None] - self._positions(stop)[:, None]  # [B, n, columns]
        masks: dict[str, torch.Tensor | None] = {
            name: full if window is None else full.masked_fill((back >= window)[:, None], self.off)
            for name, window in self.windows.items()
        }
        return positions, masks[""] if "" in masks else masks

    def accept(self, path: torch.Tensor | None, kept: list[int]) -> None:
        """The nodes path[b, :kept[b]] (None: the first) are part of row b's text from now on, the others forgotten."""
        count, device = self.pending, self.left.device
        keeps = torch.tensor(kept, device=device)[:, None]
        if path is not None:
            order = torch.arange(path.shape[1], device=device)
            source = torch.where(order < keeps, path.to(device), order)
            if device.type != "cpu" or bool((source != order).any()):
                for layer in self.layers:
                    layer.move(self.end[:, None] + source, self.end[:, None] + order)
        if self.mask.shape[3] >= max(self.ends) + count:
            marks = torch.where(torch.arange(count, device=device) < keeps, self.on, self.off).to(self.dtype)  # [B, m]
            self._mark(self.mask.shape[2], marks[:, None].expand(-1, self.mask.shape[2], -1))
        else:
            self.mask = self.mask[:, :, :0]  # made anew when it is needed
        self.ends = [end + n for end, n in zip(self.ends, kept)]
        self.end = self.end + keeps[:, 0]
        self.pending, self.depths = 0, self.depths[:, :0]
        for layer in self.layers:
            layer.width = max(self.ends)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what was row ``rows[i]``, between rounds; the layers are not touched."""
        self.left, self.end = self.left[rows], self.end[rows]
        self.ends = [self.ends[i] for i in rows.tolist()]
        self.padded = bool((self.left > 0).any())
        for layer in self.layers:
            layer.width = max(self.ends)
        self.depths, self.mask = self.depths[rows], self.mask[rows, :, :0]  # made anew when it is needed

    def clean(self) -> None:
        """Zeros after the texts."""
        for layer in self.layers:
            layer.clean(self.end)

    def _reserve(self, count: int, stop: int) -> None:
        """Makes room in the mask for passes of ``count`` nodes up to column ``stop``."""
        if self.mask.shape[2] >= count and self.mask.shape[3] >= stop:
            return
        columns = torch.arange(stop + max(GROWTH, stop // 4), device=self.left.device)
        text = (columns >= self.left[:, None]) & (columns < self.end[:, None])  # [B, columns]
        marks = torch.where(text, self.on, self.off).to(self.dtype)
        self.mask = marks[:, None, None].repeat(1, 1, max(count, self.mask.shape[2]), 1)

    def _mark(self, count: int, marks: torch.Tensor) -> None:
        """Sets what the first ``count`` nodes of a pass attend to of the columns after each text; [B, count, m]."""
        if self.uniform:
            self.mask[:, 0, :count, self.ends[0] : self.ends[0] + marks.shape[2]] = marks
        else:
            columns = self.end[:, None] + torch.arange(marks.shape[2], device=self.end.device)  # [B, m]
            self.mask[:, 0, :count].scatter_(2, columns[:, None].expand(-1, count, -1), marks)

    def _positions(self, stop: int) -> torch.Tensor:
        """Of what lies in each column, texts and nodes, int64 [B, stop]."""
        positions = torch.arange(stop, device=self.left.device) - self.left[:, None]
        columns = self.end[:, None] + torch.arange(self.pending, device=self.left.device)
        return positions.scatter(1, columns, (self.end - self.left)[:, None] + self.depths)
