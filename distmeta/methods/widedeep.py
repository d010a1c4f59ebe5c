"""Wide & Deep (Cheng et al., DLRS 2016), the baseline of paper 000 (Table 2): a linear model beside an MLP.

The wide part is linear in the values of all fields and in cross-products φ(x) of a user field's value with an item
field's (their Eq. 1: AND(gender = F, genre = drama)); the deep part an MLP on embeddings. Both are trained jointly;
here by one optimizer, where the paper has FTRL for the wide part.

A cross-product's weights are a table of the item's field with a column for each value of the user's fields that are
crossed: an item's columns are looked up once a batch, and a row takes those of its user.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distmeta.adaptation.features import Gathered, Part, PerTask, Unique
from distmeta.adaptation.lookup import lookup
from distmeta.adaptation.maps import Table
from distmeta.data.schema import Dataset, Field
from distmeta.methods.finetuning import Weights
from distmeta.methods.joint import Joint, Sides
from distmeta.methods.plain_options import WideDeep as Options
from distmeta.networks import content_fields
from distmeta.tasks import Bag


class WideDeep(Joint):
    """A linear model of field values and of their cross-products, and an MLP."""

    name = "widedeep"
    linear = True

    def __init__(self, options: Options, dataset: Dataset, items: dict[str, Bag]) -> None:
        super().__init__(options, dataset, items)
        self.crossed = crossed_fields(content_fields(dataset)[0], options.crosses)
        self.values = sum(f.size for f in self.crossed)
        """W: values of the user's fields that are crossed."""
        sizes = [len(t.weight) for t in self.embedding.items().values()] if self.values else []
        self.cross = nn.ModuleList(Table(n, self.values, 0.0) for n in sizes)

    def network(self, w: Weights, sides: Sides) -> Tensor:
        wide = self.weights(sides)
        if self.values:
            wide = wide + self.crosses(sides)
        return self.output(w, self.deep(w, sides)) + wide

    def crosses(self, sides: Sides) -> Tensor:
        """Σ of the weights of the rows' cross-products: [b, R]."""
        item = sides.derived(sides.item, "crosses", lambda _: self._items(sides))
        return (self._users(sides).rows() * item.rows()).sum(-1)

    def _items(self, sides: Sides) -> Tensor:
        """The columns [U, W] of the batch's items, all their fields together."""
        bags = self.embedding.item_bags(sides.batch.items)
        found = lookup([t.weight for t in self.cross], [bags[name] for name in self.embedding.item_names])  # type: ignore[arg-type]
        return found.unflatten(-1, (-1, self.values)).sum(-2)

    def _users(self, sides: Sides) -> Part:
        """Which values the rows' users have: [.., W]."""
        if isinstance(sides.user, PerTask):
            return PerTask(self._multi_hot(sides.block.user).unsqueeze(1))
        assert isinstance(sides.user, Gathered)
        return Gathered(Unique(self._multi_hot(sides.batch.user_fields)), sides.user.index)

    def _multi_hot(self, bags: Mapping[str, Bag]) -> Tensor:
        """[n, W] of n users."""
        columns = []
        for f in self.crossed:
            bag = bags[f.name]
            weight = torch.ones_like(bag.index, dtype=self.last.weight.dtype) if bag.weight is None else bag.weight
            columns.append(weight.new_zeros(len(bag.index), f.size).scatter_add_(1, bag.index, weight))
        return torch.cat(columns, -1)


def crossed_fields(fields: Sequence[Field], most: int) -> list[Field]:
    """The user fields that are crossed: not numeric, the smallest first, of `most` values in all."""
    found, room = [], most
    for f in sorted((f for f in fields if f.type != "numeric"), key=lambda f: f.size):
        if f.size <= room:
            found.append(f)
            room -= f.size
    return found
