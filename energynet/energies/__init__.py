"""Ready-made energies."""

from energynet.energies.convex import ConvexNetwork, NonNegative, Quadratic, StronglyConvex
from energynet.energies.multilabel import BoundedNorm, LabelContraction, LabelFeatures, MultiLabelEnergy

__all__ = [
    "BoundedNorm",
    "ConvexNetwork",
    "LabelContraction",
    "LabelFeatures",
    "MultiLabelEnergy",
    "NonNegative",
    "Quadratic",
    "StronglyConvex",
]
