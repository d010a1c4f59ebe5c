"""How exactly products with weights that all tasks share are taken: `--precision`.

bf16 rounds the operands of these products to bfloat16 and adds up in float32, forward and in every reverse pass alike,
so that gradients are those of the rounded products. They are the large ones: all rows of a batch against one matrix.
All else stays float32: weights, sums, losses, moments, and what belongs to a single task. A task's own weights differ
from the shared ones by steps that are smaller than a bfloat16 can tell, and products with them (or with a task's Gram
matrix) read so much for what they compute that they wait for memory, which conversions make more of, not less.

torch.autocast would not do: it stops at operations in place and at reverse passes that are written out, of which the
engine is made, and it would keep private weights themselves in bfloat16, which loses the steps.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_rounding = False
"""Of the process, as torch's threads are: reverse passes on a GPU run in a thread of torch's."""


@contextlib.contextmanager
def taken(precision: str, device: torch.device) -> Iterator[None]:
    """Take products as --precision says: float32, tf32 (on a GPU: operands of 10 bits, added up in float32) or bf16."""
    global _rounding
    cuda, before = torch.backends.cuda.matmul, _rounding
    kept, _rounding = cuda.fp32_precision, precision == "bf16"
    if device.type == "cuda":
        cuda.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        _rounding = before
        if device.type == "cuda":
            cuda.fp32_precision = kept


def rounds(x: Tensor) -> bool:
    """Whether the product of x with shared weights is one of rounded operands; those of float64 never are."""
    return _rounding and x.dtype == torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b without a graph: [..., d], [d, h] -> [..., h]."""
    if not rounds(a):
        return torch.matmul(a, b)
    flat, b = a.flatten(0, -2).bfloat16(), b.bfloat16()
    if a.is_cuda:  # float32 out of the accumulator; torch has that on GPUs alone
        product = torch.mm(flat, b, out_dtype=torch.float32)
    else:  # the same numbers: products of bfloat16 are exact in float32
        product = torch.mm(flat.float(), b.float())
    return product.view(*a.shape[:-1], b.shape[1])
