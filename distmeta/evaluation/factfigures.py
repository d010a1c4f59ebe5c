"""The report's figures about a method's own facts: step sizes, clusters, neighbours."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from distmeta.evaluation import groupcharts
from distmeta.evaluation.charts import signed
from distmeta.evaluation.facts import CLUSTER, TRUTH

_TITLES = {"step_size": "Personal step sizes"}


def figures(facts: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(svg, title, caption) of each picture that there is something for.

    Args:
        facts: `facts.summary`. metrics: lines of metrics.jsonl, whose "clusters" and "index" are drawn.
    """
    for name, found in facts.items():
        if name != CLUSTER:
            yield _quantity(name, found)
    sizes = groupcharts.clusters(metrics)
    if sizes:
        caption = (
            "How the training tasks are spread over the clusters, and what share changed since they were last assigned."
        )
        yield sizes, "Clusters", caption
    for i, (field, found) in enumerate(facts.get(CLUSTER, {}).get("fields", {}).items()):
        title = "Clusters and the truth" if field == TRUTH else f"Clusters and {escape(field)}"
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


def _quantity(name: str, found: Mapping[str, Any]) -> tuple[str, str, str]:
    groups = found["cohorts"]
    words = name.replace("_", " ")
    svg = groupcharts.histograms(words, found["edges"], {g: of["counts"] for g, of in groups.items()})
    said = "; ".join(
        f"{escape(g)}: mean {of['mean']:.4g}, {100 * of['below_0']:.1f} % below 0, {of['n']:,} tasks"
        for g, of in groups.items()
    )
    return svg, _TITLES.get(name, escape(words.capitalize())), f"Of the test tasks, by cohort. {said}."
