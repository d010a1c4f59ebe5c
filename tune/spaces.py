"""What there is to tune of each METHOD: one search space a method, as plain data, without ray or optuna.

A parameter is called as the option of `train` that it sets. What the papers say stands in `first`: trials that are
made before the sampler has a say, after that of the method's defaults. Where they give no value, the sampler chooses.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from distmeta.errors import UserError
from distmeta.methods import METHODS, entry

Value = float | int | str | bool
"""Of a parameter; an option that is a list has its words in one string, `64 64`."""


DEFAULTS = "the method's defaults"
"""Source of the trial that every search begins with."""


@dataclass(frozen=True)
class Parameter(ABC):
    """One option to tune. `when` = (another parameter, its values): there is nothing to choose otherwise."""

    name: str
    when: tuple[str, tuple[Value, ...]] | None = field(default=None, kw_only=True)

    def active(self, values: Mapping[str, Value]) -> bool:
        """Whether there is something to choose, with the parameters before it chosen so."""
        return self.when is None or values.get(self.when[0]) in self.when[1]

    @abstractmethod
    def holds(self, value: Value) -> bool:
        """Whether the space has this value."""

    @abstractmethod
    def ends(self) -> tuple[Value, ...]:
        """The values between which all lie, or all there are."""


@dataclass(frozen=True)
class Float(Parameter):
    """A number from `low` to `high`, both included; on a log scale where `log`."""

    low: float
    high: float
    log: bool = True

    def holds(self, value: Value) -> bool:
        return isinstance(value, float) and self.low <= value <= self.high

    def ends(self) -> tuple[Value, ...]:
        return self.low, self.high


@dataclass(frozen=True)
class Int(Parameter):
    """A whole number from `low` to `high`, both included; on a log scale where `log`."""

    low: int
    high: int
    log: bool = False

    def holds(self, value: Value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def ends(self) -> tuple[Value, ...]:
        return self.low, self.high


@dataclass(frozen=True)
class Choice(Parameter):
    """One of a few values without an order."""

    values: tuple[Value, ...]

    def holds(self, value: Value) -> bool:
        return any(type(value) is type(v) and value == v for v in self.values)

    def ends(self) -> tuple[Value, ...]:
        return self.values


@dataclass(frozen=True)
class First:
    """A trial that somebody's paper asks for; what it leaves open is as the method's defaults."""

    source: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Space:
    """The parameters of a method, conditional ones after what they depend on, and the first trials."""

    parameters: tuple[Parameter, ...]
    first: tuple[First, ...] = ()
    defaults: Mapping[str, Value] = field(default_factory=dict)
    """In the words of this space, defaults that say `as another option`: 0 units, no hidden layers."""

    def without(self, names: set[str]) -> "Space":
        """The space with these parameters settled otherwise; a condition on one of them falls with it."""
        left = tuple(p for p in self.parameters if p.name not in names and not (p.when and p.when[0] in names))
        first = tuple(First(f.source, {k: v for k, v in f.values.items() if k not in names}) for f in self.first)
        return Space(left, first, {k: v for k, v in self.defaults.items() if k not in names})


def argv(values: Mapping[str, Value]) -> list[str]:
    """The flags of `train` that set `values`."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *str(value).split()]
    return words


def space(method: str) -> Space:
    """The search space of METHOD.

    Raises:
        UserError: there is no such method, or nothing to tune of it.
    """
    entry(method)
    if method not in SPACES:
        able = " ".join(m for m in METHODS if m in SPACES)
        raise UserError(f"search: {method} has nothing to tune; methods that have: {able}")
    return SPACES[method]


_UPDATE = (
    Float("lr", 3e-4, 1e-2),
    Int("batch_size", 8, 128, log=True),
    Choice("weight_decay", (0.0, 1e-6, 1e-5, 1e-4)),
)
_LAYERS = Choice("hidden", ("32 32", "64 64", "128 128", "64 64 64", "128 64"))
_NETWORK = (Choice("embedding", (8, 16, 32, 64)), _LAYERS)
_LOSS = Choice("query_loss", ("squared", "absolute"))
_INNER = (Int("steps", 1, 8), Float("local_lr", 1e-3, 0.5), _LOSS)
_MAML = (*_UPDATE, *_NETWORK, *_INNER)
_RATES = (Choice("learn_rates", (True, False)),)

_ONE_STEP = {"steps": 1}
_MELU = First("paper 002, §7.2.2: MeLU and MetaDNN, 3e-4", {"lr": 3e-4, "learn_rates": False, **_ONE_STEP})
_PAML = First("paper 001, Eq. 1: one inner step", _ONE_STEP)

