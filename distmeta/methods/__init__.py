"""The registry: METHOD name -> its file and options. Importing it imports no torch."""

import importlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from distmeta.errors import UserError
from distmeta.fields import nearest
from distmeta.methods import options, plain_options

if TYPE_CHECKING:
    from distmeta.methods.base import Method


@dataclass(frozen=True)
class Entry:
    """Where a method lives: `module` under distmeta.methods, class name, options dataclass."""

    module: str
    class_name: str
    options: type
    train: dict[str, Any] = field(default_factory=dict)
    """Defaults of the `train` section that suit this method better than the general ones."""
    clicks_only: bool = False
    """It refuses ratings."""
    scenarios: bool = False
    """It learns tasks that are scenarios too."""
    users: bool = True
    """It learns tasks that are users."""
    feed_forward: bool = False
    """It adapts in one forward pass, without inner steps, and can be exported as one graph."""
    closed_form: bool = False
    """It is solved, not learned by gradient."""

    @property
    def inner_steps(self) -> bool:
        """Whether it adapts in inner steps, as many as its option `steps` says."""
        return any(f.name == "steps" for f in fields(self.options))


GRADIENT = {"lr": 2e-3, "batch_size": 32}
"""Measured on MovieLens 1M (README): small batches, and a larger step than Adam's usual one."""
CONTEXT = {"lr": 3e-3, "batch_size": 32, "weight_decay": 1e-5}
"""CMML's batches and weight decay (paper 002, §7.2.2, and its code, whose step of 3e-4 is too small for few epochs)."""
MEMORY = {"lr": 1e-3, "batch_size": 32, "weight_decay": 0.1}
"""RUM's, measured on MovieLens 1M: with larger steps or less decay it soon learns its users by heart."""

JOINT = {"lr": 2e-3, "batch_size": 64, "weight_decay": 1e-5}
"""Of the recommenders that are trained jointly."""

METHODS: dict[str, Entry] = {
    "melu": Entry("melu", "MeLU", options.MeLU, GRADIENT),
    "metacs": Entry("metacs", "MetaCS", options.MetaCS, GRADIENT),
    "metasgd": Entry("metasgd", "MetaSGD", options.MetaSGD, GRADIENT),
    "hml": Entry("hml", "HML", options.HML, GRADIENT),
    "paml": Entry("paml", "PAML", options.PAML, GRADIENT),
    "reg-paml": Entry("regpaml", "RegPAML", options.RegPAML, GRADIENT),
    "at-paml": Entry("atpaml", "ATPAML", options.ATPAML, GRADIENT),
    "mamo": Entry("mamo", "MAMO", options.MAMO, GRADIENT | {"lr": 1e-3}),
    "cmml-linear": Entry("cmml", "CMMLLinear", options.CMML, CONTEXT, scenarios=True, feed_forward=True),
    "cmml-sigmoid": Entry("cmml", "CMMLSigmoid", options.CMML, CONTEXT, scenarios=True, feed_forward=True),
    "cmml-film": Entry("cmml", "CMMLFilm", options.CMMLFilm, CONTEXT, scenarios=True, feed_forward=True),
    "cmml-softm": Entry("cmml", "CMMLSoftM", options.CMMLSoftM, CONTEXT, scenarios=True, feed_forward=True),
    "transfer": Entry("transfer", "Transfer", options.Transfer, GRADIENT),
    "s2meta": Entry("s2meta", "S2Meta", options.S2Meta, GRADIENT | {"plateau": 0.2}, scenarios=True),
    "widedeep": Entry("widedeep", "WideDeep", plain_options.WideDeep, JOINT, scenarios=True),
    "deepfm": Entry("deepfm", "DeepFM", plain_options.DeepFM, JOINT, scenarios=True),
    "dcn": Entry("dcn", "DCN", plain_options.DCN, JOINT, scenarios=True),
    "dcn-f": Entry("dcn", "DCNF", plain_options.DCNF, JOINT, scenarios=True),
    "rum-item": Entry("rum", "RUMItem", plain_options.RUMItem, MEMORY),
    "rum-feature": Entry("rum", "RUMFeature", plain_options.RUMFeature, MEMORY),
    "conet": Entry("conet", "CoNet", plain_options.CoNet, CONTEXT, scenarios=True, users=False),
    "constant": Entry("constant", "Constant", options.Constant, closed_form=True),
    "itemmean": Entry("itemmean", "ItemMean", options.ItemMean, closed_form=True),
    "bias": Entry("bias", "Bias", options.Bias, closed_form=True),
    "als": Entry("als", "Als", options.Als, closed_form=True),
    "itempop": Entry("itempop", "ItemPop", options.ItemPop, clicks_only=True, scenarios=True, closed_form=True),
    "ials": Entry("ials", "IALS", options.IALS, clicks_only=True, closed_form=True),
}

FLOORS = {"rating": ("constant", "itemmean", "bias", "als"), "click": ("constant", "itemmean", "itempop", "ials")}
"""What every report is compared with, by the dataset's label kind."""


def entry(name: str) -> Entry:
    """The registry entry of METHOD `name`; UserError naming the nearest one where there is none."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}; methods: {' '.join(METHODS)}")
    return METHODS[name]


def method_class(name: str) -> "type[Method]":
    """The class of METHOD `name` (imports torch)."""
    e = entry(name)
    return getattr(importlib.import_module(f"distmeta.methods.{e.module}"), e.class_name)
