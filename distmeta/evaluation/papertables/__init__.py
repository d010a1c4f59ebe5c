"""The papers' tables as data: what they print, which of our runs stand beside it, and where they contradict.

The rows are typed as the papers print them; bold and italic are left out, as what is best is computed. A star is the
paper's "significant against the best baseline".
"""

from distmeta.evaluation.papertables.cmml import CMML_2, CMML_3, CMML_4, CMML_5, CMML_SWITCHES
from distmeta.evaluation.papertables.hml import HML_2
from distmeta.evaluation.papertables.mamo import MAMO_1
from distmeta.evaluation.papertables.paml import PAML_2, PAML_3, PAML_4
from distmeta.evaluation.papertables.table import (
    FLOORS,
    HEADS,
    JUDGED,
    PREPARE,
    RARE,
    S2META,
    Column,
    Key,
    Ours,
    PaperTable,
    Printed,
    Section,
    printed,
)

__all__ = [
    "FLOORS",
    "HEADS",
    "JUDGED",
    "PREPARE",
    "RARE",
    "S2META",
    "TABLES",
    "Column",
    "Key",
    "Ours",
    "PaperTable",
    "Printed",
    "Section",
    "printed",
]

_ALL = (PAML_2, PAML_3, PAML_4, HML_2, MAMO_1, CMML_2, CMML_3, CMML_4, CMML_5, CMML_SWITCHES)
TABLES = {table.name: table for table in _ALL}
