"""The report's figures about a method's own facts: step sizes, clusters, neighbours, a memory's slots."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from distmeta.evaluation import contextcharts, groupcharts, slotcharts
from distmeta.evaluation.charts import signed
from distmeta.evaluation.contexts import CONTEXTS, ROUTES
from distmeta.evaluation.facts import CLUSTER, SLOTS, TRUTH

_TITLES = {"step_size": "Personal step sizes", "entropy": "Attention of the test tasks"}
_NAMES = {"entropy": "entropy of a task’s attention"}
_MEANING = {"entropy": " 1: a task answers to all slots alike; 0: to one alone."}


def figures(facts: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(svg, title, caption) of each picture that there is something for.

    Args:
        facts: `facts.summary` and `contexts.summary`.
        metrics: lines of metrics.jsonl, whose "clusters", "memory" and "index" are drawn.
    """
    if SLOTS in facts:
        yield from _slots(facts[SLOTS])
    if CONTEXTS in facts:
        yield from contextcharts.contexts(facts[CONTEXTS])
    if ROUTES in facts:
        yield contextcharts.routes(facts[ROUTES])
    for name, found in facts.items():
        if name not in (CLUSTER, SLOTS, CONTEXTS, ROUTES):
            yield _quantity(name, found)
    attention = slotcharts.training(metrics)
    if attention:
        yield attention, "Attention over training", _ATTENTION
    sizes = groupcharts.clusters(metrics)
    if sizes:
        caption = (
            "How the training tasks are spread over the clusters, and what share changed since they were last assigned."
        )
        yield sizes, "Clusters", caption
    for i, (field, found) in enumerate(facts.get(CLUSTER, {}).get("fields", {}).items()):
        title = f"Clusters and {_called(field)}"
        caption = (
            f"Test tasks; adjusted Rand index {signed(found['ari'], 3).lstrip('+')} (1: the same groups, 0: as by"
            " chance). Each column adds up to 100 %."
        )
        yield groupcharts.assignment(field, found["values"], found["shares"], f"assignment {i}"), title, caption
    aged = groupcharts.ages(metrics)
    if aged:
        last = next(m["index"] for m in reversed(metrics) if m.get("index"))
        told = ", ".join(f"{last[k]:,} {what}" for k, what in _COUNTED.items() if isinstance(last.get(k), int))
        yield (
            aged,
            "Neighbours’ ages",
            f"For how long the neighbours that searches returned had not been used, or stored, before. {_end(told)}",
        )


_COUNTED = {"nodes": "nodes", "evicted": "evicted", "rebuilds": "rebuilds of the index"}


def _end(told: str) -> str:
    return f"In the last epoch: {told}." if told else ""


def _called(field: str) -> str:
    return "the truth" if field == TRUTH else escape(field)


def _quantity(name: str, found: Mapping[str, Any]) -> tuple[str, str, str]:
    groups = found["cohorts"]
    words = _NAMES.get(name, name.replace("_", " "))
    svg = groupcharts.histograms(words, found["edges"], {g: of["counts"] for g, of in groups.items()})
    said = "; ".join(
        f"{escape(g)} ({of['n']:,} tasks): mean {of['mean']:.4g}{_below_0(of, found)}" for g, of in groups.items()
    )
    title = _TITLES.get(name, escape(words.capitalize()))
    return svg, title, f"Of the test tasks, by cohort. {said}.{_MEANING.get(name, '')}"


def _below_0(of: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return f", {100 * of['below_0']:.1f} % below 0" if found["edges"][0] < 0 else ""


def _slots(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What a memory's slots stand for (MAMO, Figure 5b)."""
    low, high = min(found["top"]), max(found["top"])
    n = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    told = f"the {n} test tasks that answer to it most, as in MAMO’s Figure 5b"
    if len(found["usage"]) == 1:
        caption = "There is one slot, to which every task answers."
    else:
        caption = (
            f"A slot is described by {told}: the values that they have more often than chance would have it, and how"
            " many times as often as all test tasks. A slot whose ring is hardly farther right than its bar stands for"
            " nothing: all tasks answer to it alike."
        )
    if not found["fields"]:
        caption += " The users have no field of few values that could tell who these are."
    yield slotcharts.overview(found), "What each memory slot stands for", caption
    for i, (field, of) in enumerate(found["fields"].items()):
        if len(found["usage"]) > 1:
            caption = f"Bars and numbers: of each slot {told}; lines: all test tasks. A slot’s bars add up to 100 %."
        yield slotcharts.field(field, of, f"slots {i}"), f"Memory slots and {_called(field)}", caption


_ATTENTION = (
    "Above: the entropy of a task’s attention over the slots as a share of the most it can be, mean over an epoch’s"
    " training tasks. 1: every task answers to all slots alike, the slots have collapsed and do no more than one would;"
    " 0: every task answers to one slot alone. Slots’ mean cosine: 1 where the profile memory’s slots are parallel,"
    " which is how they collapse. Below: how much of the attention each slot got."
)
