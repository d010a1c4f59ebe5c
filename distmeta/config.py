"""One object for the command line, YAML, Tune and the run directory: dataclasses that explain themselves.

YAML has the sections `method`, `data`, `train` and `method_options`; flags are flat, kebab-case, unprefixed.
Defaults < the method's own defaults < `--config FILE` < flags. An unknown key is an error naming the nearest.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from distmeta import yamlfile
from distmeta.errors import UserError
from distmeta.fields import build, nearest, option
from distmeta.methods import entry
from distmeta.storage import Location

SECTIONS = ("method", "data", "train", "method_options")
FREE = frozenset(
    {"data.data"}
    | {
        f"train.{k}"
        for k in (
            "run",
            "resume",
            "retried",
            "workers",
            "max_failures",
            "wait",
            "exchange_timeout",
            "epochs",
            "patience",
            "checkpoint_steps",
            "threads",
            "gpu",
            "floors",
        )
    }
)
"""Keys that `--resume` may change; see `fixed`."""


@dataclass(frozen=True)
class DataOptions:
    """Which tasks to learn from."""

    data: str = option(
        "",
        "Dataset directory or URI, made by `python -m jobs.prepare`. Default: a small synthetic one is made.",
    )
    protocol: str = option(
        "cmml-user",
        "What becomes a task: users (cmml-user, melu, mamo, paml, hml) or scenarios (cmml-scenario).",
        ("cmml-user", "cmml-scenario", "melu", "mamo", "paml", "hml"),
    )
    split_seed: int = option(0, "Seed of the protocol's split; independent of --seed.", least=0)
    leave_out: tuple[str, ...] = option(
        (),
        "Fields of users or items that the method is not told, such as one that is as good as the user's id: a method"
        " may learn its training users by heart from that.",
    )
    max_ratings: int = option(
        100,
        "cmml-user: keep a user's first N ratings by time (CMML's text says 50, its appendix 100).",
        least=1,
    )
    clip_training: bool = option(
        False,
        "cmml-user: clip the training users to --max-ratings too, as CMML's code does, instead of their episodes.",
    )
    cold_users: str = option(
        "", "melu: text file of the cold users' raw ids, one a line. Default: 20 % of the users by hash."
    )
    mamo_ratings: int = option(20, "mamo: keep a user's first N ratings by time.", least=2)
    mamo_query: int = option(5, "mamo: the last N of them are the query.", least=1)
    mamo_support: int = option(15, "mamo: the first N of the others are the support.", least=1)
    mamo_drawn: bool = option(
        False, "mamo: draw training users' query anew each epoch from all their kept ratings, instead of the last."
    )
    train_share: float = option(0.8, "mamo: share of the users to train on; the others are new.", above=0, most=1)
    cold_after: str = option("2000-12-03", "mamo: users whose first rating is of this day (UTC) or later are cold.")
    cold_item_ratings: int = option(
        0,
        "mamo: items with fewer than N of all users' kept ratings are cold; 0: 10, or 6 for data without times.",
        least=0,
    )
    major_over: int = option(
        2, "paml: major users have more than N fields with a value among its 30 % most frequent.", least=0
    )
    scenarios: str = option(
        "",
        "cmml-scenario: what makes the scenarios: own, or item fields like genres+decade,genres+genres (decade: of the"
        " year). Default: own where there are any, else tags, else genres, genres+decade and genres+genres.",
    )
    positive_from: float = option(
        4.0, "cmml-scenario: ratings of at least this are positives (CMML takes all: 0); of clicks those made."
    )
    scenario_least: int = option(100, "cmml-scenario: items that a scenario has at least.", least=2)
    scenario_most: int = option(1000, "cmml-scenario: items that a scenario has at most.", least=2)
    scenario_support: int = option(64, "cmml-scenario: positives of the support, each with a negative.", least=1)
    scenario_query: int = option(128, "cmml-scenario: positives of a training query, each with a negative.", least=1)
    scenario_users: int = option(
        500, "cmml-scenario: users of a validation or test scenario whose lists are ranked; 0: all.", least=0
    )
    scenario_apart: bool = option(
        False, "cmml-scenario: keep the users whose lists are ranked, a fifth of all, out of all training scenarios."
    )
    scenario_draws: int = option(32, "cmml-scenario: episodes that an epoch draws of each scenario.", least=1)


@dataclass(frozen=True)
class TrainOptions:
    """How to learn."""

    run: str = option("", "Run directory or URI. Default: runs/METHOD-DATASET-TIME.")
    resume: bool = option(False, "Go on with a run that exists, from its newest complete checkpoint.")
    retried: bool = option(
        False,
        "For a job that may be started again: go on with the run at --run where there is one (as --resume does), else"
        " begin it.",
    )
    workers: str = option(
        "0",
        "Ray Train workers, on the cluster at RAY_ADDRESS or else on this machine; A:B: as many of A to B as there"
        " is room for, changing as nodes come and go (quote that in YAML); 0 trains in this process without Ray.",
        pattern=(r"0|[1-9]\d{0,4}(:[1-9]\d{0,4})?", "a number of workers, or A:B"),
    )
    max_failures: int = option(
        10, "Losses of workers or nodes that a run on --workers outlives, from the newest checkpoint each.", least=0
    )
    wait: int = option(
        180, "Seconds to wait for nodes that --workers need, at the start and after a loss (autoscaling).", least=1
    )
    exchange_timeout: int = option(
        300, "Seconds that workers wait for one that hangs before all are restarted (--workers).", least=1
    )
    seed: int = option(0, "Seed of the initial parameters, the task order and every draw.", least=0)
    epochs: int = option(30, "Passes over the training tasks (or parts of one: --epoch-tasks), at most.", least=1)
    epoch_tasks: int = option(
        0,
        "Tasks that an epoch has at most: validation and a checkpoint follow each such part of a pass; 0: a pass.",
        least=0,
    )
    valid_tasks: int = option(
        0,
        "Validation tasks to judge an epoch by, the same for every seed and number of workers; 0: all.",
        least=0,
    )
    patience: int = option(
        5, "Stop after this many epochs without a better validation error; 0 never stops early.", least=0
    )
    batch_size: int = option(64, "Tasks a meta-update.", least=1)
    lr: float = option(1e-3, "Step size of the meta-update (Adam).", above=0)
    lr_decay: float = option(
        1.0,
        "The meta step size shrinks to this fraction of itself over --epochs, along a cosine.",
        least=0,
        most=1,
    )
    plateau: float = option(
        1.0,
        "Multiply the meta step size by this whenever --plateau-patience epochs in a row and one more had no better"
        " validation error; 1: never.",
        above=0,
        most=1,
    )
    plateau_patience: int = option(2, "Epochs without a better validation error that --plateau waits for.", least=0)
    lr_least: float = option(1e-6, "Step size that --plateau does not go below.", least=0)
    weight_decay: float = option(0.0, "Decoupled weight decay of the meta-update (AdamW).", least=0)
    clip: float = option(10.0, "Largest norm of a meta-gradient; 0 leaves it alone.", least=0)
    query_rows: int = option(
        0,
        "Query rows drawn of a training task, where the protocol leaves it open; 0: as many as it evaluates.",
        least=0,
    )
    redraw_query: bool = option(
        True, "Draw each training task's query anew every epoch, where the protocol leaves it open."
    )
    checkpoint_steps: int = option(
        0, "Checkpoint every N meta-updates besides the end of each epoch; 0: only there.", least=0
    )
    memory_mb: int = option(
        2048,
        "Memory that a worker may hold the tasks of one split in; a larger split is streamed, in an order that"
        " depends on this.",
        least=1,
    )
    state_shards: int = option(
        1,
        "Servers that the state which all tasks share is spread over, by key. Each has its part of the capacity, which"
        " may change what is learned.",
        least=1,
    )
    staleness: int = option(
        0,
        "Steps before the last whose writes to the shared state a step may do without; 0: it sees all before it."
        " Checkpoints and validation always wait for all.",
        least=0,
    )
    threads: int = option(
        0, "CPU threads of each worker; 0: the cores divided by the workers, 1 on a cluster.", least=0
    )
    gpu: float = option(
        0.0,
        "Compute on a GPU: of one, this share for each worker (or trial of a search); 0: on the CPU. Workers that train"
        " together have one each.",
        least=0,
        most=1,
        bare=1.0,
    )
    precision: str = option(
        "float32",
        "Of matrix products: float32; tf32, faster on a GPU and the same as float32 on a CPU; bf16, which rounds what"
        " is multiplied with weights that all tasks share to bfloat16 (on a CPU for trying it: it is slower there)."
        " Weights, sums and losses are float32 in any case.",
        ("float32", "tf32", "bf16"),
    )
    floors: bool = option(
        True,
        "Measure the floors on the test tasks too, once for each task table; with millions of items that takes minutes,"
        " and `evaluate --run RUN` does it later.",
    )


@dataclass(frozen=True)
class Config:
    """Everything that determines a run; RUN/config.yaml holds it."""

    method: str
    method_options: Any
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)


def read_yaml(location: Location) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader: a config cannot execute code).

    Raises:
        UserError: naming the file and line; a missing file, not YAML, no mapping, an unknown section.
    """
    try:
        raw = yamlfile.read(location, "mend or rewrite it")
    except FileNotFoundError:
        raise UserError(f"{location}: no such config file") from None
    if not isinstance(raw, dict):
        raise UserError(f"{location}: must hold the sections {', '.join(SECTIONS)}")
    for key, value in raw.items():
        if key not in SECTIONS:
            near = nearest(str(key), SECTIONS)
            raise UserError(f"{location}: unknown section {key!r}{near}; sections: {' '.join(SECTIONS)}")
        if key != "method" and not isinstance(value, dict | None):
            raise UserError(f"{location}: section {key} must hold key: value lines")
    return {key: ({} if value is None and key != "method" else value) for key, value in raw.items()}


