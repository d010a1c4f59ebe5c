"""Options of every method, apart from the code that needs torch, so that `--help` stays quick."""

from dataclasses import dataclass
from typing import ClassVar

from distmeta.fields import option


@dataclass(frozen=True)
class Constant:
    """Predicts the mean training label."""


@dataclass(frozen=True)
class ItemMean:
    """Predicts the item's mean training label, shrunk to the global mean."""

    shrink: float = option(5.0, "Pseudo-count that pulls an item's mean to the global mean.", least=0)


@dataclass(frozen=True)
class Bias:
    """Global mean + item bias + user bias; the new user's bias is fitted on the support."""

    passes: int = option(6, "Alternating passes over item and user biases.", least=1)
    shrink: float = option(5.0, "Pseudo-count of the biases in training.", least=0)
    shrink_user: float = option(4.0, "Pseudo-count of a new user's bias on the support.", least=0)


@dataclass(frozen=True)
class Als:
    """Alternating least squares with biases; the new user's vector is folded in by ridge regression."""

    factors: int = option(10, "Latent factors besides the biases.", least=0)
    penalty: float = option(8.0, "Ridge penalty of users and items, on the factors and on the biases.", least=0)
    passes: int = option(12, "Alternating sweeps.", least=1)


@dataclass(frozen=True)
class ItemPop:
    """For clicks: a probability from how many training users clicked on the item; of scenarios, what the support took
    most often."""

    counts: str = option(
        "auto",
        "Whose clicks on an item are counted: of a scenario its support's (support; paper 002), or all training"
        " scenarios' together (global); auto: users' tasks global, scenarios support.",
        ("auto", "support", "global"),
    )


@dataclass(frozen=True)
class IALS:
    """For clicks: implicit ALS, all items that a user did not click on counting a little; the new user is folded in."""

    factors: int = option(16, "Latent factors.", least=1)
    alpha: float = option(100.0, "What a click weighs beyond the 1 of a pair of which nothing is known.", above=0)
    alpha_shown: float = option(0.0, "What a row without a click weighs beyond that.", least=0)
    penalty: float = option(100.0, "Ridge penalty of users and items.", above=0)
    passes: int = option(8, "Alternating sweeps.", least=1)
    shrink: float = option(5.0, "Pseudo-count that pulls the click rates of items and users to the mean.", above=0)


@dataclass(frozen=True)
class Fields:
    """Embeddings of the items' and the users' fields."""

    embedding: int = option(32, "Width of a field's embedding.", least=1)
    item_ids: bool = option(False, "Use the item's id as a feature too; the papers use content alone.")
    id_buckets: int = option(
        0,
        "Use the item's id hashed to one of N embeddings, where an embedding for each item would be too many; 0: no.",
        least=0,
    )


@dataclass(frozen=True)
class Vectors(Fields):
    """Of scenarios, users' ids too, and vectors that are learned beforehand."""

    user_ids: bool = option(False, "Scenarios: use the user's id as a feature too.")
    pretrained: str = option(
        "none",
        "Scenarios: vectors of users and items as features too, learned beforehand from the training scenarios'"
        " positives (but for pairs that validation and test ask about) by collaborative filtering: implicit ALS, or"
        " BPR.",
        ("none", "als", "bpr"),
    )
    pretrained_width: int = option(128, "Width of these vectors; s²Meta's are 128 wide.", least=1)
    pretrained_frozen: bool = option(True, "Leave these vectors as they are, as s²Meta does; else they are learned on.")


@dataclass(frozen=True)
class Network(Fields):
    """Embeddings of the fields and a decision MLP."""

    hidden: tuple[int, ...] = option((64, 64), "Widths of the decision MLP's hidden layers.", least=1)
    wide: bool = option(False, "Add a linear path from the features to the output, adapted like the other layers.")
    form: str = option(
        "auto", "Fast weights: auto by cost, dual pairs or private matrices.", ("auto", "dual", "private")
    )


