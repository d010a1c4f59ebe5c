"""`reproduce`: a paper's tables and parameter studies, and ours, from runs that are trained where they are missing."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distmeta.commands import reproduce_call, reproduce_costs, reproduce_results
from distmeta.commands.reproduce_costs import Costs
from distmeta.commands.settings import Setting, flags_of, of_flags, told
from distmeta.errors import RunError, UserError
from distmeta.evaluation.papertables import PaperTable
from distmeta.evaluation.studies import Study
from distmeta.fields import nearest
from distmeta.parallel import submitted
from distmeta.storage import Location

if TYPE_CHECKING:
    import argparse

    from distmeta.commands.reproduce_runs import Call, Run
    from distmeta.commands.reproduce_studies import Planned
    from distmeta.data.schema import Dataset
    from distmeta.evaluation.measured import Measured
    from distmeta.evaluation.study import Curves


def main(argv: Sequence[str]) -> int:
    """Run `reproduce`; 0 when the tables are there.

    Raises:
        UserError: usage or bad input. RunError: a run failed; the same command goes on.
    """
    if argv[:1] == ["which"]:
        from distmeta.commands import reproduce_which

        return reproduce_which.main(argv[1:])
    args = reproduce_call.parse(argv)
    kept = args.results != reproduce_call.NOWHERE
    if kept:
        submitted.check("--results", args.results)
    results = Location.of(args.results) if kept else None
    if args.report:
        from distmeta.commands import reproduce_report

        return reproduce_report.main(results, args.readme)
    wanted = reproduce_call.wanted(args)
    submitted.check("--out", args.out)
    return _make(args, wanted, results)


def _make(args: "argparse.Namespace", wanted: reproduce_call.Wanted, results: Location | None) -> int:
    from distmeta.commands import reproduce_runs as runs
    from distmeta.commands import reproduce_studies as studies
    from distmeta.commands.reproduce_jobs import train_missing

    jobs = reproduce_call.at_once(args.jobs, args.workers, args.threads)
    common = [w for f in ("workers", "threads", "epochs") if getattr(args, f) for w in (f"--{f}", getattr(args, f))]
    if not (args.jobs or args.workers or args.threads):
        common += ["--threads", "1"]  # whether one run or many are trained at once
    settings = [Setting.of(text, "reproduce", reproduce_call.TAKEN) for text in args.set]
    call = runs.Call(args.seeds, Location.of(args.out), wanted.methods, settings, common)
    places = wanted.places
    datasets = {name: runs.dataset_at(name, place) for name, place in places.items()}
    tables = [(t, runs.plan(t, places, call)) for t in wanted.asked if isinstance(t, PaperTable)]
    planned = [(s, studies.plan(s, args.panels, places[s.dataset], call)) for s in wanted.asked if isinstance(s, Study)]
    named = [(t.name, r) for t, found in tables for r in found]
    named += [(s.name, r) for s, found in planned for p in found for r in p.runs()]
    every = _distinct([run for _, run in named])
    _check_settings(settings, every)
    for run in every:
        runs.check(run)
    failed = train_missing(every, jobs, after=_keeper(results, named))
    pages = _Pages(args, call, datasets, places, results)
    for table, found in tables:
        if not any(str(run.where) in failed for run in found):
            pages.table(table, found)
    for study, found in planned:
        pages.study(study, found, failed)
    for costs in (a for a in wanted.asked if isinstance(a, Costs)):
        made = reproduce_costs.run(costs, places[costs.dataset], call.out, wanted.methods)
        pages.keep("costs", costs, made)
    _check_tables(tables, failed)
    if failed:
        raise RunError(f"{len(failed)} runs diverged, which the pages say: {', '.join(failed)}")
    return 0


def _keeper(results: Location | None, named: Sequence[tuple[str, "Run"]]) -> "Callable[[Run], None]":
    """What keeps a finished run's results."""
    rows: dict[str, set[str]] = {}
    for name, run in named:
        rows.setdefault(str(run.where), set()).add(f"{name}: {run.label}")

    def keep(run: "Run") -> None:
        if results:
            reproduce_results.keep_run(results, run, [*rows[str(run.where)]])

    return keep


def _check_tables(tables: Sequence[tuple[PaperTable, Sequence["Run"]]], failed: Mapping[str, str]) -> None:
    """RunError where a run of a table diverged: it has no row without its numbers."""
    for table, found in tables:
        for run in found:
            if said := failed.get(str(run.where)):
                raise RunError(f"{table.name}: {run.where}: {said}; give it other settings with --set")


def _check_settings(settings: Sequence[Any], runs: Sequence["Run"]) -> None:
    """UserError for a --set that reaches no run: a word of it is misspelt."""
    pairs = {(run.dataset, run.config.method) for run in runs}
    for s in settings:
        if any(s.meant_for(*pair) for pair in pairs):
            continue
        known = sorted({word for pair in pairs for word in pair})
        for word in s.where:
            if word not in known:
                raise UserError(
                    f"reproduce: --set {s.text}: no run of {word!r}{nearest(word, known)}; there are {' '.join(known)}"
                )
        flags = sorted({f for _, method in pairs for f in flags_of(method)})
        raise UserError(f"reproduce: --set {s.text}: no method here has --{s.flag}{nearest(s.flag, flags)}")


