"""Network parts that methods share: the feature embedding block, and the decision MLP on a tape.

Shape letters: b tasks, R rows, U unique items of a batch, M values of a field, F fields, e embedding width.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from distmeta import draws
from distmeta.adaptation.features import Gathered, Part, PerTask, Unique
from distmeta.adaptation.lookup import gather, lookup
from distmeta.adaptation.maps import Linear, Table
from distmeta.adaptation.tape import Node, Tape
from distmeta.data.schema import Dataset, Field
from distmeta.errors import UserError
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

ITEM_ID = "item id"
USER_ID = "user id"
"""Names of the item's and of the user's own index as a feature; no field of a dataset may be called so (they hold a
space)."""


def content_fields(dataset: Dataset) -> tuple[list[Field], list[Field]]:
    """User and item fields that the papers use: those the dataset's source names, or all there are."""
    named = dataset.extra.get("content_fields", {})
    sides = []
    for side, fields in (("user", dataset.user_fields), ("item", dataset.item_fields)):
        wanted = named.get(side)
        sides.append([f for f in fields if wanted is None or f.name in wanted])
    return sides[0], sides[1]


class UserPlace:
    """Tables looked up at the users of a block: one row a task."""

    def __init__(self, x: Tensor, bags: Mapping[str, Bag]) -> None:
        self._part = PerTask(x.unsqueeze(1))
        self._bags = {
            name: Bag(bag.index.unsqueeze(1), None if bag.weight is None else bag.weight.unsqueeze(1))
            for name, bag in bags.items()
        }

    def base(self) -> Part:
        return self._part

    def bag(self, name: str) -> Bag:
        return self._bags[name]


class RowPlace:
    """Tables looked up at the items of a block's support or query rows, or at the rows' users in scenarios."""

    def __init__(self, unique: Unique, bags: Mapping[str, Bag], index: Tensor) -> None:
        self._part = Gathered(unique, index)
        self._unique_bags = bags
        self._bags: dict[str, Bag] = {}

    def base(self) -> Part:
        return self._part

    def bag(self, name: str) -> Bag:
        if name not in self._bags:
            self._bags[name] = self._unique_bags[name].take(self._part.index)
        return self._bags[name]


