"""Row losses over the vocabulary: tensors in, tensors out, nothing of SRD.

A *row* is one token position: its student logits, its teacher logits and its label. A row function returns the
row's divergence, cross-entropy and entropy, and writes the gradient over the student's logits.
"""

from .rows import RowCoefficients, RowDivergence, RowValues, distillation_rows

__all__ = ["RowCoefficients", "RowDivergence", "RowValues", "distillation_rows"]