@dataclass(frozen=True)
class Inner(Network):
    """MAML for recommendation: embeddings, a decision MLP and inner steps on the support."""

    steps: int = option(5, "Inner gradient steps on the support; the papers take 1.", least=0)
    local_lr: float = option(0.1, "Inner step size; where it is learned, what it starts from.", least=0)
    query_loss: str = option(
        "squared",
        "Query loss of the meta-update: squared, as the papers', or absolute, which is what MAE measures.",
        ("squared", "absolute"),
    )
    first_order: bool = option(False, "Leave the derivative of the inner gradients out of the meta-gradient.")


@dataclass(frozen=True)
class Gradient(Inner):
    """A step size for each adapted layer."""

    learn_rates: bool = option(True, "Learn the inner step size of each layer.")


@dataclass(frozen=True)
class MeLU(Gradient):
    """Decision layers adapt, embeddings do not."""


@dataclass(frozen=True)
class MetaCS(Gradient):
    """Everything adapts, embedding tables included."""


@dataclass(frozen=True)
class MetaSGD(Inner):
    """A learned step size for each adapted parameter."""

    tuned: str = option(
        "decision", "What adapts: the decision layers, or all layers and embeddings.", ("decision", "all")
    )


@dataclass(frozen=True)
class HML(Gradient):
    """Several MeLU initialisations; each task takes the one that adapts to it best."""

    clusters: int = option(3, "Initialisations, K.", least=1)
    own: str = option(
        "decision", "What each has of its own: the decision layers, or all layers and embeddings.", ("decision", "all")
    )
    htc: str = option(
        "support", "What assigns a training task: its support, as a new task's, or its query, as in the paper.",
        ("support", "query"),
    )  # fmt: skip
    htc_steps: int = option(
        0, "Inner steps before the initialisations are compared on a task; the paper's one or a few.", least=0
    )
    draws: int = option(5, "Splits of a support by which its task is assigned, where --htc-steps are made.", least=1)
    sum_clusters: bool = option(False, "An initialisation learns from its tasks' sum, as printed, not from their mean.")
    warm_epochs: int = option(5, "Epochs of one common solution, which all start from; 0: K random ones.", least=0)
    survey_epochs: int = option(1, "Assign all training tasks anew after every N epochs.", least=1)
    until_settled: bool = option(
        False, "End when less than 0.5 % of them changed initialisation twice in succession, as in the paper."
    )
    dead_share: float = option(
        0.1, "An initialisation with less than this part of an equal share of the tasks is made anew.", least=0, most=1
    )


@dataclass(frozen=True)
class PAML(Gradient):
    """The inner step size is personal: a network maps the user embedding to it."""

    rate_hidden: int = option(32, "Width of the hidden layer of the network that gives a user's step size.", least=1)
    history: bool = option(
        False, "Put the mean embedding of the support's items into the user embedding, beside the user's fields."
    )


@dataclass(frozen=True)
class RegPAML(PAML):
    """PAML with the regulariser that keeps known users in mind."""

    gamma: float = option(
        1e-3, "Weight of the regulariser, the squared norm of the support gradient times |α|.", least=0
    )


@dataclass(frozen=True)
class ATPAML(PAML):
    """PAML that looks up the step sizes of similar users."""

    nearest: int = option(8, "Similar users whose step sizes are looked up.", least=1)
    capacity: int = option(1_000_000, "Users that are kept; beyond it the least recently used leave.", least=1)
    warm_up: int = option(
        256, "Users to keep before any are looked up; until then everyone takes steps of --local-lr.", least=0
    )
    kernel: float = option(
        0.0, "δ of the similarity exp(−δ ‖h − h_k‖²); 0: one over the median squared distance of those found.", least=0
    )
    node_lr: float = option(0.1, "Step size of the gradient steps on kept embeddings and step sizes.", least=0)
    exact: bool = option(False, "Search exactly instead of approximately.")


