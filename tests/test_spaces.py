"""The search spaces: each parameter is an option of its method, and every value of it one that `train` takes."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distmeta.commands import train
from distmeta.config import TrainOptions
from distmeta.errors import UserError
from distmeta.methods import METHODS, entry
from tune import spaces


def test_every_method_with_something_to_tune_has_a_space():
    assert set(spaces.SPACES) == {m for m in METHODS if dataclasses.fields(entry(m).options)}
    with pytest.raises(UserError, match="constant has nothing to tune"):
        spaces.space("constant")


@pytest.mark.parametrize("method", sorted(spaces.SPACES))
def test_the_ends_of_every_parameter_are_what_train_takes(method):
    space = spaces.space(method)
    known = {f.name for c in (TrainOptions, entry(method).options) for f in dataclasses.fields(c)}
    names = [p.name for p in space.parameters]
    assert len(set(names)) == len(names)
    for n, p in enumerate(space.parameters):
        assert p.name in known, f"{p.name} is no option of {method}"
        assert p.when is None or p.when[0] in names[:n], f"{p.name} depends on what is not chosen before it"
        assert len(set(p.ends())) > 1
        for value in p.ends():
            _read_back(method, {p.name: value})


@pytest.mark.parametrize("method", sorted(spaces.SPACES))
def test_first_trials_lie_in_the_space(method):
    """The defaults among them, in the space's own words where an option's default refers to another."""
    space = spaces.space(method)
    defaults = train.parse([method, "--data", "somewhere"])
    flat = {**dataclasses.asdict(defaults.train), **dataclasses.asdict(defaults.method_options)}
    plain = {p.name: _text(flat[p.name]) for p in space.parameters} | dict(space.defaults)
    for first in (spaces.First("defaults", {}), *space.first):
        values = {**plain, **first.values}
        assert set(first.values) <= set(plain), f"{first.source}: unknown parameter"
        for p in space.parameters:
            if p.active(values):
                assert p.holds(values[p.name]), f"{method}, {first.source}: {p.name} = {values[p.name]!r}"
        _read_back(method, first.values)


def test_a_condition_falls_with_what_it_depends_on():
    names = {p.name for p in spaces.space("cmml-film").without({"encoder"}).parameters}
    assert "hyper" in names
    assert not names & {"units", "encoder"}


def test_listing_the_spaces_imports_neither_torch_nor_ray():
    code = "import sys, tune.spaces; assert not {'torch', 'ray', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tuned_configs_say_where_they_are_from_and_lie_in_the_spaces():
    """tune/tuned/DATASET/METHOD.yaml: what searches found, as `tuned.yaml` holds it."""
    folders = [f for f in (Path(spaces.__file__).parent / "tuned").iterdir() if f.is_dir()]
    assert folders
    for file in (f for folder in folders for f in folder.iterdir()):
        text = file.read_text()
        assert re.match(rf"# trial \d+ of the \d+ of study {file.stem} on {file.parent.name}, protocol ", text)
        best, plain = re.search(r"validation mae ([\d.]+); the method's defaults: ([\d.]+)", text).groups()
        assert float(best) <= float(plain)
        config = train.parse(["--config", str(file), "--data", "somewhere"])
        assert config.method == file.stem
        flat = {**dataclasses.asdict(config.train), **dataclasses.asdict(config.method_options)}
        values = {p.name: _text(flat[p.name]) for p in spaces.space(file.stem).parameters}
        values |= {k: v for k, v in spaces.space(file.stem).defaults.items() if k not in text}
        for p in spaces.space(file.stem).parameters:
            assert not p.active(values) or p.holds(values[p.name]), f"{file}: {p.name} = {values[p.name]!r}"


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _read_back(method, values):
    config = train.parse([method, "--data", "somewhere", *spaces.argv(values)])
    flat = {**dataclasses.asdict(config.train), **dataclasses.asdict(config.method_options)}
    assert {name: _text(flat[name]) for name in values} == dict(values)
