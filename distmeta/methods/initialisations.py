"""K initialisations of one network, as one stacked parameter.

The engine knows a map as an object that has a weight and a bias. So each initialisation is a network of its own,
whose weights are views of one row of the stack: set anew for each batch, so that gradients reach the stack.
"""

import torch
from torch import Tensor, nn


class Initialisations:
    """K networks of the same shape without parameters of their own.

    Args:
        own: of each network the modules whose own trainable parameters the stack is to hold, which are then taken
            from them; alike in all networks.
    """

    def __init__(self, own: list[list[nn.Module]]) -> None:
        self._slots = [
            [(m, n) for m in modules for n, p in list(m.named_parameters(recurse=False)) if p.requires_grad]
            for modules in own
        ]
        first = [getattr(m, n) for m, n in self._slots[0]]
        self._shapes = [p.shape for p in first]
        self._sizes = [p.numel() for p in first]
        rows = [torch.cat([getattr(m, n).detach().reshape(-1) for m, n in slots]) for slots in self._slots]
        self.start = torch.stack(rows)
        """[K, P]: what the networks were built with, each laid out flat."""
        for slots in self._slots:
            for m, n in slots:
                delattr(m, n)

    def bind(self, stack: Tensor) -> None:
        """Make the rows of `stack` [K, P] the networks' weights, with graph to it (one unbinding) where one is made.

        The views live until the next call: what the engine keeps under their ids is of one batch, as they are.
        """
        for row, slots in zip(stack.unbind(), self._slots, strict=True):
            for part, shape, (module, name) in zip(row.split(self._sizes), self._shapes, slots, strict=True):
                setattr(module, name, part.view(shape))

    def flat(self, values: dict[tuple[nn.Module, str], Tensor], k: int) -> Tensor:
        """[P]: a row laid out like network k's, of `values` by (module, name); zeros for parameters not among them."""
        like = next(iter(values.values()))
        row = [
            values[slot].reshape(-1) if slot in values else like.new_zeros(size)
            for slot, size in zip(self._slots[k], self._sizes, strict=True)
        ]
        return torch.cat(row)
