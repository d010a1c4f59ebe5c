"""The study behind a search: one journal, which a killed search goes on from, and what its trials came to."""

import contextlib
import dataclasses
import json
import math
import threading
import time
from typing import Any

import optuna
import polars as pl
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from distmeta import config as config_module
from distmeta.commands import search, search_plan, search_study, train
from distmeta.errors import RunError, UserError
from distmeta.parallel import rundir, tally, trialrun, trials
from distmeta.storage import Location
from tune import spaces

SPACE = spaces.Space(
    (
        spaces.Float("lr", 1e-4, 1e-1),
        spaces.Choice("encoder", ("mean", "gru")),
        spaces.Choice("units", (64, 128), when=("encoder", ("gru",))),
    )
)
FIRST = [("defaults", {"lr": 1e-3, "encoder": "mean"}), ("paper", {"lr": 1e-2, "encoder": "gru", "units": 64})]


def opened(out: Location) -> optuna.Study:
    return search_study.opened(out, "melu", "tpe", 0, FIRST)


def asked(study: optuna.Study, trial: optuna.Trial | None = None) -> tuple[optuna.Trial, dict]:
    trial = trial or study.ask()
    values = search_study.suggest(trial, SPACE)
    trial.set_user_attr("run", f"{trial.number:04d}")
    return trial, values


def plan(n: int, failures: float = 0.5, **more: Any) -> trials.Plan:
    return trials.Plan("melu", n, 5, failures, True, 1, 1, trials.Shared(None), **more)


def test_a_killed_search_goes_on_from_its_journal(tmp_path):
    out = Location.of(tmp_path)
    study = opened(out)
    done, values = asked(study)
    assert values == FIRST[0][1]
    study.tell(done, 0.7)
    killed, values = asked(study)
    assert values == FIRST[1][1]
    killed.report(0.9, 1)
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 6, "wor')
    (tmp_path / "journal.log.lock").symlink_to(journal)  # of a process killed while it wrote

    began = time.monotonic()
    study = opened(out)
    searcher = trials._searcher(
        study, plan(3), tally.tally(study, 3, 0.5), lambda t: (asked(study, t)[0].number, {}), lambda: 2
    )
    assert [searcher.suggest(name)["run"] for name in "ab"] == [1, 2]  # the interrupted one first, as itself
    assert searcher.suggest("c") is None  # there is room for two
    assert time.monotonic() - began < 20, "waited for the lock of a process that is gone"
    again = study.trials[1]
    assert again.params == FIRST[1][1]
    searcher.on_trial_result("a", {"error": 0.8, "epoch": 1, "seconds": 1.0})  # told before the kill
    assert "seconds" not in study.trials[1].user_attrs
    searcher.on_trial_result("a", {"error": 0.7, "epoch": 2, "seconds": 2.0})
    assert study.trials[1].intermediate_values == {1: 0.9, 2: 0.7}
    searcher.on_trial_complete("a", {"error": 0.6, "epoch": 2, "seconds": 2.5, "over": True})
    searcher.on_trial_complete("b", error=True)
    found = tally.tally(study, 4, 0.5)
    assert (found.done, found.failed, found.best, found.best_run) == (2, 1, 0.6, 1)
    kept = optuna.load_study(study_name="melu", storage=JournalStorage(JournalFileBackend(str(journal))))
    assert [t.number for t in kept.trials] == [0, 1, 2]
    assert kept.best_value == 0.6  # Optuna's own tools open it


def test_stopping_goes_on_where_it_was(tmp_path):
    """A rung that a trial has passed does not stop it when, interrupted, it reports all its epochs again."""
    study = opened(Location.of(tmp_path))
    killed, _ = asked(study)
    for epoch, error in ((1, 0.9), (2, 0.5)):
        killed.report(error, epoch)
    for n in range(3):
        better, _ = asked(study)
        better.report(0.6 - n / 10, 1)
        study.tell(better, 0.6 - n / 10)
    searcher = trials._searcher(study, plan(9), tally.tally(study, 9, 0.5), lambda t: ("", {}), lambda: 2)
    asha = trials._scheduler(study, plan(9), searcher)
    for trial_id in "ab":
        searcher.suggest(trial_id)
        asha.on_trial_add(None, trials._Earlier(trial_id))
    first = {"error": 0.9, "epoch": 1, "seconds": 1.0}
    assert asha.on_trial_result(None, trials._Earlier("a"), first) == "CONTINUE"
    assert asha.on_trial_result(None, trials._Earlier("b"), first) == "STOP"  # a new one as bad as that
    assert trials._scheduler(study, dataclasses.replace(plan(9), grace=5), searcher) is None


