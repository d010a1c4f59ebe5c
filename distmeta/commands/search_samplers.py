"""Who proposes what a trial tries: Optuna's samplers by the names that --sampler has."""

import warnings
from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler

GENERATION = 10
"""Trials of one generation of nsga2: of Optuna's 50, a search of 40 trials would be the first, which is random."""


def sampler(name: str, seed: int, drawn: int) -> BaseSampler:
    """The sampler of this name.

    All take parameters that only some trials have: tpe and random choose each by itself; qmc, nsga2 and gp choose those
    together that all trials have, qmc the numbers among them, and the rest by chance.

    Args:
        seed: of the search. drawn: differs with each launch, which else would draw what the one before drew.
    """
    samplers = optuna.samplers
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: samplers.TPESampler(seed=drawn, constant_liar=True),
        "random": lambda: samplers.RandomSampler(seed=drawn),
        # its place in the sequence stands in the journal, under the seed
        "qmc": lambda: samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False),
        "nsga2": lambda: samplers.NSGAIISampler(seed=drawn, population_size=GENERATION),
        "gp": lambda: samplers.GPSampler(seed=drawn, warn_independent_sampling=False),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of constant_liar, of qmc
        return makers[name]()
