"""What a search is asked for: its settings, and of each method the space that is searched and the trials to begin with.

Imports neither torch, ray nor optuna: bad input is told before they are loaded.
"""

import argparse
import dataclasses
from typing import Any

from distmeta.commands import train
from distmeta.commands.settings import Setting, flags_of
from distmeta.config import Config
from distmeta.errors import UserError
from distmeta.fields import nearest
from distmeta.methods import entry
from distmeta.storage import Location
from tune import spaces

SAMPLERS = ("tpe", "random", "qmc", "nsga2", "gp")
"""Who proposes a trial's values."""
METRICS = {False: ("mae", "mse"), True: ("recall@10", "recall@50")}
"""Whether tasks are scenarios -> what validation measures of them; the first is what training keeps checkpoints by."""
DEFAULTS = {
    "data": "", "protocol": "", "trials": 40, "epochs": 30, "grace": 3, "threads": 1, "seed": 0, "seeds": 1,
    "metric": "", "sampler": "tpe", "pruning": None, "pareto": False, "gpu": 0.0, "set": [], "failures": 0.5,
    "wait": 180, "workers_per_trial": 0,
}  # fmt: skip

_TAKEN = ("data", "protocol", "run", "resume", "retried", "workers", "epochs", "threads", "seed", "config", "gpu")
"""Flags of `train` that the search sets itself."""
_MAY_DIFFER = ("resume", "out", "trials", "failures", "wait")
"""What --resume may say differently."""
_LEAST = {"trials": 1, "epochs": 1, "grace": 1, "threads": 1, "seed": 0, "seeds": 1, "wait": 1,
          "workers_per_trial": 0}  # fmt: skip


def settle(said: dict[str, Any], out: Location) -> argparse.Namespace:
    """All settings: what was said, before what the search to go on with has, before the defaults.

    Raises:
        UserError: there is no such search, it was started otherwise, or a value makes no sense.
    """
    asked, said = dict[str, Any](DEFAULTS), dict(said)
    if not said["methods"]:
        said = {k: v for k, v in said.items() if k != "methods"}
    if said.get("data"):
        said = {**said, "data": str(Location.of(said["data"]))}
    if said.pop("retried", False):
        said["resume"] = said["resume"] or (out / "search.json").exists()
    if said["resume"]:
        before = _before(out)
        for key, value in said.items():
            if key not in _MAY_DIFFER and before.get(key, value) != value:
                raise UserError(f"{out}: was started with {key} = {before[key]!r}, not {value!r}; start a new search")
        asked |= before
    elif "methods" not in said:
        raise UserError("search: name at least one METHOD (see search --help)")
    settled = argparse.Namespace(**{**asked, **said})
    _check(settled)
    settled.pruning = not settled.pareto if settled.pruning is None else settled.pruning
    return settled


def _before(out: Location) -> dict[str, Any]:
    """The settings of the search in OUT; UserError where there is none, or something else."""
    file = out / "search.json"
    if not file.exists():
        raise UserError(f"{out}: no search here to go on with (search.json is missing); leave --resume out")
    before = file.read_json("start a new search")
    if not isinstance(before, dict) or not isinstance(before.get("methods"), list):
        raise UserError(f"{file}: is not what a search writes; start a new search")
    return before


def _check(asked: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        if getattr(asked, name) < least:
            raise UserError(f"search: --{name.replace('_', '-')} must be at least {least}, not {getattr(asked, name)}")
    if not 0 <= asked.gpu <= 1:
        raise UserError(f"search: --gpu must be from 0 to 1, the share of a GPU that a worker has, not {asked.gpu:g}")
    if not 0 <= asked.failures <= 1:
        raise UserError(f"search: --failures must be from 0 to 1, not {asked.failures:g}")
    if asked.sampler not in SAMPLERS:
        raise UserError(f"search: --sampler is {asked.sampler!r}; choose one of {' '.join(SAMPLERS)}")
    known = [name for names in METRICS.values() for name in names]
    if asked.metric and asked.metric not in known:
        near = nearest(asked.metric, known)
        raise UserError(f"search: --metric {asked.metric!r}: validation measures {' '.join(known)}{near}")
    if len(set(asked.methods)) < len(asked.methods):
        raise UserError(f"search: {' '.join(asked.methods)}: a method is named twice")
    if asked.pareto and asked.pruning:
        raise UserError("search: --pareto asks what training to the end costs: it stops no trial; leave --pruning out")
    if asked.pareto and asked.sampler == "gp":
        raise UserError("search: --sampler gp thinks too long about two objectives; with --pareto use tpe or nsga2")


def metric(asked: argparse.Namespace, scenarios: bool, protocol: str) -> str:
    """What trials are judged by; UserError where --metric names what validation does not measure of these tasks."""
    able = METRICS[scenarios]
    if asked.metric and asked.metric not in able:
        raise UserError(f"search: --metric {asked.metric}: validation of {protocol} measures {' '.join(able)}")
    return asked.metric or able[0]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The space of a method as one search has it, and the flags of `train` that all its trials share."""

    method: str
    space: spaces.Space
    common: tuple[str, ...]

    @classmethod
    def of(cls, method: str, asked: argparse.Namespace) -> "Tuned":
        """UserError: an unknown flag or value, or nothing is left to tune."""
        settings = [Setting.of(text, "search", _TAKEN) for text in asked.set]
        for s in settings:
            for word in s.where:
                entry(word)
            if not any(s.flag.removeprefix("no-") in flags_of(m) for m in asked.methods):
                near = nearest(s.flag, sorted(flags_of(method)))
                none = " nor ".join(asked.methods)
                raise UserError(f"search: --set {s.text}: {none} has no flag --{s.flag}{near}")
        mine = [s for s in settings if s.meant_for("", method)]
        common = [method, "--epochs", str(asked.epochs), "--threads", str(asked.threads), "--seed", str(asked.seed)]
        common += ["--data", asked.data] if asked.data else []
        common += ["--protocol", asked.protocol] if asked.protocol else []
        common += ["--gpu", str(asked.gpu)] if asked.gpu else []
        common += ["--workers", str(asked.workers_per_trial)] if asked.workers_per_trial else []
        common += [word for s in mine for word in s.argv()]
        train.parse(common)
        settled = {s.flag.removeprefix("no-").replace("-", "_") for s in mine}
        return cls(method, spaces.space(method), tuple(common)).without(settled, "--set")

    def without(self, names: set[str], why: str) -> "Tuned":
        """The same, with these parameters not tuned; UserError where nothing is left, for the reason `why`."""
        left = self.space.without(names)
        if not left.parameters:
            raise UserError(f"search: {why} leaves nothing of {self.method} to tune; leave one of its settings out")
        return dataclasses.replace(self, space=left)

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