_CONTEXT = (
    Float("lr", 1e-4, 1e-2),
    Int("batch_size", 8, 128, log=True),
    Float("weight_decay", 1e-6, 1e-3),
    Choice("embedding", (8, 16, 32, 64)),
    Choice("encoder", ("mean", "max", "gru")),
    Choice("units", (64, 128, 256), when=("encoder", ("gru",))),
    Choice("labels", ("product", "embedding")),
    Choice("hybrid", ("none", "dot", "mlp")),
    Choice("hyper", (64, 128, 256)),
    Choice("hyper_bias", (0.0, 0.1)),
    Float("hidden_support", 0.0, 0.2, log=False),
)
_BACKBONE = (Choice("hidden", ("64 64", "64 64 64", "128 128")),)
_USER = {"encoder": "mean", "hyper": 256}
_CMML_USER = {"lr": 1e-4, "weight_decay": 1e-5, "encoder": "mean", "hyper": 256, "labels": "embedding"}
_CMML_SCENARIO = {"lr": 1e-4, "weight_decay": 1e-5, "encoder": "gru", "units": 256, "hyper": 64, "labels": "embedding"}


def _cmml(more: tuple[Parameter, ...], user: dict[str, Value], scenario: dict[str, Value]) -> Space:
    """CMML's space with a variant's own parameters; `user`, `scenario`: its sizes in the paper's two settings."""
    first = (
        First("paper 002, §7.2.2: users", {**_CMML_USER, **user}),
        First("paper 002, §7.2.1: scenarios", {**_CMML_SCENARIO, **scenario}),
    )
    return Space((*_CONTEXT, *more), first, {**_USER, **user})


