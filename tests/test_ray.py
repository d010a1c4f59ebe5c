"""Training on Ray workers: what the same number of workers trains without Ray, whoever is killed meanwhile."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import scenarioworld
import tiny
from nodes import command

from distmeta import cli
from distmeta.data import protocols, taskmaker, tasktable
from distmeta.data.schema import Dataset
from distmeta.methods import METHODS, method_class
from distmeta.methods.base import Method
from distmeta.methods.closedform import ClosedForm
from distmeta.parallel import trainer
from distmeta.storage import Location

FLAGS = [
    "--batch-size",
    "16",
    "--threads",
    "1",
    "--patience",
    "0",
    "--checkpoint-steps",
    "4",
    "--exchange-timeout",
    "60",
]
LONG = {
    "hml": ["--epochs", "14"],
    "at-paml": ["--epochs", "14"],
    "mamo": ["--epochs", "14"],
    "melu": ["--epochs", "40"],
    "metacs": ["--epochs", "20"],
    "als": ["--passes", "300"],
}
"""What makes training on the small dataset last for seconds, so that there is something to kill."""

ALIKE = {"metasgd", "paml", "reg-paml", "transfer", "cmml-linear", "cmml-sigmoid", "cmml-softm", "cmml-film"}
ALIKE |= {"metacs", "constant", "itemmean", "bias", "itempop", "ials", "rum-item", "rum-feature", "conet"}
ALIKE |= {"s2meta", "widedeep", "deepfm", "dcn", "dcn-f"}
"""They differ from melu or als in arithmetic alone, which test_parity has; a kill costs half a minute."""
SHARING = [name for name in METHODS if method_class(name).memories is not Method.memories]
"""Methods whose tasks share a state."""


def argv(run: Path, place: Location, method: str, *flags: str) -> list[str]:
    return ["train", method, "--data", str(place), "--run", str(run), "--workers", "2", *FLAGS, *flags]


def final(run: Path) -> dict[str, str]:
    """sha256 of the tensors of the last checkpoint."""
    last = max((run / "checkpoints").iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(last.glob("*.safetensors"))} | {
        "step": last.name
    }


def lines(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def undisturbed(run: Path, small: Location, method: str, *flags: str) -> dict[str, str]:
    """What two workers that are threads of this process come to, without Ray."""
    config = cli_config(argv(run, small, method, *flags))
    options = protocols.protocol_options(config.data)
    table = tasktable.make(small, config.data.protocol, config.data.split_seed, options)
    dataset, where = table.seen(Dataset.open(small)), Location.of(run).make_dir()
    for done in tiny.together(
        2, lambda exchange: trainer.train(config, where, dataset, small, table, exchange, lambda _: None)
    ):
        done.result()
    return final(run)


@pytest.fixture(scope="module")
def calm(suits: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """METHOD -> the undisturbed run of it that lasts for seconds, made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            where = tmp_path_factory.mktemp("calm") / method
            undisturbed(where, suits(method), method, *LONG.get(method, []))
            made[method] = where
        return made[method]

    return run


def cli_config(words: list[str]) -> Any:
    from distmeta.commands import train

    return train.parse(words[1:])


@pytest.mark.parametrize("method", [name for name in METHODS if name not in {*ALIKE, *SHARING}])
def test_killed_worker(tmp_path, suits, nodes, calm, capfd, method):
    """Invariants 2 and 4: a worker is killed mid-run, and the run ends in the bits of one that nothing happened to."""
    flags, closed, small = LONG.get(method, []), issubclass(method_class(method), ClosedForm), suits(method)
    with command(*argv(tmp_path / "run", small, method, *flags)) as run:
        if closed:
            run.wait(nodes.workers)
        else:
            run.wait(lambda: len(lines(tmp_path / "run")) > 3)
        os.kill(nodes.workers()[len(method) % 2 - 1], signal.SIGKILL)
    assert run.status == 0
    assert final(tmp_path / "run") == final(calm(method))
    assert [r["epoch"] for r in lines(tmp_path / "run")] == [r["epoch"] for r in lines(calm(method))]
    if not closed:
        assert " died" in capfd.readouterr().out


