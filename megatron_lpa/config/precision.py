"""What ``train.precision`` means: in which precision a run keeps the weights that compute, and multiplies."""

from __future__ import annotations

from typing import NamedTuple


class Precision(NamedTuple):
    """Masters and AdamW's moments are fp32 in all of them.

    Args:
        weights: ``fp32`` or ``bf16``: the model's parameters, and the weights that a checkpoint holds for
            use.
        products: ``fp32`` or ``bf16``: matrix products, attention, and what they keep for the backward pass.
    """

    weights: str
    products: str

    @property
    def mixed(self) -> bool:
        """Whether autocast makes the products' precision from the weights'."""
        return self.weights != self.products

    @property
    def weight_bytes(self) -> int:
        """Bytes of one parameter."""
        return _BYTES[self.weights]

    @property
    def product_bytes(self) -> int:
        """Bytes of one element of a product."""
        return _BYTES[self.products]


_BYTES = {"fp32": 4, "bf16": 2}

PRECISIONS = {
    "fp32": Precision("fp32", "fp32"),
    "bf16": Precision("bf16", "bf16"),
    "bf16_mixed": Precision("fp32", "bf16"),
}
"""By the value of ``train.precision``."""
