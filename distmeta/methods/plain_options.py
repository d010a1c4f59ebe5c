"""Options of the plain recommenders that the papers compare with, apart from the code that needs torch."""

from dataclasses import dataclass

from distmeta.fields import option
from distmeta.methods.options import Fields, Vectors


@dataclass(frozen=True)
class Joint(Vectors):
    """Trained jointly on all rows of all tasks; fine-tuned on a new task's support where `steps` says so."""

    hidden: tuple[int, ...] = option((64, 64), "Widths of the deep part's hidden layers.", least=1)
    user_ids: bool = option(
        False,
        "Use the user's id as a feature too, one embedding a user; a user who was not trained on has 0, which"
        " fine-tuning starts from.",
    )
    hidden_ids: float = option(
        0.2,
        "Share of the training tasks whose user id is hidden, so that a user without one is learned too (as DropoutNet"
        " does).",
        least=0,
        most=1,
    )
    steps: int = option(0, "Fine-tuning steps on the support; 0, as the papers have it: none.", least=0)
    local_lr: float = option(3e-3, "Step size of fine-tuning; it is not learned.", above=0)
    tuned: str = option(
        "all",
        "What fine-tuning changes: the layers, the features of the task's own user (fields and id), or all of these."
        " Scenarios have no user of their own.",
        ("all", "layers", "user"),
    )
    tuner: str = option(
        "adam", "Fine-tuning by Adam, begun anew with each task, or by plain gradient descent.", ("adam", "sgd")
    )
    tune_penalty: float = option(
        30.0, "Ridge penalty of what fine-tuning changes, beside the sum of the support's losses.", least=0
    )
    query_loss: str = option(
        "auto",
        "Training loss: of ratings squared (auto) or absolute, of clicks cross-entropy (auto) or hinge, which is also"
        " auto of scenarios: each positive row against the negative ones of the same user.",
        ("auto", "squared", "absolute", "cross-entropy", "hinge"),
    )


@dataclass(frozen=True)
class WideDeep(Joint):
    """A linear model of fields and of their cross-products beside an MLP on embeddings."""

    crosses: int = option(
        64,
        "Cross-products of the user's fields with the item's: of user fields with N values in all, the smallest first;"
        " 0: none.",
        least=0,
    )


@dataclass(frozen=True)
class DeepFM(Joint):
    """A factorisation machine beside an MLP, on the same embeddings."""


@dataclass(frozen=True)
class DCN(Joint):
    """Cross layers beside an MLP, on the same features."""

    cross_layers: int = option(3, "Cross layers.", least=0)


@dataclass(frozen=True)
class DCNF(DCN):
    """DCN, fine-tuned on the support."""

    steps: int = option(
        20,
        "Fine-tuning steps on the support; the paper has 5 of 2e-4 for users, 5 or 10 of 1e-3 for scenarios.",
        least=0,
    )


@dataclass(frozen=True)
class RUM(Fields):
    """A memory of what the user rated, read for each item that is asked about."""

    width: int = option(50, "Width d of a user's and of an item's vector, which the fields' are mapped to.", least=1)
    slots: int = option(20, "Memory slots K of a user.", least=1)
    alpha: float = option(
        0.5, "Weight α of what is read from the memory, beside the user's own vector.", least=0, most=1
    )
    labels: str = option(
        "residual",
        "What the memory is told of a support label: none (the paper's, which knows clicks alone), the label scaled to"
        " −1 … 1 (product), or what the biases leave of it (residual).",
        ("residual", "product", "none"),
    )
    biases: str = option(
        "user",
        "Biases added to the score: none (the paper's), a global and the item's (item), and the user's besides, fitted"
        " on the support (user).",
        ("user", "item", "none"),
    )
    shrink: float = option(4.0, "Pseudo-count of the user's bias on the support.", least=0)
    steps: int = option(
        3, "Gradient steps on the support that change what is in the user's memory; RUM itself takes none.", least=0
    )
    local_lr: float = option(1.0, "Size of these steps.", least=0)
    query_loss: str = option(
        "auto",
        "Query loss: of ratings squared (auto) or absolute, of clicks cross-entropy (auto) or hinge.",
        ("auto", "squared", "absolute", "cross-entropy", "hinge"),
    )


@dataclass(frozen=True)
class RUMItem(RUM):
    """RUM, item-level: the memory holds the last items."""

    slots: int = option(50, "Items K that the memory holds, the last ones; the paper's are 20.", least=1)


@dataclass(frozen=True)
class RUMFeature(RUM):
    """RUM, feature-level: each item writes to slots whose keys all users share."""


@dataclass(frozen=True)
class CoNet(Vectors):
    """Scenarios: two networks side by side, on the scenarios and on a source domain, that see each other's layers."""

    hidden: tuple[int, ...] = option((64, 32, 16), "Widths of both networks' hidden layers.", least=1)
    source: str = option(
        "outside",
        "The source domain: what users like among items of no scenario (outside; paper 002's movies without a genre),"
        " or their positives in other training scenarios than the one at hand (others).",
        ("outside", "others"),
    )
    source_items: int = option(16, "Items of the source domain that are kept of a user, by hash.", least=1)
    source_weight: float = option(1.0, "Weight of the source domain's loss.", least=0)
    query_loss: str = option(
        "auto",
        "Loss: hinge (auto), each positive row against the negative ones of the same user, or cross-entropy.",
        ("auto", "cross-entropy", "hinge"),
    )