class Embedding(nn.Module):
    """The feature embedding block: one table a field, e wide, side by side (MeLU §3.1; multi-hot fields by their mean).

    All embeddings of a model live here, and their rows are read here alone, of a batch once (adaptation/lookup.py), so
    that tables of which a worker holds some rows need another `_lookup` and nothing else.

    Args:
        dataset: names and sizes of the fields.
        items: Bags of all items by field name.
        width: e.
        item_ids: whether the item's own index is a feature too; the papers leave it out, practice does not.
        user_ids: whether the user's is, where tasks are scenarios; where they are users, new ones have none.
        scale: standard deviation that the tables start with.
        vectors: width of vectors that users (of scenarios) and items have besides, all 0 until somebody sets them.
        id_buckets: of item ids so many embeddings, shared by the items whose ids have the same hash, so that neither
            memory nor an update's time knows how many items there are; 0: one an item, where `item_ids`.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Mapping[str, Bag],
        width: int,
        item_ids: bool,
        user_ids: bool = False,
        scale: float = 0.1,
        vectors: int = 0,
        id_buckets: int = 0,
    ) -> None:
        super().__init__()
        user_fields, item_fields = content_fields(dataset)
        item_ids = item_ids or bool(id_buckets)
        if not user_fields and not item_fields and not item_ids and not vectors:
            raise UserError(f"{dataset.name}: has no user or item fields to learn from; add --item-ids")
        # ModuleDict forbids dots in names, which a user's own table may have: the tables go by position there
        self.user_names = [f.name for f in user_fields] + ([USER_ID] if user_ids else [])
        self.item_names = [f.name for f in item_fields] + ([ITEM_ID] if item_ids else [])
        sizes = [f.size for f in user_fields] + ([dataset.users] if user_ids else [])
        self.user_tables = nn.ModuleList(Table(n, width, scale) for n in sizes)
        sizes = [f.size for f in item_fields] + ([id_buckets or dataset.items] if item_ids else [])
        self.item_tables = nn.ModuleList(Table(n, width, scale) for n in sizes)
        self.user_vectors = Table(dataset.users, vectors, 0.0) if vectors else None
        self.item_vectors = Table(dataset.items, vectors, 0.0) if vectors else None
        self.user_width = width * len(self.user_tables) + vectors
        self.item_width = width * len(self.item_tables) + vectors
        # buffers, so that the items' fields follow the module's device and precision; a checkpoint leaves them out
        for i, f in enumerate(item_fields):
            self.register_buffer(f"item_index_{i}", items[f.name].index, persistent=False)
            self.register_buffer(f"item_weight_{i}", items[f.name].weight, persistent=False)
        bucket = _buckets(dataset.items, id_buckets) if id_buckets else None
        self.register_buffer("item_bucket", bucket, persistent=False)

    def users(self) -> dict[str, Table]:
        return dict(zip(self.user_names, self.user_tables, strict=True))  # type: ignore[arg-type]

    def items(self) -> dict[str, Table]:
        return dict(zip(self.item_names, self.item_tables, strict=True))  # type: ignore[arg-type]

    def item_bags(self, items: Tensor) -> dict[str, Bag]:
        """Bags of the given items (int64 [U]) by field name, the id included where it is a feature."""
        bags = {}
        for i, name in enumerate(self.item_names):
            if name == ITEM_ID:
                ids = items if self.item_bucket is None else self.get_buffer("item_bucket")[items].long()
                bags[name] = Bag(ids.unsqueeze(1), None)
            else:
                bags[name] = Bag(getattr(self, f"item_index_{i}"), getattr(self, f"item_weight_{i}")).take(items)
        return bags

    def item_rows(self, items: Tensor) -> tuple[Tensor, dict[str, Bag]]:
        """The given items (int64 [U]) embedded, [U, F · e], and their bags."""
        bags = self.item_bags(items)
        return self._lookup(self.items(), bags, items.shape[0], self.item_vectors, items), bags

    def encode(self, batch: TaskBatch) -> "Encoded":
        """Embed what the batch touches: each unique item once, each user once.

        Raises:
            UserError: user ids are a feature, the tasks are users, and their blocks do not have them as a field.
        """
        x, bags = self.item_rows(batch.items)
        items = Unique(x)
        if batch.users is None:
            if USER_ID in self.user_names and any(USER_ID not in block.user for block in batch):
                raise UserError("--user-ids: the tasks are users, of whom new ones have no learned id; leave it out")
            return Encoded(self, items, bags)
        user_bags = {**batch.user_fields, USER_ID: Bag(batch.users.unsqueeze(1), None)}
        users = Unique(self._lookup(self.users(), user_bags, batch.users.shape[0], self.user_vectors, batch.users))
        return Encoded(self, items, bags, users, user_bags)

    def user_place(self, block: TaskBlock) -> UserPlace:
        bags = {name: block.user[name] for name in self.user_names}
        return UserPlace(self._lookup(self.users(), bags, block.task.shape[0]), bags)

    def _lookup(
        self,
        tables: Mapping[str, Table],
        bags: Mapping[str, Bag],
        rows: int,
        vectors: Table | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Tables looked up side by side, [rows, width]; after them the `vectors` at `index` (int64 [rows])."""
        found = [lookup([t.weight for t in tables.values()], [bags[name] for name in tables])] if tables else []
        if vectors is not None and index is not None:
            found.append(gather(vectors.weight, index))
        return torch.cat(found, -1) if found else next(chain(self.parameters(), self.buffers())).new_zeros(rows, 0)


def _buckets(items: int, buckets: int) -> Tensor:
    """Which of `buckets` each item's id is in, int32 [items]; always the same."""
    keys = draws.hashed(np.arange(items), purpose="item bucket") % np.uint64(buckets)
    return torch.from_numpy(keys.astype(np.int32))


