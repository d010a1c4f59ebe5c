"""`export`: files that serve a trained run without this package, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from cmml_oracle import cmml, scenarios

from distmeta import cli
from distmeta.commands import export as command
from distmeta.serving import onnxgraph
from distmeta.serving.export import described, exported, given

SMALL = ["--embedding", "4", "--hidden", "8", "--hyper", "8", "--units", "5", "--epochs", "1", "--batch-size", "64"]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("runs") / "run"
    words = ["cmml-sigmoid", "--data", str(small), "--run", str(where), "--encoder", "gru", "--item-ids", *SMALL]
    assert cli.main(["train", *words]) == 0
    return where


def test_the_file_serves_without_this_package(run, tmp_path, capsys):
    out = tmp_path / "served" / "m.pt2"
    out.parent.mkdir()
    assert cli.main(["export", "--run", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    about = json.loads((out.parent / "m.pt2.json").read_text())
    assert about["compared"]["tasks"] > 10
    assert about["compared"]["largest_difference"] <= 1e-5
    assert (about["method"], about["format"]) == ("cmml-sigmoid", "pt2")
    assert all(i["name"] in said for i in about["inputs"])
    code = """
import json, sys, torch
about = json.load(open(sys.argv[1] + ".json"))
sizes = {"users": 2, "support": 6, "candidates": 11}
sizes |= {n: 3 for i in about["inputs"] for n in i["shape"] if n not in sizes and isinstance(n, str)}
made = [torch.ones([sizes.get(n, n) for n in i["shape"]]).to(getattr(torch, i["dtype"])) for i in about["inputs"]]
user, rest = {}, iter(made)
for f in about["fields"]["user"]:
    user[f["name"]] = (next(rest),) if f["type"] == "categorical" else (next(rest), next(rest))
scores = torch.export.load(sys.argv[1]).module()(user, *rest)
assert scores.shape == (2, 11) and bool(scores.isfinite().all())
assert not any(m.split(".")[0] == "distmeta" for m in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, cwd=tmp_path)


def test_by_default_it_lies_in_the_run(run):
    assert cli.main(["export", "--run", str(run)]) == 0
    assert (run / "export.pt2.json").exists()


def test_a_graph_that_scores_otherwise_is_not_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "TOLERANCE", -1.0)
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "m.pt2")]) == 1
    assert "not written: its scores are up to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_one_sentence(run, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnxgraph.importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    assert cli.main(["export", "--run", str(run), "--onnx", str(tmp_path / "m.onnx")]) == 2
    assert "--onnx needs onnx; install the extra: pip install 'distmeta[onnx]'" in capsys.readouterr().err
    words = ["melu", "--data", str(small), "--run", str(tmp_path / "melu"), *SMALL[:4], *SMALL[8:]]
    assert cli.main(["train", *words]) == 0
    assert cli.main(["export", "--run", str(tmp_path / "melu")]) == 2
    assert "melu adapts by gradients or in closed form, not in one graph; export one of cmml-linear" in (
        capsys.readouterr().err
    )
    assert cli.main(["export", "--run", str(tmp_path / "nothing")]) == 2
    assert "no run here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changes", "many"),
    [
        ("cmml-linear", {"encoder": "mean"}, False),
        ("cmml-sigmoid", {"encoder": "gru", "positives": True}, False),
        ("cmml-film", {"encoder": "lstm", "hybrid": "mlp"}, False),
        ("cmml-softm", {"encoder": "max"}, False),
        ("cmml-film", {"encoder": "gru", "user_ids": True}, True),
    ],
    ids=str,
)
def test_onnx_answers_as_the_method_does(name, changes, many):
    """To 1e-5, whatever the numbers of users, support rows and candidates; no support and scenarios included."""
    for package in onnxgraph.PACKAGES:
        pytest.importorskip(package, reason="the extra `onnx` is not installed")
    m = cmml(name, **changes).float()
    names = [i["name"] for i in described(m.dataset, many)]
    session = onnxgraph.Session(onnxgraph.converted(exported(m, many), names))
    ragged = [([[5, 3, 1, 0]], [[2, 4, 3, 2]]), ([[40]], [[1000]]), ([[1]], [[1]]), ([[0, 0]], [[9, 9]])]
    for sizes in [([[9, 4]], [[11, 30]])] if many else ragged:
        batch = scenarios(oracle.batch(*sizes)) if many else oracle.batch(*sizes)
        batch = batch.to("cpu", torch.float32)
        (expected,) = m.predict(m.adapt(batch), batch)
        mask = batch.blocks[0].query.mask
        found = session(*given(batch, batch.blocks[0], m.dataset))
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
