"""Field columns of users/, items/ and task tables -> Bags of indices and weights (distmeta.tasks.Bag)."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from distmeta.data.schema import Dataset, Field
from distmeta.data.tables import read_side
from distmeta.errors import UserError
from distmeta.storage import Location
from distmeta.tasks import Bag

Encoded = tuple[NDArray[np.int32], NDArray[np.float32] | None]
"""Index [n, M] and weight [n, M], or None where every weight is one."""


def encode(field: Field, column: pa.ChunkedArray, where: object) -> Encoded:
    """A field's column as indices and weights.

    categorical: its index, weight one. numeric: index 0, the standardised value as weight (0 where unknown).
    multi_categorical: its M indices with weights 1/count; the unknown index 0 alone where it is empty.

    Raises:
        UserError: an index is outside the field's vocabulary; `where` starts the sentence.
    """
    if field.type == "numeric":
        value = column.cast(pa.float32()).fill_null(field.mean).to_numpy()
        weight = ((value - field.mean) / field.std).astype(np.float32)
        return np.zeros((len(weight), 1), np.int32), weight[:, None]
    if field.type == "categorical":
        index = column.cast(pa.int32()).fill_null(0).to_numpy()
        _check(field, index, where)
        return np.ascontiguousarray(index[:, None]), None
    values, count = ragged(column, pa.int32())
    _check(field, values, where)
    width = max(int(count.max(initial=0)), 1)
    index = np.zeros((len(count), width), np.int32)
    real = np.arange(width) < count[:, None]
    index[real] = values
    real[:, 0] = True  # an empty set stands for the unknown value, index 0
    return index, (real / np.maximum(count, 1)[:, None]).astype(np.float32)


def ragged(column: pa.ChunkedArray, kind: pa.DataType) -> tuple[NDArray, NDArray[np.int64]]:
    """A list column's values, flat, and each list's length; a null list is empty."""
    whole = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], column.type)
    count = whole.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return whole.flatten().cast(kind).to_numpy(zero_copy_only=False), count


def _check(field: Field, index: NDArray[np.int32], where: object) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < field.size:
        bad = int(index.min()) if index.min() < 0 else int(index.max())
        raise UserError(
            f"{where}: field {field.name} has index {bad}, outside its vocabulary of {field.size:,}; "
            "prepare the dataset again"
        )


def joined(parts: Sequence[Encoded]) -> Encoded:
    """One field's columns of several tables, one after the other; the narrower are padded."""
    width = max(index.shape[1] for index, _ in parts)
    index = np.concatenate([np.pad(i, ((0, 0), (0, width - i.shape[1]))) for i, _ in parts])
    weights = [np.pad(w, ((0, 0), (0, width - w.shape[1]))) for _, w in parts if w is not None]
    return index, np.concatenate(weights) if weights else None


def bag(encoded: Encoded) -> Bag:
    """Encoded columns as tensors: int64 index, float32 weight."""
    index, weight = encoded
    return Bag(torch.from_numpy(index.astype(np.int64)), None if weight is None else torch.from_numpy(weight))


def encode_all(fields: Sequence[Field], table: pa.Table, where: object) -> dict[str, Encoded]:
    """All `fields` of a table, by name."""
    return {f.name: encode(f, table[f.name], where) for f in fields}


def read_items(dataset_location: Location, dataset: Dataset) -> dict[str, Bag]:
    """All item fields as Bags of `dataset.items` rows, by field name.

    Raises:
        UserError: items/ is missing, damaged or not as the manifest says.
    """
    table = read_side(dataset_location, dataset, "items", [f.name for f in dataset.item_fields])
    return item_bags(table, dataset, dataset_location / "items")


def item_bags(table: pa.Table, dataset: Dataset, where: object) -> dict[str, Bag]:
    """All item fields as Bags, by field name, from a table with a row for each item.

    Raises:
        UserError: as `encode`.
    """
    return {name: bag(e) for name, e in encode_all(dataset.item_fields, table, where).items()}
