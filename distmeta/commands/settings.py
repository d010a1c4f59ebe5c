"""`--set [WHERE:]FLAG[=VALUE]`: flags of `train` for some of the runs that a command makes."""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass

from distmeta.config import DataOptions, TrainOptions
from distmeta.errors import UserError
from distmeta.methods import entry


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


def flags_of(method: str) -> set[str]:
    """The flags of `train METHOD`, without their dashes."""
    sections = (DataOptions, TrainOptions, entry(method).options)
    return {f.name.replace("_", "-") for section in sections for f in dataclasses.fields(section)}
