"""Row losses over the vocabulary: they take and return tensors, and know nothing of SRD.

A *row* is one token position: its student logits, its teacher logits and its label. A row function returns the
row's divergence, cross-entropy and entropy, and writes the gradient on the student's logits.
"""

from .class_blocks import ClassBlocks
from .class_passes import ClassPasses
from .compact import SparseDivergence
from .compact_class_blocks import CompactClassBlocks
from .divergences import FORMULAS, Formula, RowDivergence
from .joint_classes import join_states, join_sums, join_terms, state_of, sums_of, terms_of
from .passes import LOGIT_FLOOR
from .pieces import ALIGNMENT, EAGER_BUFFERS, block_bytes
from .row_numbers import RowCoefficients, RowValues
from .rows import compact_rows, distillation_rows
from .standardised import standardised_rows

__all__ = [
    "ALIGNMENT",
    "EAGER_BUFFERS",
    "FORMULAS",
    "LOGIT_FLOOR",
    "ClassBlocks",
    "ClassPasses",
    "CompactClassBlocks",
    "Formula",
    "RowCoefficients",
    "RowDivergence",
    "RowValues",
    "SparseDivergence",
    "block_bytes",
    "compact_rows",
    "distillation_rows",
    "join_states",
    "join_sums",
    "join_terms",
    "standardised_rows",
    "state_of",
    "sums_of",
    "terms_of",
]
