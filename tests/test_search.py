"""The study behind a search: one journal, which a killed search goes on from, and what its trials came to."""

import optuna
import polars as pl
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from distmeta.commands import search, search_study
from distmeta.errors import RunError, UserError
from distmeta.parallel import trials
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


def asked(study: optuna.Study) -> tuple[optuna.Trial, dict]:
    trial = study.ask()
    values = search_study.suggest(trial, SPACE)
    trial.set_user_attr("run", trial.user_attrs.get("run") or f"{trial.number:04d}")
    return trial, values


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

    again, values = asked(opened(out))
    assert (again.user_attrs["run"], values) == ("0001", FIRST[1][1])  # the interrupted one, in its own directory
    again, _ = asked(study := opened(out))  # killed once more
    assert again.user_attrs["run"] == "0001"
    study.tell(again, 0.6)
    new, _ = asked(study)
    assert new.user_attrs["run"] not in ("0000", "0001")  # no first trial is made twice
    found = trials.tally(study, plan(4))
    assert (found.done, found.failed, found.best, found.best_run) == (2, 0, 0.6, "0001")
    kept = optuna.load_study(study_name="melu", storage=JournalStorage(JournalFileBackend(str(journal))))
    assert kept.best_value == 0.6  # Optuna's own tools open it


def test_a_later_launch_draws_other_trials(tmp_path):
    drawn = []
    for _ in range(2):
        study = search_study.opened(Location.of(tmp_path), "melu", "random", 3, [])
        trial, values = asked(study)
        drawn.append(values["lr"])
        study.tell(trial, 1.0)
    assert drawn[0] != drawn[1]


def plan(n: int, failures: float = 0.5) -> trials.Plan:
    return trials.Plan("melu", n, 5, failures, True, 1, 1, Location.of("nowhere"))


def test_how_a_trial_ends():
    report = {trials.OBJECTIVE: 0.5, "epoch": 2}
    assert trials._ending({**report, "over": "patience"}, False, 5) == (TrialState.COMPLETE, 0.5, "")
    assert trials._ending({**report, "epoch": 5}, False, 5) == (TrialState.COMPLETE, 0.5, "")
    assert trials._ending(report, False, 5)[0] == TrialState.PRUNED
    assert trials._ending({**report, "failure": "loss is NaN"}, False, 5) == (TrialState.FAIL, None, "loss is NaN")
    assert trials._ending(report, True, 5)[0] == TrialState.FAIL


def test_too_many_failures_end_the_search_with_the_reason(tmp_path):
    study = opened(Location.of(tmp_path))
    for _ in range(2):
        trial, _ = asked(study)
        trial.set_user_attr("failure", "loss is NaN")
        study.tell(trial, state=TrialState.FAIL)
    assert not trials.tally(study, plan(4)).hopeless
    with pytest.raises(RunError, match=r"2 of 3 trials failed.*0001: loss is NaN"):
        trials.search(study, plan(3), lambda _: pytest.fail("asked"), Location.of(tmp_path))
    search_study.write_trials(study, Location.of(tmp_path))
    table = pl.read_parquet(tmp_path / "trials.parquet")
    assert table["failure"].to_list() == ["loss is NaN"] * 2
    assert table["param.units"].to_list() == [None, 64]
    with pytest.raises(RunError, match="no trial was completed"):
        search_study.write_best(study, Location.of(tmp_path))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "name at least one METHOD"),
        (["melu", "--trials", "0"], "--trials must be at least 1"),
        (["melu", "--sampler", "cma"], "choose one of tpe random"),
        (["melu", "--set", "slots=3"], "none of melu has the flag --slots"),
        (["melu", "--set", "epochs=3"], "the command sets --epochs itself"),
        (["itemmean", "--set", "shrink=3"], "leaves nothing of itemmean to tune"),
        (["constant"], "constant has nothing to tune"),
        (["melu", "melu"], "named twice"),
        (["--resume"], "no search here"),
        (["melu", "--trails", "3"], "did you mean --trials"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        search.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
