"""What of the README is not run by tests/test_readme.py, or in a smaller size, and why: the only place that says so."""

NOT_RUN = {
    'pip install -e ".[test]"': "installs: .ci/run evaluates this very block",
    "python -m pytest\n": "the test command, of which this is a part: .ci/run evaluates this very block",
    "ruff check .": ".ci/run evaluates this very block",
    "ray start --head": "a terminal of its own that stays: test_jobs starts such a head and submits to it",
    "ray job submit": "to a head at a fixed port: test_jobs submits train, prepare, evaluate and search",
    "pkill -9": "kills by name, the workers of other tests too: test_ray kills each kind of process by its id",
    "helm install": "a cluster to install into: test_k8s holds the manifests against this operator's schemas",
    "docker build": "a daemon, and gigabytes: test_k8s reads the Dockerfile",
    "kubectl": "an API server: test_k8s renders the overlays, test_emulated runs the jobs' entrypoints",
    "--gpu": "a GPU: test_gpu does the same where there is one, test_devices on a pretended one",
    "python -m jobs.benchmark scaling": "five trainings, three of them clusters that start: test_scaling runs it",
    "python -m jobs.reproduce cmml-3 cmml-switches": "19 rows, a minute: test_reproduce_cmml plans them",
    "python -m jobs.reproduce cmml-2": "four rows of scenarios: test_reproduce_cmml runs some",
    "python -m jobs.reproduce mamo-1": "six rows like those of paml-2, of which some are run",
    "python -m jobs.reproduce all": "ninety rows: test_reproduce and test_results run tables of a small world",
    "python -m jobs.reproduce --report": "writes this very page: test_results holds that it is what is made",
    "python -m jobs.reproduce mamo-fig2": "dozens of runs: test_studies runs studies of a small world",
    "python -m jobs.reproduce cmml-fig2": "18 processes that import torch, a minute: test_costs runs it",
}
"""Phrase of a block that is only read, its command lines parsed -> why. One that begins with `python -m jobs` or `tune`
stands for those commands alone; what else the block has is run."""

_TASKS = "epoch-tasks=64 valid-tasks=16"
_ONCE = "--epochs 1 --seeds 1 --jobs 1 --results runs/results"
"""Its own results are not the repository's."""
CAPS = {
    "train": "--epochs 1 --epoch-tasks 64 --valid-tasks 16 --no-floors",
    "train cmml-scenario": "--epochs 1 --epoch-tasks 32 --valid-tasks 4 --no-floors --scenario-users 20"
    " --pretrained-width 8",
    "prepare synthetic": "--users 300",
    "prepare synthetic --profile": "--users 1000 --items 2000 --interactions 20000 --jobs 1",
    "search": "--trials 1 --epochs 1 --grace 1 --set epoch-tasks=64 --set valid-tasks=16 --set no-floors",
    "reproduce": f"{_ONCE} --set {_TASKS}",
    "reproduce paml-2": f"{_ONCE} --methods melu reg-paml --set {_TASKS}",
    "reproduce which": "--methods bias als --jobs 1 --results runs/results",
    "benchmark adaptation": "--repeats 1 --steps 1 --model plain --quick",
    "benchmark input": "--users 200 --epochs 1",
    "benchmark methods": "--epochs 2 --rounds 1 --steps 1",
    "benchmark neighbours": "--nodes 3000 --turns 1",
    "benchmark search": "--trials 1 --epochs 1 --grace 1 --seeds 1 --set epoch-tasks=64 --set valid-tasks=16",
    "benchmark serving": "--candidates 50 --requests 10 --steps 1",
}
"""Words that a command has -> flags that are added where its own value is larger or left open: the README's commands
train for hours. The most words win. A --resume goes on with what was capped when it began."""


def capped(words: list[str]) -> list[str]:
    """The words of a command with its caps."""
    fitting = [key for key in CAPS if set(key.split()) <= set(words) and key.split()[0] == words[0]]
    if not fitting or "--resume" in words:
        return words
    made = list(words)
    for flag, *values in _flags(CAPS[max(fitting, key=lambda key: len(key.split()))].split()):
        if flag == "--set" and flag in made and words[0] == "reproduce":
            made[_end(made, flag) : _end(made, flag)] = values  # the list goes on: a second one would replace it
        elif flag == "--set" or _larger(made, flag, values):
            made += [flag, *values]
    return made


def _flags(words: list[str]) -> list[list[str]]:
    """Each flag with its values."""
    found: list[list[str]] = []
    for word in words:
        found += [[word]] if word.startswith("--") else []
        found[-1] += [] if word.startswith("--") else [word]
    return found


def _end(words: list[str], flag: str) -> int:
    """Where the values of the last such flag end."""
    at = len(words) - words[::-1].index(flag)
    return next((k for k in range(at, len(words)) if words[k].startswith("--")), len(words))


def _larger(words: list[str], flag: str, values: list[str]) -> bool:
    """Whether what the command has for a flag is more than `values`, or left open."""
    if flag not in words:
        return True
    own = words[len(words) - words[::-1].index(flag) : _end(words, flag)]
    if not all(v.isdigit() for v in [*own, *values]):
        return own != values
    return max(map(int, own), default=0) > max(map(int, values), default=0)
