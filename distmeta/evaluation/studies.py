"""MAMO's parameter studies (paper 003, Figures 2, 4 and 5) as data: what is varied, and what the paper says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from distmeta.evaluation.papertables import Ours
from distmeta.evaluation.papertables.mamo import MAMO_FLAGS


@dataclass(frozen=True)
class Panel:
    """One parameter, varied while all others stay."""

    name: str
    """What --panels calls it."""
    flag: str
    """Of `train`."""
    label: str
    """Its name in words, on the axis."""
    values: tuple[str, ...]
    """What it is set to; its default joins them where it is not among them."""
    paper: str
    """What the paper says of it."""
    same_tasks: bool = True
    """Whether all values have the same test users and query rows, so that they can be compared one by one."""


@dataclass(frozen=True)
class Study:
    """One figure of a paper and how it is reproduced."""

    name: str
    title: str
    dataset: str
    protocol: str
    ours: tuple[Ours, ...]
    """The curves; each is compared with the first too."""
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]
    splits: tuple[str, ...] = ("test",)
    """What is measured: new tasks, and maybe those trained on (`train`)."""
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """As a table's (`papertables.PaperTable`)."""
    seeds: int = 3
    """As a table's."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """As a table's."""
        return (self.dataset,)


METRICS = {"mae": "MAE", "ndcg@3": "NDCG@3"}
"""What a study measures, a mean over tasks of each (MAMO Eq. 13-15, the formula as printed)."""

_STUDIED = {"*": MAMO_FLAGS}
_MEANS = (
    "MAE and NDCG@3 are means over users (Eq. 13 to 15), not the paper's public code's NDCG, which sorts the 3 ranked"
    " highest once more. The paper's curves are pictures without numbers; what is quoted is its text."
)
_FLOORS = (
    "bias and als are fitted in closed form on the same training users and adapted to the same support. They have none"
    " of these parameters, so that their lines bend only where the tasks differ."
)
_SUPPORT = Panel(
    "support", "mamo-support", "support size", ("5", "8", "10", "12", "15"),
    "a larger sample is better, a smaller one still acceptable (§3.2.1).",
)  # fmt: skip

MAMO_2 = Study(
    name="mamo-fig2",
    title="MAMO, Figure 2: one parameter at a time",
    dataset="movielens-1m",
    protocol="mamo",
    flags=_STUDIED,
    seeds=2,
    ours=(Ours("MAMO", "mamo"),),
    panels=(
        Panel(
            "train", "train-share", "share of the users to train on", ("0.5", "0.6", "0.7", "0.8"),
            "a higher ratio improves the performance, half of the users is still acceptable (§3.2.1).",
            same_tasks=False,
        ),
        _SUPPORT,
        Panel(
            "layers", "layers", "embedding layers", ("1", "2", "3", "4"),
            "slight impact, too shallow or too deep may be bad; 2 is the default (§3.2.2, A.3).",
        ),
        Panel(
            "width", "width", "embedding size d_e", ("25", "50", "100", "200"),
            "a moderate size is acceptable and takes less training time; 100 is the default (§3.2.2, A.3).",
        ),
        Panel(
            "alpha", "alpha", "α, what is written to the profile memory", ("0", "0.25", "0.5", "0.75", "1"),
            "values around .5 are better (§3.2.3).",
        ),
        Panel(
            "beta", "beta", "β, what is written to the user embedding memory", ("0", "0.05", "0.1", "0.5", "1"),
            "too much new information causes chaos, .1 is best (§3.2.3); .05 is the default (A.3).",
        ),
        Panel(
            "gamma", "gamma", "γ, what is written to the task memory", ("0", "0.05", "0.1", "0.5", "1"),
            "best around .1, without a picture (§3.2.3).",
        ),
        Panel(
            "rho", "local-lr", "ρ, local step size", ("0.01", "0.03", "0.1", "0.3"),
            "small rates are best; .01 is the default (§3.2.3, A.3).",
        ),
        Panel(
            "lambda", "lr", "λ, global step size", ("0.0005", "0.001", "0.002", "0.005", "0.01"),
            "small rates are best; .05 is the default, of plain gradient descent (§3.2.3, A.3).",
        ),
        Panel(
            "tau", "tau", "τ, weight of the personal bias term", ("0", "0.05", "0.1", "0.2", "0.5"),
            "around .1 performs best, without a picture (§3.2.3).",
        ),
    ),
    notes=(
        "All but the varied parameter have our defaults, which differ from the paper's where ours do better.",
        "Share of the users to train on: the others are the test users, so that every value is measured on other users"
        " and only means stand side by side.",
        "Support size: the first of a user's 15 ratings before the last 5, which are the query throughout.",
        "λ is Adam's step size here and plain gradient descent's in the paper.",
        _MEANS,
        _FLOORS,
    ),
)  # fmt: skip

MAMO_4 = Study(
    name="mamo-fig4",
    title="MAMO, Figure 4: recommenders by support size",
    dataset="movielens-1m",
    protocol="mamo",
    flags=_STUDIED,
    seeds=2,
    ours=(
        Ours("MAMO", "mamo"),
        Ours("DNN", "mamo", ("--recommender", "dnn")),
        Ours("NMF", "mamo", ("--recommender", "nmf")),
    ),
    panels=(
        Panel(
            "support", "mamo-support", "support size", _SUPPORT.values,
            "DNN and NMF converge fast in training but do not perform well on test users with a small support; MAMO"
            " learns fast there (§3.4.2).",
        ),
    ),
    notes=(
        "MAMO: the task memory M_u,I before the layers of the recommender. DNN: the two embeddings joined, without it."
        " NMF: the product of the two embeddings.",
        "Training tasks: the trained model's best checkpoint, adapted to the training users' support and measured on"
        " their query, which it was trained on. Test tasks: new users. The paper's panels (a) and (c) may be of the"
        " course of training, which it does not say.",
        _MEANS,
        _FLOORS,
    ),
    splits=("train", "test"),
)  # fmt: skip

MAMO_5 = Study(
    name="mamo-fig5",
    title="MAMO, Figure 5 (a): the number of slots K",
    dataset="movielens-1m",
    protocol="mamo",
    flags=_STUDIED,
    seeds=2,
    ours=(Ours("MAMO", "mamo"),),
    panels=(
        Panel(
            "slots", "slots", "slots K", ("1", "2", "3", "4", "6", "8"),
            "K around 2 to 4 is best (§3.4.3).",
        ),
    ),
    notes=(_MEANS, _FLOORS),
)  # fmt: skip

STUDIES = {study.name: study for study in (MAMO_2, MAMO_4, MAMO_5)}