def _distinct(runs: Sequence["Run"]) -> list["Run"]:
    """Each once, split by split, so that a call that is cut short has finished the first splits."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(str(run.where), run)
    return sorted(found.values(), key=lambda run: run.seed)


class _Pages:
    """Writes what the finished runs came to: OUT/NAME.html, .md and .json, and RESULTS/NAME.json."""

    def __init__(
        self,
        args: "argparse.Namespace",
        call: "Call",
        datasets: Mapping[str, "Dataset"],
        places: Mapping[str, Location],
        results: Location | None,
    ) -> None:
        self.args, self.call, self.datasets, self.places, self.results = args, call, datasets, places, results

    def keep(
        self, kind: str, one: reproduce_call.Asked, found: Mapping[str, Any], planned: Sequence["Run"] = ()
    ) -> None:
        """RESULTS/NAME.json."""
        if not self.results:
            return
        pairs = {(run.dataset, run.config.method) for run in planned}
        reached = [s for s in self.call.settings if any(s.meant_for(*pair) for pair in pairs)]
        words = reproduce_results.command(one, self.args, self.places, reached)
        reproduce_results.keep(self.results, kind, found, words, planned)

    def table(self, table: PaperTable, planned: Sequence["Run"]) -> None:
        """OUT/TABLE.html, .md and, last, .json."""
        from distmeta.commands import reproduce_pictures as pictures
        from distmeta.commands import reproduce_runs as runs
        from distmeta.evaluation import evaluate as evaluation
        from distmeta.evaluation import reproduction, reproduction_page

        ours: dict[str, dict[str, list[Measured]]] = {}
        floors: dict[str, dict[str, list[Measured]]] = {}
        tables = {}
        for run in planned:
            place = self.places[run.dataset]
            if (run.dataset, run.seed) not in tables:
                tables[run.dataset, run.seed] = tasks = runs.tasks(run, place)
                found = evaluation.floors(tasks, tasks.seen(self.datasets[run.dataset]), place, [*table.floors])
                for name, one in found.items():
                    floors.setdefault(run.dataset, {}).setdefault(name, []).append(one)
            ours.setdefault(run.dataset, {}).setdefault(run.label, []).append(
                runs.measured(run, tables[run.dataset, run.seed])
            )
        compared = next(iter(tables.values())).compared
        hashes = {f"{dataset} {seed}": t.split_hash for (dataset, seed), t in tables.items()}
        made = reproduction.assemble(table, ours, floors, compared)
        made |= {**self._said(table), "split_hashes": hashes}
        figures = pictures.figures(table, planned, self.places, self.datasets, ours, floors, tables)
        out, text = self.call.out, reproduction_page.markdown(made)
        (out / f"{table.name}.html").write_bytes(reproduction_page.page(made, figures).encode())
        (out / f"{table.name}.md").write_bytes(text.encode())
        (out / f"{table.name}.json").write_json(made)
        self.keep("table", table, made, planned)
        print(f"\n{text}\n{out / table.name}.html, .md and .json")

    def study(self, study: Study, planned: Sequence["Planned"], failed: Mapping[str, str]) -> None:
        """OUT/STUDY.svg, .html, .md and, last, .json."""
        from distmeta.commands import reproduce_studies as studies
        from distmeta.evaluation import study as assembly
        from distmeta.evaluation import study_page, studycharts

        place, dataset = self.places[study.dataset], self.datasets[study.dataset]
        measured: dict[str, Curves] = studies.gather(study, planned, place, dataset, failed)
        found = assembly.assemble(study, measured)
        there = [p["name"] for p in found["panels"]]
        found |= {**self._said(study), "left_out": [p.name for p in study.panels if p.name not in there]}
        out, text = self.call.out, study_page.markdown(found)
        heads = {split: study_page.SPLITS[split] for split in study.splits}
        (out / f"{study.name}.svg").write_bytes(studycharts.sheet(found["panels"], heads, study.name).encode())
        (out / f"{study.name}.html").write_bytes(study_page.page(found).encode())
        (out / f"{study.name}.md").write_bytes(text.encode())
        (out / f"{study.name}.json").write_json(found)
        finished = [run for p in planned for run in p.runs() if str(run.where) not in failed]
        self.keep("study", study, found, finished)
        print(f"\n{text}\n{out / study.name}.html, .svg, .md and .json")

    def _said(self, one: PaperTable | Study) -> dict[str, Any]:
        """What a page says of the call that made it."""
        described = {name: self._described(name) for name in one.datasets}
        last = [Setting((), "epochs", (n,), "") for n in [self.args.epochs] if n]
        given = told([*of_flags(one.flags), *self.call.settings, *last])
        return {"seeds": self.call.seeds or one.seeds, "datasets": described, "settings": " ".join(given)}

    def _described(self, name: str) -> dict[str, Any] | None:
        dataset = self.datasets.get(name)
        if dataset is None:
            return None
        counts = {"users": dataset.users, "items": dataset.items, "interactions": dataset.interactions}
        return {"name": dataset.name, "location": str(self.places[name]), **counts}
