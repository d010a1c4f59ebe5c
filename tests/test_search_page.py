"""A search's report: what it says and draws is what the study has, and a poor study gives a page that says so."""

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from distmeta.commands import search_pages
from distmeta.evaluation import searchpage
from distmeta.evaluation.searchrows import Axis, Search, Trial, ceiling, front, so_far
from distmeta.storage import Location
from tune import spaces

RANGES = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "encoder": CategoricalDistribution(("mean", "gru")),
    "units": CategoricalDistribution((64, 128)),
    "steps": IntDistribution(1, 8),
}
PICTURES = [
    "History", "Learning curves", "Parameters together", "Parameters one by one", "Importance of parameters",
    "Quality against training time", "Time by state",
]  # fmt: skip


def study(name: str = "melu", goals: int = 1, storage: JournalStorage | None = None) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(study_name=name, directions=["minimize"] * goals, storage=storage)
    made.set_user_attr("metric", "mae")
    return made


def add(
    to: optuna.Study,
    state: TrialState,
    values: list[float] | None = None,
    told: list[float] | None = None,
    params: dict[str, Any] | None = None,
    ranges: dict[str, Any] = RANGES,
    **attrs: Any,
) -> None:
    """A trial that has ended."""
    params = {"lr": 1e-3} if params is None else params
    attrs = {"run": f"{len(to.get_trials(deepcopy=False)):04d}", **attrs}
    trial = create_trial(
        state=state, values=values, params=params, distributions={k: ranges[k] for k in params},
        user_attrs=attrs, intermediate_values=dict(enumerate(told or [], 1)),
    )  # fmt: skip
    to.add_trial(trial)


def rich(n: int = 40, ranges: dict[str, Any] = RANGES) -> optuna.Study:
    """`lr` alone decides; defaults and paper first; every fifth pruned, every ninth failed."""
    rng, made = random.Random(0), study()
    for k in range(n):
        lr = 10 ** rng.uniform(-4, -1)
        params = {"lr": lr, "encoder": rng.choice(("mean", "gru")), "steps": rng.randint(1, 8)}
        params |= {"units": rng.choice((64, 128))} if params["encoder"] == "gru" else {}
        params |= {name: rng.uniform(has.low, has.high) for name, has in ranges.items() if name not in RANGES}
        value = 0.7 + 0.02 * (math.log10(lr) + 2.5) ** 2 + 1e-4 * rng.random()
        told = [value + 0.2 / e for e in range(1, 30)] + [value]
        source = {0: spaces.DEFAULTS, 1: "paper <1> & sons"}.get(k)
        more: dict[str, Any] = {"source": source} if source else {}
        more |= {"params": params, "ranges": ranges}
        if k > 1 and k % 9 == 0:
            add(made, TrialState.FAIL, failure="loss is NaN <b>in</b> epoch 3", **more)
        elif k > 1 and k % 5 == 0:
            add(made, TrialState.PRUNED, told=told[: k % 7 + 1], seconds=4.25, **more)
        else:
            add(made, TrialState.COMPLETE, [value], told, seconds=rng.uniform(20, 40), **more)
    return made