@dataclass(frozen=True)
class MAMO(Gradient):
    """Memories give each user initial weights and a preference matrix of their own."""

    steps: int = option(3, "Inner gradient steps on the support; the paper takes one an item.", least=0)
    local_lr: float = option(0.03, "Inner step size ρ; where it is learned, what it starts from.", least=0)
    width: int = option(
        100, "Width d_e of the user's and of the item's embedding, which the fields' are mapped to.", least=1
    )
    layers: int = option(2, "Fully connected layers of each of the two maps.", least=1)
    hidden: tuple[int, ...] = option((64,), "Widths of the hidden layers after the preference matrix.", least=1)
    slots: int = option(3, "User types K that the memories keep.", least=1)
    temperature: float = option(
        20.0, "What the cosine between profile and slot is multiplied by before the softmax; the paper's is 1.", least=0
    )
    alpha: float = option(0.5, "Rate at which profiles are written to the profile memory (Eq. 5).", least=0, most=1)
    beta: float = option(0.05, "Rate at which gradients are written to the user memory (Eq. 6).", least=0, most=1)
    gamma: float = option(0.1, "Rate at which preference matrices are written to theirs (Eq. 8).", least=0, most=1)
    tau: float = option(
        0.1, "Weight of the user memory in a user's initial weights (Eq. 9); 0: do without it.", least=0
    )
    write: str = option(
        "mean", "How a batch's users go together: their mean, or one after the other.", ("mean", "sequential")
    )
    erase: str = option(
        "attended", "What a write takes from a slot: as much as the user answers to it, or the whole rate, as printed.",
        ("attended", "all"),
    )  # fmt: skip
    recommender: str = option(
        "memory",
        "What joins user and item: the preference matrix, fully connected layers alone, or the inner product.",
        ("memory", "dnn", "nmf"),
    )
    classes: bool = option(False, "Predict the probability of each whole rating instead of the rating itself.")
    per_item: bool = option(False, "Inner steps take the support's items one by one, as printed, not all at once.")


@dataclass(frozen=True)
class CMML(Vectors):
    """Adapts without a gradient: the support is encoded to a context that modulates the network."""

    sizes: str = option(
        "user",
        "The paper's sizes to take where none is given: user (its §7.2.2: mean encoder 64, backbone 64 64, hypernetwork"
        " 256), scenario (§7.2.1: gru of 256 and 256, 64 64 64, 64) or text (§4.1.4: gru of 128 and 128 128, 64 64 64,"
        " 64).",
        ("user", "scenario", "text"),
    )
    embedding_std: float = option(0.1, "Standard deviation that the embeddings start with.", above=0)
    hidden: tuple[int, ...] = option((), "Widths of the backbone's hidden layers; by default as --sizes.", least=1)
    leaky: float = option(0.01, "Slope of the backbone's ReLU below 0; the paper's text has 0.", least=0)
    encoder: str = option(
        "auto",
        "What makes the support a context: mean or max of an MLP on its rows, or a gru or lstm over them in time order;"
        " auto: as --sizes.",
        ("auto", "mean", "max", "gru", "lstm"),
    )
    encoder_hidden: tuple[int, ...] = option(
        (), "Hidden layers of the encoder's MLP, before mean or max, after gru or lstm; by default as --sizes.", least=1
    )
    units: int = option(0, "Units of the gru or lstm; 0: as --sizes (user: 64).", least=0)
    labels: str = option(
        "product",
        "What the encoder sees of a support label: an embedding of it (the authors' code), that and the row's features"
        " times the label (product), its value, or none.",
        ("product", "embedding", "value", "none"),
    )
    positives: bool = option(
        False,
        "The context leaves out support rows whose label is not above the middle of its range: the paper's ablation"
        " Non-negative.",
    )
    detach: bool = option(
        False, "The encoder does not teach the embeddings, as in the authors' code; the prediction alone does."
    )
    hybrid: str = option(
        "dot",
        "How the context meets a row's own features: none, their product (dot), or a layer on both (mlp).",
        ("none", "dot", "mlp"),
    )
    wide: bool = option(
        True,
        "Add a linear map of the hybrid context to the output, with --hybrid dot at first the inner product of context"
        " and features; the paper has none.",
    )
    hyper: int = option(0, "Width of the hypernetwork's layers; 0: as --sizes. The paper has 128 for Taobao.", least=0)
    hyper_bias: float = option(
        0.0, "What the hypernetwork's biases start from; the paper has 0 and, for MovieLens, .1."
    )
    hidden_support: float = option(
        0.02,
        "Share of the training tasks whose support is hidden, so that a user with nothing at all is predicted too.",
        least=0,
        most=1,
    )
    query_loss: str = option(
        "auto",
        "Query loss: of ratings squared (auto) or absolute, of clicks cross-entropy (auto) or hinge, which is also auto"
        " of scenarios: each positive row against the negative ones of the same user.",
        ("auto", "squared", "absolute", "cross-entropy", "hinge"),
    )


