"""A GPU that is pretended on the CPU: real numbers, and an error wherever tensors of host and device meet.

Two modes of torch keep apart what lies where. The outer one sees the calls that programs make: what they make on
`cuda` or move there is marked as the device's (by its storage, so that views are too), and its `.device` says so. The
inner one sees each operation that calls come to, in reverse passes too: what it makes of the device's tensors is the
device's, and operands of both places are an error, as they are to CUDA, but for what that allows: numbers in tensors
without dimensions, indices on the host, and copies.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from distmeta import tasks

GPU = torch.device("cuda", 0)
_DEVICE: Any = Tensor.device.__get__  # type: ignore[attr-defined]
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index"}
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_", "aten::copy"}
_JOINING = {"aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::embedding"}
"""Operations that refuse even numbers in tensors of the other place."""


class Mixed(RuntimeError):
    """Operands of host and device in one operation."""


class _Places:
    """Which storages are the device's."""

    def __init__(self) -> None:
        self.kept: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from use by another

    def on_gpu(self, t: Tensor) -> bool:
        return _storages(t)[0]._cdata in self.kept

    def mark(self, t: Tensor) -> None:
        for s in _storages(t):
            if s._cdata not in self.kept:
                self.kept[s._cdata] = StorageWeakRef(s)


def _storages(t: Tensor) -> list[Any]:
    if not t.is_sparse:
        return [t.untyped_storage()]
    with torch._C._DisableTorchDispatch():
        return [part.untyped_storage() for part in (t._values(), t._indices())]


class _Operations(TorchDispatchMode):
    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places, self.within = places, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, on = kwargs or {}, func._schema.name, self.places.on_gpu
        given = _tensors((*args, *kwargs.values()))
        there = [t for t in given if on(t)]
        if there and name not in _COPIES:
            if name in _INDEXING:
                bad = not on(args[0]) or (len(args) > 2 and args[2].dim() > 0 and not on(args[2]))
            else:
                strict = name in _JOINING
                bad = any(not on(t) and (strict or t.dim()) for t in given)
            if bad:
                shapes = [(tuple(t.shape), "device" if on(t) else "host") for t in given]
                raise Mixed(f"{name} of {shapes}")
        made = func(*args, **kwargs)
        # what a derivative or a composite makes from nothing, it makes where its operands are
        alike = bool(there) if given else self.within
        if alike and name != "aten::copy_":
            for t in _tensors(made if isinstance(made, tuple | list) else (made,)):
                self.places.mark(t)
        return made


class _Calls(TorchFunctionMode):
    def __init__(self, places: _Places, operations: _Operations) -> None:
        super().__init__()
        self.places, self.operations = places, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, on = dict(kwargs or {}), self.places.on_gpu
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and on(first):
            if func == _DEVICE:
                return GPU
            if func in (Tensor.numpy, Tensor.__array__):
                raise Mixed("numpy of a tensor of the device: copy it to the host first")
        named = getattr(func, "__name__", "")
        wanted = [d for d in (*args, *kwargs.values()) if isinstance(d, torch.device | str) and _is_place(d)]
        if named == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            wanted = [GPU if on(args[1]) else torch.device("cpu")]
        if named in ("_parse_to", "device"):  # a module's `to` goes on to those of its tensors
            wanted = []
        if named == "new_tensor" and first is not None and on(first):
            wanted = [GPU]
        if named == "cpu":
            wanted = [torch.device("cpu")]
        if not wanted:
            tensors = _tensors((*args, *kwargs.values()))
            outer, self.operations.within = self.operations.within, any(map(on, tensors))
            try:
                return self._reverse(args[0]) if func is Tensor.backward else func(*args, **kwargs)
            finally:
                self.operations.within = outer
        return self._placed(torch.device(wanted[-1]), func, named, args, kwargs)

    def _reverse(self, loss: Tensor) -> None:
        """Its reverse pass, with the calls that those make which are written out seen as well."""
        with self:
            seed = torch.ones_like(loss)
            torch.autograd.Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
                (loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _placed(self, where: torch.device, func: Any, named: str, args: Any, kwargs: Any) -> Any:
        """What a call makes on a place, or moves there."""
        args, kwargs = tree_map(_here, (args, kwargs), is_leaf=lambda x: isinstance(x, torch.device | str))
        made, there = func(*args, **kwargs), where.type == "cuda"
        source = args[0] if named in ("to", "cpu") else None
        if source is not None and self.places.on_gpu(source) != there:  # in memory of its own
            made = _Moved.apply(made)
        if there:
            self.places.mark(made)
        return made


class _Moved(torch.autograd.Function):
    """A copy in the other place. No method has a gradient that goes back through one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch._C._DisableTorchDispatch():
            return x.clone()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _is_place(d: Any) -> bool:
    return isinstance(d, torch.device) or d.split(":")[0] in ("cuda", "cpu")


def _here(x: Any) -> Any:
    return torch.device("cpu") if isinstance(x, torch.device) or (isinstance(x, str) and _is_place(x)) else x


@contextlib.contextmanager
def gpu(monkeypatch: Any) -> Iterator[_Places]:
    """Within, torch has a GPU; only this thread sees it. Gives what tells which tensors are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(tasks, "_joined", torch.cat)  # page-locked memory wants a driver
    places = _Places()
    operations = _Operations(places)
    with operations, _Calls(places, operations):
        yield places
