"""Checkpoints: one consistent cut of a run as safetensors and JSON (no pickle: reading executes nothing).

RUN/checkpoints/step-NNNNNNNNN/
  params-00000.safetensors      the method's state_dict: parameters and persistent buffers, by name
  optimizer-00000.safetensors   AdamW's state, NAME.{step,exp_avg,exp_avg_sq}; not in closed form
  state-00000.safetensors       what else has a state, NAME.KEY: shared memories; only where there is such a thing
  checkpoint.json               manifest, written last: format version, method, global step, cursor, progress,
                                settings, split_hash, versions, each file's size and sha256, its own

A folder without a manifest was interrupted and does not count. Damage is never passed over in silence: the
sentence names the file, and what to delete to go on from an older step.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import safetensors
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from distmeta import remote
from distmeta.config import Config, fixed
from distmeta.errors import UserError
from distmeta.memory.base import Arrays
from distmeta.storage import Location

FORMAT = 1
_FIELDS = {
    "method": str,
    "step": int,
    "cursor": dict,
    "progress": dict,
    "config": dict,
    "split_hash": str,
    "files": dict,
}


TRAINING = frozenset({"clusters"})
"""States that only training takes up again; for evaluation the parameters and the shared memories are enough."""


class Stateful(Protocol):
    """What a checkpoint carries besides parameters and moments: a shared memory, say."""

    def snapshot(self) -> Arrays:
        """All there is; called on rank 0."""
        ...

    def restore(self, snapshot: Arrays) -> None:
        """Become what `snapshot` was taken of, on all ranks; KeyError, ValueError, … where that is another thing."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: where it lies and what its manifest says. The tensors are read by `load`."""

    location: Location
    method: str
    step: int
    """Meta-updates made (sweeps, for a method in closed form)."""
    cursor: dict[str, int]
    """`epoch` and `batch`: what comes next."""
    progress: dict[str, Any]
    """The trainer's scalars: best error and its step, stale epochs, sums of the epoch under way."""
    config: dict[str, Any]
    """`distmeta.config.fixed` of the run: the settings that decide its parameters."""
    split_hash: str
    files: dict[str, dict[str, Any]]
    """File name -> {"bytes", "sha256"}."""


def folder(run: Location, step: int) -> Location:
    """Where the checkpoint of global step `step` lies."""
    return run / "checkpoints" / f"step-{step:09d}"


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    names = ("distmeta", "torch", "numpy", "pyarrow", "polars")
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}


def save(
    run: Location,
    parts: Mapping[str, Mapping[str, Tensor] | Arrays],
    *,
    method: str,
    step: int,
    cursor: dict[str, int],
    progress: dict[str, Any],
    config: dict[str, Any],
    split_hash: str,
) -> None:
    """Write the checkpoint of `step`; until its manifest is there, older ones stand untouched.

    Args:
        parts: `params`, `optimizer`, `state` -> tensors or arrays by name; one file each.

    Raises:
        RunError: the disk is full. UserError: the place cannot be written.
    """
    where = folder(run, step)
    (where / "checkpoint.json").remove()
    where.make_dir()
    files = {}
    for part, tensors in parts.items():
        data = to_safetensors({k: _tensor(v) for k, v in tensors.items()})
        name = f"{part}-00000.safetensors"
        (where / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "format": FORMAT,
        "method": method,
        "step": step,
        "cursor": cursor,
        "progress": progress,
        "config": config,
        "split_hash": split_hash,
        "versions": versions(),
        "files": files,
    }
    (where / "checkpoint.json").write_json({**manifest, "sha256": _digest(manifest)})


def _tensor(value: Any) -> Tensor:
    """A tensor or an array as safetensors wants it; what came from elsewhere may be read-only, and is copied."""
    if not isinstance(value, Tensor):
        value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    return value.detach().cpu().contiguous()


def complete(run: Location) -> list[int]:
    """Steps of the checkpoints that have a manifest, ascending."""
    steps = []
    for child in (run / "checkpoints").children():
        digits = child.name.removeprefix("step-")
        if digits != child.name and digits.isdigit() and (child / "checkpoint.json").exists():
            steps.append(int(digits))
    return sorted(steps)


def newest(run: Location) -> Checkpoint | None:
    """The newest complete checkpoint (its manifest; `load` checks the files), or None where there is none.

    Raises:
        UserError: its manifest is damaged or of another format version.
    """
    steps = complete(run)
    return read(run, steps[-1]) if steps else None


def read(run: Location, step: int) -> Checkpoint:
    """The manifest of the checkpoint of `step`.

    Raises:
        UserError: missing, damaged, or of another format version; says how to go on.
    """
    where = folder(run, step)
    manifest = where / "checkpoint.json"
    if not manifest.exists():
        raise UserError(f"{manifest}: no such checkpoint; complete are the steps {complete(run) or 'none'}")
    try:
        raw = manifest.read_json()
    except UserError:
        raise UserError(f"{manifest}: damaged (not JSON); {_mend(run, step)}") from None
    if not isinstance(raw, dict) or "format" not in raw:
        raise UserError(f"{manifest}: damaged (no format version); {_mend(run, step)}")
    if raw["format"] != FORMAT:
        raise UserError(
            f"{manifest}: format version {raw['format']!r}, this distmeta reads {FORMAT};"
            " go on with the distmeta that wrote it, or start a new run"
        )
    if raw.pop("sha256", None) != _digest(raw) or raw["step"] != step:
        raise UserError(f"{manifest}: damaged (not what was written here); {_mend(run, step)}")
    if not all(isinstance(raw.get(k), kind) for k, kind in _FIELDS.items()):
        odd = next(k for k, kind in _FIELDS.items() if not isinstance(raw.get(k), kind))
        raise UserError(f"{manifest}: damaged (no {odd} that could be used); {_mend(run, step)}")
    return Checkpoint(location=where, **{k: raw[k] for k in _FIELDS})


