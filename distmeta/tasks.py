"""TaskBatch: the one value that flows through everything.

Shape letters used throughout distmeta:
  B tasks, b tasks of one block, R rows of a side (S support, Q query), U unique items and V users of the batch,
  M values of a field (1 for a categorical one), F fields, e embedding width, d inputs and h outputs of a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor


class _Movable:
    """Dataclasses of tensors (nested in tuples, dicts and further such dataclasses) that move together."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """The same value on `device`, its floating-point tensors as `dtype` where one is given."""
        return type(self)(**{f.name: _moved(getattr(self, f.name), device, dtype) for f in fields(self)})  # type: ignore[arg-type]


def _moved(value: Any, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, _Movable):
        return value.to(device, dtype)
    if isinstance(value, dict):
        return {k: _moved(v, device, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(v, device, dtype) for v in value)
    return value


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