def test_a_later_launch_draws_other_trials(tmp_path):
    drawn = []
    for _ in range(2):
        study = search_study.opened(Location.of(tmp_path), "melu", "random", 3, [])
        trial, values = asked(study)
        drawn.append(values["lr"])
        study.tell(trial, 1.0)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("pareto", [False, True])
@pytest.mark.parametrize("name", search_plan.SAMPLERS)
def test_samplers_take_conditional_parameters(tmp_path, name, pareto):
    """Through a resume, with a trial under way, and with one that failed and one that was stopped."""
    if pareto and name == "gp":
        pytest.skip("the command refuses it: it takes minutes")
    drawn = []
    for launch in range(2):
        study = search_study.opened(Location.of(tmp_path), "melu", name, 3, FIRST, pareto=pareto)
        ends: list[dict[str, Any]] = [{"values": None, "state": TrialState.FAIL}]
        ends += [] if pareto else [{"values": None, "state": TrialState.PRUNED}]
        for n in range(5):
            trial, values = asked(study)
            drawn.append(values)
            assert ("units" in values) == (values["encoder"] == "gru")
            error = [math.log10(values["lr"]) ** 2, *[float(n)] * pareto]
            if n < 4:
                study.tell(trial, **(ends[n] if launch and n < len(ends) else {"values": error}))
    assert drawn[:2] == [values for _, values in FIRST]
    rates = [values["lr"] for values in drawn[2:]]
    assert len(set(rates)) == len(rates), "drawn twice"
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)


def test_how_a_trial_ends():
    report = {trials.OBJECTIVE: 0.5, "epoch": 5}
    assert trials._ending({**report, "over": True}, False) == (TrialState.COMPLETE, "")
    assert trials._ending(report, False)[0] == TrialState.PRUNED
    assert trials._ending({**report, "failure": "loss is NaN"}, False) == (TrialState.FAIL, "loss is NaN")
    assert trials._ending(report, True)[0] == trials._ending(None, False)[0] == TrialState.FAIL


def test_too_many_failures_end_the_search_with_the_reason(tmp_path):
    study = opened(Location.of(tmp_path))
    for _ in range(2):
        trial, _ = asked(study)
        trial.set_user_attr("failure", "loss is NaN")
        study.tell(trial, state=TrialState.FAIL)
    assert not tally.tally(study, 4, 0.5).hopeless
    with pytest.raises(RunError, match=r"2 of 3 trials failed.*0001: loss is NaN"):
        trials.search(study, plan(3), lambda _: pytest.fail("asked"), Location.of(tmp_path))
    search_study.write_trials(study, Location.of(tmp_path))
    table = pl.read_parquet(tmp_path / "trials.parquet")
    assert table["failure"].to_list() == ["loss is NaN"] * 2
    assert table["param.units"].to_list() == [None, 64]
    with pytest.raises(RunError, match="no trial was completed"):
        search_study.write_best(study, Location.of(tmp_path))


def test_a_search_that_is_interrupted_at_once_has_an_empty_table(tmp_path):
    study = opened(Location.of(tmp_path))
    asked(study)
    search_study.write_trials(study, Location.of(tmp_path))
    table = pl.read_parquet(tmp_path / "trials.parquet")
    assert table.height == 0
    assert {"number", "run", "error", "failure"} <= set(table.columns)


