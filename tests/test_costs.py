"""What CMML costs: `benchmark serving`, what the exported graph works out per candidate, `reproduce cmml-fig2`."""

import json

import oracle
import pytest
import torch
from cmml_oracle import cmml
from torch.utils.flop_counter import FlopCounterMode

from distmeta import cli
from distmeta.commands import reproduce_costs
from distmeta.errors import RunError
from distmeta.serving.export import exported, given
from distmeta.storage import Location


def test_the_graph_works_out_the_user_s_half_once():
    """What a further candidate adds is its item's half of the first layers and the layers after them, no more."""
    m = cmml("cmml-film", encoder="mean", embedding=3, hidden=(6, 5), hyper=7).float()
    graph = exported(m).module()

    def operations(candidates: int) -> int:
        batch = oracle.batch([[4]], [[candidates]]).to("cpu", torch.float32)
        with FlopCounterMode(display=False) as counter:
            graph(*given(batch, batch.blocks[0], m.dataset))
        return counter.get_total_flops()

    item = m.embedding.item_width
    backbone, hyper = item * 6 + 6 * 5 + 5, item * 7 + 7 * 7 + 7 * 2 * (6 + 5)
    assert operations(50) - operations(30) == 20 * 2 * (backbone + hyper)


def test_serving_is_measured_variant_by_variant(small, tmp_path, capsys):
    file = tmp_path / "rows.json"
    words = ["--data", str(small), "--methods", "cmml-linear", "--set", "encoder=gru", "--steps", "1"]
    sizes = ["--support", "4", "--candidates", "20", "--requests", "10"]
    assert cli.main(["benchmark", "serving", *words, *sizes, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    found = {(r["method"], r["variant"]) for r in rows} - {("cmml-linear", "onnx")}
    assert found == {("cmml-linear", "eager"), ("cmml-linear", "exported"), ("melu", "eager, 1 steps")}
    for r in rows:
        assert 0 < r["value"] <= r["p95"]
    assert "4 support rows, 20 candidates, one user at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "melu"], "melu cannot be exported; methods that can: cmml-linear"),
        (["--candidates", "200"], "has 120 items; lower --candidates"),
        (["--run", "x"], "give either --run RUN or --data DATASET"),
        (["--set", "hiden=3"], "--set hiden=3: none of cmml-film has that flag"),
    ],
)
def test_serving_misuse_is_one_sentence(small, words, said, capsys):
    assert cli.main(["benchmark", "serving", "--data", str(small), *words]) == 2
    assert said in capsys.readouterr().err


def test_figure_2_is_measured_in_processes_of_their_own(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce_costs, "ROUNDS", 1)
    reproduce_costs.run(reproduce_costs.COSTS["cmml-fig2"], small, Location.of(tmp_path / "out"), ["cmml-film"])
    found = json.loads((tmp_path / "out/cmml-fig2.json").read_text())
    assert [r["label"] for r in found["rows"]] == ["CMML-FiLM, gru", "CMML-FiLM, mean"]
    assert all(r["s_per_1000"] > 0 and r["peak_mb"] > 0 for r in found["rows"])
    page = (tmp_path / "out/cmml-fig2.html").read_text()
    for words_there in ("CMML, Figure 2", "CMML-FiLM, gru", "<svg"):
        assert words_there in page, words_there
    assert (tmp_path / "out/cmml-fig2.svg").read_text().startswith("<?xml")
    assert "peak MB" in (tmp_path / "out/cmml-fig2.md").read_text()
    assert "round 1 of 1, CMML-FiLM, mean" in capsys.readouterr().out


def test_figure_2_needs_its_data_and_a_known_name(capsys):
    assert cli.main(["reproduce", "cmml-fig2"]) == 2
    assert "cmml-fig2 needs" in capsys.readouterr().err
    assert cli.main(["reproduce", "cmml-fig3"]) == 2
    assert "did you mean cmml-fig2?" in capsys.readouterr().err


def test_a_measurement_that_fails_says_why(tmp_path):
    with pytest.raises(RunError, match=r"measuring melu failed .*nowhere"):
        reproduce_costs.apart(["melu", "--data", str(tmp_path / "nowhere")])
