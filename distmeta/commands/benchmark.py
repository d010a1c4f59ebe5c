"""`benchmark`: measure this machine; each measurement is a file of its own."""

import importlib
from collections.abc import Sequence

from distmeta.cli import Parser
from distmeta.errors import UserError
from distmeta.fields import nearest
from distmeta.parallel import submitted
from distmeta.storage import Location

BENCHMARKS = {
    "adaptation": "the inner loop: dual form against private matrices, vmap and a loop over tasks",
    "input": "task tables: users a second, read, permuted and padded",
    "methods": "training end to end on a dataset: users a second of each method, and its wait for input",
    "neighbours": "the index of AT-PAML: searches, stores and merges a second, recall, memory",
    "search": "a search's CPUs, and ASHA and TPE with half of random search's training epochs",
    "serving": "one new user's support and candidates to scores: in eager, exported, as ONNX, and melu",
    "scaling": "workers on this machine against independent processes: users a second, exchange, wait, start-up",
}
_HELP = (
    "usage: benchmark NAME [--json FILE] [...]\n\n"
    + "\n".join(f"  {name:<12} {text}" for name, text in BENCHMARKS.items())
    + "\n\n--json FILE also writes the rows as a JSON list. `benchmark NAME --help` explains each.\n"
)


def main(argv: Sequence[str]) -> int:
    """Run one benchmark, which prints its rows; 0 when they are written.

    Raises:
        UserError: usage.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    name, rest = argv[0], list(argv[1:])
    if name not in BENCHMARKS:
        near = nearest(name, BENCHMARKS)
        raise UserError(f"benchmark: unknown benchmark {name!r}{near}; benchmarks: {' '.join(BENCHMARKS)}")
    parser = Parser(prog=f"benchmark {name}", add_help=False)
    parser.add_argument("--json", metavar="FILE")
    own, others = parser.parse_known_args(rest)
    if own.json:
        submitted.check("--json", own.json)
    rows = importlib.import_module(f"distmeta.commands.benchmark_{name}").main(others)
    if own.json:
        Location.of(own.json).write_json(rows)
        print(f"rows     {own.json}")
    return 0