class Page(HTMLParser):
    """Checks that elements nest and close, and gathers a page's words and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))
        self.pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [tag] if tag != "meta" else []
        self.tags.add(tag)
        self.outside += [v for k, v in attrs if v and k in ("src", "href", "xlink:href", "data") and v[0] != "#"]
        self.ids += [v for k, v in attrs if k == "id" and v]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += [data] if "style" not in self.open else []


def of(made: optuna.Study) -> Search:
    return search_pages.rows_of(made, "films & books", "melu", 2)


def test_the_page_says_what_the_study_has():
    made = rich()
    page = Page(text := searchpage.page(of(made)))
    done = [t for t in made.trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in made.trials if t.state == TrialState.PRUNED]
    failed = [t for t in made.trials if t.state == TrialState.FAIL]
    seconds = sum(t.user_attrs.get("seconds", 0.0) for t in made.trials)
    best, default = made.best_trial, made.trials[0]
    assert default.value is not None
    assert (
        f"The best trial, {best.user_attrs['run']}, has a validation MAE of {best.value:.4f} ,"
        f" {default.value - made.best_value:.4f} lower than the method’s defaults ({default.value:.4f})."
        f" Of 40 trials {len(done)} were completed, {len(pruned)} were pruned and {len(failed)} failed,"
        f" in {seconds:,.0f} s of training."
    ) in page.text
    assert all(name in page.text for name in PICTURES)
    assert len(page.pictures) == len(PICTURES)
    assert "Not drawn" not in page.text
    ranked = sorted(done, key=lambda t: t.value or 0.0)[: searchpage.TOP]
    columns = re.search(r"<thead><tr>(.*?)</tr>", text)
    assert columns
    assert re.findall(r"\b\d{4}\b", columns[1])[: searchpage.TOP] == [t.user_attrs["run"] for t in ranked]
    assert f"{', '.join(t.user_attrs['run'] for t in failed[:3])} and {len(failed) - 3} more" in page.text
    assert "loss is NaN <b>in</b> epoch 3" in page.text
    assert "0001: paper <1> & sons" in page.text
    assert not page.outside
    assert not page.tags & {"script", "img", "link", "iframe"}


def test_pictures_have_a_mark_for_each_trial():
    made = rich()
    found = of(made)
    page = Page(searchpage.page(found))
    marks = [len(svg.findall(".//{*}use")) for svg in page.pictures]
    paths = [len(svg.findall(".//{*}path")) for svg in page.pictures]
    valued = [t for t in made.trials if t.state != TrialState.FAIL]
    assert marks[0] >= len(made.trials) + 2  # the defaults' and the paper's are there twice
    assert paths[1] >= len(valued)
    assert paths[2] >= len(valued)
    assert marks[3] >= sum(len(t.params) for t in valued)
    words = ["".join(svg.itertext()) for svg in page.pictures]
    assert all(name in words[2] and name in words[3] for name in RANGES)
    assert "none" in words[2]  # units, of those whose encoder has none
    for state, total in found.times().items():
        assert f"{total:,.0f} s" in words[6] or f"{total:.1f} s" in words[6], state


def test_importance_finds_what_decides():
    shares = of(rich(80)).importance
    assert set(shares) == set(RANGES)
    assert max(shares, key=lambda name: shares[name]) == "lr"
    assert shares["lr"] > 0.5
    assert math.fsum(shares.values()) == pytest.approx(1)


def test_the_front_is_that_of_brute_force():
    rng, errors = random.Random(1), (0.1, 0.2, 0.3, None, math.inf)
    for _ in range(60):
        trials = [
            Trial(k, "", rng.choice(("complete", "complete", "pruned", "failed")), rng.choice(errors),
                  {}, seconds=rng.choice((1, 2, 3, 4, 5, 6, None)))
            for k in range(rng.randint(0, 14))
        ]  # fmt: skip
        able = [
            (t.number, t.value, t.seconds)
            for t in trials
            if t.state == "complete" and t.seconds is not None and t.value is not None and math.isfinite(t.value)
        ]
        wanted = {
            n for n, v, s in able if not any(a <= v and b <= s and (a < v or b < s) for _, a, b in able)
        }  # fmt: skip
        assert {t.number for t in front(trials)} == wanted
        assert [t.seconds for t in front(trials)] == sorted(t.seconds for t in front(trials) if t.seconds)


def test_where_the_time_went():
    """Launches of 6 and 4 CPUs, two a trial: room for 3 and 2 trials; one trial is still to be gone on with."""
    made = study()
    for k, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL) * 2):
        add(made, state, [0.5] if state == TrialState.COMPLETE else None, [0.5], seconds=10.0 + k)
    add(made, TrialState.FAIL)
    made.ask().set_user_attr("seconds", 4.0)
    assert (of(made).beside(), of(made).unfinished) == (None, 4.0)
    assert "beside training" not in Page(searchpage.page(of(made))).text
    made.set_user_attr("launches", [{"seconds": 20.0, "cpus": 6.0}, {"seconds": 30.5, "cpus": 4.0}])
    found = of(made)
    assert found.times() == {"complete": 23, "pruned": 25, "failed": 27}
    assert (found.trained(), found.beside()) == (79, 20 * 3 + 30.5 * 2 - 79)
    text = Page(searchpage.page(found)).text
    bars = "".join(Page(searchpage.page(found)).pictures[-1].itertext())
    assert [s for s in ("23 s, 19 %", "25 s, 21 %", "27 s, 22 %", "4.0 s, 3 %", "42 s, 35 %") if s not in bars] == []
    assert "in 79 s of training" in text
    assert "in 50 s" in text


def test_several_seeds_and_two_goals():
    made = study(goals=2)
    for error, seconds in [(0.7, 30.0), (0.8, 10.0), (0.9, 20.0)]:
        add(made, TrialState.COMPLETE, [error, seconds], seconds=seconds, deviation=0.0123)
    found = of(made)
    text = Page(searchpage.page(found)).text
    assert [t.number for t in front(found.trials)] == [t.number for t in reversed(made.best_trials)] == [1, 0]
    assert "0.7000 (standard deviation over seeds 0.0123)" in text
    assert "0.7000 ± 0.0123" in text
    assert "The search sought both." in text
    assert "the method’s defaults were not tried" in text


def nothing(made: optuna.Study) -> None: ...


def one(made: optuna.Study) -> None:
    add(made, TrialState.COMPLETE, [0.7], [0.8, 0.7], seconds=3.0, source=spaces.DEFAULTS)


def all_failed(made: optuna.Study) -> None:
    for _ in range(25):
        add(made, TrialState.FAIL, told=[0.9, 0.8], seconds=2.0, failure=f"reason {len(made.trials)}")


def endless(made: optuna.Study) -> None:
    for _ in range(12):
        add(made, TrialState.COMPLETE, [math.inf])
    add(made, TrialState.PRUNED)


def choices_alone(made: optuna.Study) -> None:
    for k in range(12):
        params = {"encoder": ("mean", "gru")[k % 2], "units": 64}
        add(made, TrialState.COMPLETE, [0.7 + k / 100], [0.8], params, seconds=0.0)


def alike(made: optuna.Study) -> None:
    for _ in range(12):
        add(made, TrialState.COMPLETE, [0.7], [0.7], {"lr": 1e-3, "steps": 3}, seconds=5.0)


@pytest.mark.parametrize(
    ("make", "drawn", "sentences"),
    [
        (nothing, 0, ["No trial was completed, so there is no best one. None has ended.", "it takes two trials"]),
        (
            one,
            5,
            ["those are the method’s defaults", "it takes 10 completed trials", "Of 1 trial 1 was"],
        ),
        (all_failed, 2, ["no trial has a value", "reason 0", "25 failed", "5 more reasons are in trials.parquet"]),
        (endless, 0, ["No trial was completed", "12 were completed", "no completed trial told its seconds"]),
        (choices_alone, 5, ["no trial told its seconds", "no trial told more than one value", "encoder", "0.7000"]),
        (alike, 5, ["do not differ from the others", "0.7000"]),
    ],
)
def test_a_poor_study_gives_a_page_that_says_so(make, drawn, sentences):
    make(made := study())
    page = Page(searchpage.page(of(made)))
    assert [s for s in sentences if s not in page.text] == []
    assert len(page.pictures) == drawn
    assert ("Not drawn" in page.text) == (drawn < len(PICTURES))
    Page(searchpage.index([of(made), of(rich(12))]))


def test_five_hundred_trials_are_less_than_two_megabytes():
    """With as many parameters as the largest space has."""
    most = max(len(s.parameters) for s in spaces.SPACES.values())
    more = {f"p{k}": FloatDistribution(0, 1) for k in range(most - len(RANGES))}
    assert len(searchpage.page(of(rich(500, RANGES | more)))) < 2_000_000


def test_axes_and_edges():
    log = Axis("lr", 1e-4, 1e-1, log=True)
    assert [log.at(v) for v in (1e-4, 1e-3, 1e-1)] == pytest.approx([0, 1 / 3, 1])
    assert [text for _, text in log.ticks()] == ["0.0001", "0.001", "0.01", "0.1"]
    assert [text for _, text in Axis("b", 8, 100, log=True, whole=True).ticks()] == ["8", "16", "32", "64"]
    assert Axis("x", 3e-2, 9e-2, log=True).ticks() == [(0.0, "0.03"), (1.0, "0.09")]
    assert Axis("same", 2, 2).ticks() == [(0.5, "2")]
    assert Axis("c", choices=(True, False)).ticks() == [(0.25, "yes"), (0.75, "no")]
    assert ceiling([0.7, 0.71, 0.72, 0.73, 50.0]) == pytest.approx(0.76)
    assert ceiling([0.7, 0.71, 0.72, 0.73, 0.77]) is None
    assert ceiling([0.7, 0.71]) is None
    assert ceiling([0.7] * 3) is None
    assert ceiling([]) is None
    trials = [Trial(k, "", "complete", v, {}) for k, v in enumerate((0.9, 0.8, 0.85, None, 0.7))]
    assert so_far(trials) == [(0, 0.9), (1, 0.8), (4, 0.7)]


def test_files_of_a_search_of_several_methods(tmp_path: Path):
    """The index has the methods begun so far, the lowest marked, and leads to their reports."""
    out, storage = Location.of(tmp_path), JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    for name, errors in (("melu", (0.8, 0.75)), ("hml", (0.78, 0.72)), ("mamo", ())):
        made = study(name, storage=storage)
        for error in errors:
            source: dict[str, Any] = {"source": spaces.DEFAULTS} if error == errors[0] else {}
            add(made, TrialState.COMPLETE, [error], [error], seconds=7.0, **source)
        (out / name).make_dir()
        search_pages.write(made, out, ["melu", "hml", "mamo", "paml"], "films", "melu", 2)
    page = Page(text := (tmp_path / "index.html").read_text())
    assert page.outside == ["melu/report.html", "hml/report.html", "mamo/report.html"]
    assert all((tmp_path / place).exists() for place in page.outside)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)[1:]]
    assert [row[1:4] for row in rows] == [
        ["0.7500", "0.8000", "−0.0500"], ["<b>0.7200</b>", "0.7800", "−0.0600"], ["–", "not tried", "–"],
    ]  # fmt: skip
    assert [row[-1] for row in rows] == ["14", "14", "0"]
    assert "Of 3 methods hml has the lowest validation MAE, 0.7200" in page.text

    one_method = Location.of(tmp_path / "one")
    (one_method / "melu").make_dir()
    search_pages.write(rich(3), one_method, ["melu"], "films", "melu", 2)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["melu"]