def test_time_beside_training_counts_all_launches(tmp_path):
    study = opened(Location.of(tmp_path))
    study.set_user_attr("launches", [{"seconds": 30.0, "cpus": 4.0}, {"seconds": 20.0, "cpus": 4.0}])
    for seconds in (40.0, 45.0):
        trial, _ = asked(study)
        trial.set_user_attr("seconds", seconds)
        study.tell(trial, seconds / 100)
    assert tally.spent(study, 2) == (170 / 200, (200 - 170) / 2 / 2)
    assert tally.summary(study, 2) == (
        "melu: best validation error 0.4000 (0000), defaults 0.4000;"
        " CPU in training 85 %, 7.5 s a trial beside training"
    )


def test_the_front_is_written_and_the_best_is_that_of_the_lowest_error(tmp_path):
    out = Location.of(tmp_path)
    study = search_study.opened(out, "melu", "nsga2", 0, FIRST, pareto=True)
    for n, values in enumerate([(0.7, 9.0), (0.6, 20.0), (0.8, 10.0)]):
        trial, _ = asked(study)
        (tmp_path / f"{n:04d}").mkdir()
        config = train.parse(["melu", "--data", "somewhere", "--lr", f"{n + 2}e-3"])
        (tmp_path / f"{n:04d}/config.yaml").write_text(config_module.to_yaml(config))
        study.tell(trial, values)
    (tmp_path / "front").mkdir()
    (tmp_path / "front/0009.yaml").write_text("of an earlier launch")
    assert search_study.write_best(study, out).number == 1
    search_study.write_trials(study, out)
    assert pl.read_parquet(tmp_path / "trials.parquet")["front"].to_list() == [True, True, False]
    assert sorted(f.name for f in (tmp_path / "front").iterdir()) == ["0000.yaml", "0001.yaml"]
    assert config_module.load(out / "best.yaml", None, {}).train.lr == 3e-3
    # for other data: nothing that is as usual, nothing of this machine
    assert config_module.read_yaml(out / "tuned.yaml") == {"method": "melu", "train": {"lr": 3e-3}}
    assert (
        (tmp_path / "tuned.yaml")
        .read_text()
        .startswith("# trial 1 of the 3 of study melu:\n# validation error 0.6000; defaults: 0.7000\n")
    )


def test_what_a_trial_is_judged_by():
    rows = [
        {"valid_mae": 0.8, "valid_mse": 1.0},
        {"valid_mae": 0.7, "valid_mse": 1.1},
    ]
    kept = min(rows, key=trialrun._judged)
    assert trialrun._error(kept, "mse") == 1.1  # of the epoch that training keeps
    lists = {"valid_mae": None, "valid_recall@10": 0.25, "valid_recall@50": 0.5}
    assert (trialrun._judged(lists), trialrun._error(lists, "recall@50")) == (0.75, 0.5)
    assert trialrun._error({"valid_mae": None, "valid_mse": None}, "mae") == math.inf


