"""TaskBatch: the one value that flows through everything.

Shape letters used throughout distmeta:
  B tasks, b tasks of one block, R rows of a side (S support, Q query), U unique items and V users of the batch,
  M values of a field (1 for a categorical one), F fields, e embedding width, d inputs and h outputs of a layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Movable:
    """Dataclasses of tensors (nested in tuples, dicts and further such dataclasses) that move together."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The same value on `device`, its floating-point tensors as `dtype` where one is given."""
        return _each(self, lambda t: t.to(device, dtype if t.is_floating_point() else None))


def _each(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same value with all its tensors changed, always in the same order."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, _Movable):
        found = type(value)(**{f.name: _each(getattr(value, f.name), change) for f in fields(value)})  # type: ignore[arg-type]
    elif isinstance(value, dict):
        found = {k: _each(v, change) for k, v in value.items()}
    elif isinstance(value, tuple):
        found = tuple(_each(v, change) for v in value)
    return found


@dataclass(frozen=True)
class Bag(_Movable):
    """Values of one field for n users or items: weighted sets of indices into the field's embedding table.

    categorical: M = 1, weight None (one). multi_categorical: weight 1/count (0 on padding; a mean, as MeLU's).
    numeric: index 0, weight = the standardised value.
    """

    index: Tensor
    """int64 [n, M]; 0 on padding."""
    weight: Tensor | None
    """float [n, M], or None where every weight is one."""

    def take(self, rows: Tensor) -> "Bag":
        """The bags of `rows` (int64 [k]), in that order."""
        return Bag(self.index[rows], None if self.weight is None else self.weight[rows])


@dataclass(frozen=True)
class Rows(_Movable):
    """Support or query of b tasks, padded to R rows; a task's rows stand first, in time order."""

    item: Tensor
    """int64 [b, R]: position in TaskBatch.items; 0 on padding."""
    label: Tensor
    """float [b, R]; 0 on padding."""
    mask: Tensor
    """bool [b, R]: true on real rows."""
    user: Tensor | None = None
    """int64 [b, R]: position in TaskBatch.users where tasks are scenarios; 0 on padding."""

    def take(self, rows: Tensor) -> "Rows":
        """Those of the tasks at `rows` (int64 [k]), in that order."""
        user = None if self.user is None else self.user[rows]
        return Rows(self.item[rows], self.label[rows], self.mask[rows], user)


@dataclass(frozen=True)
class TaskBlock(_Movable):
    """Tasks of similar length, padded to common sizes."""

    task: Tensor
    """int64 [b]: task ids."""
    user: dict[str, Bag]
    """The user's fields: Bags of b users. Of scenarios none: each row has its user (TaskBatch.user_fields)."""
    support: Rows
    query: Rows

    def take(self, rows: Tensor) -> "TaskBlock":
        """The tasks at `rows` (int64 [k]), in that order."""
        user = {name: bag.take(rows) for name, bag in self.user.items()}
        return TaskBlock(self.task[rows], user, self.support.take(rows), self.query.take(rows))

    def rows(self) -> Rows:
        """Support and query rows side by side, [b, S + Q]: padding stands after each."""
        s, q = self.support, self.query
        sides = ((getattr(s, f.name), getattr(q, f.name)) for f in fields(Rows))
        return Rows(*(None if pair[0] is None else torch.cat(pair, 1) for pair in sides))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TaskBatch(_Movable):
    """B tasks: the items they touch, once each, and blocks of padded tasks that point into them."""

    items: Tensor
    """int64 [U]: item indices of the dataset, each once; every Rows.item points into this."""
    blocks: tuple[TaskBlock, ...]
    seed: int = 0
    epoch: int = 0
    users: Tensor | None = None
    """int64 [V]: user indices of the dataset, each once, where tasks are scenarios; every Rows.user points into this.

    A training task's rows are then pairs: a positive (label 1) and after it an item of the scenario that the same
    user has not taken (label 0). A query that is ranked is a row of lists: user by user, all items of the scenario.
    """
    user_fields: dict[str, Bag] = field(default_factory=dict)
    """Their fields: Bags of V users."""

    def __len__(self) -> int:
        """Number of tasks, B."""
        return sum(len(block.task) for block in self.blocks)

    def __iter__(self) -> Iterator[TaskBlock]:
        return iter(self.blocks)


class Packed:
    """A batch on its way to a GPU: its dozens of small tensors as one of each type, in memory that is copied from
    without a pause of the program."""

    def __init__(self, batch: TaskBatch) -> None:
        tensors: dict[torch.dtype, list[Tensor]] = {}
        self._batch = _each(batch, lambda t: tensors.setdefault(t.dtype, []).append(t) or t)
        self._flat = {dtype: _joined([t.reshape(-1) for t in each]) for dtype, each in tensors.items()}

    def to(self, device: torch.device) -> TaskBatch:
        """The batch on `device`: views of one copy a type, queued before what is computed with it."""
        sizes: dict[torch.dtype, list[int]] = {dtype: [] for dtype in self._flat}
        _each(self._batch, lambda t: sizes[t.dtype].append(t.numel()) or t)
        parts = {d: iter(flat.to(device, non_blocking=True).split(sizes[d])) for d, flat in self._flat.items()}
        return _each(self._batch, lambda t: next(parts[t.dtype]).view(t.shape))


def _joined(parts: list[Tensor]) -> Tensor:
    """The 1-d tensors one after the other, in page-locked memory; torch keeps it from use until it was copied."""
    flat = torch.empty(sum(map(len, parts)), dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(parts, out=flat)
