"""The cases of `benchmark adaptation`: inputs, and every variant as a function that gives the meta-gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distmeta.adaptation.cost import Plan
from distmeta.adaptation.features import Dense
from distmeta.adaptation.inner import Turn, adapt, squared_error
from distmeta.adaptation.maps import Map
from distmeta.adaptation.tape import Node, Tape
from distmeta.commands import adaptation_baselines as baselines
from distmeta.commands.benchmark_adaptation import LR
from distmeta.data.schema import Dataset, Field, Label
from distmeta.methods import options
from distmeta.methods.gradient import GradientMethod
from distmeta.methods.melu import MeLU
from distmeta.methods.metacs import MetaCS
from distmeta.methods.metasgd import MetaSGD
from distmeta.networks import Decision
from distmeta.tasks import Bag, Rows, TaskBatch, TaskBlock

Variant = Callable[[], Sequence[Tensor]]
CPU = torch.device("cpu")
FORMS = {"auto": "auto", "dual": "dual", "materialised": "private"}
SUPPORT, QUERY, ITEMS, BLOCK = 36, 10, 3_000, 64
USER_FIELDS = (
    Field("gender", "categorical", 3),
    Field("age", "categorical", 8),
    Field("occupation", "categorical", 22),
    Field("zip", "categorical", 3_403),
)
ITEM_FIELDS = (
    Field("rate", "categorical", 7),
    Field("genre", "multi_categorical", 26),
    Field("director", "multi_categorical", 2_187),
    Field("actor", "multi_categorical", 7_979),
)
COUNTS = {"genre": (0.4, 0.35, 0.18, 0.07), "director": (0.93, 0.07), "actor": (0.03, 0.02, 0.02, 0.93)}
"""How often an item has 1, 2, … values of a field."""


@dataclass
class Case:
    """Variants of a case, and one task of it for counting operations."""

    variants: dict[str, Variant]
    first: Variant

    def operations(self) -> int:
        """Floating-point operations of one task's meta-gradient by plain autograd, as torch counts them."""
        with FlopCounterMode(display=False) as counter:
            self.first()
        return counter.get_total_flops()


def plain(b: int, s: int, q: int, d: int, h: int, steps: int, double: bool = False, device: torch.device = CPU) -> Case:
    """An MLP d → h → h → 1 on given inputs."""
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    net = Decision(d, (h, h)).to(device, dtype)
    drawn = [(torch.randn(b, n, d, dtype=dtype), torch.randn(b, n, dtype=dtype)) for n in (s, q)]
    sides = [(x.to(device), y.to(device)) for x, y in drawn]
    support, query = (Rows(y[:, :0].long(), y, torch.ones_like(y, dtype=torch.bool)) for _, y in sides)
    leaves: list[Tensor] = list(net.parameters())
    rates: dict[Map, float] = dict.fromkeys(net, LR)

    def engine(form: str) -> Sequence[Tensor]:
        x, z = (Node(Dense(x), needs=False) for x, _ in sides)
        plan = Plan(steps, q, form)  # type: ignore[arg-type]
        fast = adapt([Turn(lambda tape: net(tape, x), support)] * steps, rates, first_order=False, plan=plan)
        scores = net(Tape(fast), z).part.rows().squeeze(-1)
        return torch.autograd.grad(squared_error(scores, query).sum(), leaves)

    inputs: list[baselines.Side] = [([(x, None)], y) for x, y in sides]
    variants: dict[str, Variant] = {name: partial(engine, form) for name, form in FORMS.items()}
    lr = [LR] * len(leaves)

    def loop(tasks: slice = slice(None)) -> Sequence[Tensor]:
        one: list[baselines.Side] = [([(x[tasks], None)], y[tasks]) for x, y in sides]
        return baselines.loop([], leaves, 0, steps, lr, one[0], one[1], leaves)

    variants["vmap"] = lambda: baselines.vmapped([], leaves, 0, steps, lr, inputs[0], inputs[1], leaves)
    return Case(variants | {"loop": loop}, lambda: loop(slice(1)))