@pytest.mark.parametrize("method", SHARING)
def test_killed_worker_and_server(tmp_path, small, nodes, calm, capfd, method):
    """Invariant 4: a worker is killed (of one of the methods), and once others go on the server of the shared state;
    the run ends in the bits of an undisturbed one."""
    both = method == SHARING[0]
    with command(*argv(tmp_path / "run", small, method, *LONG.get(method, []))) as run:
        run.wait(lambda: len(lines(tmp_path / "run")) > 3)
        if both:
            os.kill(nodes.workers()[0], signal.SIGKILL)
            before = len(lines(tmp_path / "run"))
            run.wait(lambda: len(lines(tmp_path / "run")) > before + 1)
        (server,) = nodes.servers()
        os.kill(server, signal.SIGKILL)
    assert run.status == 0
    assert "state-00000.safetensors" in final(tmp_path / "run")
    assert final(tmp_path / "run") == final(calm(method))
    assert [r["epoch"] for r in lines(tmp_path / "run")] == [r["epoch"] for r in lines(calm(method))]
    out = capfd.readouterr().out
    assert not both or " died" in out
    assert re.search(
        r"the shared state \w+ was lost: its server \(shard 0, process \d+ on .*the workers are restarted", out
    )
    assert not nodes.servers(), "the server outlived its run"


@pytest.mark.parametrize("method", SHARING[:1])
def test_killed_server_with_no_failure_left(tmp_path, small, nodes, capfd, method):
    with command(*argv(tmp_path / "run", small, method, *LONG.get(method, []), "--max-failures", "0")) as run:
        run.wait(lambda: len(lines(tmp_path / "run")) > 1)
        os.kill(nodes.servers()[0], signal.SIGKILL)
    assert run.status == 1
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(r"--max-failures 0 times, last worker \d: .*the shared state \w+ was lost: its server", said)


def test_killed_node(tmp_path, small, nodes, calm, capfd):
    """The workers wait for a node in the place of the lost one, and read what was lost with it again. A second driver
    of the same run was refused meanwhile."""
    words = argv(tmp_path / "run", small, "melu", *LONG["melu"])
    with command(*words) as run:
        run.wait(lambda: lines(tmp_path / "run"))
        said = refused(capfd, [*words, "--resume"])
        run.wait(lambda: len(lines(tmp_path / "run")) > 3)
        nodes.lose()
        nodes.fill(2)
    assert f"is being trained by process {os.getpid()}" in said
    assert run.status == 0
    assert final(tmp_path / "run") == final(calm("melu"))
    assert "going on from step" in capfd.readouterr().out


def test_elastic_goes_on_with_what_is_left(tmp_path, small, nodes, calm):
    """A node is lost and not replaced: one worker ends what two began. Exactness of that: test_trainer."""
    words = argv(tmp_path / "run", small, "melu", *LONG["melu"])
    words[words.index("--workers") + 1] = "1:2"
    with command(*words) as run:
        run.wait(lambda: len(lines(tmp_path / "run")) > 3)
        nodes.lose()
    assert run.status == 0
    assert [lines(tmp_path / "run")[i]["world"] for i in (0, -1)] == [2, 1]
    last, plain = lines(tmp_path / "run")[-1], lines(calm("melu"))[-1]
    assert last["step"] == plain["step"]
    assert last["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)


def test_hung_worker_is_named(tmp_path, small, nodes, calm, capfd):
    """A worker that stands still is named and replaced."""
    words = argv(tmp_path / "run", small, "melu", *LONG["melu"])
    words[words.index("--exchange-timeout") + 1] = "8"
    with command(*words) as run:
        run.wait(lambda: len(lines(tmp_path / "run")) > 3)
        hung = nodes.workers()[0]
        os.kill(hung, signal.SIGSTOP)
    assert run.status == 0
    assert final(tmp_path / "run") == final(calm("melu"))
    assert f"(process {hung} on " in capfd.readouterr().out


def test_streamed(tmp_path, nodes, capfd, monkeypatch):
    """Above the budget Ray Data reads pools of row groups ahead; killed and all, the bits of one that reads itself."""
    monkeypatch.setattr(taskmaker, "GROUP_TASKS", 8)
    place = Location.of(tmp_path / "data")
    words = ["prepare", "synthetic", "--users", "1200", "--items", "200", "--per-user", "30", "60", "--out", str(place)]
    assert cli.main(words) == 0
    flags = ["--memory-mb", "1", "--epochs", "2", "--steps", "1", "--query-rows", "5"]
    with command(*argv(tmp_path / "run", place, "melu", *flags)) as run:
        run.wait(lambda: lines(tmp_path / "run"))
        os.kill(nodes.workers()[0], signal.SIGKILL)
    assert run.status == 0
    assert "streamed in " in capfd.readouterr().out
    assert final(tmp_path / "run") == undisturbed(tmp_path / "plain", place, "melu", *flags)


def test_shard_removed_while_it_is_streamed(tmp_path, nodes, capfd, monkeypatch):
    monkeypatch.setattr(taskmaker, "GROUP_TASKS", 8)
    place = Location.of(tmp_path / "data")
    words = ["prepare", "synthetic", "--users", "1200", "--items", "200", "--per-user", "30", "60", "--out", str(place)]
    assert cli.main(words) == 0
    with command(*argv(tmp_path / "run", place, "melu", "--memory-mb", "1", "--epochs", "40")) as run:
        run.wait(lambda: len(lines(tmp_path / "run")) > 0)
        (part,) = Path(place.path).glob("tasks/*/train/part-00005.parquet")
        part.unlink()
    assert run.status == 2
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(part) in said
    assert lines(tmp_path / "run")
    assert final(tmp_path / "run")


def test_workers_evaluate_what_one_process_evaluates(tmp_path, small, nodes):
    """Cohorts of query rows included, which the protocol mamo has."""
    for name, workers in (("two", "2"), ("none", "0")):
        words = argv(tmp_path / name, small, "melu", "--epochs", "2", "--protocol", "mamo")
        words[words.index("--workers") + 1] = workers
        assert cli.main(words) == 0
    two, none = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("two", "none"))
    assert two["floors"] == none["floors"]
    assert two["cohorts"].keys() == none["cohorts"].keys() >= {"all", "C-W", "C-C"}
    for cohort, found in two["cohorts"].items():
        for metric, other in none["cohorts"][cohort].items():
            wanted = other if other is None else pytest.approx(other, rel=1e-4)
            assert found[metric] == wanted, (cohort, metric)


