"""The training loop: the same in one process and inside each worker; an `Exchange` tells them apart.

A step: each worker sums its tasks' losses and gradients into one flat buffer, the exchange adds up the
buffers, and every worker divides by the number of tasks of all and makes the same AdamW update. Nothing is
drawn from a generator (draws are hashes of what they are for), so the parameters, the moments and the place
in the task order are the whole state: stopped anywhere and resumed, a run ends in the same parameters, bit
for bit.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from distmeta.config import Config, TrainOptions
from distmeta.data.loader import Loader, read_items
from distmeta.data.schema import Dataset, Label
from distmeta.data.tasktable import TaskTable
from distmeta.errors import Diverged, RunError, UserError
from distmeta.evaluation import lists
from distmeta.exchange import Exchange
from distmeta.methods.base import Method, fit_closed_form
from distmeta.parallel import checkpoint as checkpoints
from distmeta.parallel import standing
from distmeta.parallel.checkpoint import Stateful
from distmeta.parallel.clusters import survey_of
from distmeta.parallel.keeping import Keeper
from distmeta.parallel.preparing import prepare
from distmeta.parallel.progress import Progress
from distmeta.parallel.standing import Standing, Words
from distmeta.parallel.timing import Times, together
from distmeta.parallel.update import MetaUpdate, NotFinite, build_method, device_of, numerics
from distmeta.parallel.validation import read_metrics, validate, write_metrics
from distmeta.storage import Location
from distmeta.tasks import Bag, TaskBatch

_DIVERGED = "start a new run with a smaller --lr or inner step (--local-lr), or look at those tasks' data"


@dataclass(frozen=True)
class Outcome:
    """What training came to."""

    best_step: int
    """Step of the checkpoint with the lowest validation MAE (the last one, where there is no validation)."""
    best_mae: float | None
    epochs: int
    steps: int
    seconds: float
    """Spent on training and validation, over all launches of this run."""
    ended: str
    """`epochs` (all done), `patience` (stopped early), `converged` (clusters that stand still) or `solved` (closed
    form)."""


def train(
    config: Config,
    run: Location,
    dataset: Dataset,
    dataset_location: Location,
    table: TaskTable,
    exchange: Exchange | None = None,
    log: Callable[[str], None] = print,
    *,
    fence: Callable[[], None] | None = None,
    report: Callable[[list[dict[str, Any]]], None] | None = None,
    items: dict[str, Bag] | None = None,
) -> Outcome:
    """Train into RUN/checkpoints and RUN/metrics.jsonl, from the newest complete checkpoint if there is one.

    Every worker of `exchange` calls this with the same arguments but `exchange` and `log`; the first one, rank 0,
    writes and speaks. All raise RunError at the same step for what is not finite anywhere, and all stop early
    after the same epoch.

    Args:
        fence: called by rank 0 before each checkpoint and before metrics are written; raises where these workers
            were replaced by others that write to the same run.
        report: called on all workers after each epoch and its checkpoint, and at first where there are epochs
            already, with the lines of RUN/metrics.jsonl so far.
        items: all item fields, where the caller has read them; else they are read from `dataset_location`.

    Raises:
        RunError: the loss or its gradient is not finite; the disk is full; what `fence` raises.
        UserError: a checkpoint is damaged or belongs to other settings; the split has no training tasks.
    """
    exchange = exchange or Exchange()
    device = device_of(config.train)
    with numerics(config.train, device):
        items = read_items(dataset_location, dataset) if items is None else items
        method = build_method(config, dataset, items, device, exchange)
        o = config.train
        tasks, surveyed, valid = _loaders(o, table, dataset, exchange, method.groups > 1, device)
        for loader in (tasks, valid):
            if loader.note and exchange.rank == 0:
                log(loader.note)
        if not tasks.n_tasks:
            raise UserError(f"{table.location}: no training tasks; choose another --protocol or a larger dataset")
        if method.groups > tasks.n_tasks:
            raise UserError(f"--clusters {method.groups}: there are {tasks.n_tasks} training tasks; ask for fewer")
        warm = getattr(config.method_options, "warm_epochs", 0)
        if method.groups > 1 and o.epochs <= warm and exchange.rank == 0:
            log(f"--epochs {o.epochs}: the clusters part after --warm-epochs {warm}, so all tasks stay with one")
        if method.sweeps and o.epoch_tasks and exchange.rank == 0:
            log(f"--epoch-tasks {o.epoch_tasks}: {method.name} is solved from all training tasks, in sweeps")
        training = _Training(
            config,
            run,
            method,
            tasks,
            surveyed,
            valid,
            table.split_hash,
            exchange,
            log,
            dataset.label,
            device,
            fence,
            report,
        )
        try:
            if training.history:
                training.report(training.history)
            training.prepare(table, dataset)
            return training.solve() if method.sweeps else training.learn()
        finally:
            training.keeper.writing.wait()


def _loaders(
    o: TrainOptions, table: TaskTable, dataset: Dataset, exchange: Exchange, clusters: bool, device: torch.device
) -> tuple[Loader, Loader, Loader]:
    """This worker's tasks to train on, those whose clusters are surveyed after each epoch, and those to validate on."""
    shared: dict[str, Any] = {"seed": o.seed, "rank": exchange.rank, "world": exchange.world}
    shared |= {"memory": o.memory_mb << 20, "device": device}
    drawn = dataclasses.replace(table, query_rows=o.query_rows or table.query_rows)
    given = {**shared, "redraw": o.redraw_query, "epoch_tasks": o.epoch_tasks}
    tasks = surveyed = Loader(drawn, dataset, "train", o.batch_size, **given)
    if clusters and tasks.epochs.parts > 1:
        surveyed = Loader(drawn, dataset, "train", o.batch_size, most=o.epoch_tasks, **shared)
    at_once = lists.BATCH if table.scenarios else o.batch_size
    return tasks, surveyed, Loader(table, dataset, "valid", at_once, redraw=False, most=o.valid_tasks, **shared)