def test_a_trial_waits_for_the_process_that_it_replaces(tmp_path):
    run, ended = Location.of(tmp_path), threading.Event()

    def leave(held: contextlib.AbstractContextManager[None]) -> None:
        time.sleep(0.5)
        ended.set()
        held.__exit__(None, None, None)

    held = rundir.lock(run)
    held.__enter__()
    threading.Thread(target=leave, args=(held,)).start()
    with trialrun._held(run, lambda _: None):
        assert ended.is_set()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "name at least one METHOD"),
        (["melu", "--trials", "0"], "--trials must be at least 1"),
        (["melu", "--epochs", "0"], "--epochs must be at least 1"),
        (["melu", "--failures", "7"], "--failures must be from 0 to 1"),
        (["melu", "--sampler", "cma"], "choose one of tpe random"),
        (["melu", "--metric", "maee"], r"validation measures mae mse recall@10 recall@50 \(did you mean mae"),
        (["melu", "--threads", "4096"], "--threads 4096: this machine has"),
        (["melu", "--pareto", "--pruning"], "it stops no trial; leave --pruning out"),
        (["melu", "--pareto", "--sampler", "gp"], "with --pareto use tpe or nsga2"),
        (["melu", "--set", "slots=3"], "melu has no flag --slots"),
        (["melu", "--set", "bath-size=3"], "did you mean batch-size"),
        (["melu", "--set", "lr=fast"], "--lr: invalid float"),
        (["melu", "--set", "lr"], "--lr: expected one argument"),
        (["nosuch"], "nosuch"),
        (["melu", "--set", "epochs=3"], "the command sets --epochs itself"),
        (["itemmean", "--set", "shrink=3"], "leaves nothing of itemmean to tune"),
        (["constant"], "constant has nothing to tune"),
        (["melu", "melu"], "named twice"),
        (["--resume"], "no search here"),
        (["--retried"], "name at least one METHOD"),
        (["melu", "--retried", "--data", "/nowhere"], "/nowhere"),
        (["melu", "--trails", "3"], "did you mean --trials"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        search.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def search_there(tmp_path) -> str:
    settings = {**search_plan.DEFAULTS, "methods": ["melu"], "pruning": True, "data": "/nowhere"}
    (tmp_path / "search.json").write_text(json.dumps(settings))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["hml", "--resume"], r"was started with methods = \['melu'\], not \['hml'\]; start a new search"),
        (["--resume", "--sampler", "random"], "was started with sampler = 'tpe', not 'random'"),
        (["--resume", "--no-pruning"], "was started with pruning = True, not False"),
        (["--resume"], "/nowhere"),
        (["hml", "--retried"], r"was started with methods = \['melu'\], not \['hml'\]"),
        (["melu", "--retried", "--trials", "3"], "/nowhere"),
        (["melu"], "a search exists here; add --resume"),
    ],
)
def test_a_search_goes_on_as_it_was_started(search_there, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        search.main([*argv, "--out", search_there])


@pytest.mark.parametrize("kept", ["[]", "{}", '{"methods": 3}', "{"])
def test_what_is_no_search_is_not_gone_on_with(tmp_path, kept):
    (tmp_path / "search.json").write_text(kept)
    with pytest.raises(UserError, match=r"search\.json.*start a new search"):
        search.main(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("line", [b"{", b'{"op_code": 4}', b"[]"])
def test_damaged_journal(tmp_path, line):
    opened(Location.of(tmp_path))
    journal = tmp_path / "journal.log"
    journal.write_bytes(line + b"\n" + journal.read_bytes())
    with pytest.raises(UserError, match=r"journal\.log.*is damaged.*start a new search"):
        opened(Location.of(tmp_path))


def test_trials_of_another_space_or_other_tasks(tmp_path):
    study = search_study.opened(Location.of(tmp_path), "melu", "tpe", 0, FIRST, tasks="one")
    asked(study)
    study = search_study.opened(Location.of(tmp_path), "melu", "tpe", 0, FIRST, tasks="one")
    other = spaces.Space((spaces.Float("lr", 1e-4, 1e-1), spaces.Choice("encoder", ("mean", "max"))))
    with pytest.raises(UserError, match="another search space"):
        search_study.suggest(optuna.Trial(study, study.trials[0]._trial_id), other)
    with pytest.raises(UserError, match="the dataset has changed"):
        search_study.opened(Location.of(tmp_path), "melu", "tpe", 0, FIRST, tasks="two")


def test_methods_and_metrics_suit_the_dataset(tmp_path, small, clicks):
    for argv, sentence in (
        (["ials", "--data", str(small)], "ials counts clicks and the labels are ratings"),
        (["melu", "--data", str(small), "--metric", "recall@10"], "validation of cmml-user measures mae mse"),
        (["melu", "--data", str(tmp_path / "none")], "none"),
    ):
        with pytest.raises(UserError, match=sentence):
            search.main([*argv, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    asked = search_plan.settle({"methods": ["melu"], "resume": False, "data": str(clicks)}, Location.of(tmp_path))
    suited = search._Search.of(search_plan.Tuned.of("melu", asked), clicks, asked)
    assert "query_loss" not in [p.name for p in suited.plan.space.parameters]


def test_a_submitted_job_searches_where_it_will_not_be_deleted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    with pytest.raises(UserError, match="--out here: is relative to the working directory of this submitted job"):
        search.main(["melu", "--out", "here"])
    with pytest.raises(UserError, match="--data is missing, and its default lies in"):
        search.main(["melu", "--out", str(tmp_path)])
