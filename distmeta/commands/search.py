"""`search`: tune methods on validation with Ray Tune; write the best config and a table of the trials."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distmeta import config as config_module
from distmeta.cli import Parser
from distmeta.commands import train
from distmeta.commands.settings import Setting, flags_of
from distmeta.config import Config
from distmeta.errors import UserError
from distmeta.methods import entry
from distmeta.parallel import rundir, submitted
from distmeta.storage import Location
from tune import spaces

if TYPE_CHECKING:
    import optuna

_TAKEN = ("data", "protocol", "run", "resume", "workers", "epochs", "threads", "seed", "config", "gpu")
"""Flags of `train` that the search sets itself."""
_MAY_DIFFER = ("resume", "out", "trials", "failures", "wait")
"""What --resume may say differently."""

_EPILOG = """\
examples:
  python -m tune.search melu --data data/ml-1m --protocol melu --trials 40 --out searches/first
  python -m tune.search melu hml --data data/ml-1m --trials 20 --out searches/two --set batch-size=32
  python -m tune.search --out searches/first --resume
  python -m jobs.train --config searches/first/melu/best.yaml --run runs/tuned

OUT/journal.log is an Optuna journal with a study for each method.
"""


def main(argv: Sequence[str]) -> int:
    """Run `search`; 0 when every method's best config is there.

    Raises:
        UserError: usage or bad input. RunError: more trials failed than may.
    """
    given = _parse(argv)
    submitted.check("--out", given.out)
    out = Location.of(given.out)
    if not out.is_local:
        raise UserError(
            f"--out {out}: must be a folder of this machine or on a shared disk: the journal is appended to"
        )
    asked = _asked(given, out)
    plans = {method: _Space.of(method, asked) for method in asked.methods}
    if not given.resume:
        _check_new(out)
    out.make_dir()
    with rundir.lock(out):
        (out / "search.json").write_json({k: v for k, v in vars(asked).items() if k != "resume"})
        return _search(asked, out, plans)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="search",
        usage="search METHOD [METHOD ...] --out OUT [flags]",
        description="Find better settings of methods by their validation error, with Ray Tune and Optuna.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="methods to tune, one after the other")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of the search")
    parser.add_argument("--data", default=argparse.SUPPRESS, help="dataset; default: a small synthetic one")
    parser.add_argument("--protocol", default=argparse.SUPPRESS, help="what becomes a task, as of train [cmml-user]")
    for name, kind, default, text in (
        ("trials", int, 40, "trials of each method, failed ones among them"),
        ("epochs", int, 30, "epochs of a trial, at most"),
        ("grace", int, 3, "epochs of every trial before it may be stopped"),
        ("threads", int, 1, "CPUs of a trial; as many trials run at a time as there is room for"),
        ("seed", int, 0, "of the sampler, and of training"),
        ("failures", float, 0.5, "share of the trials that may fail; beyond it the search stops"),
        ("wait", int, 180, "seconds to wait for a node that has room for a trial"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} [{default}]")
        parser.set_defaults(defaults={**(parser.get_default("defaults") or {}), name: default})
    parser.add_argument("--sampler", default=argparse.SUPPRESS, help="who proposes: tpe or random [tpe]")
    parser.add_argument("--pruning", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                        help="stop trials that fall behind, by ASHA [True]")  # fmt: skip
    parser.add_argument("--gpu", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                        help="a GPU for each trial [False]")  # fmt: skip
    parser.add_argument("--set", action="append", metavar="[METHOD:]FLAG=VALUE", default=argparse.SUPPRESS,
                        help="a flag of train for every trial; what it sets is not tuned")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the search in OUT")
    return parser.parse(argv)


def _asked(given: argparse.Namespace, out: Location) -> argparse.Namespace:
    """All settings: what was given, before what the search to go on with has, before the defaults.

    Raises:
        UserError: there is no such search, it was started otherwise, or a value makes no sense.
    """
    said = {k: v for k, v in vars(given).items() if k != "defaults"}
    if not said["methods"]:
        del said["methods"]
    asked = {"data": "", "protocol": "", "sampler": "tpe", "pruning": True, "gpu": False, "set": [], **given.defaults}
    if given.resume:
        if not (out / "search.json").exists():
            raise UserError(f"{out}: no search here to go on with (search.json is missing); leave --resume out")
        before = (out / "search.json").read_json("start a new search")
        for key, value in said.items():
            if key not in _MAY_DIFFER and key in before and before[key] != value:
                raise UserError(f"{out}: was started with {key} = {before[key]!r}, not {value!r}; start a new search")
        asked |= before
    elif "methods" not in said:
        raise UserError("search: name at least one METHOD (see search --help)")
    asked = argparse.Namespace(**{**asked, **said})
    for name, least in (("trials", 1), ("epochs", 1), ("grace", 1), ("threads", 1), ("seed", 0), ("wait", 1)):
        if getattr(asked, name) < least:
            raise UserError(f"search: --{name} must be at least {least}, not {getattr(asked, name)}")
    if not 0 <= asked.failures <= 1:
        raise UserError(f"search: --failures must be from 0 to 1, not {asked.failures:g}")
    if asked.sampler not in ("tpe", "random"):
        raise UserError(f"search: --sampler is {asked.sampler!r}; choose one of tpe random")
    if len(set(asked.methods)) < len(asked.methods):
        raise UserError(f"search: {' '.join(asked.methods)}: a method is named twice")
    return asked


def _check_new(out: Location) -> None:
    if (out / "search.json").exists():
        raise UserError(f"{out}: a search exists here; add --resume to go on with it, or choose another --out")
    others = [c.name for c in out.children() if c.name != ".lock"]
    if others:
        raise UserError(f"{out}: holds other things ({others[0]}); choose an --out that is empty or does not exist")


@dataclasses.dataclass(frozen=True)
class _Space:
    """The space of a method as one search has it, and the flags of `train` that all its trials share."""

    method: str
    space: spaces.Space
    common: tuple[str, ...]

    @classmethod
    def of(cls, method: str, asked: argparse.Namespace) -> "_Space":
        """UserError: an unknown flag or value, or nothing is left to tune."""
        settings = [Setting.of(text, "search", _TAKEN) for text in asked.set]
        for s in settings:
            for word in s.where:
                entry(word)
            if not any(s.flag.removeprefix("no-") in flags_of(m) for m in asked.methods):
                raise UserError(f"search: --set {s.text}: none of {' '.join(asked.methods)} has the flag --{s.flag}")
        mine = [s for s in settings if s.meant_for("", method)]
        full = spaces.space(method)
        space = full.without({s.flag.removeprefix("no-").replace("-", "_") for s in mine})
        if not space.parameters:
            raise UserError(f"search: --set leaves nothing of {method} to tune; leave one of its settings out")
        common = [method, "--epochs", str(asked.epochs), "--threads", str(asked.threads), "--seed", str(asked.seed)]
        common += ["--data", asked.data] if asked.data else []
        common += ["--protocol", asked.protocol] if asked.protocol else []
        common += ["--gpu"] if asked.gpu else []
        common += [word for s in mine for word in s.argv()]
        train.parse(common)
        return cls(method, space, tuple(common))

    def config(self, values: dict[str, Any], data: str = "", run: str = "") -> Config:
        """The config of a trial with these values: what `train` makes of the same flags."""
        config = train.parse([*self.common, *spaces.argv(values)])
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, data=data or config.data.data),
            train=dataclasses.replace(config.train, run=run),
        )

    def first(self) -> list[tuple[str, dict[str, Any]]]:
        """The trials to begin with: the method's defaults, and what its papers say; of each what there is to choose."""
        config = self.config({})
        flat = {**dataclasses.asdict(config.train), **dataclasses.asdict(config.method_options)}
        plain = {p.name: flat[p.name] for p in self.space.parameters}
        plain = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in plain.items()}
        plain |= self.space.defaults
        made = []
        for first in (spaces.First(spaces.DEFAULTS, {}), *self.space.first):
            values = {**plain, **first.values}
            made.append((first.source, {p.name: values[p.name] for p in self.space.parameters if p.active(values)}))
        return made


