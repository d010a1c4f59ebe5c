"""An Optuna journal where files do not grow: numbered parts on an object store, each written in one put.

A part's name says which records it holds, START-END.jsonl. Small parts become one when there are many, which is there
before they go: of two parts with the same record the larger counts. One process writes, so nothing is locked.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from distmeta.errors import UserError
from distmeta.storage import Location

MOST = 64
"""Parts besides the merged one."""


class PartsJournal(BaseJournalBackend):
    """The journal in a folder, made where there is none.

    Raises:
        UserError: a part is missing or damaged.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.parts: list[str] = []
        """Names of the parts that the records are in, in their order."""
        self._take(sorted(c.name for c in folder.children()))

    def _take(self, names: list[str]) -> None:
        spans = {name: (int(m[1]), int(m[2])) for name in names if (m := re.fullmatch(r"(\d+)-(\d+)\.jsonl", name))}
        last = max((end for _, end in spans.values()), default=0)
        while len(self.lines) < last:
            here = {end: name for name, (start, end) in spans.items() if start == len(self.lines)}
            if not here:
                raise UserError(f"{self.folder}: record {len(self.lines)} is missing; start a new search")
            name = here[max(here)]
            self.lines += self._read(name, max(here) - len(self.lines))
            self.parts.append(name)

    def _read(self, name: str, records: int) -> list[str]:
        try:
            lines = (self.folder / name).read_bytes().decode().splitlines()
            for n, line in enumerate(lines, 1):
                if not isinstance(json.loads(line), dict):
                    raise ValueError(f"line {n}")
        except ValueError as e:
            raise UserError(f"{self.folder / name}: is damaged ({e}); start a new search") from None
        if len(lines) != records:
            raise UserError(f"{self.folder / name}: is damaged ({len(lines)} lines); start a new search")
        return lines

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The records from this number on."""
        return [json.loads(line) for line in self.lines[log_number_from:]]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records, as a part of their own."""
        lines, start = [json.dumps(log, separators=(",", ":")) for log in logs], len(self.lines)
        self.parts.append(self._write(start, lines))
        self.lines += lines
        if len(self.parts) > MOST:
            merged = self._write(0, self.lines)
            for name in self.parts:
                (self.folder / name).remove()
            self.parts = [merged]

    def _write(self, start: int, lines: list[str]) -> str:
        name = f"{start:09d}-{start + len(lines):09d}.jsonl"
        (self.folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode())
        return name
