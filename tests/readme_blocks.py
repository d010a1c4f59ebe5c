"""The README as a program: its command blocks in order, the files it links to, and how a block is run or only read."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest import mock

from distmeta import cli
from distmeta.commands import train

REPO = Path(__file__).parent.parent
PAGES = ("README.md", "k8s/README.md", "tune/README.md")
"""Those that there are, in the order in which a reader comes to them."""
_FENCE = re.compile(r"^```(\w*)$")
_LINK = re.compile(r"\]\(([^)#\s]+)|src=\"([^\"]+)\"")
_CODE = re.compile(r"`((?:distmeta|jobs|k8s|tests|tune)/[\w./-]+)`")
_VARIES = re.compile(r"\b(?!README)[A-Z]{3,}\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    heading: str
    line: int
    """Where its text begins."""
    language: str
    text: str

    @property
    def section(self) -> str:
        return f"{self.page}: {self.heading}"

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks() -> list[Block]:
    """All fenced blocks of the pages that there are."""
    return [b for page in PAGES if (REPO / page).exists() for b in blocks_of(page, (REPO / page).read_text())]


def blocks_of(page: str, text: str) -> list[Block]:
    """The fenced blocks of one page; AssertionError where one does not end."""
    found: list[Block] = []
    heading, language, begun, held = "", "", 0, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if not begun and line.startswith("#"):
            heading = line.lstrip("# ")
        elif not begun and fence:
            language, begun, held = fence[1], number + 1, []
        elif begun and fence:
            found.append(Block(page, heading, begun, language, "\n".join(held) + "\n"))
            begun = 0
        elif begun:
            held.append(line)
    assert not begun, f"{page}, line {begun}: a block that does not end"
    return found


def dangling() -> list[str]:
    """What the pages link to, or name in `code` as a file of the repository, and is not there."""
    found = []
    for page in (REPO / p for p in PAGES if (REPO / p).exists()):
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
        links = [a or b for a, b in _LINK.findall(text)]
        places = [(w, page.parent / w) for w in links if "://" not in w]
        places += [(w, REPO / w) for w in _CODE.findall(text) if not _VARIES.search(w)]
        found += [f"{page.relative_to(REPO)}: {word}" for word, place in places if not place.exists()]
    return found


_READ = r"""
command_not_found_handle() {
  (IFS=$'\x1f'; printf '%s\x1e' "$*" >&3)
  if [[ $1 =~ ^(ba)?sh$ && $2 = -*c ]]; then eval "$3"; return; fi
  while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
  [ $# -lt 2 ] || "${@:2}"  # what follows -- is for another machine
}
exec() { [ $# -eq 0 ] || "$@"; }
"""


def read(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a block as bash sees them, loops and variables worked out; none but its built-ins is run."""
    record = folder / "commands"
    with record.open("wb") as file:
        words = ["bash", "--norc", "-c", f"exec 3>&{file.fileno()}\n{_READ}PATH=/nowhere\n{block.text}"]
        done = subprocess.run(
            words,
            cwd=folder,
            pass_fds=(file.fileno(),),
            capture_output=True,
            text=True,
            timeout=20,
            env={"HOME": str(folder)},
        )
    assert not done.stderr, f"{block.where}: {done.stderr}"
    return [line.split("\x1f") for line in record.read_text().split("\x1e") if line]


class Parsed(BaseException):
    """Thrown when the command line has been understood, before the command begins."""


def parse(argv: list[str]) -> None:
    """Have the real parser read a command line, METHOD and values of `train` included.

    Raises:
        UserError: it is not understood.
    """
    if argv[0] == "train":
        train.parse(_new(argv[1:]))
        return

    real = cli.Parser.parse

    def parse_only(self: cli.Parser, words: list[str]) -> NoReturn:
        raise Parsed(real(self, words))

    with mock.patch.object(cli.Parser, "parse", parse_only):
        try:
            cli._command(argv)
        except Parsed:
            return
    raise AssertionError(f"{argv}: did not come to a parser")


def _new(words: list[str]) -> list[str]:
    """`train`'s words as for a new run: without those that need a run or config that an earlier command would make."""
    kept = [w for w in words if w not in ("--resume", "--retried")]
    if "--config" in kept:
        at = kept.index("--config")
        del kept[at : at + 2]
    return kept


def command_of(words: list[str]) -> list[str] | None:
    """The words of `distmeta` in a shell command: of `distmeta X`, `python -m jobs.X` and `python -m tune.search`."""
    if words[0] == "distmeta":
        return words[1:]
    if words[0] in ("python", "python3") and words[1:2] == ["-m"]:
        package, _, name = words[2].partition(".")
        if package in ("jobs", "tune"):
            return [name, *words[3:]]
    return None


def missing_paths(words: list[str]) -> list[str]:
    """Words that name a file of the repository which is not there."""
    ours = [w for w in words if re.match(r"(\./)?(distmeta|jobs|k8s|tests|tune)/", w)]
    return [w for w in ours if not (REPO / w.split("::")[0]).exists()]
