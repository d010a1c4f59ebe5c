"""Several runs judged together: `evaluate --run A B`."""

import re

import numpy as np
import polars as pl
import pytest

from distmeta import cli
from distmeta.commands.evaluate import pooled_table
from distmeta.evaluation.measured import ErrorHistogram, Measured
from distmeta.storage import Location


def frame(tasks: list[int], absolute: float) -> Measured:
    """Per-task sums with a MAE of `absolute` everywhere, two rows a task."""
    n = len(tasks)
    ones = {f"ndcg@{k}": [0.5] * n for k in (1, 3, 5, 10)}
    sums = {"n": [2] * n, "abs_sum": [2 * absolute] * n, "sq_sum": [1.0] * n}
    made = pl.DataFrame({"split": ["test"] * n, "task": tasks, "cohort": ["C-W"] * n, **sums, **ones})
    return Measured(made, None, ErrorHistogram(np.linspace(-4, 4, 3), np.zeros(2, np.int64)))


def test_pooled_differences_are_those_of_all_tasks_together():
    """Three tasks better by .3 and one better by .1: the mean over the four tasks, not over the two runs."""
    runs = [(frame([1, 2, 3], 0.5), {"bias": frame([1, 2, 3], 0.8)}), (frame([9], 0.6), {"bias": frame([9], 0.7)})]
    line = next(row for row in pooled_table(runs).splitlines() if row.startswith("C-W"))
    assert float(re.findall(r"[-+]\d\.\d+", line)[0]) == pytest.approx(-0.25)


def test_evaluate_takes_several_runs(small: Location, tmp_path, capsys):
    for seed in ("0", "1"):
        argv = ["train", "bias", "--data", str(small), "--split-seed", seed, "--run", str(tmp_path / seed)]
        assert cli.main(argv) == 0
    assert cli.main(["evaluate", "--run", str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    said = capsys.readouterr().out.split("all 2 runs together")[1]
    assert re.search(r"C-W +-\d", said)  # bias beats the constant, pooled


def test_runs_that_have_nothing_in_common_are_not_pooled(small: Location, tmp_path, capsys):
    """One number over two methods or two protocols would be believed."""
    for name, argv in (
        ("a", ["bias"]),
        ("method", ["constant"]),
        ("protocol", ["bias", "--protocol", "melu"]),
        ("options", ["bias", "--max-ratings", "20"]),
    ):
        assert cli.main(["train", *argv, "--data", str(small), "--run", str(tmp_path / name)]) == 0
    for name, says in (
        ("a", "is named twice"),
        ("method", "its method is constant, that of"),
        ("protocol", "its protocol is melu, that of"),
        ("options", "its set of protocol options is {'max_ratings': 20"),
    ):
        before = (tmp_path / "a" / "report.html").stat().st_mtime_ns
        capsys.readouterr()
        assert cli.main(["evaluate", "--run", str(tmp_path / "a"), str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
        assert (tmp_path / "a" / "report.html").stat().st_mtime_ns == before, "nothing was written"