class Encoded:
    """Embeddings of one batch, and the places of its blocks."""

    def __init__(
        self,
        embedding: Embedding,
        unique: Unique,
        bags: dict[str, Bag],
        people: Unique | None = None,
        people_bags: dict[str, Bag] | None = None,
    ) -> None:
        """`people`, `people_bags`: the users of the rows, where tasks are scenarios."""
        self._embedding = embedding
        self._unique = unique
        self._detached = unique.detach()
        self._bags = bags
        self._people, self._people_bags = people, people_bags or {}
        self._people_detached = people.detach() if people else None
        self._users: dict[int, tuple[TaskBlock, UserPlace]] = {}

    def place(self, block: TaskBlock, rows: Rows, detach: bool = False) -> tuple[UserPlace | RowPlace, RowPlace]:
        """Users and items of some of the block's rows; without graph where `detach` (first order)."""
        items = RowPlace(self._detached if detach else self._unique, self._bags, rows.item)
        people = self._people_detached if detach else self._people
        if people is not None and rows.user is not None:
            return RowPlace(people, self._people_bags, rows.user), items
        with torch.no_grad() if detach else contextlib.nullcontext():
            return self._user_place(block), items

    def items(self) -> Tensor:
        """The batch's items embedded: [U, F · e]."""
        return self._unique.x

    def people(self) -> Tensor:
        """The users of the batch's rows embedded, where tasks are scenarios: [V, F · e]."""
        return self._unique.x[:0] if self._people is None else self._people.x

    def users(self, block: TaskBlock) -> Tensor:
        """Embedded fields of the block's users side by side: [b, F · e]; without fields [b, 0].

        Raises:
            UserError: tasks are scenarios.
        """
        if self._people is not None:
            raise UserError(
                "the tasks are scenarios, which have no user of their own, as this method needs; try cmml-film"
            )
        return self._user_place(block).base().rows().squeeze(1)

    def history(self, block: TaskBlock) -> Tensor:
        """Mean embedding of each task's support items: [b, F · e]; 0 without support."""
        mask = block.support.mask.to(self._unique.x.dtype)
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        rows = gather(self._unique.x, block.support.item)
        return torch.bmm(share.unsqueeze(1), rows).squeeze(1)

    def _user_place(self, block: TaskBlock) -> UserPlace:
        """The users of a block, looked up once for support and query; without a graph again where one is not wanted."""
        if not torch.is_grad_enabled():
            return self._embedding.user_place(block)
        if id(block) not in self._users:  # block is held, so its id stays its own
            self._users[id(block)] = (block, self._embedding.user_place(block))
        return self._users[id(block)][1]


def wide_path(d: int, outputs: int) -> Linear:
    """A linear map beside other layers; it starts at a tenth of a layer's usual size, so that those speak first."""
    layer = Linear(d, outputs)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    return layer


class Decision(nn.Module):
    """Fully connected layers with ReLU between them and one linear output a row, or several.

    Args:
        slope: of the (leaky) ReLU below 0.
        wide: add a linear map of the features to the output, as Wide&Deep's (Cheng et al., 2016). Adapted, it gives
            a user a weight for every coordinate of an item's embedding, as matrix factorisation does.
    """

    def __init__(self, d: int, hidden: Sequence[int], wide: bool = False, outputs: int = 1, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = slope
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise([d, *hidden, outputs]))
        self.wide = wide_path(d, outputs) if wide else None

    def __iter__(self) -> Iterator[Linear]:
        """All dense layers, the wide one last."""
        yield from self.layers  # type: ignore[misc]
        if self.wide is not None:
            yield self.wide

    @property
    def output_bias(self) -> Tensor:
        return self.layers[-1].bias  # type: ignore[return-value]

    def forward(self, tape: Tape, *inputs: Node) -> Node:
        """Outputs [b, R, C] of the rows whose features are `inputs` side by side."""
        first, *others = self.layers
        deep = tape.chain(others, tape.linear(first, *inputs), self.slope)  # type: ignore[arg-type]
        return deep if self.wide is None else tape.add(deep, tape.linear(self.wide, *inputs))
