"""The cache of several rows: which of its slots holds which token of which row, holes included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

States = list[tuple[torch.Tensor, torch.Tensor]]


class Slots:
    """The slots of a `DynamicCache` that several rows share, each with a text of its own length.

    All rows have as many slots as the one that has committed most, so that one pass serves all. A slot where a row
    holds none of its text, for its draft was rejected there or was shorter than another's, is a hole, which no mask
    shows. When holes are many the rows are moved together, each token to the slot of its place in the text.

    A row that ends leaves the cache, so that it costs no more; `restore` brings it back.

    Args:
        cache: holds the prompts, and nothing but keys and values, in layers that keep all of them.
        padding: bool or int `(rows, cached)`, 0 where a prompt is padded; None = nowhere.

    Attributes:
        lengths: int64 `(rows,)`, tokens of each live row's text in the cache, padding included.
        rows: the numbers of the live rows, rising.
    """

    SLACK = 32
    """Holes that are never worth moving the rows together for."""

    def __init__(self, cache: Any, padding: torch.Tensor | None, rows: int) -> None:
        self._cache = cache
        count, device = cache.get_seq_length(), cache.layers[0].keys.device
        self._count = count
        self._place = torch.arange(count, device=device).expand(rows, -1).contiguous()
        self._held = torch.ones((rows, count), dtype=torch.bool, device=device)
        padding = self._held if padding is None else padding.to(device=device, dtype=torch.bool)
        self._text = padding[:, :count].clone()
        self.lengths = torch.full((rows,), count, device=device)
        self.rows = list(range(rows))
        self._ended: dict[int, States] = {}

    @property
    def visible(self) -> torch.Tensor:
        """Bool `(rows, slots)`: the slots that hold text."""
        text = self._text.new_ones(self._held.shape)
        text[:, : self._text.shape[1]] = self._text
        return self._held & text

    @property
    def places(self) -> torch.Tensor:
        """Int64 `(rows, slots)`: the place in the text of what a slot holds."""
        return self._place

    @property
    def holes(self) -> torch.Tensor:
        """Int64 `(rows,)`: slots of each row that hold nothing of it."""
        return self._count - self.lengths

    def columns(self, row: int) -> list[int]:
        """The slots of the text of live row number `row`, padding included, in the text's order."""
        columns: list[int] = self._held[row].nonzero().flatten().tolist()
        return columns

    def keep(self, width: int, paths: Sequence[Sequence[int]]) -> None:
        """Keep of the newest `width` slots those at `paths`, one rising sequence a live row; drop all others."""
        longest = max(map(len, paths))
        chosen = torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths], device=self._place.device)
        straight = all(path[-1] == len(path) - 1 for path in paths)
        if longest < width or not straight:
            self._gather(width, longest, None if straight else chosen)
        kept = torch.tensor([len(path) for path in paths], device=self._place.device)
        new = torch.arange(longest, device=self._place.device)[None]
        self._place = torch.cat([self._place, self.lengths[:, None] + new], dim=1)
        self._held = torch.cat([self._held, new < kept[:, None]], dim=1)
        self.lengths = self.lengths + kept
        self._count += longest
        if self._count > 1.25 * int(self.lengths.max()) + self.SLACK:
            self.compact()

    def _gather(self, width: int, longest: int, chosen: torch.Tensor | None) -> None:
        """Cut the newest `width` slots to `longest`, those that are `chosen` moved there first."""
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                if chosen is not None:
                    newest = states[:, :, states.shape[2] - width :]
                    newest[:, :, :longest] = _gathered(newest, chosen)
                setattr(layer, name, states[:, :, : states.shape[2] - width + longest])

    def compact(self) -> None:
        """Move every token to the slot of its place in the text."""
        longest = int(self.lengths.max())
        sources = self._sources(longest)
        for layer in self._cache.layers:
            layer.keys, layer.values = _gathered(layer.keys, sources), _gathered(layer.values, sources)
        self._count = longest
        place = torch.arange(longest, device=self._place.device)
        self._place = place.expand(len(self.rows), -1).contiguous()
        self._held = place[None] < self.lengths[:, None]

    def end(self, ended: Sequence[bool]) -> None:
        """Take rows out: one flag a live row."""
        sources = self._sources(int(self.lengths.max()))
        for i, row in enumerate(self.rows):
            if ended[i]:
                own = sources[i, : int(self.lengths[i])]
                self._ended[row] = [(layer.keys[i][:, own], layer.values[i][:, own]) for layer in self._cache.layers]
        self.rows = [row for row, over in zip(self.rows, ended, strict=True) if not over]
        staying = torch.tensor([i for i, over in enumerate(ended) if not over], device=self._place.device)
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys.index_select(0, staying), layer.values.index_select(0, staying)
        self._place, self._held = self._place[staying], self._held[staying]
        self._text, self.lengths = self._text[staying], self.lengths[staying]

    def restore(self) -> None:
        """Leave the cache as plain decoding does: every row in it, every token in the slot of its place."""
        if self.rows:
            self.compact()
        if not self._ended:
            return
        states: list[States] = []
        for number in range(len(self.rows) + len(self._ended)):
            if number in self._ended:
                states.append(self._ended[number])
            else:
                live = self.rows.index(number)
                states.append([(layer.keys[live], layer.values[live]) for layer in self._cache.layers])
        for i, layer in enumerate(self._cache.layers):
            layer.keys = _stacked([row[i][0] for row in states])
            layer.values = _stacked([row[i][1] for row in states])
        self._ended = {}
        self.rows = list(range(len(states)))

    def _sources(self, longest: int) -> torch.Tensor:
        """Int64 `(rows, longest)`: the slot of each place of each text; 0 behind its end."""
        sources = self._place.new_zeros((len(self.rows), longest))
        rows, slots = self._held.nonzero(as_tuple=True)
        sources[rows, self._place[rows, slots]] = slots
        return sources


def _gathered(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The entries of `states` `(rows, heads, slots, size)` at `slots` int64 `(rows, n)`."""
    index = slots.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index)


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows `(heads, n, size)` of several lengths as one tensor, with zeros behind the shorter ones."""
    longest = max(row.shape[1] for row in rows)
    whole = rows[0].new_zeros((len(rows), rows[0].shape[0], longest, rows[0].shape[2]))
    for i, row in enumerate(rows):
        whole[i, :, : row.shape[1]] = row
    return whole
