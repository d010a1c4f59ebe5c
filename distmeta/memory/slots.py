"""Where each key's node is kept: a sorted list of all keys that is made anew now and then, and a short one of those
that came since. A key that has left is not taken out: it is told by its slot, which holds another by then."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
FEW = 4096


class Slots:
    """Slots of int64 keys. `held` is everywhere the key of each slot in use, int64 [size]."""

    def __init__(self, held: Ints) -> None:
        self._all(held)

    def find(self, keys: Ints, held: Ints) -> Ints:
        """The slot of each of the keys; −1 where there is none."""
        found = np.full(len(keys), -1)
        for known, slots in ((self.keys, self.slots), (self.new_keys, self.new_slots)):
            if len(known):
                at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
                there = (known[at] == keys) & (held[slots[at]] == keys)
                found[there] = slots[at][there]
        return found

    def put(self, keys: Ints, slots: Ints, held: Ints) -> None:
        """Keys, each once, that are at these slots from now on; `held` says so already."""
        if len(self.new_keys) + len(keys) > len(self.keys) // 16 + FEW:
            self._all(held)
            return
        stay = ~np.isin(self.new_keys, keys)
        every = np.concatenate([self.new_keys[stay], keys])
        order = np.argsort(every)
        self.new_keys = every[order]
        self.new_slots = np.concatenate([self.new_slots[stay], slots.astype(np.int32)])[order]

    def _all(self, held: Ints) -> None:
        self.slots = np.argsort(held).astype(np.int32)
        self.keys = held[self.slots]
        self.new_keys, self.new_slots = np.empty(0, np.int64), np.empty(0, np.int32)