def whole(model: str, tasks: int, steps: int, double: bool = False, device: torch.device = CPU) -> Case:
    """Tasks from ids: 8 fields × 32 → 64 → 64 → 1, 'whole' (MeLU), 'embeddings' (adapted as well: MetaCS) or
    'parameters' (MeLU with a step for each of them: Meta-SGD)."""
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    dataset = Dataset("benchmark", Label("rating", 1, 5), USER_FIELDS, ITEM_FIELDS, tasks, ITEMS, 0)
    items, batch = _bags(ITEM_FIELDS, ITEMS, dtype), _batch(tasks, dtype).to(device)
    cls, option = {
        "whole": (MeLU, options.MeLU(learn_rates=False)),
        "embeddings": (MetaCS, options.MetaCS(learn_rates=False)),
        "parameters": (MetaSGD, options.MetaSGD()),
    }[model]
    option, methods = replace(option, steps=steps, local_lr=LR), {}
    for name, form in ({"auto": "auto"} if model == "parameters" else FORMS).items():  # has one form
        torch.manual_seed(1)
        methods[name] = cls(replace(option, form=form), dataset, items).to(device, dtype)
    items = {name: bag.to(device) for name, bag in items.items()}

    def engine(method: GradientMethod) -> Sequence[Tensor]:
        return torch.autograd.grad(method.loss(batch).sum(), _leaves(method))

    plain = _Baselines(methods["auto"], batch, items, adapted=model == "embeddings")
    variants: dict[str, Variant] = {name: lambda m=m: engine(m) for name, m in methods.items()}
    return Case(variants | plain.variants(), plain.first)


def _leaves(method: GradientMethod) -> list[Tensor]:
    return [p for p in method.parameters() if p.requires_grad]


class _Baselines:
    """The same tasks for adaptation_baselines, whose inputs are bags of every row."""

    def __init__(self, method: GradientMethod, batch: TaskBatch, items: dict[str, Bag], adapted: bool) -> None:
        self.leaves, self.adapted, self.steps = _leaves(method), adapted, method.options.steps
        fields = len(USER_FIELDS) + len(ITEM_FIELDS)
        self.tables = self.leaves[:fields]
        self.weights: list[Tensor] = list(method.decision.parameters())
        self.lr = self._rates(method)
        self.users = {f.name: _join([b.user[f.name] for b in batch]) for f in USER_FIELDS}
        self.items = [items[f.name].take(batch.items) for f in ITEM_FIELDS]
        self.rows = [torch.cat([getattr(b, side).item for b in batch]) for side in ("support", "query")]
        self.labels = [torch.cat([getattr(b, side).label for b in batch]) for side in ("support", "query")]
        self.sides = [(self._inputs(r), y) for r, y in zip(self.rows, self.labels, strict=True)]
        self.values, *local = baselines.touched(self.sides[0][0], self.sides[1][0])
        self.local = [(inputs, y) for inputs, y in zip(local, self.labels, strict=True)]

    def _rates(self, method: GradientMethod) -> list[Tensor | float]:
        """Of each fast parameter, in the order of the leaves."""
        if isinstance(method, MetaSGD):
            pairs = zip(method.rate_weights, method.rate_biases, strict=True)
            return [rate for pair in pairs for rate in pair]
        rate = float(method.log_rate[0].exp())  # type: ignore[operator, index]  # not LR to the last digit
        return [rate] * (len(self.weights) + len(self.tables) * self.adapted)

    def variants(self) -> dict[str, Variant]:
        if not self.adapted:
            return {"vmap": self._vmap_fixed, "vmap rows": self._vmap_unique, "loop": self.loop}
        return {"vmap": self._vmap_tables, "vmap rows": self._vmap_rows, "loop": self.loop}

    def loop(self, tasks: slice = slice(None)) -> Sequence[Tensor]:
        fixed, fast = ([], self.tables + self.weights) if self.adapted else (self.tables, self.weights)
        sides: list[baselines.Side] = [
            ([(i[tasks], None if w is None else w[tasks]) for i, w in inputs], y[tasks]) for inputs, y in self.sides
        ]
        n = len(self.tables) * self.adapted
        return baselines.loop(fixed, fast, n, self.steps, self.lr, sides[0], sides[1], self.leaves)

    def first(self) -> Sequence[Tensor]:
        return self.loop(slice(1))

    def _vmap_fixed(self) -> Sequence[Tensor]:
        sides: list[baselines.Side] = [([(baselines.embed(self.tables, inputs), None)], y) for inputs, y in self.sides]
        return baselines.vmapped([], self.weights, 0, self.steps, self.lr, sides[0], sides[1], self.leaves)

    def _vmap_unique(self) -> Sequence[Tensor]:
        n = len(self.users)
        items = baselines.embed(self.tables[n:], [(b.index, b.weight) for b in self.items])
        users = baselines.embed(self.tables[:n], [(b.index, b.weight) for b in self.users.values()])
        sides: list[baselines.Side] = []
        for rows, y in zip(self.rows, self.labels, strict=True):
            x = torch.cat([users[:, None].expand(-1, rows.shape[1], -1), F.embedding(rows, items)], -1)
            sides.append(([(x, None)], y))
        return baselines.vmapped([], self.weights, 0, self.steps, self.lr, sides[0], sides[1], self.leaves)

    def _vmap_tables(self) -> Sequence[Tensor]:
        return self._vmap(self.sides, [], self.tables + self.weights, len(self.tables))

    def _vmap_rows(self) -> Sequence[Tensor]:
        own = [F.embedding(v, t) for v, t in zip(self.values, self.tables, strict=True)]
        return self._vmap(self.local, own, self.weights, 0)

    def _vmap(self, sides: list[baselines.Side], rows: list[Tensor], fast: list[Tensor], tables: int) -> list[Tensor]:
        return baselines.vmapped(rows, fast, tables, self.steps, self.lr, sides[0], sides[1], self.leaves)

    def _inputs(self, rows: Tensor) -> baselines.Inputs:
        users = [
            (b.index[:, None].expand(-1, rows.shape[1], -1), b.weight) for b in self.users.values()
        ]  # categorical alone: no weights to expand
        return users + [(b.index[rows], None if b.weight is None else b.weight[rows]) for b in self.items]


