"""Flags of `train` for the runs that a command makes: `--set [WHERE:]FLAG[=VALUE]`, and inner steps."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from distmeta.config import Config, DataOptions, TrainOptions
from distmeta.errors import UserError
from distmeta.methods import METHODS, entry


@dataclass(frozen=True)
class Setting:
    """One `--set [WHERE:]FLAG[=VALUE]`: a flag of `train` for the methods and data sets named, or for all."""

    where: tuple[str, ...]
    flag: str
    values: tuple[str, ...]
    text: str

    @classmethod
    def of(cls, text: str, command: str, taken: Collection[str]) -> "Setting":
        """Parse it; UserError where it is none, or sets what the command itself sets: the flags `taken`."""
        match = re.fullmatch(r"(?:([\w./-]+):)?([a-z][a-z0-9-]*)(?:=(.*))?", text.replace("_", "-"))
        if not match:
            raise UserError(
                f"{command}: --set {text!r} is not [WHERE:]FLAG[=VALUE]; say item-ids, lr=1e-3 or"
                " bookcrossing/hml:lr=1e-3"
            )
        where, flag, _ = match.groups()
        if flag in taken:
            raise UserError(f"{command}: --set {flag} is not possible: the command sets --{flag} itself")
        values = text.split("=", 1)[1].split(",") if "=" in text else ()
        return cls(tuple(where.split("/")) if where else (), flag, tuple(values), text)

    def argv(self) -> list[str]:
        return [f"--{self.flag}", *self.values]

    def meant_for(self, dataset: str, method: str) -> bool:
        """Whether it is for this method on this data set: all that it names, and a flag that the method has."""
        named = set(self.where)
        if not named <= {dataset, method}:
            return False
        return method in named or self.flag.removeprefix("no-") in flags_of(method)


EVERY = "*"
"""The key of a table's flags that are every row's."""


def of_flags(flags: Mapping[str, Sequence[str]]) -> list[Setting]:
    """A table's own flags (`PaperTable.flags`) as settings, the widest first: `*`, METHOD, DATASET, DATASET/METHOD."""
    found = []
    for key in sorted(flags, key=lambda k: (k != EVERY, "/" in k, k not in METHODS)):
        starts = [i for i, word in enumerate(flags[key]) if word.startswith("--")]
        for start, end in zip(starts, [*starts[1:], len(flags[key])], strict=True):
            flag, *values = flags[key][start:end]
            text = flag.removeprefix("--") + ("=" + ",".join(values) if values else "")
            where = () if key == EVERY else tuple(key.split("/"))
            found.append(
                Setting(where, flag.removeprefix("--"), tuple(values), ("" if not where else f"{key}:") + text)
            )
    return found


def told(settings: Sequence[Setting]) -> list[str]:
    """The settings in words, as --set takes them, without those that a later one of the same flag overrides."""
    found: list[Setting] = []
    for s in settings:
        flag, where = s.flag.removeprefix("no-"), set(s.where)
        found = [f for f in found if f.flag.removeprefix("no-") != flag or not where <= set(f.where)] + [s]
    heads = ["/".join(s.where) + ":" * bool(s.where) + s.flag for s in found]
    return [head + ("=" + ",".join(s.values) if s.values else "") for head, s in zip(heads, found, strict=True)]


def inner_steps(method: str, command: str) -> bool:
    """Whether the method has inner steps; a feed-forward one has none, nor one that does not adapt.

    Raises:
        UserError: it has a closed form, of which there are no steps to measure.
    """
    own = entry(method)
    if own.closed_form:
        able = " ".join(name for name, e in METHODS.items() if not e.closed_form)
        raise UserError(f"{command}: {method} has a closed form, without steps to measure; methods that have: {able}")
    return own.inner_steps


def told_steps(config: Config) -> str:
    """What a benchmark's case says of the method's adaptation: `5 steps` or `no steps`."""
    return f"{config.method_options.steps} steps" if entry(config.method).inner_steps else "no steps"


def flags_of(method: str) -> set[str]:
    """The flags of `train METHOD`, without their dashes."""
    sections = (DataOptions, TrainOptions, entry(method).options)
    return {f.name.replace("_", "-") for section in sections for f in dataclasses.fields(section)}
