"""Benchmarks of training take methods without inner steps."""

import json

import pytest

from distmeta import cli


def test_a_feed_forward_method_is_measured_once_beside_each_number_of_steps(small, tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["--data", str(small), "--methods", "melu", "cmml-film", "--steps", "1", "2", "--epochs", "2"]
    assert cli.main(["benchmark", "methods", *words, "--set", "cmml-film:encoder=gru", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(r["variant"], r["steps"]) for r in rows] == [
        ("melu", "1 steps"),
        ("cmml-film", "no steps"),
        ("melu", "2 steps"),
    ]
    film, melu = rows[1], {r["steps"]: r["value"] for r in rows[::2]}
    assert film["ratio_to"] == {f"melu {k}": pytest.approx(film["value"] / v) for k, v in melu.items()}
    assert "rows, no steps" in capsys.readouterr().out


def test_a_closed_form_has_no_steps_to_measure(small, capsys):
    assert cli.main(["benchmark", "methods", "--data", str(small), "--methods", "als"]) == 2
    assert "als has a closed form, without steps to measure; methods that have: melu" in capsys.readouterr().err
