"""The canonical dataset: what `dataset.json`, `users/`, `items/` and `interactions/` hold (design §3).

DATASET/
  dataset.json                  manifest, written last: format version, label, fields, counts, files
  users/part-00000.parquet      user int32 (0 … n−1, row order), raw_id string, one column a field
  items/part-00000.parquet      item int32 (0 … n−1, row order), raw_id string, one column a field
  interactions/part-*.parquet   user int32, item int32, label float32, time int64 (seconds); sorted by (user, time);
                                and scenario int32 where the log says in which one each took place
  vocabularies/SIDE-FIELD.parquet   value string; row i is what index i stands for; row 0 is the unknown value
  vocabularies/interaction-scenario.parquet   value string; row i is the name of scenario i

Field columns: categorical int32 index; multi_categorical list<int32> of indices (empty = unknown);
numeric float32 (null = unknown; standardised by the field's mean and std where it is used).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from distmeta.errors import UserError
from distmeta.fields import nearest
from distmeta.storage import Location

FORMAT = 1
SCENARIOS = "vocabularies/interaction-scenario.parquet"
TASK_COLUMNS = ("task", "split", "cohort", "label", "time", "role", "row_cohort")
"""Columns of task tables besides user, item and the user's fields, which may not be called so."""
FieldType = Literal["categorical", "multi_categorical", "numeric"]


@dataclass(frozen=True)
class Field:
    """One feature of users or of items."""

    name: str
    type: FieldType
    size: int = 1
    """Number of indices, the unknown value 0 included; 1 for a numeric field."""
    mean: float = 0.0
    """Numeric fields: mean over the users or items that have a value."""
    std: float = 1.0
    """Numeric fields: standard deviation, 1 where it would be 0."""


@dataclass(frozen=True)
class Label:
    """What is predicted: a rating within [minimum, maximum], or a click (0 or 1)."""

    kind: Literal["rating", "click"]
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Dataset:
    """The manifest of a canonical dataset."""

    name: str
    label: Label
    user_fields: tuple[Field, ...]
    item_fields: tuple[Field, ...]
    users: int
    items: int
    interactions: int
    extra: dict[str, Any] = field(default_factory=dict)
    """What the source adds: counts of dropped rows, the Bayes-optimal error of a synthetic dataset, …"""
    scenarios: int = 0
    """The dataset's own scenarios; 0: interactions/ has no such column."""
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Table name ('users', 'items', 'interactions', 'vocabularies') -> [{"path", "rows", "bytes"}], paths relative."""

    def without(self, fields: Sequence[str]) -> "Dataset":
        """The dataset as a method is to know it, without some fields of users or items.

        Raises:
            UserError: it has no such field.
        """
        known = [f.name for f in (*self.user_fields, *self.item_fields)]
        for name in fields:
            if name not in known:
                raise UserError(
                    f"--leave-out {name}: {self.name} has no such field{nearest(name, known)}; its fields:"
                    f" {' '.join(known) or 'none'}"
                )
        user, item = (tuple(f for f in side if f.name not in fields) for side in (self.user_fields, self.item_fields))
        return replace(self, user_fields=user, item_fields=item)

    def to_json(self) -> dict[str, Any]:
        values = {"format": FORMAT, **asdict(self)}
        return values if self.scenarios else {k: v for k, v in values.items() if k != "scenarios"}

    @classmethod
    def open(cls, where: "str | Location") -> "Dataset":
        """Read DATASET/dataset.json.

        Raises:
            UserError: there is no dataset here, it is damaged, or of another format version.
        """
        location = Location.of(where)
        manifest = location / "dataset.json"
        if not manifest.exists():
            raise UserError(
                f"{location}: no dataset here (dataset.json is missing); make one with `python -m jobs.prepare`,"
                " or say with --data where it lies now"
            )
        raw = manifest.read_json("delete the folder and prepare the dataset again")
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else None
            raise UserError(
                f"{manifest}: format version {found!r}, this distmeta reads {FORMAT}; prepare the dataset again"
            )
        try:
            raw.pop("format")
            raw["label"] = Label(**raw["label"])
            for side in ("user_fields", "item_fields"):
                raw[side] = tuple(Field(**f) for f in raw[side])
            return cls(**raw)
        except (KeyError, TypeError) as e:
            raise UserError(f"{manifest}: damaged ({e}); prepare the dataset again") from None
