"""`reproduce --report`: RESULTS/report.md, report.html and pictures, and a README's part, of what RESULTS holds."""

import os
from collections.abc import Mapping
from typing import Any

from distmeta.commands import reproduce_results
from distmeta.errors import UserError
from distmeta.evaluation import resultspage
from distmeta.evaluation.resultspage import Part
from distmeta.storage import Location


def main(results: Location | None, readme: str | None) -> int:
    """Write the pages; 0 when they are there.

    Raises:
        UserError: there are no results, one is damaged, or the README has no place for them.
    """
    if results is None:
        raise UserError("reproduce: --report needs the results; give --results DIR")
    parts, missing = told(results)
    page = None
    if readme:
        file = Location.of(readme)
        text = resultspage.short(parts, missing, way(file, results))
        page = file, resultspage.replaced(_read(file), text, readme).encode()
    for one in parts:
        if one.svg:
            (results / f"{one.name}.svg").write_bytes(one.svg.encode())
    (results / "report.html").write_bytes(resultspage.page(parts, missing).encode())
    (results / "report.md").write_bytes(resultspage.markdown(parts, missing).encode())
    print(f"{len(parts)} results -> {results / 'report.html'}, report.md")
    if page:
        page[0].write_bytes(page[1])
        print(f"{readme}: has them too")
    return 0


def told(results: Location) -> tuple[list[Part], list[str]]:
    """What the pages say of each kept file, in order, and of what is missing; UserError naming a damaged one."""
    made = reproduce_results.load(results)
    return [_part(results, one) for one in resultspage.ordered(made)], resultspage.missing(made)


def _part(results: Location, made: Mapping[str, Any]) -> Part:
    try:
        return resultspage.part(made)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise reproduce_results.damaged(results / f"{made.get('name')}.json") from e


def way(file: Location, results: Location) -> str:
    """From a page to report.md: relative where both are local files."""
    target = results / "report.md"
    if file.is_local and results.is_local:
        return os.path.relpath(target.path, file.parent.path).replace(os.sep, "/")
    return str(target)


def _read(file: Location) -> str:
    try:
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give --readme the page that has a place for the results") from None
