"""One object for the command line, YAML, Tune and the run directory: dataclasses whose fields say what they do.

YAML has the sections `method`, `data`, `train` and `method_options`; flags are flat, kebab-case and unprefixed.
Defaults < the method's own defaults < `--config FILE` < flags. An unknown key is an error that names the nearest one.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from distmeta.errors import UserError
from distmeta.storage import Location

T = TypeVar("T")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its default, the sentence that `--help` shows, and what it may be."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class DataOptions:
    """Which tasks to learn from."""

    data: str = option("", "Dataset directory or URI, made by `python -m jobs.prepare`. Default: a small synthetic dataset is made.")
    protocol: str = option("cmml-user", "How users become tasks: cmml-user or melu.", ("cmml-user", "melu"))
    split_seed: int = option(0, "Seed of the protocol's split; independent of --seed.")
    max_ratings: int = option(100, "cmml-user: keep a user's first N ratings by time (CMML's text says 50, its appendix 100).")


@dataclass(frozen=True)
class TrainOptions:
    """How to learn."""

    run: str = option("", "Run directory or URI. Default: runs/METHOD-DATASET-TIME.")
    resume: bool = option(False, "Go on with a run that exists, from its newest complete checkpoint.")
    workers: int = option(0, "Ray Train workers; 0 trains in this process without Ray.")
    seed: int = option(0, "Seed of the initial parameters, the task order and every draw.")
    epochs: int = option(30, "Passes over the training tasks, at most.")
    patience: int = option(5, "Stop after this many epochs without a better validation error; 0 never stops early.")
    batch_size: int = option(64, "Tasks a meta-update.")
    lr: float = option(1e-3, "Step size of the meta-update (Adam).")
    lr_decay: float = option(1.0, "The meta step size shrinks to this fraction of itself over --epochs, along a cosine.")
    weight_decay: float = option(0.0, "Decoupled weight decay of the meta-update (AdamW).")
    clip: float = option(10.0, "Largest norm of a meta-gradient; 0 leaves it alone.")
    redraw_query: bool = option(True, "Draw each training task's query anew every epoch, where the protocol leaves it open.")
    checkpoint_steps: int = option(0, "Checkpoint every N meta-updates besides the end of each epoch; 0: only there.")
    threads: int = option(0, "CPU threads of each worker; 0: the cores divided by the workers.")
    gpu: bool = option(False, "Compute on a GPU.")


@dataclass(frozen=True)
class Config:
    """Everything that determines a run; RUN/config.yaml holds it."""

    method: str
    method_options: Any
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the name most like `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def add_flags(parser: argparse.ArgumentParser, section: type, title: str) -> None:
    """Add one flag a field of the dataclass `section`, grouped under `title`; absent flags stay absent."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        flag = "--" + f.name.replace("_", "-")
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} [{default}]".replace("%", "%%")}
        if hints[f.name] is bool:
            kwargs |= {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(hints[f.name]) is tuple:
            kwargs |= {"type": typing.get_args(hints[f.name])[0], "nargs": "+", "metavar": "N"}
        else:
            kwargs |= {"type": hints[f.name], "choices": f.metadata["choices"], "metavar": hints[f.name].__name__.upper()}
            if kwargs["choices"]:
                kwargs["metavar"] = "|".join(kwargs["choices"])
        group.add_argument(flag, **kwargs)


def build(section: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `section` from `values`, each checked against its field's type and choices.

    Raises:
        UserError: a key that is no field (names the nearest), or a value of the wrong type; `where` starts the sentence.
    """
    hints = typing.get_type_hints(section)
    known = {f.name: f for f in dataclasses.fields(section)}  # type: ignore[arg-type]
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}; known: {' '.join(known) or 'none'}")
        checked[key] = _checked(value, hints[key], f"{where}: {key}")
        choices = known[key].metadata.get("choices")
        if choices and value not in choices:
            raise UserError(f"{where}: {key} is {value!r}{nearest(str(value), choices)}; choose one of {' '.join(choices)}")
    return section(**checked)


def _checked(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        return tuple(_checked(v, typing.get_args(hint)[0], where) for v in value)
    if isinstance(hint, types.UnionType):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def read_yaml(location: Location) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader: a config cannot execute code); UserError naming the file and line."""
    try:
        raw = yaml.safe_load(location.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{location}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{location}{line}: not readable as YAML; mend or rewrite it") from None
    if not isinstance(raw, dict):
        raise UserError(f"{location}: must hold the sections method, data, train, method_options")
    return raw


def load(file: Location | None, method: str | None, flags: Mapping[str, Any]) -> Config:
    """A Config from a YAML file (or none), METHOD on the command line (or none) and flags.

    Raises:
        UserError: unknown method, section, key or flag, or a value of the wrong type.
    """
    from distmeta.methods import entry  # the registry needs option() from here

    raw = read_yaml(file) if file else {}
    where = str(file) if file else "command line"
    sections = ("method", "data", "train", "method_options")
    for key, value in raw.items():
        if key not in sections:
            raise UserError(f"{where}: unknown section {key!r}{nearest(key, sections)}; sections: {' '.join(sections)}")
        if key != "method" and not isinstance(value, dict):
            raise UserError(f"{where}: section {key} must hold key: value lines")
    name = method or raw.get("method") or "melu"
    chosen = entry(str(name))
    built = {}
    for section, cls, defaults in (
        ("data", DataOptions, {}), ("train", TrainOptions, chosen.train), ("method_options", chosen.options, {}),
    ):
        file_values = raw.get(section, {}) if section != "method_options" or name == raw.get("method", name) else {}
        mine = {f.name for f in dataclasses.fields(cls)}
        build(cls, file_values, f"{where}, section {section}")
        built[section] = build(cls, {**defaults, **file_values, **{k: v for k, v in flags.items() if k in mine}}, where)
    return Config(str(name), built["method_options"], built["data"], built["train"])


def to_yaml(config: Config) -> str:
    """The config as RUN/config.yaml holds it; `load` reads it back to an equal Config."""
    plain = {
        "method": config.method,
        "data": dataclasses.asdict(config.data),
        "train": dataclasses.asdict(config.train),
        "method_options": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config.method_options).items()},
    }
    return yaml.safe_dump(plain, sort_keys=False)