_RUM = Space(
    (
        Float("lr", 1e-4, 1e-1),
        Int("batch_size", 8, 128, log=True),
        Choice("weight_decay", (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
        Choice("embedding", (8, 16, 32, 64)),
        Choice("width", (10, 20, 30, 40, 50)),
        Choice("slots", (5, 10, 20, 50)),
        Float("alpha", 0.0, 1.0, log=False),
        Choice("labels", ("residual", "product", "none")),
        Choice("biases", ("user", "item", "none")),
        Int("steps", 0, 5),
        Float("local_lr", 1e-2, 3.0),
    ),
    tuple(
        First(
            f"paper 003, A.2.2: K = 20, width {width}, α = {alpha}",
            {"slots": 20, "width": width, "alpha": alpha, "lr": lr, "labels": "none", "biases": "none", "steps": 0},
        )
        for width, alpha, lr in ((50, 0.2, 1e-2), (20, 0.5, 1e-3))
    ),
)
_CONET = Space(
    (
        Float("lr", 1e-4, 1e-2),
        Int("batch_size", 8, 128, log=True),
        Choice("weight_decay", (0.0, 1e-6, 1e-5, 1e-4)),
        Choice("embedding", (8, 16, 32, 64)),
        Choice("hidden", ("64 32", "64 32 16", "64 32 16 8", "128 64 32")),
        Choice("source_items", (4, 16, 64)),
        Float("source_weight", 0.01, 3.0),
    ),
    (First("Hu et al., CoNet: layers of 64, 32, 16 and 8", {"hidden": "64 32 16 8"}),),
)
_CMML = _cmml(_BACKBONE, {"hidden": "64 64"}, {"hidden": "64 64 64"})

_TUNING = (
    Int("steps", 0, 40),
    Float("local_lr", 1e-4, 3e-2),
    Float("tune_penalty", 0.3, 300.0),
    Choice("tuned", ("all", "layers", "user")),
)
_JOINT = (*_UPDATE, *_NETWORK, Choice("user_ids", (False, True)), *_TUNING)
_DCN = First("paper 002, §7.2.2: 3 cross layers, 64 64, 1e-3", {"lr": 1e-3, "weight_decay": 1e-5, "cross_layers": 3})
_DCN_F = {"steps": 5, "local_lr": 2e-4, "tuned": "layers", "tune_penalty": 0.3}
_CROSS = Int("cross_layers", 1, 6)

SPACES: dict[str, Space] = {
    "melu": Space((*_MAML, *_RATES), (_MELU,)),
    "metacs": Space((*_MAML, *_RATES), (_MELU,)),
    "metasgd": Space(
        (*_MAML, Choice("tuned", ("decision", "all"))),
        (First("paper 001, its baseline: one inner step", _ONE_STEP),),
    ),
    "hml": Space(
        (
            *_MAML,
            *_RATES,
            Int("clusters", 2, 8),
            Choice("own", ("decision", "all")),
            Choice("htc", ("support", "query")),
            Int("htc_steps", 0, 3),
            Int("warm_epochs", 0, 10),
        ),
        (First("paper 000, Alg. 1: one step, clusters by the query", {"htc": "query", "htc_steps": 1, **_ONE_STEP}),),
    ),
    "paml": Space((*_MAML, *_RATES, Choice("rate_hidden", (16, 32, 64)), Choice("history", (False, True))), (_PAML,)),
    "reg-paml": Space(
        (
            *_MAML,
            *_RATES,
            Choice("rate_hidden", (16, 32, 64)),
            Choice("history", (False, True)),
            Float("gamma", 1e-5, 1e-1),
        ),
        (
            First("paper 001: γ = 1e-3 by default", {"gamma": 1e-3, **_ONE_STEP}),
            First("paper 001, the table of γ: 1e-4", {"gamma": 1e-4, **_ONE_STEP}),
        ),
    ),
    "at-paml": Space(
        (
            *_MAML,
            *_RATES,
            Choice("rate_hidden", (16, 32, 64)),
            Choice("history", (False, True)),
            Int("nearest", 2, 32, log=True),
            Float("node_lr", 1e-3, 1.0),
            Choice("kernel", (0.0, 0.1, 1.0, 10.0)),
        ),
        (_PAML,),
    ),
    "mamo": Space(
        (
            Float("lr", 3e-4, 5e-2),
            *_UPDATE[1:],
            Choice("hidden", ("32", "64", "128", "64 64")),
            *_INNER,
            *_RATES,
            Choice("width", (32, 50, 64, 100)),
            Int("layers", 1, 3),
            Int("slots", 2, 8),
            Float("temperature", 1.0, 100.0),
            Float("alpha", 0.05, 1.0, log=False),
            Float("beta", 5e-3, 0.5),
            Float("gamma", 5e-3, 0.5),
            Float("tau", 1e-2, 1.0),
        ),
        (
            First(
                "paper 003, A.3: MovieLens",
                {"width": 100, "layers": 2, "local_lr": 0.01, "lr": 0.05, "learn_rates": False}
                | {"alpha": 0.5, "beta": 0.05, "gamma": 0.1, "tau": 0.1, "temperature": 1.0},
            ),
            First(
                "paper 003, A.3: BookCrossing",
                {"width": 50, "layers": 2, "local_lr": 0.01, "lr": 0.01, "learn_rates": False}
                | {"alpha": 0.5, "beta": 0.1, "gamma": 0.1, "tau": 0.15, "temperature": 1.0},
            ),
        ),
    ),
    "cmml-linear": _CMML,
    "cmml-sigmoid": _CMML,
    "cmml-film": _cmml(
        (*_BACKBONE, Choice("one_plus", (True, False))),
        {"hidden": "64 64"},
        {"hidden": "64 64 64", "one_plus": False},
    ),
    "cmml-softm": _cmml(
        (
            Float("embedding_std", 0.05, 1.0),
            Int("modules", 2, 8),
            Choice("module_width", (16, 32, 64)),
            Int("module_layers", 1, 4),
        ),
        {"module_layers": 2},
        {"module_layers": 3, "modules": 4, "module_width": 32},
    ),
    "s2meta": Space(
        (
            Float("lr", 1e-4, 1e-2),
            Int("batch_size", 1, 128, log=True),
            _UPDATE[2],
            Choice("plateau", (0.2, 0.5, 1.0)),
            _NETWORK[0],
            Choice("hidden", ("32 32", "64 64", "64 32 16", "128")),
            Choice("steps", (5, 10, 20)),
            Int("least_steps", 1, 5),
            Choice("units", (8, 16, 32)),
            Float("first_rate", 1e-2, 0.5),
            Float("forget", 3.0, 8.0, log=False),
            Choice("penalty", (0.0, 1e-4, 1e-3)),
        ),
        (
            First(
                "its code, MovieLens: 64 32 16, 4 to 20 steps, Adam 1e-4",
                {"lr": 1e-4, "batch_size": 1, "weight_decay": 1e-5, "plateau": 0.2, "hidden": "64 32 16"}
                | {"steps": 20, "least_steps": 4, "units": 16, "first_rate": 0.5, "forget": 5.0, "penalty": 0.0},
            ),
        ),
    ),
    "transfer": Space(
        (
            *_UPDATE,
            *_NETWORK,
            Int("steps", 1, 64, log=True),
            Float("local_lr", 1e-3, 0.5),
            Choice("tuned", ("all", "decision")),
            _LOSS,
        )
    ),
    "widedeep": Space((*_JOINT, Choice("crosses", (0, 16, 64, 256)))),
    "deepfm": Space(_JOINT),
    "dcn": Space((*_JOINT, _CROSS), (_DCN,)),
    "dcn-f": Space(
        (*_JOINT, _CROSS),
        (First("paper 002, §7.2.2: five steps of 2e-4 besides", {**_DCN.values, **_DCN_F}),),
    ),
    "rum-item": _RUM,
    "rum-feature": _RUM,
    "conet": _CONET,
    "itempop": Space((Choice("counts", ("auto", "global")),)),
    "itemmean": Space((Float("shrink", 0.1, 100.0),)),
    "bias": Space((Float("shrink", 0.1, 100.0), Float("shrink_user", 0.1, 100.0), Int("passes", 2, 12))),
    "als": Space((Int("factors", 1, 64, log=True), Float("penalty", 0.5, 100.0), Int("passes", 4, 30))),
    "ials": Space(
        (
            Int("factors", 4, 128, log=True),
            Float("alpha", 1.0, 1000.0),
            Float("penalty", 1.0, 1000.0),
            Float("shrink", 0.5, 100.0),
            Int("passes", 4, 20),
        )
    ),
}
