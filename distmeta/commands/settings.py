"""Flags of `train` for the runs that a command makes: `--set [WHERE:]FLAG[=VALUE]`, and inner steps."""

import dataclasses
import re
from collections.abc import Collection
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


def inner_steps(method: str, command: str) -> bool:
    """Whether the method has inner steps; a feed-forward one has none.

    Raises:
        UserError: it is neither: it has a closed form, of which there are no steps to measure.
    """
    own = entry(method)
    if not own.inner_steps and not own.feed_forward:
        able = " ".join(name for name, e in METHODS.items() if e.inner_steps or e.feed_forward)
        raise UserError(f"{command}: {method} has a closed form, without steps to measure; methods that have: {able}")
    return own.inner_steps


def told_steps(config: Config) -> str:
    """What a benchmark's case says of the method's adaptation: `5 steps` or `feed-forward`."""
    return f"{config.method_options.steps} steps" if entry(config.method).inner_steps else "feed-forward"


def flags_of(method: str) -> set[str]:
    """The flags of `train METHOD`, without their dashes."""
    sections = (DataOptions, TrainOptions, entry(method).options)
    return {f.name.replace("_", "-") for section in sections for f in dataclasses.fields(section)}
