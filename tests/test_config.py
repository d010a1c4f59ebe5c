"""Config: the same object from flags and YAML, and errors that say what to do."""

import dataclasses
import itertools

import pytest

from distmeta import config as config_module
from distmeta.config import Config, DataOptions, TrainOptions, load, to_yaml
from distmeta.errors import UserError
from distmeta.methods import METHODS, entry
from distmeta.storage import Location


def written(tmp_path, text: str) -> Location:
    (tmp_path / "c.yaml").write_text(text)
    return Location.of(tmp_path / "c.yaml")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_yaml_round_trip(tmp_path, method):
    config = load(None, method, {"lr": 3e-5, "data": "väg/data: x", "max_ratings": 50})
    assert load(written(tmp_path, to_yaml(config)), None, {}) == config


def test_no_flag_means_two_things():
    """Flags are unprefixed, so the sections that meet on one command line must share no name."""
    for name, e in METHODS.items():
        sections = {s: {f.name for f in dataclasses.fields(s)} for s in (DataOptions, TrainOptions, e.options)}
        for a, b in itertools.combinations(sections, 2):
            assert not sections[a] & sections[b], f"{name}: {a.__name__} and {b.__name__} share a flag"
        assert not sections[e.options] & {"config", "help", "method"}


def test_every_field_explains_itself_and_its_default_is_allowed():
    for section in {DataOptions, TrainOptions, *(e.options for e in METHODS.values())}:
        for f in dataclasses.fields(section):
            assert len(f.metadata["help"]) > 10, f.name
        assert config_module.build(section, dataclasses.asdict(section()), "defaults") == section()


def test_precedence(tmp_path):
    """Defaults < the method's own < file < flags."""
    file = written(tmp_path, "method: melu\ntrain: {epochs: 7, lr: 1e-2}\nmethod_options: {steps: 3}\ndata:\n")
    config = load(file, None, {"epochs": 9})
    assert (config.train.epochs, config.train.lr, config.method_options.steps) == (9, 0.01, 3)
    assert config.train.batch_size == {"batch_size": 64, **entry("melu").train}["batch_size"]
    other = load(file, "metacs", {})
    assert other.train.epochs == 7
    assert other.method_options == entry("metacs").options(), "options of another method do not carry over"


def test_method_defaults_stand_between(monkeypatch):
    monkeypatch.setitem(METHODS, "melu", dataclasses.replace(METHODS["melu"], train={"lr": 0.5, "epochs": 3}))
    config = load(None, "melu", {"epochs": 4})
    assert (config.train.lr, config.train.epochs) == (0.5, 4)


def test_base_stands_in_for_defaults():
    base = load(None, "melu", {"lr": 0.25, "steps": 2})
    assert load(None, None, {"epochs": 1}, base) == dataclasses.replace(
        base, train=dataclasses.replace(base.train, epochs=1)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {learning_rate: 1}", ["section train", "learning_rate", "known: run"]),
        ("train: {batchsize: 1}", ["batchsize", "did you mean batch_size?"]),
        ("trian: {lr: 1}", ["trian", "did you mean train?"]),
        ("method: meluu", ["meluu", "did you mean melu?"]),
        ("method_options: {embeding: 3}", ["method_options", "did you mean embedding?"]),
        ("train: {lr: fast}", ["lr must be a number", "'fast'"]),
        ("train: {lr: .nan}", ["lr must be a finite number"]),
        ("train: {lr: 0}", ["lr must be greater than 0"]),
        ("train: {epochs: 2.5}", ["epochs must be a whole number"]),
        ("train: {epochs: true}", ["epochs must be a whole number"]),
        ("train: {batch_size: 0}", ["batch_size must be at least 1"]),
        ("train: {lr_decay: 2}", ["lr_decay must be at most 1"]),
        ("train: {resume: 'yes'}", ["resume must be true or false"]),
        ("train: {run: 12}", ["run must be text"]),
        ("train: [1, 2]", ["section train", "key: value"]),
        ("data: {protocol: mell}", ["protocol", "did you mean melu?"]),
        ("method_options: {hidden: 8}", ["hidden must be a list"]),
        ("method_options: {hidden: [8, x]}", ["hidden must be a whole number", "'x'"]),
        ("- a\n- b", ["must hold the sections"]),
        ("train: {lr: 1\nx", ["line 2", "not readable as YAML"]),
        ("train: !!python/object/apply:os.system ['exit 9']", ["not readable as YAML"]),
        ("\xff".encode("latin-1"), ["not readable as YAML"]),
        ("", ["must hold the sections"]),
        ("train: {lr: 1}\ndata: {}\ntrain: {lr: 2}", ["line 3", "the key train is there twice"]),
        ("train: {lr: 1, seed: 2, lr: 3}", ["line 1", "the key lr is there twice"]),
        ("train: {seed: 99999999999999999999}", ["seed must be at most"]),
        ("method_options: {hidden: [8, 0]}", ["hidden must be at least 1, not 0"]),
        ("method_options: {local_lr: -1}", ["local_lr must be at least 0"]),
        pytest.param("[" * 5000, ["not readable as YAML"], id="deep"),
    ],
)
def test_bad_yaml_is_one_sentence_that_names_the_file(tmp_path, text, words):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as e:
        load(Location.of(tmp_path / "c.yaml"), None, {})
    message = str(e.value)
    assert "\n" not in message
    assert [w for w in words if w not in message] == [], message
    if "unknown method" not in message:
        assert "c.yaml" in message