class _Training:
    """A run under way: where it stands, and how it goes on."""

    def __init__(
        self,
        config: Config,
        run: Location,
        method: Method,
        tasks: Loader,
        surveyed: Loader,
        valid: Loader,
        split_hash: str,
        exchange: Exchange,
        log: Callable[[str], None],
        label: Label,
        device: torch.device,
        fence: Callable[[], None] | None,
        report: Callable[[list[dict[str, Any]]], None] | None,
    ) -> None:
        self.config, self.options, self.run = config, config.train, run
        self.method, self.tasks, self.valid, self.label = method, tasks, valid, label
        self.exchange, self.device = exchange, device
        self.driver, self.fence = exchange.rank == 0, fence or (lambda: None)
        self.report = report or (lambda _: None)
        self.screen = Progress(log if self.driver else lambda _: None)
        self.step = self.epoch = self.batch = 0
        self.begun = False
        """There is a checkpoint."""
        self.keeper = Keeper(config, run, split_hash, exchange, self.fence)
        self.update = None if method.sweeps else MetaUpdate(method, self.options, exchange, tasks.epochs.mean)
        self._begin(Standing())
        self.cpu = time.process_time()
        self.history: list[dict[str, Any]] = []
        self.words = Words(self.options.epochs, tasks.epochs, self.update is not None)
        self.stateful: dict[str, Stateful] = dict(method.shared)
        """What a checkpoint carries besides parameters and moments, by name."""
        self.survey = survey_of(method, self.update, surveyed, exchange, device)
        if self.survey:
            self.stateful["clusters"] = self.survey
        self._restore()

    def _begin(self, progress: Standing) -> None:
        self.progress, self.times = progress, Times(progress.phases)
        if self.update:
            self.update.shrunk = progress.shrunk

    def _caught_up(self) -> None:
        """Have all writes to shared memories applied; all workers come here."""
        with self.times.phase("exchange"):
            for shared in self.method.shared.values():
                shared.flush()

    def prepare(self, table: TaskTable, dataset: Dataset) -> None:
        """What the method learns beforehand, kept as the checkpoint of step 0; nothing where there is one already."""
        if self.method.prepares and not self.begun:
            prepare(self.method, table, dataset, self.exchange, self.screen)
            self._save()

    # ---- the loop

    def learn(self) -> Outcome:
        """All epochs of a gradient method that are still to do."""
        assert self.update
        while self.epoch < self.options.epochs and not self._over():
            self._train_epoch(self.update)
            self._end_epoch()
        ended = self._over() or "epochs"
        best = self.progress.best_step
        return self._outcome(self.step if best is None else best, ended)

    def solve(self) -> Outcome:
        """All sweeps of a closed-form method, one validation, one checkpoint; nothing where that exists."""
        if not self.step:
            with self.times.phase("adapt"):
                fit_closed_form(self.method, lambda sweep: self._reading(self.tasks.evaluation()), self._sums)
            self.times.step()
            self.progress.tasks = float(self.tasks.n_tasks * self.method.sweeps)
            self.step = self.method.sweeps
            self._end_epoch()
        return self._outcome(self.step, "solved")

    def _outcome(self, best_step: int, ended: str) -> Outcome:
        done = self.progress
        return Outcome(best_step, done.best, self.epoch, self.step, done.seconds, ended)

    def _over(self) -> str | None:
        """Why to end before all epochs are done."""
        if self.survey and self.survey.settled:
            return "converged"
        return "patience" if 0 < self.options.patience <= self.progress.stale else None

    def _train_epoch(self, update: MetaUpdate) -> None:
        """Go on from batch `self.batch` of epoch `self.epoch` to its end."""
        state, every, steps = self.progress, self.options.checkpoint_steps, self.tasks.epochs.steps(self.epoch)
        self.method.train()
        waited = self.tasks.wait_seconds - state.wait
        epoch = cast("Generator[TaskBatch]", self.tasks.epoch(self.epoch, start=self.batch))
        with contextlib.closing(epoch) as batches:
            while True:
                with self.times.phase("input"):
                    batch = next(batches, None)
                    batch = batch.to(self.device) if batch is not None else None
                state.wait = self.tasks.wait_seconds - waited
                if batch is None:
                    break
                self._meta_update(update, batch)
                self.batch += 1
                self.step += 1
                if every and self.step % every == 0 and self.batch < steps:
                    self._save()
                self.times.step()
                self.screen.within(self._within)
        if self.batch != steps:
            raise RunError(
                f"{self.run}: epoch {self.epoch + 1} gave {self.batch} batches, not {steps};"
                " the task table changed while it was read; start a new run"
            )

    def _meta_update(self, update: MetaUpdate, batch: TaskBatch) -> None:
        update.local(batch, self.times.phase)
        with self.times.phase("exchange"):
            self.exchange.sum(update.flat)
        with self.times.phase("optimizer"):
            try:
                loss, count = update.apply(batch, self.step)
            except NotFinite as e:
                raise self._diverged(e) from None
        self.progress.add(loss, count, update.counts)

    def _diverged(self, e: NotFinite) -> Diverged:
        """The sentence about it, the same on all workers, which are all here."""
        tasks = sorted(t for found in self.exchange.gather(json.dumps(e.tasks).encode()) for t in json.loads(found))
        blame = "of the batch's tasks together"
        if tasks:
            more = f" and {len(tasks) - 10} more" if len(tasks) > 10 else ""
            blame = f"of task{'s' * (len(tasks) > 1)} {', '.join(map(str, tasks[:10]))}{more}"
        self.keeper.writing.wait()
        newest = checkpoints.newest(self.run)
        kept = f"the checkpoint of step {newest.step} is kept" if newest else "there is no checkpoint yet"
        place = f"epoch {self.epoch + 1}, step {self.step}"
        return Diverged(f"{place}: the {e.what} {blame} is not finite; {kept}; {_DIVERGED}")

    def _end_epoch(self) -> None:
        """Validate, write the epoch's line, tell, checkpoint."""
        state = self.progress
        self._caught_up()
        with self.times.phase("validation"):
            clusters = self.survey.after(self.epoch) if self.survey else None
            if self.survey and self.survey.beginning:
                state.best, state.stale, state.waited = None, 0, 0  # a common start is no result of clusters yet
            mae, mse = validate(self.method, self.valid.evaluation(), self.label, self.exchange, self.device)
        if self.valid.n_tasks and not math.isfinite(mae):
            raise Diverged(f"epoch {self.epoch + 1}: predictions for the validation tasks are not finite; {_DIVERGED}")
        state.judge(mae if self.valid.n_tasks else None, self.step, self.options.plateau_patience)
        self._write_line(mae, mse, {"clusters": clusters} if clusters else {})
        over = self._over() is not None
        self.screen.line(self.words.summary(state, self.history[-1], over, self.times.learning()))
        self._begin(state.next())
        self.epoch, self.batch = self.epoch + 1, 0
        self._save()
        self.report(self.history)

    def _reading(self, batches: Iterable[TaskBatch]) -> Iterator[TaskBatch]:
        """The same batches; waiting for them counts as input."""
        left = iter(batches)
        while True:
            with self.times.phase("input"):
                batch = next(left, None)
            if batch is None:
                return
            yield batch

    def _sums(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.times.phase("exchange"):
            return self.exchange.sums(statistics)

    # ---- what is kept

    def _save(self) -> None:
        """Have everything that a checkpoint holds kept."""
        self._caught_up()
        if not self.driver:
            return
        with self.times.phase("checkpoint"):
            parts = {"params": self.method.state_dict()}
            if self.update:
                parts["optimizer"] = self.update.moments()
            cursor = {"epoch": self.epoch, "batch": self.batch}
            self.keeper.save(parts, self.stateful, self.step, cursor, self.progress)

    def _restore(self) -> None:
        """Take everything up from the newest complete checkpoint, if there is one."""
        found = self.keeper.newest()
        if found is None:
            return
        self.begun = True
        checkpoints.restore_params(self.run, found, self.method, self.config.method)
        if self.update:
            self.keeper.restore_moments(found, self.update)
        self._begin(standing.of_checkpoint(found))
        checkpoints.restore_state(self.run, found, self.stateful)
        self.step, self.epoch, self.batch = found.step, found.cursor["epoch"], found.cursor["batch"]
        self.history = read_metrics(self.run)[: self.epoch]
        self.screen.line(f"going on from step {self.step} (epoch {self.epoch + 1}, batch {self.batch})")

    def _write_line(self, mae: float, mse: float, clusters: dict[str, Any]) -> None:
        """Add this epoch's line to RUN/metrics.jsonl; the file is written whole, as object stores need.

        `checkpoint_s` covers those written since the epoch began, the one at its end not included (it stands in the
        next one's, and in its first step's). Seconds are rank 0's, and of all launches that the epoch took;
        `step_ms`, `exchange_wait_s` and `skew` are all workers', and of this launch (see `timing.together`), as `cpu_s`
        is: rank 0's processor time since the line before, all its threads together.
        """
        state, learning = self.progress, self.times.learning()
        workers = together(self.exchange.gather(self.times.packed()))
        ranked, now = self.valid.table.scenarios, time.process_time()
        line = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "seconds": sum(state.phases.values()),
            "tasks_per_s": state.tasks / learning if learning else 0.0,
            "train_loss": state.loss / state.tasks if state.tasks and not self.method.sweeps else None,
            "valid_mae": mae if math.isfinite(mae) and not ranked else None,
            "valid_mse": mse if math.isfinite(mse) and not ranked else None,
            **({"valid_recall@10": 1 - mae, "valid_recall@50": 1 - mse} if ranked and math.isfinite(mae) else {}),
            "lr": self.update.rate(self.step - 1) if self.update else None,
            "wait_s": state.wait,
            "cpu_s": now - self.cpu,
            **{f"{k}_s": v for k, v in state.phases.items()},
            **workers,
            **clusters,
            **self._more(),
        }
        self.cpu = now
        self.history.append(line)
        if self.driver:
            self.fence()
            write_metrics(self.run, self.history)

    def _more(self) -> dict[str, Any]:
        """What the line says of groups and shared memories, where the method has them."""
        groups = {"groups": self.progress.groups} if self.method.groups > 1 else {}
        return {**groups, **({name: s.report() for name, s in self.method.shared.items()} if self.driver else {})}

    def _within(self) -> str:
        return self.words.within(self.progress, self.epoch, self.batch, self.times.learning())