def load(file: Location | None, method: str | None, flags: Mapping[str, Any], base: Config | None = None) -> Config:
    """A Config from a YAML file (or none), METHOD on the command line (or none) and flags.

    Args:
        flags: the flags that were given, by field name; those of other sections are passed over.
        base: a stored config that stands in for the defaults (a resumed run's).

    Raises:
        UserError: unknown method, section, key or flag, or a value of the wrong type or out of range.
    """
    raw = read_yaml(file) if file else {}
    name = str(method or raw.get("method") or (base.method if base else "melu"))
    chosen = entry(name)
    built = {}
    for section, cls in (("data", DataOptions), ("train", TrainOptions), ("method_options", chosen.options)):
        # method_options belong to the method they were written for
        mine = section != "method_options" or raw.get("method", name) == name
        values = raw.get(section, {}) if mine else {}
        build(cls, values, f"{file}, section {section}")
        given = {k: v for k, v in flags.items() if k in {f.name for f in dataclasses.fields(cls)}}
        build(cls, given, "command line", flags=True)
        defaults = chosen.train if section == "train" else {}
        if base and (section != "method_options" or base.method == name):
            defaults = dataclasses.asdict(getattr(base, section))
        built[section] = build(cls, {**defaults, **values, **given}, f"method {name}, section {section}")
    return Config(name, built["method_options"], built["data"], built["train"])


