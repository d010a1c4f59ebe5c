"""What the logs that big made worlds stand in for look like: sizes, activity, popularity, fields.

Where each number comes from is said beside it. Counted: taken from the data set itself (MovieLens 1M whole; of
Book-Crossing a subset of 171,274 of the 433,671 explicit ratings; of Taobao the published extract of 453,518 buys and
carts). Assumed: nobody published it, and what is here has the published mean.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from distmeta.data.sources.oracle import HIGH, LOW

Floats = NDArray[np.float64]
Knots = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Profile:
    """The marginals of a log."""

    users: int
    items: int
    interactions: int
    least: int
    """Interactions that every user has."""
    activity: Knots
    """(share of the users, interactions that they have at most): log-normal between two of them."""
    popularity: Knots
    """(share of the items, most popular first; their share of the interactions): a power law between two of them."""
    categories: tuple[float, ...]
    """Share of the items in each."""
    fields: dict[str, tuple[tuple[str, ...], tuple[float, ...]]]
    """User field -> its values and their shares, the most frequent first."""
    labels: Literal["ratings", "clicks"]
    mean: float
    """Of the noise-free scores, in stars of 1 to 5."""
    scale: tuple[float, float]
    """Least and greatest rating: the stars 1 to 5 are stretched to these."""
    first: int
    span: int
    """Seconds: when the log starts (Unix time) and how long it is."""
    sitting: int
    """Seconds from a user's first interaction to the last, at most."""

    @property
    def stretch(self) -> float:
        """Units of the rating's scale in a star."""
        return (self.scale[1] - self.scale[0]) / (HIGH - LOW)

    def counts(self, chance: Floats) -> Floats:
        """Interactions of the users at these quantiles; not whole."""
        at, most = np.array(self.activity).T
        edge = 0.5 / self.users
        z, drawn = (ndtri(np.clip(u, edge, 1 - edge)) for u in (at, chance))
        return np.exp(np.interp(drawn, z, np.log(most)))

    def head(self, items: Floats) -> Floats:
        """Share of the interactions that the most popular `items` (a share, 0 to 1) have."""
        at, share = np.log(np.array(self.popularity)).T
        slope = (share[1] - share[0]) / (at[1] - at[0])
        with np.errstate(divide="ignore"):
            x = np.log(items)
        return np.exp(np.where(x < at[0], share[0] + slope * (x - at[0]), np.interp(x, at, share)))


def zipf(n: int, exponent: float = 1.0) -> tuple[float, ...]:
    """Shares of n values, the k-th's proportional to k^−exponent."""
    weight = np.arange(1, n + 1) ** -exponent
    return tuple((weight / weight.sum()).tolist())


def _shares(*parts: float) -> tuple[float, ...]:
    return tuple(p / math.fsum(parts) for p in parts)


def _numbered(name: str, n: int) -> tuple[str, ...]:
    return tuple(f"{name}{i}" for i in range(n))


_GENRES = _shares(
    .3028, .2636, .1296, .0675, .0399, .0338, .0317, .026, .0232, .0229, .0129, .0119, .0093, .0085, .0064, .0064,
    .0031, .0005,
)  # fmt: skip
"""MovieLens 1M's first genres, counted."""
_AGES = (
    ("25", "35", "18", "45", "50", "56", "1"),
    _shares(.34702, .19752, .18262, .09106, .08212, .06291, .03675),
)  # fmt: skip
_JOBS = (
    ("4", "0", "7", "1", "17", "12", "14", "20", "2", "16", "6", "10", "3", "15", "13", "11", "5", "9", "19", "18",
     "8"),
    _shares(
        .12566, .11772, .11242, .08742, .08311, .06424, .05, .04653, .04421, .0399, .03907, .03228, .02864, .02384,
        .02351, .02136, .01854, .01523, .01192, .01159, .00281,
    ),
)  # fmt: skip
"""MovieLens 1M's ages and occupations, counted."""
_COUNTRIES = (
    ("usa", "canada", "united kingdom", "germany", "australia", "spain", "france", "portugal", "netherlands",
     *_numbered("country", 40)),
    _shares(.77967, .0991, .02346, .01906, .01592, .00802, .00688, .00525, .00434, *(.0383 * s for s in zipf(40, .6))),
)  # fmt: skip
"""Book-Crossing's countries, counted in the subset; those after the ninth by Zipf's law."""

PROFILES: dict[str, Profile] = {
    # Sizes published (Tianchi 649; of 9,439 categories); 10.4 % of the behaviours are more than a view. Popularity
    # counted in the extract. Activity and user fields assumed: the log has no user fields.
    "taobao": Profile(
        users=987_994, items=4_162_024, interactions=100_150_807, least=1,
        activity=((0, 1), (.01, 5), (.1, 20), (.25, 39), (.5, 78), (.75, 140), (.9, 219), (.99, 413), (1, 850)),
        popularity=((2.5e-5, .0014), (3e-4, .00885), (.001, .0206), (.003, .0453), (.01, .1017), (.05, .2699),
                    (.1, .3921), (.2, .5522), (.3, .6634), (.5, .8192), (.7, .9218), (.9, .9856), (1, 1)),
        categories=zipf(9_439),
        fields={
            "gender": (("f", "m"), (.7, .3)),
            "age": (_numbered("age", 7), zipf(7, .8)),
            "city": (_numbered("city", 300), zipf(300)),
            "device": (_numbered("device", 50), zipf(50, 1.2)),
        },
        labels="clicks", mean=2.465, scale=(1.0, 5.0), first=1_511_539_200, span=9 * 86_400, sitting=9 * 86_400,
    ),
    # All counted, and as published.
    "movielens-1m": Profile(
        users=6_040, items=3_706, interactions=1_000_209, least=20,
        activity=((0, 20), (.1, 27.5), (.25, 44.5), (.5, 96.5), (.75, 208.5), (.9, 400.5), (.99, 907), (1, 2315)),
        popularity=((.003, .03055), (.01, .0873), (.05, .2828), (.1, .4438), (.2, .6516), (.3, .7812), (.4, .8664),
                    (.5, .9237), (.6, .9599), (.7, .9814), (.8, .9936), (.9, .9989), (1, 1)),
        categories=_GENRES,
        fields={"gender": (("M", "F"), (.71705, .28295)), "age": _AGES, "occupation": _JOBS},
        labels="ratings", mean=3.6, scale=(1.0, 5.0), first=956_703_600, span=30_000_000, sitting=14_400,
    ),
    # Sizes and the median published (explicit ratings only); the quantiles over it assumed. The popular books are
    # counted, as shares of all ratings; half of the books have one rating.
    "bookcrossing": Profile(
        users=77_805, items=185_973, interactions=433_671, least=1,
        activity=((0, 1), (.58, 1.999), (.75, 3.5), (.9, 9), (.95, 16.5), (.99, 66), (.999, 340), (1, 8_524)),
        popularity=((5.4e-6, .00157), (1e-4, .01376), (.001, .06166), (.01, .163), (.05, .3), (.1, .42), (.5, .7856),
                    (.6, .82846), (.7, .87134), (.8, .91423), (.9, .95712), (1, 1)),
        categories=zipf(1_867, .8),
        fields={
            "country": _COUNTRIES,
            "age": (_numbered("age", 8), (.27, .22, .17, .13, .09, .06, .04, .02)),
        },
        labels="ratings", mean=3.85, scale=(1.0, 10.0), first=1_000_000_000, span=90_000_000, sitting=30_000_000,
    ),
}  # fmt: skip
