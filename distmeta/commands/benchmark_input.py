"""`benchmark input`: how many users a second are read from Parquet, and turned into TaskBatches by one core."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmeta.cli import Parser
from distmeta.data.schema import Dataset, Field, Label
from distmeta.errors import UserError
from distmeta.storage import Location

ITEMS, SHARDS, QUERY_ROWS, POOLS = 20_000, 16, 10, 4
_FIELDS = (Field("gender", "categorical", 3), Field("age", "categorical", 8), Field("zip", "categorical", 3_000))


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a small table, and give its rows (design §8)."""
    parser = Parser(
        prog="distmeta benchmark input", description="Users a second on one core, from Parquet and as batches."
    )
    parser.add_argument("--users", type=int, default=20_000, metavar="N", help="training users [20000]")
    parser.add_argument("--rows", type=int, default=50, metavar="N", help="interactions of each user [50]")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="users a batch [256]")
    parser.add_argument("--epochs", type=int, default=7, metavar="N", help="epochs of each variant, alternating [7]")
    args = parser.parse(argv)
    for name in ("users", "batch_size", "epochs"):
        if getattr(args, name) < 1:
            raise UserError(f"benchmark input: --{name.replace('_', '-')} must be at least 1")
    if args.rows < 2:
        raise UserError("benchmark input: --rows must be at least 2; a user needs support and query")
    rows = run(args.users, args.rows, args.batch_size, args.epochs)
    for r in rows:
        print(f"{r['benchmark']}  {r['case']}  {r['variant']:<9} {r['value']:>12,.0f} {r['unit']}")
    return rows


def run(users: int, per_user: int, batch_size: int, epochs: int) -> list[dict[str, Any]]:
    """Medians over `epochs` of each variant, which alternate within this process on one thread.

    collate: batches made when asked, nothing else running. prefetch: the same through the prefetching thread.
    parquet: reading the task table's parts into the loader's arrays (Arrow decodes with its own threads).
    streamed: an epoch of the table in at least POOLS pools, read and collated by threads; its wall time.
    """
    import torch

    from distmeta.data import pools
    from distmeta.data.loader import Loader

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            table, dataset = _synthetic(Location.of(folder), users, per_user)
            seconds: dict[str, list[float]] = {"collate": [], "prefetch": [], "parquet": [], "streamed": []}
            largest = max(pools.estimate(n, rows, dataset) for shard in table.groups("train") for n, rows in shard)
            memory = max(pools.estimate(users, users * per_user, dataset) // 2, 2 * SHARDS * largest)
            for epoch in range(epochs + 1):
                for variant, taken in seconds.items():
                    began = time.perf_counter()
                    if variant == "parquet":
                        made = Loader(table, dataset, "train", batch_size)
                        count = made.n_tasks
                    else:
                        budget = memory if variant == "streamed" else None
                        ahead = 0 if variant == "collate" else 2
                        loader = Loader(table, dataset, "train", batch_size, prefetch=ahead, memory=budget)
                        assert bool(loader.note) == (variant == "streamed")
                        began = time.perf_counter()
                        count = sum(len(batch) for batch in loader.epoch(epoch))
                    taken.append(time.perf_counter() - began)
                    assert count == users
    finally:
        torch.set_num_threads(threads)
    case = f"{batch_size} x {per_user}"
    rates = {v: users / statistics.median(taken[1:]) for v, taken in seconds.items()}  # the first one warms up
    return [
        {
            "benchmark": "input",
            "case": case,
            "variant": v,
            "value": rate,
            "unit": "users/s",
            "ratio_to": {w: rate / other for w, other in rates.items() if w != v},
        }
        for v, rate in rates.items()
    ]


def _synthetic(where: Location, users: int, per_user: int) -> tuple[Any, Dataset]:
    """A task table of `users` training users with `per_user` rows each, and the dataset it would belong to."""
    from distmeta import draws
    from distmeta.data.protocols import DRAWN
    from distmeta.data.tables import PARQUET
    from distmeta.data.taskmaker import GROUP_ROWS, GROUP_TASKS, task_schema
    from distmeta.data.tasktable import TaskTable

    dataset = Dataset("benchmark", Label("rating", 1.0, 5.0), _FIELDS, (), users, ITEMS, users * per_user)
    schema, files = task_schema(dataset), []
    user = np.arange(users, dtype=np.int32)
    shard = draws.hashed(user, purpose="shard") % np.uint64(SHARDS)
    for s in range(SHARDS):
        mine = user[shard == s]
        n = len(mine) * per_user
        flat = {
            "item": draws.hashed(mine[:, None], np.arange(per_user), purpose="item").ravel() % np.uint64(ITEMS),
            "label": 1 + draws.hashed(np.arange(n), s, purpose="label") % np.uint64(5),
            "time": np.tile(np.arange(per_user), len(mine)),
            "role": np.full(n, DRAWN),
        }
        offsets = pa.array(np.arange(len(mine) + 1, dtype=np.int32) * per_user)
        word = ["train"] * len(mine)
        columns: dict[str, Any] = {"task": mine, "user": mine, "split": word, "cohort": word}
        columns |= {f.name: draws.hashed(mine, purpose=f.name) % np.uint64(f.size) for f in _FIELDS}
        columns = {name: pa.array(values).cast(schema.field(name).type) for name, values in columns.items()}
        for name, values in flat.items():
            kind = schema.field(name).type
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values).cast(kind.value_type)).cast(kind)
        path = f"part-{s:05d}.parquet"
        tasks = max(min(GROUP_TASKS, GROUP_ROWS // per_user, -(-len(mine) // POOLS)), 1)
        pq.write_table(pa.table(columns, schema=schema), (where / path).path, row_group_size=tasks, **PARQUET)
        files.append({"split": "train", "shard": s, "path": path, "rows": len(mine), "bytes": 0})
    origin = {"user_fields": [{"name": f.name} for f in _FIELDS]}
    counts = {"train": {"tasks": users, "rows": users * per_user}}
    return TaskTable(where, "benchmark", 1, {}, 0, SHARDS, QUERY_ROWS, 0, counts, {}, {}, "", origin, files), dataset
