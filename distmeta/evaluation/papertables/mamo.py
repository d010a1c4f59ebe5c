"""MAMO's table (paper 003)."""

from distmeta.evaluation.papertables.table import (
    FLOOR_NOTE,
    S2META,
    S2META_NOTE,
    SUBSET,
    Column,
    Key,
    Ours,
    PaperTable,
    Section,
)

MAMO_FLAGS = ("--epochs", "10", "--mamo-drawn", "--query-loss", "absolute", "--query-rows", "10", "--lr-decay", "0",
              "--patience", "0", "--item-ids", "--wide")  # fmt: skip
"""Settings of MAMO's table and studies, chosen on split 0."""
_GRADIENT = ("--steps", "3", "--lr", "1e-3")

MAMO_1 = PaperTable(
    name="mamo-1",
    title="MAMO, Table 1: warm and cold users and items",
    protocol="mamo",
    columns=tuple(
        Column(dataset, metric, head)
        for dataset in ("movielens-1m", "bookcrossing-complete")
        for metric, head in (("mae", "MAE"), ("ndcg@3", "NDCG@3"))
    ),
    sections=(
        Section(
            "Warm users, warm items (W-W)",
            "W-W",
            """
            MeLU | 0.7661 | 0.8904 | 0.7799 | 0.9572
            MetaCS-DNN | 0.9047 | 0.9090 | 1.6206 | 0.8860
            s²Meta | 0.7567 | 0.8870 | 1.5147 | 0.8781
            Item-level RUM | 0.8874 | 0.9102 | 1.4611 | 0.8920
            Feature-level RUM | 0.8739 | 0.9120 | 1.3945 | 0.8909
            MAMO | 0.8725 | 0.8866 | 1.4879 | 0.8879
            """,
        ),
        Section(
            "Warm users, cold items (W-C)",
            "W-C",
            """
            MeLU | 0.9361 | 0.7990 | 2.1047 | 0.8441
            MetaCS-DNN | 1.1694 | 0.7715 | 2.1457 | 0.8365
            s²Meta | 0.8860 | 0.8323 | 1.9767 | 0.8463
            Item-level RUM | 1.3424 | 0.7692 | 2.2857 | 0.8265
            Feature-level RUM | 1.2439 | 0.7721 | 2.0837 | 0.8430
            MAMO | 0.9306 | 0.8315 | 1.7379 | 0.8402
            """,
        ),
        Section(
            "Cold users, warm items (C-W)",
            "C-W",
            """
            MeLU | 0.7884 | 0.8810 | 1.8701 | 0.8527
            MetaCS-DNN | 1.0625 | 0.8559 | 2.2648 | 0.8202
            s²Meta | 0.8443 | 0.8401 | 1.8738 | 0.8490
            Item-level RUM | 1.2655 | 0.7420 | 2.2608 | 0.8202
            Feature-level RUM | 1.2488 | 0.7642 | 2.0322 | 0.8338
            MAMO | 0.8967 | 0.8799 | 1.6217 | 0.8565
            """,
        ),
        Section(
            "Cold users, cold items (C-C)",
            "C-C",
            """
            MeLU | 0.9299 | 0.8011 | 2.1475 | 0.8410
            MetaCS-DNN | 1.2012 | 0.7680 | 2.3088 | 0.8160
            s²Meta | 0.9130 | 0.8148 | 2.0921 | 0.8422
            Item-level RUM | 1.3509 | 0.7680 | 2.3197 | 0.8160
            Feature-level RUM | 1.2773 | 0.7547 | 2.1260 | 0.8273
            MAMO | 0.8894 | 0.8709 | 1.8188 | 0.8384
            """,
        ),
        Section("All test users (ours; the paper has none)", "all"),
    ),
    ours=(
        Ours("MeLU", "melu"),
        Ours("MetaCS-DNN", "metacs"),
        Ours("s²Meta", "s2meta"),
        Ours("Item-level RUM", "rum-item"),
        Ours("Feature-level RUM", "rum-feature"),
        Ours("MAMO", "mamo", against=("MeLU", "MetaCS-DNN", "s²Meta", "Item-level RUM", "Feature-level RUM")),
        Ours("MAMO without feature memory (τ = 0)", "mamo", ("--tau", "0"), against=("MAMO",)),
        Ours("MAMO without task memory (DNN)", "mamo", ("--recommender", "dnn"), against=("MAMO",)),
        Ours("MAMO, K = 1", "mamo", ("--slots", "1"), against=("MAMO",)),
    ),
    key=(Key(2, 0), Key(4, 0), Key(2, 2)),
    flags={
        "*": MAMO_FLAGS,
        "melu": _GRADIENT,
        "metacs": _GRADIENT,
        "s2meta": (*S2META, "--epochs", "12"),
        "bookcrossing-complete/s2meta": ("--lr", "2e-3"),
        "bookcrossing-complete": (
            "--no-item-ids",
            "--no-wide",
            "--embedding",
            "16",
            "--lr",
            "5e-4",
            "--local-lr",
            "0.01",
        ),
        "bookcrossing-complete/mamo": ("--width", "50", "--beta", "0.1", "--tau", "0.15"),
    },
    digits=4,
    notes=(
        "The paper's own table has MAMO's error above MeLU's for cold users and warm items on MovieLens (.8967 against"
        " .7884) and for warm users and items on both data sets (.8725 against .7661, 1.4879 against .7799): s²Meta's"
        " or MeLU's error is lower in three of the four MovieLens columns.",
        "Always predicting 4 has MAE .82 over all users of this protocol (in file order): less than each of the paper's"
        " four MAEs of MAMO on MovieLens (.87 to .93).",
        "The paper's NDCG@3 is not its formula's: its public code sorts the true ratings of the 3 items ranked highest"
        " once more, so that their order does not count. A random order of a query of 5 then scores .800, by the"
        " formula .717; a bias model .880 and .823. Ours is the formula; the constant's row ranks nothing and shows"
        " what that scores.",
        "Rows of W-W to C-C: MAE over query rows, NDCG@3 over clips of 5 rows of a cohort by (user, time), fewer than"
        " 3 rows left out (appendix A.2.3). Intervals resample users with all their rows. `all`: means over users.",
        "Cold users by first rating, 2000-12-03 or later (Book-Crossing: the last 10 % by id); cold items by fewer"
        " than 10 ratings among all users' first 20 (Book-Crossing: 5 or fewer). C-C on MovieLens is some 15"
        " users a split: only large differences show there.",
        "Book-Crossing without ratings of users or books of unknown profile, as in the paper, which has about 600,000"
        " left of 1 to 10: more than the 433,671 that the dump has in all.",
        SUBSET,
        "MeLU's .7799 for warm users and items on Book-Crossing stands beside 1.39 to 1.62 of all others and its own"
        " 2.10 for cold items; no ratings of 1 to 10 explain it.",
        "MAMO on Book-Crossing has the paper's settings for it: d_e 50, β .1, τ .15; rows below it differ in"
        " what they name alone. All start from local steps of .01 there: at our .1 MetaCS-DNN diverges on ratings up to"
        " 10.",
        "MAMO without a memory and with one slot: ours alone.",
        S2META_NOTE.format("12,000"),
        FLOOR_NOTE,
    ),
)
