"""Planted worlds: what is planted is there to be found, only where it should be, and its best errors are true."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from handmade import make
from scipy.cluster.vq import kmeans2
from scipy.stats import chi2_contingency

from distmeta import cli
from distmeta.data import tasktable
from distmeta.data.schema import Dataset, Label
from distmeta.data.sources import oracle
from distmeta.data.sources.synthetic import Recipe, World, generate, optimal
from distmeta.errors import UserError
from distmeta.evaluation.metrics import pooled_auc
from distmeta.networks import content_fields
from distmeta.storage import Location


def _made(where: Path, **arguments: Any) -> tuple[Dataset, pl.DataFrame, pl.DataFrame]:
    """The dataset, its users with the values of their fields, and its interactions."""
    dataset = generate(Location.of(where), **arguments)
    users = pl.read_parquet(f"{where}/users/*.parquet")
    for f in dataset.user_fields:
        values = pl.read_parquet(f"{where}/vocabularies/user-{f.name}.parquet")["value"]
        users = users.with_columns(values.gather(users[f.name]).alias(f.name))
    return dataset, users, pl.read_parquet(f"{where}/interactions/*.parquet")


def _contingency(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.unique(a, return_inverse=True)[1] * 1000 + np.unique(b, return_inverse=True)[1]


def _adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Hubert & Arabie (1985): pairs together in both, over what chance gives."""

    def pairs(groups: np.ndarray) -> float:
        n = np.unique(groups, return_counts=True)[1]
        return float((n * (n - 1) / 2).sum())

    both, one, other, all_pairs = pairs(_contingency(a, b)), pairs(a), pairs(b), pairs(np.zeros(len(a)))
    chance = one * other / all_pairs
    return (both - chance) / ((one + other) / 2 - chance)


def _content(where: Path) -> np.ndarray:
    """[items, 16]: category and mean of the tags, as one-hots, centred."""
    items = pl.read_parquet(f"{where}/items/*.parquet")
    tags = [np.bincount(t, minlength=13)[1:] / len(t) for t in items["tags"].to_list()]
    x = np.hstack([np.eye(5)[items["category"].to_numpy()][:, 1:], np.stack(tags)])
    return x - x.mean(0)


def _left(rows: pl.DataFrame) -> np.ndarray:
    """[n]: what the mean, then the items' and the users' offsets leave of the labels."""
    left = rows["label"].to_numpy() - rows["label"].mean()
    for side in ("item", "user"):
        index = rows[side].to_numpy()
        left = left - (np.bincount(index, left) / (np.bincount(index) + 1))[index]
    return left


@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_are_in_the_ratings_and_in_no_field(tmp_path: Path, seed: int) -> None:
    """K-means on each user's regression of 20 ratings on item content finds them; a chi-square test on fields not."""
    arguments = {"users": 600, "per_user": (20, 20), "preference_clusters": 3, "seed": seed}
    dataset, users, rows = _made(tmp_path / "d", **arguments)
    x, user = _content(tmp_path / "d")[rows["item"]], rows["user"].to_numpy()
    gram, right = np.zeros((600, 16, 16)), np.zeros((600, 16))
    np.add.at(gram, user, x[:, :, None] * x[:, None, :])
    np.add.at(right, user, x * _left(rows)[:, None])
    tastes = np.linalg.solve(gram + np.eye(16), right[..., None])[..., 0]
    found = [kmeans2(tastes, 3, minit="++", rng=start) for start in range(5)]
    labels = min(found, key=lambda f: ((tastes - f[0][f[1]]) ** 2).sum())[1]
    planted = users["planted_cluster"].to_numpy()
    assert _adjusted_rand(planted, labels) > 0.9
    assert _adjusted_rand(planted, np.random.default_rng(0).permutation(labels)) < 0.05

    fields, _ = content_fields(dataset)
    assert [f.name for f in fields] == ["segment", "region", "job", "channel", "device"]
    assert {f.name for f in dataset.user_fields} - {f.name for f in fields} == {"planted_cluster"}
    for f in fields:
        table = pl.DataFrame({"a": planted, "b": users[f.name]}).pivot(
            "b", index="a", values="b", aggregate_function="len"
        )
        assert chi2_contingency(table.fill_null(0).drop("a").to_numpy()).pvalue > 1e-3
    mean = World.of(Recipe.of(arguments)).users.factors
    apart = [mean[planted == v].mean(0) for v in "012"]
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(apart, [*apart[1:], apart[0]], strict=True)
    ]
    assert cosines == pytest.approx([-0.5] * 3, abs=0.1)


