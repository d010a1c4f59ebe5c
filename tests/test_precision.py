"""--precision: products of rounded operands, in every pass alike, that leave gradients what they were but for that."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_contract import World
from torch import Tensor

from distmeta.adaptation import precision, products
from distmeta.errors import UserError
from distmeta.methods import METHODS
from distmeta.storage import Location

CPU = torch.device("cpu")


def gradient(m: Any, batch: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The loss of each task and the meta-gradient, flat."""
    params = [p for p in m.parameters() if p.requires_grad]
    with precision.taken(kind, CPU):
        losses = m.loss(batch)
        grads = torch.autograd.grad(losses.sum(), params, allow_unused=True, materialize_grads=True)
    for memory in m.shared.values():  # what this pass would write is not the next one's
        memory.discard()
    return losses.detach(), torch.cat([g.reshape(-1) for g in grads])


def test_gradients_of_every_method_are_float32s_but_for_rounding(suits: Callable[[str], Location]) -> None:
    for name in METHODS:
        world = World(suits(name))
        m = world.method(name)
        if m.sweeps:
            continue
        batch = next(iter(world.loader("train").epoch(0)))
        losses, exact = gradient(m, batch, "float32")
        rounded, found = gradient(m, batch, "bf16")
        again, tf32 = gradient(m, batch, "tf32")
        assert torch.equal(again, losses) and torch.equal(tf32, exact), name  # noqa: PT018
        # s²Meta's weights are each task's own from the start: nothing is multiplied with what all share
        assert torch.equal(rounded, losses) == (name == "s2meta"), name
        assert found.dtype == rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, losses, rtol=0.03, atol=0.03)
        # of scenarios' hinges some are open in one precision and shut in the other
        least, most = (0.99, 0.1) if world.table.scenarios else (0.999, 0.04)
        assert torch.cosine_similarity(found, exact, 0) > least, name
        assert (found - exact).norm() < most * exact.norm(), name
        doubled = [gradient(m.double(), batch.to(CPU, torch.float64), kind)[1] for kind in ("float32", "bf16")]
        assert torch.equal(*doubled), name  # float64 is never rounded


def test_rounded_products_and_their_gradients() -> None:
    """Each operand is rounded, then all is as in float32, exactly; sums are not rounded."""
    g = torch.Generator().manual_seed(0)
    x, w, b, up = (torch.randn(*shape, generator=g) for shape in ((3, 5, 7), (7, 4), (4,), (3, 5, 4)))
    near = [t.bfloat16().float() for t in (x, w, up)]
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with precision.taken("bf16", CPU):
        z = products.affine(*leaves)
        grads = torch.autograd.grad(z, leaves, up)
        back = products.back(up, w)
    torch.testing.assert_close(z, near[0] @ near[1] + b)
    wanted = near[2] @ near[1].t(), torch.einsum("brd,brh->dh", near[0], near[2]), up.sum((0, 1))
    for found, exact in zip((*grads, back), (*wanted, wanted[0]), strict=True):
        torch.testing.assert_close(found, exact)
    assert not torch.allclose(z, x @ w + b, rtol=1e-5)
    assert torch.equal(products.affine(x, w, b), torch.nn.functional.linear(x, w.t(), b))  # and afterwards as before


def test_a_run_is_of_one_precision(small: Location, tmp_path: Any) -> None:
    """It is learned, and gone on with, in the precision that it began with; what the option says is checked."""
    from distmeta import config as config_module

    config = tiny.setting(small, "melu", precision="bf16")[0]
    assert config_module.fixed(config)["train.precision"] == "bf16"
    with pytest.raises(UserError, match=r"--precision is 'bf'.*float32 tf32 bf16"):
        config_module.load(None, "melu", {"precision": "bf"})
    with pytest.MonkeyPatch.context() as m:
        tiny.register(m)
        tiny.run_of(tmp_path / "run", small, epochs=1)
        with pytest.raises(UserError, match="precision"):
            tiny.run_of(tmp_path / "run", small, epochs=2, precision="bf16")