def load(run: Location, checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """The tensors of one part (`params`, `optimizer`) by name, on the CPU, after checking size and sha256.

    Raises:
        UserError: the file is missing or damaged, or the checkpoint has no such part.
    """
    name = f"{part}-00000.safetensors"
    file = checkpoint.location / name
    mend = _mend(run, checkpoint.step)
    if name not in checkpoint.files:
        raise UserError(f"{checkpoint.location}: has no {name}; {mend}")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: missing; {mend}") from None
    except (UserError, OSError) as e:
        remote.let_pass(e)
        raise UserError(f"{e}; {mend}" if isinstance(e, OSError) else f"{file}: not a readable file; {mend}") from None
    if hashlib.sha256(data).hexdigest() != checkpoint.files[name].get("sha256"):
        raise UserError(f"{file}: damaged (its sha256 is not the manifest's); {mend}")
    try:
        return from_safetensors(data)
    except safetensors.SafetensorError as e:
        raise UserError(f"{file}: not readable as safetensors ({e}); {mend}") from None


def check_origin(run: Location, checkpoint: Checkpoint, config: Config, split_hash: str) -> None:
    """UserError where the checkpoint was trained with other settings, or on another split, than these.

    Settings that an older distmeta did not have yet are passed over.
    """
    now = fixed(config)
    for key in sorted(checkpoint.config.keys() & now.keys()):
        if checkpoint.config[key] != now[key]:
            raise UserError(
                f"{run / 'config.yaml'}: {key} is {now[key]!r}, but the checkpoint of step {checkpoint.step} was"
                f" trained with {checkpoint.config[key]!r}; undo the change, or start a new run"
            )
    if checkpoint.split_hash != split_hash:
        raise UserError(
            f"{checkpoint.location}: was trained on another split, {checkpoint.split_hash[:12]}, not"
            f" {split_hash[:12]}; give the --data it was started with, or start a new run"
        )


def restore_params(run: Location, checkpoint: Checkpoint, method: nn.Module, name: str) -> None:
    """Copy the checkpoint's parameters and buffers into `method`, whose METHOD name is `name`.

    Raises:
        UserError: it is another method's; a tensor is missing, unknown or of another shape; a file damaged.
    """
    if checkpoint.method != name:
        raise UserError(
            f"{checkpoint.location}: holds {checkpoint.method}, not {name}; choose a run that trained {name}"
        )
    found = load(run, checkpoint, "params")
    check(checkpoint, found, method.state_dict())
    method.load_state_dict(found)


def state_of(stateful: Mapping[str, Stateful]) -> Arrays:
    """The part `state`: NAME.KEY -> array, of every thing that has a state, by name (without a dot)."""
    return {f"{name}.{key}": value for name, thing in stateful.items() for key, value in thing.snapshot().items()}


def restore_state(run: Location, checkpoint: Checkpoint, stateful: Mapping[str, Stateful]) -> None:
    """Give every thing that has a state the one in the checkpoint, in the order of their names.

    Raises:
        UserError: the checkpoint's is of other things; a file is damaged.
    """
    has = "state-00000.safetensors" in checkpoint.files
    arrays = {k: v.numpy() for k, v in load(run, checkpoint, "state").items()} if has or stateful else {}
    skipped = TRAINING - stateful.keys()
    arrays = {k: v for k, v in arrays.items() if k.partition(".")[0] not in skipped}
    parts: dict[str, Arrays] = {name: {} for name in stateful}
    for key, value in arrays.items():
        parts.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
    for name, part in sorted(parts.items()):
        try:
            stateful[name].restore(part)
        except (KeyError, IndexError, TypeError, ValueError) as e:  # it may be anything, if of other code
            raise UserError(
                f"{checkpoint.location}: its shared state {name} is not this method's ({type(e).__name__}: {e}); the"
                " dataset or the method's code changed since; start a new run"
            ) from e


def check(checkpoint: Checkpoint, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """UserError naming the first tensor that is missing in `found`, unknown, or of another shape or type."""
    mend = "the dataset or the method's code changed since; start a new run"
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found:
            raise UserError(f"{checkpoint.location}: has no tensor {key}; {mend}")
        if key not in wanted:
            raise UserError(f"{checkpoint.location}: tensor {key} is unknown to this method; {mend}")
        have, want = found[key], wanted[key]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise UserError(
                f"{checkpoint.location}: tensor {key} is {have.dtype} {list(have.shape)},"
                f" not {want.dtype} {list(want.shape)}; {mend}"
            )


def retain(run: Location, keep: Iterable[int]) -> None:
    """Delete all checkpoints but those of the steps `keep`, leftovers of interrupted ones included.

    The manifest goes first, so that a checkpoint half deleted is one that does not exist.
    """
    kept = {folder(run, step).name for step in keep}
    for child in (run / "checkpoints").children():
        if child.name.startswith("step-") and child.name not in kept:
            (child / "checkpoint.json").remove()
            child.remove()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _mend(run: Location, step: int) -> str:
    where = folder(run, step)
    older = [s for s in complete(run) if s < step]
    if older:
        return f"delete that folder ({where}) to go on from step {older[-1]}"
    return f"delete that folder ({where}) to start from the beginning"
