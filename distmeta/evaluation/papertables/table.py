"""What a paper's table is made of, as data, and what its tables have in common."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Printed:
    """A number of a paper, with its standard deviation where the paper has one."""

    mean: float
    sd: float | None = None
    starred: bool = False


@dataclass(frozen=True)
class Column:
    """One number of each row."""

    dataset: str
    metric: str
    """A key of a cohort's metrics in evaluation.json; `p`: of the t-test between the table's two groups."""
    head: str
    cohort: str = ""
    """Of this column; empty: that of the section."""


@dataclass(frozen=True)
class Section:
    """Rows under one heading, of one cohort."""

    title: str
    cohort: str
    printed: str = ""
    """One line a row: label | a cell a column of the table, as the paper prints it. Empty: the paper has none."""

    def rows(self) -> dict[str, list[Printed | None]]:
        """Label -> what the paper prints, by column."""
        lines = [[cell.strip() for cell in line.split("|")] for line in self.printed.strip().splitlines()]
        return {label: [printed(cell) for cell in cells] for label, *cells in lines}


@dataclass(frozen=True)
class Ours:
    """What we train for one row."""

    label: str
    """The paper's label of the row; another, where the paper has no such row."""
    method: str
    flags: tuple[str, ...] = ()
    """Of `train METHOD`, besides the method's own defaults."""
    against: tuple[str, ...] = ()
    """Labels of other rows of ours that it is compared with unit by unit, besides the floors."""


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper and how it is reproduced."""

    name: str
    title: str
    protocol: str
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    ours: tuple[Ours, ...]
    notes: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dataset, or DATASET/METHOD -> flags of `train` for every method on it, or for that one."""
    digits: int = 3
    """Decimals that the paper prints."""
    boxes: bool = False
    """Whether per-user errors are drawn by method (PAML's Figures 5, 6)."""
    maps: bool = False
    """Whether the users' embeddings are drawn by group (PAML's Figure 11)."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets that its columns are about."""
        return tuple(dict.fromkeys(column.dataset for column in self.columns))


_NUMBER = re.compile(r"(\d*\.\d+)(\*?)(?:\s*±\s*(\d*\.\d+))?")


def printed(cell: str) -> Printed | None:
    """A cell as the paper prints it; None for an empty one.

    Raises:
        ValueError: it is neither empty nor a number.
    """
    if not cell:
        return None
    match = _NUMBER.fullmatch(cell)
    if not match:
        raise ValueError(f"{cell!r} is not a number as the papers print them")
    mean, star, sd = match.groups()
    return Printed(float(mean), float(sd) if sd else None, bool(star))


PREPARE = {
    "movielens-1m": "python -m jobs.prepare movielens-1m --raw ml-1m --out data/ml-1m",
    "bookcrossing": "python -m jobs.prepare bookcrossing --raw BX --out data/bookcrossing",
    "bookcrossing-complete": "python -m jobs.prepare bookcrossing --raw BX --out data/bookcrossing-complete --complete",
}
"""How each data set is made."""
HEADS = {"movielens-1m": "MovieLens-1M", "bookcrossing": "Book-Crossing", "bookcrossing-complete": "Book-Crossing"}

FLOORS = ("constant", "bias", "als")
"""Rows of ours in every table."""
JUDGED = ("bias", "als")
"""The floors that every method is compared with user by user."""

FLOOR_NOTE = (
    "constant, bias and als are fitted in closed form on the same splits: the mean of all training ratings; item and"
    " shrunk user offsets; alternating least squares whose new user is folded in by ridge regression."
)
SUBSET = (
    "Book-Crossing: explicit ratings 1 to 10. The 171k subset, where the data set's name says that it is one, is denser"
    " and more popular than the official 433,671 ratings (1,149,780 with those of 0)."
)