@pytest.mark.parametrize("told", [0.0, 0.7])
def test_the_segment_tells_as_much_as_it_is_asked_to(tmp_path: Path, told: float) -> None:
    _, users, _ = _made(tmp_path / "d", users=2000, items=40, per_user=(1, 1), preference_clusters=4, told=told)
    assert (users["segment"] == users["planted_cluster"]).mean() == pytest.approx(told + (1 - told) / 4, abs=0.045)


@pytest.mark.parametrize(
    "arguments", [{"minor": 0.2}, {"minor": 0.1, "preference_clusters": 3, "factors": 6, "told": 1.0}]
)
def test_minor_users_are_those_that_protocol_paml_calls_minor(tmp_path: Path, arguments: dict[str, Any]) -> None:
    _, users, _ = _made(tmp_path / "d", users=800, items=60, per_user=(5, 9), **arguments)
    assert (users["planted_group"] == "minor").mean() == pytest.approx(arguments["minor"], abs=0.05)
    table = tasktable.make(Location.of(tmp_path / "d"), "paml", 0, {})
    columns = ["user", "cohort"]
    parts = [pl.DataFrame(pl.from_arrow(t)) for s in ("train", "valid", "test") for t in table.read(s, columns=columns)]
    said = pl.concat(parts).join(users, on="user")
    assert len(said) == 640
    assert set(said["cohort"]) == {"major", "minor"}
    assert (said["cohort"] == said["planted_group"]).all()


def test_who_fits_everybody_overlooks_the_minor_users(tmp_path: Path) -> None:
    """Ridge regression on item content, the same for all, leaves minor users more than a constant does, major less."""
    dataset, users, rows = _made(tmp_path / "d", users=1000, minor=0.15)
    minor = (users["planted_group"] == "minor").to_numpy()[rows["user"]]
    x, left = _content(tmp_path / "d")[rows["item"]], rows["label"].to_numpy() - rows["label"].mean()
    left = left - (np.bincount(rows["user"], left) / np.bincount(rows["user"]))[rows["user"]]
    error = (left - x @ np.linalg.solve(x.T @ x + np.eye(16), x.T @ left)) ** 2
    assert error[~minor].mean() < 0.8 * (left[~minor] ** 2).mean()
    assert error[minor].mean() > 1.2 * (left[minor] ** 2).mean()
    assert error[minor].mean() > 2 * error[~minor].mean()
    groups = dataset.extra["bayes_groups"]["planted_group"]
    assert groups["minor"]["mse"] == pytest.approx(groups["major"]["mse"], rel=0.05)  # no harder for who knows them
    assert groups["minor"]["rows"] + groups["major"]["rows"] == len(rows)


@pytest.mark.parametrize(
    "arguments", [{}, {"preference_clusters": 3}, {"minor": 0.3, "clicks": True}, {"clicks": True}]
)
def test_best_predictions_have_the_stated_errors_and_no_other_has_less(tmp_path: Path, arguments: dict) -> None:
    """On the dataset's own labels, over all and by group, within four standard errors."""
    dataset, users, rows = _made(tmp_path / "d", users=900, seed=5, **arguments)
    best = optimal(dataset)
    assert best.select("user", "item").cast(pl.Int32).equals(rows.select("user", "item"))
    label = rows["label"].to_numpy().astype(float)
    errors = {"mae": np.abs(label - best["median"].to_numpy()), "mse": (label - best["mean"].to_numpy()) ** 2}
    if "clicks" in arguments:
        assert dataset.label == Label("click", 0.0, 1.0)
        assert set(np.unique(label)) == {0.0, 1.0}
        p = best["mean"].to_numpy()
        errors["log_loss"] = -np.log(np.where(label > 0, p, 1 - p))
    stated = [(np.ones(len(rows), bool), dataset.extra["bayes"])]
    for name, groups in dataset.extra.get("bayes_groups", {}).items():
        of_row = users[name].to_numpy()[rows["user"]]
        stated += [(of_row == value, found) for value, found in groups.items()]
    assert len(stated) == 1 + 3 * ("preference_clusters" in arguments) + 2 * ("minor" in arguments)
    for mine, found in stated:
        for metric, error in errors.items():
            within = 4 * error[mine].std() / np.sqrt(mine.sum())
            assert found[metric] == pytest.approx(error[mine].mean(), abs=within), metric
        assert found["rmse"] == pytest.approx(np.sqrt(found["mse"]))
    for shift in (-0.2, 0.2):
        assert ((label - best["mean"].to_numpy() - shift) ** 2).mean() > errors["mse"].mean()


