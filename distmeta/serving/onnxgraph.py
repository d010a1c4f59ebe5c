"""The exported graph as ONNX, with the extra `onnx` (onnx and onnxscript to write it, onnxruntime to run it).

A GRU or LSTM is a Scan there, so that the number of support rows is free as in the exported program.
"""

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree

from distmeta.errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing() -> list[str]:
    """Packages of the extra that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def check_installed() -> None:
    """UserError where a package of the extra is missing."""
    if absent := missing():
        raise UserError(f"--onnx needs {' and '.join(absent)}; install the extra: pip install 'distmeta[onnx]'")


def converted(program: ExportedProgram, names: Sequence[str]) -> bytes:
    """The program as an ONNX model whose inputs have these names and whose output is called score."""
    for logger in ("onnxscript", "onnx_ir", "torch.onnx"):  # they tell what could not be folded
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own trees
        made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=list(names), output_names=["score"])
    assert made is not None
    return made.model_proto.SerializeToString()


class Session:
    """An ONNX model in memory, called as the exported program is."""

    def __init__(self, model: bytes, threads: int = 1) -> None:
        import onnxruntime  # type: ignore[import-not-found]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._names = [i.name for i in self._session.get_inputs()]

    def __call__(self, *inputs: Any) -> Tensor:
        """Scores [b, Q] of what `Served.forward` takes."""
        flat = [t.numpy() for t in _pytree.tree_leaves(inputs)]
        (score,) = self._session.run(None, dict(zip(self._names, flat, strict=True)))
        return torch.from_numpy(score)