def plain(config: Config) -> dict[str, Any]:
    """The config as the nested mapping of its YAML: dicts, lists, strings, numbers, booleans, None."""
    sections = {s: dataclasses.asdict(getattr(config, s)) for s in SECTIONS if s != "method"}
    return {
        "method": config.method,
        **{s: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} for s, values in sections.items()},
    }


def apart(config: Config) -> dict[str, Any]:
    """What a config sets otherwise than its method's defaults, nested as in `plain`; of use with other data.

    Left out are seeds, where things lie and how the work is spread.
    """
    usual = plain(load(None, config.method, {}))
    found: dict[str, Any] = {"method": config.method}
    left = (FREE - {"train.epochs", "train.patience"}) | {"data.split_seed", "train.seed"}
    for section in SECTIONS[1:]:
        mine = {k: v for k, v in plain(config)[section].items() if f"{section}.{k}" not in left}
        found[section] = {k: v for k, v in mine.items() if v != usual[section][k]}
    return {k: v for k, v in found.items() if v}


def of_plain(values: Mapping[str, Any]) -> Config:
    """The Config whose `plain` this is."""
    where = f"config of {values['method']}"
    return Config(
        values["method"],
        build(entry(values["method"]).options, values["method_options"], where),
        build(DataOptions, values["data"], where),
        build(TrainOptions, values["train"], where),
    )


def to_yaml(config: Config) -> str:
    """The config as RUN/config.yaml holds it; `load` reads it back to an equal Config."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def fixed(config: Config) -> dict[str, Any]:
    """What determines a run's parameters, as `section.key` -> value: what `--resume` may not change.

    Free are where things lie (the split's hash vouches for the data), how the work (not the shared state) is spread,
    when to stop, and how often to checkpoint. --epochs is free only where the step size does not depend on it
    (--lr-decay 1).
    """
    values: dict[str, Any] = {"method": config.method}
    for section, keys in plain(config).items():
        if section != "method":
            values |= {f"{section}.{k}": v for k, v in keys.items()}
    free = FREE if config.train.lr_decay == 1.0 else FREE - {"train.epochs"}
    return {k: v for k, v in values.items() if k not in free}
