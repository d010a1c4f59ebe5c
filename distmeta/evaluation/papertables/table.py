"""What a paper's table is made of, as data, and what its tables have in common."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

FLOORS = ("constant", "bias", "als")
"""Rows of ours in every table."""
JUDGED = ("bias", "als")
"""The floors that every method is compared with user by user."""


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
    table: str = ""
    """Which of the paper's tables prints it, where a page shows several."""
    ours: bool = True
    """Whether ours stand in it too."""


@dataclass(frozen=True)
class Section:
    """Rows under one heading, of one cohort."""

    title: str
    cohort: str
    printed: str = ""
    """One line a row: label | a cell a column, as the paper prints it; nothing for the last columns, where the paper
    has none of them. Empty: it has none at all."""
    columns: tuple[Column, ...] = ()
    """Its own, where it does not have the table's."""
    ours: tuple[str, ...] = ()
    """Labels of the rows of ours that stand in it; empty: all."""

    def rows(self, columns: int = 0) -> dict[str, list[Printed | None]]:
        """Label -> what the paper prints, by column; with None for the last of so many columns."""
        lines = [[cell.strip() for cell in line.split("|")] for line in self.printed.strip().splitlines()]
        found = {label: [printed(cell) for cell in cells] for label, *cells in lines}
        return {label: cells + [None] * (columns - len(cells)) for label, cells in found.items()}


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
class Key:
    """A column of a section that speaks for a table where there is no room for all."""

    section: int
    column: int
    paper: int | None = None
    """The column of the paper's number beside it, where that is of other data."""


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper and how it is reproduced."""

    name: str
    title: str
    protocol: str
    columns: tuple[Column, ...]
    """Of the sections that have none of their own."""
    sections: tuple[Section, ...]
    ours: tuple[Ours, ...]
    notes: tuple[str, ...]
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Whom they are for: `*` (every row), METHOD, DATASET or DATASET/METHOD -> flags of `train`. Of `*` and a DATASET
    a method takes those that it has; where several say the same flag, the narrower one counts, in this order."""
    digits: int = 3
    """Decimals that the paper prints."""
    boxes: bool = False
    """Whether per-user errors are drawn by method (PAML's Figures 5, 6)."""
    maps: bool = False
    """Whether the users' embeddings are drawn by group (PAML's Figure 11)."""
    floors: Mapping[str, str] = field(default_factory=lambda: {name: name for name in FLOORS})
    """Floor -> label of its row."""
    judged: tuple[str, ...] = JUDGED
    """Labels of the floors that every row of ours is compared with unit by unit."""
    seeds: int = 3
    """Split seeds 0 to this, without it, unless another number is asked for."""
    confidence: bool = False
    """Whether ± is 1.96 · sd / √seeds, and each seed is of training too (paper 002's appendix); else it is the sd."""
    percent: bool = False
    """Whether the paper prints shares in percent."""
    key: tuple[Key, ...] = (Key(0, 0),)
    """What a short page and the pictures show of it."""

    def columns_of(self, section: Section) -> tuple[Column, ...]:
        """The section's own columns, or else the table's."""
        return section.columns or self.columns

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets that ours are measured on."""
        return tuple(dict.fromkeys(c.dataset for s in self.sections for c in self.columns_of(s) if c.ours))


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
    "movielens-20m": "python -m jobs.prepare movielens-20m --raw ml-20m --out data/ml-20m",
    "taobao-cloud-theme": "python -m jobs.prepare taobao-cloud-theme --raw themes --out data/themes",
    "hybrid": "python -m jobs.prepare hybrid --of data/ml-20m data/themes --positive-from 0 --out data/hybrid",
}
"""How each data set is made."""
HEADS = {
    "movielens-1m": "MovieLens-1M",
    "bookcrossing": "Book-Crossing",
    "bookcrossing-complete": "Book-Crossing",
    "movielens-20m": "MovieLens-20M",
    "taobao-cloud-theme": "Taobao",
    "hybrid": "MovieLens-Taobao",
}
RARE = ("movielens-20m", "taobao-cloud-theme", "hybrid")
"""Data sets whose columns have the paper's numbers alone where they are not given, as not everybody can have them."""

S2META = (
    *("--embedding", "16", "--steps", "5", "--first-rate", "0.02", "--batch-size", "16", "--lr", "3e-3"),
    *("--epochs", "24", "--epoch-tasks", "1000", "--plateau", "1", "--lr-decay", "0.1"),
)
"""s²Meta's settings where tasks are users: an LSTM on every weight costs 25 ms a task, so that it sees 24,000 tasks."""
S2META_NOTE = (
    "s²Meta sees {} training tasks, a few passes where the others have ten or more: an LSTM on each of its weights"
    " makes a task cost some 25 ms, a dozen times MeLU's."
)

FLOOR_NOTE = (
    "constant, bias and als are fitted in closed form on the same splits: the mean of all training ratings; item and"
    " shrunk user offsets; alternating least squares whose new user is folded in by ridge regression."
)
SUBSET = (
    "Book-Crossing: explicit ratings 1 to 10. The 171k subset, where the data set's name says that it is one, is denser"
    " and more popular than the official 433,671 ratings (1,149,780 with those of 0)."
)