def test_missing_file():
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such config file"):
        load(Location.of("nowhere.yaml"), None, {})


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"epochs": 0}, "--epochs must be at least 1"), ({"lr": float("inf")}, "--lr must be a finite number")],
)
def test_bad_flag_is_named_as_a_flag(tmp_path, flags, words):
    file = written(tmp_path, "train: {epochs: 3}")
    with pytest.raises(UserError, match=f"command line: {words}"):
        load(file, None, flags)


@dataclasses.dataclass(frozen=True)
class Maybe:
    width: float | None = config_module.option(None, "A width; none means by the data.", above=0)


def test_optional_fields():
    assert config_module.build(Maybe, {"width": None}, "x").width is None
    assert config_module.build(Maybe, {"width": 2}, "x").width == 2.0
    with pytest.raises(UserError, match="x: width must be a number, not 'wide'"):
        config_module.build(Maybe, {"width": "wide"}, "x")


def change(config: Config, section: str, **values) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_fixed_is_what_decides_the_parameters():
    config = load(None, "melu", {})
    same = [
        change(
            config, "train", run="x", resume=True, epochs=99, patience=0, threads=3, workers="2", checkpoint_steps=4
        ),
        change(config, "data", data="elsewhere"),
    ]
    other = [
        change(config, "train", lr=0.5),
        change(config, "train", seed=1),
        change(config, "train", batch_size=3),
        change(config, "data", split_seed=1),
        change(config, "method_options", steps=2),
        load(None, "metacs", {}),
    ]
    first = config_module.fixed(config)
    assert all(config_module.fixed(c) == first for c in same)
    assert all(config_module.fixed(c) != first for c in other)


def test_epochs_are_fixed_where_the_step_size_depends_on_them():
    decaying = load(None, "melu", {"lr_decay": 0.1})
    assert config_module.fixed(decaying) != config_module.fixed(change(decaying, "train", epochs=99))


def test_shares_of_a_gpu(tmp_path):
    """--gpu is one, --gpu SHARE a part of one; what older configs say is understood; workers do not share one."""
    from distmeta.commands import search_plan
    from distmeta.commands.search import main as search
    from distmeta.commands.train import parse
    from distmeta.parallel import launch

    for words, share in (("", 0), ("--gpu", 1), ("--gpu 0.25", 0.25), ("--gpu --no-gpu", 0), ("--gpu --lr 0.1", 1)):
        assert parse(["melu", *words.split()]).train.gpu == share
    for stored, share in (("true", 1), ("false", 0), ("0.5", 0.5)):
        assert load(written(tmp_path, f"method: melu\ntrain: {{gpu: {stored}}}"), None, {}).train.gpu == share
    for words, sentence in (
        (["--gpu", "2"], "--gpu must be at most 1"),
        (["--gpu", "-1"], "--gpu must be at least 0"),
        (["--gpu", "mamo"], "'mamo' is no number"),
        (["--precision", "bf"], "--precision is 'bf'.* choose one of float32 tf32 bf16"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse(["melu", *words])
    for workers in ("2", "1:2"):
        with pytest.raises(UserError, match=r"--gpu 0.5 --workers 2: workers that train together have a GPU each"):
            launch.workers(load(None, "melu", {"gpu": 0.5, "workers": workers}))
    assert launch.workers(load(None, "melu", {"gpu": 0.5, "workers": "1"})) == (1, 1)
    out = ["melu", "--out", str(tmp_path / "s"), "--data", str(tmp_path)]
    with pytest.raises(UserError, match=r"--gpu 0.5 --workers-per-trial 2: .* --workers-per-trial 0"):
        search([*out, "--gpu", "0.5", "--workers-per-trial", "2"])
    with pytest.raises(UserError, match="--gpu must be from 0 to 1"):
        search([*out, "--gpu", "1.5"])
    assert search_plan.DEFAULTS["gpu"] == 0