def test_click_errors_over_all_rows_agree_with_simulation() -> None:
    """auc_rows and nel_rows, which are no means over rows, against fresh draws of the labels."""
    world = World.of(Recipe.of({"users": 60, "clicks": True, "noise": 1.5}))
    p = oracle.probability(oracle.click_logit(world.score, 1.5))
    odds = p / (1 - p) * (1 - p).sum() / p.sum()
    even, rng = odds / (1 + odds), np.random.default_rng(0)

    def nel(predicted: np.ndarray, label: np.ndarray) -> float:
        return -(np.log(predicted[label]).mean() + np.log(1 - predicted[~label]).mean()) / 2

    labels = [rng.random(len(p)) < p for _ in range(200)]
    drawn = {
        "auc_rows": [pooled_auc(pl.DataFrame({"score": p, "label": label.astype(float)})) for label in labels],
        "nel_rows": [nel(even, label) for label in labels],
    }
    found = oracle.click_bayes(world.score, 1.5)
    for metric, values in drawn.items():
        assert found[metric] == pytest.approx(np.mean(values), abs=4 * np.std(values) / np.sqrt(200) + 1e-4)
    assert np.mean(drawn["nel_rows"]) < np.mean([nel(p, label) for label in labels])


def test_click_errors_of_a_few_rows_are_exact_and_leave_out_what_is_not_defined() -> None:
    assert oracle.click_bayes(np.array([3.0]), 0.4).keys() == {"mae", "mse", "rmse", "log_loss"}
    sure = oracle.click_bayes(np.array([1.0, 2.0]), 1e-9)
    assert sure == {"mae": 0.0, "mse": 0.0, "rmse": 0.0, "log_loss": 0.0}
    assert oracle.click_bayes(np.array([1.0, 5.0]), 1e-9) == sure | {"nel_rows": 0.0, "auc_rows": 1.0}
    p = oracle.probability(oracle.click_logit(np.array([4.1, 3.0, 3.9, 3.7]), 0.5))
    pairs = np.outer(p, 1 - p) * (1 - np.eye(4))  # of a click and another row
    found = oracle.click_bayes(np.array([4.1, 3.0, 3.9, 3.7]), 0.5)["auc_rows"]
    assert found == pytest.approx((pairs * (p[:, None] > p)).sum() / pairs.sum())


def test_clicks_are_the_noisy_score_over_a_threshold() -> None:
    score, rng = np.linspace(2.5, 5.0, 6), np.random.default_rng(0)
    noise = rng.logistic(scale=np.sqrt(3) / np.pi, size=(200_000, 1))
    assert noise.std() == pytest.approx(1.0, abs=0.01)
    share = (score + 0.7 * noise > oracle.THRESHOLD).mean(0)
    assert oracle.probability(oracle.click_logit(score, 0.7)) == pytest.approx(share, abs=0.005)


def test_the_command_plants_what_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    flags = ["--users", "80", "--items", "50", "--per-user", "5", "9", "--preference-clusters", "2", "--minor", "0.2"]
    assert cli.main(["prepare", "synthetic", *flags, "--clicks", "--out", out]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "auc_rows" in said
    assert "planted_cluster (2 values), planted_group (2 values)" in said
    stated = Dataset.open(out).extra["arguments"]
    assert stated["per_user"] == [5, 9]
    assert {k: stated[k] for k in ("preference_clusters", "minor", "clicks")} == {
        "preference_clusters": 2, "minor": 0.2, "clicks": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"minor": 0.5}, "--minor must be below 0.5"),
        ({"preference_clusters": 5}, "--factors must be 5 .* to 12"),
        ({"preference_clusters": 7, "minor": 0.1}, "--preference-clusters must be fewer: 14 tastes"),
        ({"preference_clusters": 3, "items": 8, "per_user": (2, 3)}, "--items must be more than twice --factors"),
        ({"told": 0.5, "minor": 0.1}, "--told must be left out without --preference-clusters"),
        ({"personal": 0.5}, "--personal must be left out without"),
        ({"per_user": (20,)}, "--per-user must be LOW HIGH"),
        ({"preference_cluster": 3}, "did you mean preference_clusters"),
    ],
)
def test_a_world_that_cannot_be_is_refused(tmp_path: Path, bad: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate(Location.of(tmp_path / "d"), **bad)
    assert not (tmp_path / "d").exists()


def test_only_a_made_dataset_has_known_best_predictions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiny: not made by `prepare synthetic`"):
        optimal(make(tmp_path / "d"))
