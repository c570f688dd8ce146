"""Ready-made energies."""

from energynet.energies.convex import ConvexNetwork, NonNegative, Quadratic, StronglyConvex
from energynet.energies.filters import Boundary, BoundedFilters, cosine_filters, filter_bank, largest_response
from energynet.energies.image import ImageEnergy
from energynet.energies.multilabel import BoundedNorm, LabelContraction, LabelFeatures, MultiLabelEnergy, StructuredEnergy

__all__ = [
    "BoundedFilters",
    "BoundedNorm",
    "Boundary",
    "ConvexNetwork",
    "ImageEnergy",
    "LabelContraction",
    "LabelFeatures",
    "MultiLabelEnergy",
    "NonNegative",
    "Quadratic",
    "StronglyConvex",
    "StructuredEnergy",
    "cosine_filters",
    "filter_bank",
    "largest_response",
]
