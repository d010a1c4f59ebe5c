"""What one who knows every noise-free score can do in a made world: the best predictions and their errors.

A rating is clip(s + σ ε, LOW, HIGH) of a noise-free score s, ε standard normal. A click is s + σ ε > THRESHOLD,
ε logistic with variance 1, so its probability is a logistic of the score.
"""

import math

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 1.0, 5.0
THRESHOLD = 3.8
"""Stars that a click needs: about a quarter of the pairs have them."""

Floats = NDArray[np.float64]


def oracle_error(score: Floats, noise: float) -> tuple[Floats, Floats]:
    """Least expected absolute and squared error of a constant for Y = clip(score + noise·ε, LOW, HIGH).

    The best constant is Y's median, clip(score), for the first and its mean for the second.
    E|Y − c| = ∫_LOW^c P(Y ≤ t) dt + ∫_c^HIGH P(Y > t) dt, and xΦ(x) + φ(x) is an antiderivative of Φ.
    The second is Var Y by the moments of a doubly censored normal (Greene, Econometric Analysis, ch. 19).
    """
    a, b = (LOW - score) / noise, (HIGH - score) / noise
    c = (np.clip(score, LOW, HIGH) - score) / noise
    mae = noise * (_antiderivative(c) - _antiderivative(a) + _antiderivative(-c) - _antiderivative(-b))
    # Moments of Z = clip(ε, a, b); Y = score + noise·Z.
    inside = _cdf(b) - _cdf(a)
    first = _censored_mean(a, b)
    second = a**2 * _cdf(a) + b**2 * _cdf(-b) + inside + a * _pdf(a) - b * _pdf(b)
    return mae, noise**2 * np.maximum(second - first**2, 0.0)


def rating_mean(score: Floats, noise: float) -> Floats:
    """E[clip(score + noise·ε, LOW, HIGH)], the prediction with the least squared error."""
    return score + noise * _censored_mean((LOW - score) / noise, (HIGH - score) / noise)


def rating_bayes(score: Floats, noise: float, rows: NDArray[np.int64] | None = None) -> dict[str, float]:
    """`oracle_error` averaged over all ratings: mae, mse, rmse; `rows`: how many ratings have each score [1]."""
    mae, mse = (float(np.average(e, weights=rows)) for e in oracle_error(score, noise))
    return {"mae": mae, "mse": mse, "rmse": math.sqrt(mse)}


def click_logit(score: Floats, noise: float) -> Floats:
    """Log odds of a click: (score − THRESHOLD) over the scale of a logistic with standard deviation `noise`."""
    return (score - THRESHOLD) * (math.pi / (math.sqrt(3.0) * noise))


def probability(logit: Floats) -> Floats:
    """1 / (1 + exp(−logit)), for logits of any size."""
    return np.exp(-np.logaddexp(0.0, -logit))


def click_bayes(score: Floats, noise: float, rows: NDArray[np.int64] | None = None) -> dict[str, float]:
    """Least expected errors over all rows, each by its own best prediction.

    Args:
        rows: how many rows have each score [1].

    Returns:
        mae (by 0 or 1), mse, rmse and log_loss (by p), auc_rows (by the order of p, over all rows; but for what a
        sample's share of clicks varies), and nel_rows, the class-weighted log loss, whose best prediction has the
        logit of p shifted by log(Σ(1 − p) / Σp): as if the classes were equally frequent. The last two are left out
        where they are not defined: there cannot be both a click and another row.
    """
    order = np.argsort(score, kind="stable")
    n = np.ones(len(score)) if rows is None else rows[order].astype(np.float64)
    logit = click_logit(score[order], noise)
    p, q = probability(logit), probability(-logit)
    mse, log_loss = p * q, p * np.logaddexp(0.0, -logit) + q * np.logaddexp(0.0, logit)
    found = {
        "mae": np.average(np.minimum(p, q), weights=n),
        "mse": np.average(mse, weights=n),
        "rmse": np.sqrt(np.average(mse, weights=n)),
        "log_loss": np.average(log_loss, weights=n),
    }
    clicks, others = n @ p, n @ q
    # Pairs of a click and another row, both expected, and those of them ranked right (half of equal scores').
    pairs = clicks * others - n @ mse
    right = (n * p) @ (np.cumsum(n * q) - n * q) + (n * (n - 1)) @ mse / 2
    if pairs > 0:
        shifted = logit + np.log(others) - np.log(clicks)
        sides = (n * p) @ np.logaddexp(0.0, -shifted) / clicks, (n * q) @ np.logaddexp(0.0, shifted) / others
        found |= {"nel_rows": sum(sides) / 2, "auc_rows": right / pairs}
    return {name: float(value) for name, value in found.items()}


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _pdf(x: Floats) -> Floats:
    return np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)


def _cdf(x: Floats) -> Floats:
    return 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))


def _antiderivative(x: Floats) -> Floats:
    return x * _cdf(x) + _pdf(x)


def _censored_mean(a: Floats, b: Floats) -> Floats:
    """E[clip(ε, a, b)], ε standard normal."""
    return a * _cdf(a) + b * _cdf(-b) + _pdf(a) - _pdf(b)