@dataclass(frozen=True)
class CMMLFilm(CMML):
    """The context scales and shifts the units of each layer."""

    one_plus: bool = option(
        True, "Scale units by 1 + the generated weights; as printed and in the authors' code, by the weights alone."
    )


@dataclass(frozen=True)
class CMMLSoftM(CMML):
    """The context chooses routes through small modules."""

    embedding_std: float = option(
        0.4,
        "Standard deviation that the embeddings start with; from .1 the routes hardly part within ten epochs.",
        above=0,
    )
    modules: int = option(4, "Modules of a layer.", least=1)
    module_width: int = option(32, "Units of a module.", least=1)
    module_layers: int = option(
        0, "Layers of modules; 0: as many as the backbone has hidden layers (--sizes user 2, else 3).", least=0
    )


@dataclass(frozen=True)
class S2Meta(Vectors):
    """Learns where tasks begin, a step size and a decay for every coordinate, and when to stop."""

    embedding_std: float = option(0.1, "Standard deviation that the embeddings start with.", above=0)
    hidden: tuple[int, ...] = option(
        (64, 32, 16), "Widths of the hidden layers, all of which adapt; these are its code's for MovieLens.", least=1
    )
    steps: int = option(20, "Inner steps at most.", least=0)
    least_steps: int = option(4, "Inner steps before the stop controller has a say (or --steps, if fewer).", least=0)
    units: int = option(16, "Units of each gate's LSTM.", least=1)
    layer_norm: bool = option(True, "Normalise the state of each gate's LSTM.")
    first_rate: float = option(
        0.1, "Step size that the input gates begin near; the authors' code begins near .5.", above=0, most=0.99
    )
    forget: float = option(5.0, "What the forget gates' biases begin at: 5 keeps 99.3 % of a coordinate a step.")
    penalty: float = option(0.0, "What each further step costs the stop controller.", least=0)
    query_loss: str = option(
        "auto",
        "Query loss: of ratings squared (auto) or absolute (the support's is squared), of clicks cross-entropy (auto)"
        " or hinge, which is also auto of scenarios: each positive row against the negative ones of the same user.",
        ("auto", "squared", "absolute", "cross-entropy", "hinge"),
    )


@dataclass(frozen=True)
class Transfer(Network):
    """Trained jointly on all rows of all tasks, fine-tuned on a new user's support."""

    steps: int = option(20, "Fine-tuning steps on the support.", least=0)
    local_lr: float = option(0.03, "Step size of fine-tuning; it is not learned.", least=0)
    tuned: str = option("all", "What fine-tuning changes: all layers and embeddings, or the decision layers alone.",
                        ("all", "decision"))  # fmt: skip
    query_loss: str = option(
        "squared",
        "Training loss: squared, as fine-tuning's, or absolute, which is what MAE measures.",
        ("squared", "absolute"),
    )
    learn_rates: ClassVar[bool] = False
    first_order: ClassVar[bool] = True
