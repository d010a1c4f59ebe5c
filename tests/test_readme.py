"""Every command block of the README, in order, by bash: what a reader types works.

The commands are the README's own. Long ones get flags that make them short, and a few are only parsed: readme_caps.py
has both, with the reasons. A section may need what those before it made: run the file as a whole.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_blocks import REPO, Block, blocks, blocks_of, command_of, dangling, missing_paths, parse, read
from readme_caps import CAPS, NOT_RUN, capped
from readme_sandbox import Sandbox, sandbox, written

from distmeta.errors import UserError

BLOCKS = blocks()
COMMANDS = [b for b in BLOCKS if b.language == "bash"]
SECTIONS = list(dict.fromkeys(b.section for b in COMMANDS))


@pytest.fixture(scope="module")
def place(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with sandbox(tmp_path_factory.mktemp("readme"), raw, Path(os.environ["DISTMETA_DATA"])) as made:
        yield made


def only_read(block: Block) -> bool:
    return any(phrase in block.text for phrase in NOT_RUN if not phrase.startswith("python -m jobs"))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_a_section(section: str, place: Sandbox, tmp_path: Path) -> None:
    for block in (b for b in BLOCKS if b.section == section):
        if block.language == "yaml":
            written(block, place.folder)
        elif block.language == "bash" and only_read(block):
            check(block, tmp_path)
        elif block.language == "bash":
            print(place.run(block))


def check(block: Block, folder: Path) -> None:
    """A block that is not run: its command lines are understood, and the files that it names are there."""
    for words in read(block, folder):
        assert missing_paths(words) == [], block.where
        if command := command_of(words):
            try:
                parse(command)
            except UserError as e:
                raise AssertionError(f"{block.where}: {' '.join(words)}: {e}") from None


def test_what_is_not_run_is_there() -> None:
    whole = "".join(b.text for b in COMMANDS)
    assert [phrase for phrase in NOT_RUN if phrase not in whole] == []
    given = [set(line.replace(".", " ").split()) for line in whole.replace("\\\n", "").splitlines()]
    assert [key for key in CAPS if not any(set(key.split()) <= words for words in given)] == []


def test_ci_runs_the_blocks_that_are_left_to_it() -> None:
    script, readme = (REPO / ".ci" / "run").read_text(), (REPO / "README.md").read_text()
    for name in ("install", "lint", "test"):
        assert f'eval "$(readme {name})"' in script
        assert f"<!-- {name} -->\n```bash\n" in readme


def test_what_the_pages_name_is_there() -> None:
    assert dangling() == []


TEXT = """# One
```bash
for s in 0 1; do python -m jobs.train melu \\
  --seed $s --run "a b"; done; cd /   # a comment
ray job submit --working-dir . -- python -m tune.search melu --out x
sh -c 'exec distmeta evaluate --run r' && kubectl apply -k k8s/overlays/nowhere | tee log
```
## Two
```yaml
# x.yaml
```
"""


def test_a_block_is_read_as_bash_reads_it(tmp_path: Path) -> None:
    one, two = blocks_of("PAGE", TEXT)
    assert (one.section, one.line, two.language, two.section) == ("PAGE: One", 3, "yaml", "PAGE: Two")
    words = read(one, tmp_path)
    found = [command_of(w) for w in words]
    assert [f for f in found if f] == [
        *(["train", "melu", "--seed", s, "--run", "a b"] for s in "01"),
        ["search", "melu", "--out", "x"],
        ["evaluate", "--run", "r"],
    ]
    assert list(itertools.chain.from_iterable(map(missing_paths, words))) == ["k8s/overlays/nowhere"]
    with pytest.raises(UserError, match="did you mean --seed"):
        parse(["train", "melu", "--sed", "1", "--resume", "--config", "nowhere.yaml"])
    with pytest.raises(UserError, match="did you mean --trials"):
        parse(["search", "melu", "--trails", "3", "--out", "x"])


def test_caps() -> None:
    words = ["train", "melu", "--epochs", "1", "--valid-tasks", "5000"]
    assert capped(words) == [*words, "--epoch-tasks", "64", "--valid-tasks", "16", "--no-floors"]
    assert capped(["train", "--run", "r", "--resume"]) == ["train", "--run", "r", "--resume"]
    words = capped(["reproduce", "paml-3", "--set", "wide", "lr=1", "--out", "o", "--seeds", "2"])
    assert words[2:9] == ["--set", "wide", "lr=1", "epoch-tasks=64", "valid-tasks=16", "--out", "o"]
    assert words[9:13] == ["--seeds", "2", "--epochs", "1"]
    assert words[13:] == ["--seeds", "1", "--jobs", "1", "--results", "runs/results"]
    with pytest.raises(UserError, match="did you mean"):
        parse(["benchmark", "methods", "--epoch", "1"])
