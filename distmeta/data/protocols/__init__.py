"""Evaluation protocols: pure, versioned functions from a dataset's interactions to tasks (design §7).

A protocol first makes a `Plan` from the dataset (who is new, who validates, which items are cold), in passes
whose memory is bounded by users and items, then turns interactions of whole users into rows of tasks, chunk by
chunk: a part bounds the memory. One file a protocol; base.py has what they share.
"""

from typing import Any

from distmeta.config import DataOptions
from distmeta.data.protocols.base import (
    DRAWN,
    KINDS,
    OFFERED,
    QUERY,
    SCHEMA,
    SPLITS,
    SUPPORT,
    Plan,
    Protocol,
    Source,
    read_text,
)
from distmeta.data.protocols.cmml import CMML_USER
from distmeta.data.protocols.hml import HML
from distmeta.data.protocols.mamo import MAMO
from distmeta.data.protocols.melu import MELU
from distmeta.data.protocols.paml import PAML
from distmeta.data.protocols.scenario import CMML_SCENARIO
from distmeta.errors import UserError
from distmeta.fields import nearest

__all__ = [
    "DRAWN",
    "KINDS",
    "OFFERED",
    "PROTOCOLS",
    "QUERY",
    "SCHEMA",
    "SPLITS",
    "SUPPORT",
    "Plan",
    "Protocol",
    "Source",
    "protocol",
    "protocol_options",
    "read_text",
]

PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (CMML_USER, CMML_SCENARIO, MELU, MAMO, PAML, HML)}


def protocol(name: str) -> Protocol:
    """The protocol `name`; UserError naming the nearest one where there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{nearest(name, PROTOCOLS)}; protocols: {' '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def protocol_options(data: DataOptions) -> dict[str, Any]:
    """The options in `data` that its protocol knows.

    Raises:
        UserError: one that only other protocols know was set, which would change nothing.
    """
    known = protocol(data.protocol).options
    for other in PROTOCOLS.values():
        for name, default in other.options.items():
            if name not in known and getattr(data, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} is for protocol {other.name}, not {data.protocol}; leave it out, "
                    f"or choose --protocol {other.name}"
                )
    return {name: getattr(data, name) for name in known}
