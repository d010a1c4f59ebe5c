"""Items that a user never touched, sampled beside the clicks made: for logs that hold nothing but positives."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from distmeta import draws

ATTEMPTS = 64
"""Draws for one negative; a user who still has none has touched almost everything that is drawn."""


FLATTER = 0.75
"""Exponent of an item's number of users where popular items are drawn more often (word2vec's; Mikolov et al., 2013).
With 1, how often an item is clicked in training tells the negatives from the positives (AUC 0.46 on Taobao): a
positive's own click is missing in it when that row is asked for, a negative's item lacks none."""


def sample(
    touched: pl.DataFrame, positives: pl.DataFrame, mean: int, weights: str, seed: int
) -> tuple[pl.DataFrame, int]:
    """Items that the user of a positive has not touched, `mean` for each on average, each at most once a user.

    How many a positive gets is geometric: as if the user had been shown items one by one and each were a click with
    probability 1 / (1 + mean). Were it the same number each time, a user's support would tell how many clicks are
    left for the query. Every draw is a hash of (seed, user, item of the positive, which negative, attempt), so that a
    user's negatives depend on the others' only by how often items are touched.

    Args:
        touched: columns user, item (whole numbers): each pair once.
        positives: columns user, item, time: some of these pairs.
        weights: "uniform": all items alike; "popularity": by the number of users who touched them to the FLATTER.

    Returns:
        Columns user, item, time (of the positive), and how many were given up after ATTEMPTS draws.
    """
    items, users_of = np.unique(touched["item"].to_numpy(), return_counts=True)
    users = np.unique(touched["user"].to_numpy())
    upto = np.cumsum(users_of**FLATTER if weights == "popularity" else np.ones(len(items)))

    def pair(user: NDArray, item: NDArray) -> NDArray[np.int64]:
        return np.searchsorted(users, user) * len(items) + item

    taken = np.sort(pair(touched["user"].to_numpy(), np.searchsorted(items, touched["item"].to_numpy())))
    asking = positives.sort("user", "item")
    u = draws.uniform(seed, *(asking[c].to_numpy() for c in ("user", "item")), purpose="taobao/negatives")
    count = np.floor(np.log1p(-u) / np.log(mean / (mean + 1))).astype(np.int64)
    user, clicked, time = (np.repeat(asking[c].to_numpy(), count) for c in ("user", "item", "time"))
    number = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    chosen = np.full(len(user), -1)
    open_rows = np.arange(len(user))
    for attempt in range(ATTEMPTS):
        u = draws.uniform(
            seed, user[open_rows], clicked[open_rows], number[open_rows], attempt, purpose="taobao/negative"
        )
        item = np.minimum(np.searchsorted(upto, u * upto[-1], side="right"), len(items) - 1)
        key = pair(user[open_rows], item)
        at = np.minimum(np.searchsorted(taken, key), len(taken) - 1)
        first = np.zeros(len(key), bool)
        first[np.unique(key, return_index=True)[1]] = True
        good = first & (taken[at] != key)
        chosen[open_rows[good]] = item[good]
        taken = np.sort(np.concatenate([taken, key[good]]), kind="stable")
        open_rows = open_rows[~good]
        if not len(open_rows):
            break
    kept = chosen >= 0
    drawn = pl.DataFrame({"user": user[kept], "item": items[chosen[kept]], "time": time[kept]})
    return drawn, len(open_rows)
