"""The runs behind a parameter study, and what they measured: on new tasks, and on those that they were trained on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distmeta.commands import reproduce_runs as runs
from distmeta.commands.reproduce_runs import Call, Run
from distmeta.data.tasktable import TaskTable
from distmeta.evaluation.papertables import JUDGED, Ours
from distmeta.evaluation.studies import Panel, Study
from distmeta.storage import Location

if TYPE_CHECKING:
    from distmeta.data.schema import Dataset
    from distmeta.evaluation.measured import Measured
    from distmeta.evaluation.study import Curves


@dataclass(frozen=True)
class Planned:
    """One panel of a study: the runs behind it."""

    panel: Panel
    values: tuple[Any, ...]
    """In order, the default among them."""
    default: Any
    curves: Mapping[str, tuple[tuple[Run, ...], ...]]
    """Label -> by value the runs by split seed."""

    def runs(self) -> list[Run]:
        """All of them; a run that stands for several points comes as often."""
        return [run for points in self.curves.values() for seeds in points for run in seeds]


def plan(study: Study, panels: Sequence[str], place: Location, call: Call) -> list[Planned]:
    """The runs of the panels named, of each curve and value on each split; a study that has none of them is made whole.

    Raises:
        UserError: a method is not there, or a setting is not one of its.
    """
    curves = [ours for ours in study.ours if ours.method in call.methods]
    plain = runs.make(study, study.dataset, place, curves[0], 0, call).config
    found = []
    for panel in [p for p in study.panels if p.name in panels] or study.panels:
        default = runs.value_of(plain, panel.flag)
        values = tuple(sorted({*map(type(default), panel.values), default}))
        made = {ours.label: tuple(_seeds(study, panel, ours, v, place, call) for v in values) for ours in curves}
        found.append(Planned(panel, values, default, made))
    return found


def _seeds(study: Study, panel: Panel, ours: Ours, value: Any, place: Location, call: Call) -> tuple[Run, ...]:
    point = dataclasses.replace(
        ours, label=f"{ours.label}, {panel.flag} {value:g}", flags=(*ours.flags, f"--{panel.flag}", f"{value!r}")
    )
    return tuple(runs.make(study, study.dataset, place, point, seed, call) for seed in range(call.seeds or study.seeds))


def gather(
    study: Study, planned: Sequence[Planned], place: Location, dataset: "Dataset", failed: Mapping[str, str]
) -> dict[str, "Curves"]:
    """What every point of a study came to, by panel; what no run has measured yet is measured.

    Args:
        failed: where runs lie that diverged -> what they said.

    Raises:
        UserError: a run is damaged, or of another split. RunError: a prediction on training tasks is not finite.
    """
    from distmeta.evaluation import evaluate as evaluation
    from distmeta.evaluation.study import Curves, Point

    tables: dict[str, TaskTable] = {}
    floors: dict[str, dict[str, Measured]] = {}
    measured: dict[str, dict[str, Measured]] = {}
    for run in (r for p in planned for r in p.runs()):
        where = str(run.where)
        if where in tables:
            continue
        tables[where] = table = runs.tasks(run, place)
        if str(table.location) not in floors:
            floors[str(table.location)] = evaluation.floors(table, dataset, place, JUDGED)
        if where not in failed:
            measured[where] = {split: _split(run, split, table, place, dataset) for split in study.splits}

    def point(seeds: Sequence[Run]) -> Point:
        said = [failed[str(r.where)] for r in seeds if str(r.where) in failed]
        if said:
            return Point({}, said[0])
        return Point({split: [measured[str(r.where)][split] for r in seeds] for split in study.splits})

    def beside(seeds: Sequence[Run]) -> "dict[str, list[Measured]]":
        theirs = [floors[str(tables[str(r.where)].location)] for r in seeds]
        return {floor: [one[floor] for one in theirs] for floor in JUDGED}

    return {
        p.panel.name: Curves(
            p.values,
            p.default,
            {label: [*map(point, by)] for label, by in p.curves.items()},
            [*map(beside, next(iter(p.curves.values())))],
        )
        for p in planned
    }


def _split(run: Run, split: str, table: TaskTable, place: Location, dataset: "Dataset") -> "Measured":
    """What a finished run comes to on one split; of others than `test` kept in the run, for the step measured."""
    from distmeta import process
    from distmeta.evaluation.measured import Measured
    from distmeta.parallel import assessment, rundir

    test = runs.measured(run, table)
    if split == "test":
        return test
    config, step = rundir.stored(run.where), assessment.best_step(run.where)
    file = run.where / f"measured-{split}-{step:09d}.arrow"
    if file.exists():
        return runs.read_measured(file, f"delete {file} to have it made again")
    print(f"{run.label}, split {run.seed}: measuring the {split} tasks")
    process.prepare(config.train.threads)
    found: Measured = assessment.assess_split(config, run.where, step, dataset, place, table, split)
    file.write_bytes(found.to_ipc())
    return found
