"""`benchmark neighbours`: AT-PAML's index of users: searches, stores and the merges of training steps.

The data is a mixture of 1,000 Gaussians (centres standard normal, within them a deviation of 0.1), or with --run the
embeddings that a run of at-paml has in its index.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmeta.cli import Parser
from distmeta.errors import UserError
from distmeta.memory.neighbours import Neighbours
from distmeta.storage import Location

CENTRES, WITHIN = 1_000, 0.1
FILL = 4096
"""Users stored at a time while the index is filled."""
LR = 0.1


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure, print a table, and give its rows (design §8).

    Raises:
        UserError: usage; the run has no index.
    """
    parser = Parser(
        prog="distmeta benchmark neighbours",
        description="Queries and stores a second, merges, recall and memory of the neighbour index, by the CPU time"
        " of this process; recall: the share of what is found that is no further than the exact K-th nearest.",
    )
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--nodes", type=int, nargs="+", default=sizes, metavar="N", help="[10000 100000 1000000]")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[32], metavar="D", help="of an embedding [32]")
    parser.add_argument("--run", metavar="RUN", help="a run of at-paml: its users instead of a mixture")
    parser.add_argument("--nearest", type=int, default=8, metavar="K", help="nodes that a query asks for [8]")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="tasks a step [256]")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="steps of each mode, alternating [5]")
    args = parser.parse(argv)
    for name in ("nodes", "dimensions", "nearest", "batch_size", "turns"):
        if np.min(getattr(args, name)) < 1:
            raise UserError(f"benchmark neighbours: --{name.replace('_', '-')} must be at least 1")
    if args.run:
        return show(run(*kept(args.run, args.batch_size), args.nearest, args.batch_size, args.turns))
    rows = []
    for width in args.dimensions:
        for nodes in args.nodes:
            made = mixture(nodes, width), mixture(8 * args.batch_size, width, seed=1)
            rows += show(run(*made, args.nearest, args.batch_size, args.turns))
    return rows


def mixture(count: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """`count` draws [count, width] from always the same mixture."""
    centres = np.random.default_rng(99).standard_normal((CENTRES, width), dtype=np.float32)
    rng = np.random.default_rng(seed)
    found = centres[rng.integers(0, CENTRES, count)]
    found += WITHIN * rng.standard_normal((count, width), dtype=np.float32)
    return found


def kept(run: str, batch: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The embeddings that a run's newest checkpoint has in its index: those to store, and some to ask with.

    Raises:
        UserError: there is none.
    """
    from distmeta.parallel import checkpoint as checkpoints

    where = Location.of(run)
    newest = checkpoints.newest(where)
    state = checkpoints.load(where, newest, "state") if newest and "state-00000.safetensors" in newest.files else {}
    if "index.vector" not in state or len(state["index.vector"]) < 2 * batch:
        raise UserError(f"{where}: no checkpoint with an index of {2 * batch} users or more; train at-paml longer")
    vectors = np.random.default_rng(0).permutation(state["index.vector"].numpy())
    asking = min(8 * batch, len(vectors) // 4)
    return vectors[asking:], vectors[:asking]


def run(nodes: NDArray[Any], asking: NDArray[Any], nearest: int, batch: int, turns: int) -> list[dict[str, Any]]:
    """Rows of both modes for one set of nodes [n, d]; `asking` [m, d] are the embeddings of the users of steps.

    A turn is a training step at full capacity: a read for `batch` users; a merge of their stores and of gradients at
    all that they found; and a merge of as many stores of others alone.
    """
    size, width = nodes.shape
    made = Neighbours(size, nearest, LR)
    for start in range(0, size, FILL):
        made.merge([write(np.arange(start, min(start + FILL, size)), nodes[start : start + FILL], nearest)])
    indices = {"approximate": made, "exact": Neighbours(size, nearest, LR, exact=True)}
    indices["exact"].restore(made.snapshot())
    taken: dict[str, dict[str, list[float]]] = {m: {"read": [], "step": [], "store": []} for m in indices}
    recall, rng = [], np.random.default_rng(0)
    for turn in range(turns + 1):
        own = size * (turn + 1) + np.arange(batch)
        mine = rng.choice(asking, (2, batch))
        gradient = rng.standard_normal((batch, nearest, width)).astype(nodes.dtype)
        found = {}
        for mode, index in indices.items():
            ask = {"key": own, "vector": mine[0]}
            found[mode] = timed(taken[mode]["read"], lambda index=index, ask=ask: index.read(ask))
        limit = found["exact"]["distance"][:, -1:]
        recall.append(float((found["approximate"]["distance"] <= limit).mean()))
        step = write(own, mine[0], nearest, found["approximate"]["key"], gradient)
        others = write(own + batch, mine[1], nearest)
        for mode, index in indices.items():
            timed(taken[mode]["step"], lambda index=index, step=step: index.merge([step]))
            timed(taken[mode]["store"], lambda index=index, others=others: index.merge([others]))
    seconds = {m: {what: statistics.median(s[1:]) for what, s in kinds.items()} for m, kinds in taken.items()}
    return [
        {
            "benchmark": "neighbours",
            "case": f"{size} x {width}",
            "variant": mode,
            "value": batch / s["read"],
            "unit": "queries/s",
            "ratio_to": {other: o["read"] / s["read"] for other, o in seconds.items() if other != mode},
            "recall": statistics.mean(recall) if mode == "approximate" else 1.0,
            "nearest": nearest,
            "stores_per_s": batch / s["store"],
            "merge_ms": 1e3 * s["step"],
            "memory_over_vectors": memory(indices[mode]) / nodes.nbytes,
        }
        for mode, s in seconds.items()
    ]


def timed(taken: list[float], call: Callable[[], Any]) -> Any:
    """The call's result; its seconds are added to `taken`."""
    began = time.process_time()
    result = call()
    taken.append(time.process_time() - began)
    return result


def write(
    keys: NDArray[Any], vectors: NDArray[Any], nearest: int, used: Any = None, gradient: Any = None
) -> dict[str, NDArray[Any]]:
    """What tasks write that store themselves and, if given, found `used` [b, K] with this gradient [b, K, d]."""
    none = np.full((len(keys), nearest), -1)
    return {
        "task": keys,
        "key": keys,
        "vector": vectors,
        "rate": np.full(len(keys), 0.1, vectors.dtype),
        "used": none if used is None else used,
        "vector_grad": np.zeros((*none.shape, vectors.shape[1]), vectors.dtype) if gradient is None else gradient,
        "rate_grad": np.zeros(none.shape, vectors.dtype),
    }


def memory(index: Neighbours) -> int:
    """Bytes of all the arrays of an index that is full."""
    holders = [index, index.slots] + [index.cells] * (not index.exact)
    return sum(a.nbytes for holder in holders for a in vars(holder).values() if isinstance(a, np.ndarray))


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print one case's rows, and give them back."""
    for r in rows:
        print(
            f"{r['case']:<14} {r['variant']:<12} {r['value']:>9,.0f} {r['unit']}  recall@{r['nearest']} "
            f"{r['recall']:.3f}  {r['stores_per_s']:>9,.0f} stores/s  merge {r['merge_ms']:>5.1f} ms  "
            f"memory {r['memory_over_vectors']:.2f} x vectors",
            flush=True,
        )
    return rows