def test_scenarios(tmp_path, nodes, capfd):
    """A worker is killed mid-run: the same bits as undisturbed; what is evaluated, traits too, is what one process
    does."""
    scenarioworld.make(tmp_path / "data", themes=True)
    place = Location.of(tmp_path / "data")
    flags = [x for k, v in scenarioworld.SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--protocol", "cmml-scenario", "--embedding", "4", "--hidden", "8", "8", "--hyper", "8", "--item-ids"]
    flags += ["--epochs", "60"]
    with command(*argv(tmp_path / "run", place, "cmml-softm", *flags)) as run:
        run.wait(lambda: len(lines(tmp_path / "run")) > 3)
        os.kill(nodes.workers()[0], signal.SIGKILL)
    assert run.status == 0
    assert final(tmp_path / "run") == undisturbed(tmp_path / "plain", place, "cmml-softm", *flags)
    assert " died" in capfd.readouterr().out
    two = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert cli.main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    one = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert one["floors"] == two["floors"]
    assert one["cohorts"]["all"] == pytest.approx(two["cohorts"]["all"], abs=1e-6)
    assert (
        one["facts"]["contexts"]["groups"]["scenario"]["index"]
        == two["facts"]["contexts"]["groups"]["scenario"]["index"]
    )
    assert one["facts"]["routes"]["distance"] == pytest.approx(two["facts"]["routes"]["distance"], rel=1e-3)


@pytest.mark.parametrize("reader", ["driver", "tasks"])
def test_every_rank_gets_its_shards_as_stored(small, nodes, reader):
    """For 1, 2, 3 and 16 workers, from the object store, as TaskTable.read gives them."""
    from distmeta.parallel import delivery

    _, dataset, table = tiny.setting(small, "melu")
    datasets = delivery.materialise(table, dataset, 1 << 30, delivery.SMALL if reader == "driver" else 0)
    config = delivery.ShardConfig({split: table.sizes(split) for split in datasets})
    for split, whole in datasets.items():
        for world in (1, 2, 3, 16):
            for rank, given in enumerate(config.configure({split: whole}, world)):
                mine = [v for v in range(table.shards) if v % world == rank and table.sizes(split)[v]]
                if not mine:
                    assert given[split] is None
                    continue
                blocks = list(given[split].iter_batches(batch_size=None, batch_format="pyarrow"))
                stored = pa.concat_tables(table.read(split, mine))
                assert pa.concat_tables(blocks).equals(stored.select(blocks[0].column_names))


# ---- what cannot be


def prepared(where: Path) -> Path:
    """A dataset of this test's own, to be damaged."""
    argv = ["prepare", "synthetic", "--users", "60", "--items", "40", "--per-user", "10", "20"]
    assert cli.main([*argv, "--out", str(where / "data")]) == 0
    return where / "data"


def refused(capfd: Any, words: list[str], status: int = 2) -> str:
    """The one sentence with which a command ends."""
    capfd.readouterr()
    assert cli.main(words) == status
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return sentence


def test_more_workers_than_there_is_room_for(tmp_path, small, nodes, capfd, monkeypatch):
    """The autoscaler is asked for nodes, and no longer than they are waited for."""
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    words = argv(tmp_path / "run", small, "melu", "--wait", "1")
    for flag, value, said in (
        ("--workers", "17", "has 16 shards"),
        ("--workers", "3", "3 workers need 3 CPUs, the cluster has 2 after 1 s"),
        (
            "--workers",
            "1",
            "1 worker needs 2 CPUs on one node, the cluster has 2 nodes of 1 CPU: room for 0 after 1 s",
        ),
        ("--gpu", None, "1 worker needs 1 GPUs, the cluster has 0 after 1 s"),
    ):
        if value:
            words[words.index(flag) + 1] = value
            words[words.index("--threads") + 1] = "2" if value == "1" else "1"
        else:
            words = [*words, flag, "--threads", "1"]
        assert said in refused(capfd, words)
    each = [[{"CPU": 1}] * 3, [{"CPU": 2}], [{"CPU": 1, "GPU": 1.0}]]
    assert asked == [a for bundles in each for a in (bundles, [])]


@pytest.mark.parametrize("reader", ["driver", "tasks"])
def test_damaged_shard(tmp_path, small, nodes, capfd, monkeypatch, reader):
    """Found here, or by a read task on some node; said here."""
    if reader == "tasks":
        from distmeta.parallel import delivery

        monkeypatch.setattr(delivery.materialise, "__defaults__", (0, delivery.SPLITS))
    place = prepared(tmp_path)
    assert cli.main(["prepare", "tasks", "--data", str(place)]) == 0
    part = next(place.glob("tasks/*/train/part-00003.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    said = refused(capfd, argv(tmp_path / "run", Location.of(place), "melu"))
    assert str(part) in said
    part.unlink()
    assert str(part) in refused(capfd, argv(tmp_path / "run", Location.of(place), "melu"))


def test_dataset_that_workers_do_not_see(tmp_path, small, nodes, capfd):
    """The driver has read the dataset; by the time workers look for it, it is not there."""
    place = prepared(tmp_path)
    with command(*argv(tmp_path / "run", Location.of(place), "melu", "--epochs", "3")) as run:
        run.wait(nodes.workers)
        (place / "dataset.json").rename(tmp_path / "dataset.json")
    assert run.status == 2
    assert "does not see this dataset; put it on storage that all nodes share" in capfd.readouterr().err


def test_tasks_that_a_node_does_not_see(tmp_path, small, nodes):
    """Where Ray's tasks read for the workers; nodes with mounts of their own: test_emulated."""
    from distmeta.parallel import delivery

    _, dataset, table = tiny.setting(small, "melu")
    elsewhere = dataclasses.replace(table, location=Location.of(tmp_path))
    with pytest.raises(Exception, match="does not see") as caught:
        delivery.materialise(elsewhere, dataset, 1 << 30, small=0)
    said = delivery.sentence(caught.value)
    assert re.fullmatch(rf"{tmp_path}: the node \S+ does not see this task table; put .* nodes share", str(said))


def test_diverged_run_is_not_tried_again(tmp_path, small, nodes, capfd):
    said = refused(capfd, argv(tmp_path / "run", small, "melu", "--lr", "1e30", "--clip", "0", "--epochs", "5"), 1)
    assert "is not finite" in said
    assert not [t for t in threading.enumerate() if t.name == "distmeta-watch"]


def test_no_cluster_at_the_address(tmp_path, small, capfd):
    """In a process of its own: this one is connected."""
    import subprocess
    import sys

    words = [sys.executable, "-m", "jobs.train", *argv(tmp_path / "run", small, "melu")[1:]]
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there" in done.stderr
    assert done.stderr.count("\n") == 1