def _search(asked: argparse.Namespace, out: Location, plans: dict[str, _Space]) -> int:
    from distmeta.commands import search_pages, search_study
    from distmeta.data import protocols, tasktable
    from distmeta.data.schema import Dataset
    from distmeta.parallel import trials

    config = plans[asked.methods[0]].config({})
    place = Location.of(config.data.data) if config.data.data else train._small()
    dataset = Dataset.open(place)
    table = tasktable.make(place, config.data.protocol, config.data.split_seed, protocols.protocol_options(config.data))
    table.seen(dataset)
    for method in asked.methods:
        if table.scenarios and not entry(method).scenarios:
            raise UserError(f"{method} learns users and the tasks of {table.protocol} are scenarios; leave it out")
    winners: list[Location] = []
    with trials.connected(asked.threads, asked.gpu, asked.wait):
        for method, plan in plans.items():
            study = search_study.opened(out, method, asked.sampler, asked.seed, plan.first())
            where = (out / method).make_dir()
            print(f"{method} on {dataset.name}, {table.protocol}, {asked.trials} trials -> {where}")

            def ask(trial: "optuna.Trial", plan: _Space = plan, where: Location = where) -> tuple[str, dict[str, Any]]:
                name = trial.user_attrs.get("run") or f"{trial.number:04d}"
                values = search_study.suggest(trial, plan.space)
                return name, config_module.plain(plan.config(values, str(place), str(where / name)))

            wanted = trials.Plan(
                method, asked.trials, asked.epochs, asked.failures, asked.pruning, asked.grace, asked.threads,
                table.location, asked.gpu,
            )  # fmt: skip
            try:
                trials.search(study, wanted, ask, (out / ".ray").make_dir())
            finally:
                search_study.write_trials(study, where)
                search_pages.write(study, out, asked.methods, dataset.name, table.protocol, asked.threads)
            best = search_study.write_best(study, where)
            print(f"{method}: best validation error {best.value:.4f}; {where / 'best.yaml'}")
            winners.append(where / best.user_attrs["run"])
    (out / ".ray").remove()
    for run in winners:  # trained to its end: what is left of it is the test, which no other trial sees
        train.main(["--run", str(run), "--resume"])
    return 0