def _join(bags: list[Bag]) -> Bag:
    return Bag(torch.cat([b.index for b in bags]), None)


def _bags(fields: Sequence[Field], n: int, dtype: torch.dtype) -> dict[str, Bag]:
    """Fields of n users or items; values by Zipf's law, as in the data."""
    out = {}
    for f in fields:
        counts = COUNTS.get(f.name, (1.0,))
        index = 1 + torch.multinomial(_zipf(f.size - 1), n * len(counts), replacement=True).view(n, -1)
        if f.type == "categorical":
            out[f.name] = Bag(index, None)
            continue
        count = 1 + torch.multinomial(torch.tensor(counts), n, replacement=True)[:, None]
        real = torch.arange(len(counts)) < count
        out[f.name] = Bag(index * real, (real / count).to(dtype))
    return out


def _zipf(n: int) -> Tensor:
    return 1 / (torch.arange(n) + 10.0)


def _batch(tasks: int, dtype: torch.dtype) -> TaskBatch:
    """Tasks with SUPPORT + QUERY different items each, popular ones more often; blocks of BLOCK tasks."""
    drawn = torch.stack([torch.multinomial(_zipf(ITEMS), SUPPORT + QUERY) for _ in range(tasks)])
    items, rows = torch.unique(drawn, return_inverse=True)
    label = torch.randint(1, 6, rows.shape).to(dtype)
    users = _bags(USER_FIELDS, tasks, dtype)

    def side(mine: slice, part: slice) -> Rows:
        r = rows[mine, part]
        return Rows(r.contiguous(), label[mine, part].contiguous(), torch.ones(r.shape, dtype=torch.bool))

    blocks = []
    for start in range(0, tasks, BLOCK):
        mine = slice(start, min(start + BLOCK, tasks))
        ids = torch.arange(mine.start, mine.stop)
        user = {name: bag.take(ids) for name, bag in users.items()}
        blocks.append(TaskBlock(ids, user, side(mine, slice(SUPPORT)), side(mine, slice(SUPPORT, None))))
    return TaskBatch(items, tuple(blocks))
