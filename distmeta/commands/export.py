"""`export`: a run's best checkpoint as one graph that is served without this package, checked on real tasks."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from distmeta import process
from distmeta.cli import Parser
from distmeta.config import Config
from distmeta.data import protocols, tasktable
from distmeta.data.schema import Dataset
from distmeta.data.tasktable import TaskTable
from distmeta.errors import RunError, UserError
from distmeta.parallel import rundir, submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    from torch import Tensor

    from distmeta.methods.base import Method

TOLERANCE = 1e-5
"""How far a graph's score may be from the method's own, in absolute terms or, above 1, of the score."""
_TASKS, _BATCHES = 64, 4
"""Test tasks of a batch, and batches, on which they are compared."""


def main(argv: Sequence[str]) -> int:
    """Run `export`; 0 when the files are there.

    Raises:
        UserError: usage, no run, no checkpoint, a method that is no graph, a missing package.
        RunError: a graph's scores are not the method's.
    """
    parser = Parser(
        prog="export",
        description="Write the best checkpoint of a run as one graph, from a user's support and candidates to their"
        " scores: a torch.export program (--out), ONNX (--onnx, with the extra `onnx`) or both, and beside each a FILE"
        ".json that says what it takes. Numbers of users, support rows and candidates are free. Its scores are compared"
        " with the method's own on tasks of the test split before anything is written. Methods: cmml-*.",
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="run directory or URI, made by `train`")
    parser.add_argument(
        "--out", metavar="FILE.pt2", help="where to write the program [RUN/export.pt2, or with --onnx none]"
    )
    parser.add_argument("--onnx", metavar="FILE.onnx", help="where to write it as ONNX [none]")
    parser.add_argument("--data", metavar="DATASET", help="where the run's dataset lies now, if it was moved")
    args = parser.parse(argv)
    for flag in ("run", "out", "onnx", "data"):
        if value := getattr(args, flag):
            submitted.check(f"--{flag}", value)
    run = Location.of(args.run)
    wanted = {k: Location.of(v) for k, v in (("pt2", args.out), ("onnx", args.onnx)) if v} or {
        "pt2": run / "export.pt2"
    }
    if len({str(w) for w in wanted.values()}) < len(wanted):
        raise UserError(f"export: --out and --onnx are both {args.out}; give each a file of its own")
    if "onnx" in wanted:
        from distmeta.serving import onnxgraph

        onnxgraph.check_installed()
    _export(run, args.data, wanted)
    return 0


def _export(run: Location, data: str | None, wanted: dict[str, Location]) -> None:
    import torch

    from distmeta.parallel import assessment
    from distmeta.serving import export, onnxgraph

    config = rundir.stored(run)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gpu=0.0))
    place = Location.of(data or config.data.data)
    dataset = Dataset.open(place)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, protocols.protocol_options(config.data))
    whole = table.seen(dataset)
    process.prepare(config.train.threads or 1)
    step, method = assessment.best_method(config, run, whole, place, table)
    program = export.exported(method, table.scenarios)
    dataset = method.dataset  # without the fields that it is not told
    inputs = export.described(dataset, table.scenarios)
    held = io.BytesIO()
    torch.export.save(program, held)
    made: dict[str, tuple[bytes, Callable[..., Tensor]]] = {}
    if "pt2" in wanted:
        held.seek(0)
        made["pt2"] = held.getvalue(), torch.export.load(held).module()
    if "onnx" in wanted:
        model = onnxgraph.converted(program, [i["name"] for i in inputs])
        made["onnx"] = model, onnxgraph.Session(model)
    told = _about(config, run, step, dataset, place, table, inputs)
    worst = {kind: _worst(method, graph, whole, table, config) for kind, (_, graph) in made.items()}
    for kind, (apart, tasks) in worst.items():
        if not apart <= TOLERANCE:
            raise RunError(f"{wanted[kind]}: not written: its scores are up to {apart:.2g} from those of {run}")
        wanted[kind].write_bytes(made[kind][0])
        (wanted[kind].parent / f"{wanted[kind].name}.json").write_json(
            {**told, "format": kind, "compared": {"tasks": tasks, "largest_difference": apart}}
        )
        print(f"{wanted[kind]}: scores of {tasks} test tasks are within {apart:.1e} of the method's")
    for i in inputs:
        print(f"  {i['name']:<24} {i['dtype']:<8} {' x '.join(map(str, i['shape'])):<20} {i['meaning']}")
    print(f"  {'-> score':<24} {'float32':<8} users x candidates")


def _worst(
    method: "Method", graph: Callable[..., "Tensor"], dataset: Dataset, table: TaskTable, config: Config
) -> tuple[float, int]:
    """How far the graph is from the method on test tasks, as TOLERANCE has it, and on how many."""
    from distmeta.data.loader import Loader
    from distmeta.serving import export

    loader = Loader(table, dataset, "test", _TASKS, memory=config.train.memory_mb << 20)
    apart, tasks = 0.0, 0
    for batch in islice(loader.evaluation(), _BATCHES):
        for block, score in zip(batch, method.predict(method.adapt(batch), batch), strict=True):
            mask, found = block.query.mask, graph(*export.given(batch, block, method.dataset))
            off = ((found - score).abs() / score.abs().clamp(min=1))[mask]
            apart, tasks = max(apart, float(off.nan_to_num(float("inf")).max())), tasks + len(block.task)
    return apart, tasks


def _about(
    config: Config,
    run: Location,
    step: int,
    dataset: Dataset,
    place: Location,
    table: TaskTable,
    inputs: list[dict[str, Any]],
) -> dict[str, Any]:
    """What FILE.json says, enough to serve the graph without this package."""
    sides = {"user": dataset.user_fields, "item": dataset.item_fields}
    return {
        "method": config.method,
        "run": str(run),
        "step": step,
        "protocol": config.data.protocol,
        "split_hash": table.split_hash,
        "scenarios": table.scenarios,
        "inputs": inputs,
        "output": {"name": "score", "dtype": "float32", "shape": ["users", "candidates"]},
        "arguments": "user: {field: (indices,) or (indices, weights)}, support_item, support_label, support_mask,"
        " candidate" + (", (people, support_user, candidate_user)" if table.scenarios else ""),
        "label": dataclasses.asdict(dataset.label),
        "fields": {side: [dataclasses.asdict(f) for f in fields] for side, fields in sides.items()},
        "items": dataset.items,
        "dataset": dataset.name,
        "indices": f"of an item: its row in {place / 'items'}; of a field's value: {place / 'vocabularies'}",
    }
