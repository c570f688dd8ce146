"""Ready-made energies."""

from energynet.energies.convex import ConvexNetwork, NonNegative, Quadratic, StronglyConvex
from energynet.energies.filters import Boundary, BoundedFilters, cosine_filters, filter_bank, largest_response
from energynet.energies.flow import FlowEnergy
from energynet.energies.flow_correction import FlowCorrection
from energynet.energies.flow_fields import flow_to_color, pyramid, warp
from energynet.energies.flow_solver import Effort, FlowEstimate, OpticalFlow
from energynet.energies.image import ImageEnergy
from energynet.energies.multilabel import BoundedNorm, LabelContraction, LabelFeatures, MultiLabelEnergy, StructuredEnergy

__all__ = [
    "BoundedFilters",
    "BoundedNorm",
    "Boundary",
    "ConvexNetwork",
    "Effort",
    "FlowCorrection",
    "FlowEnergy",
    "FlowEstimate",
    "ImageEnergy",
    "LabelContraction",
    "LabelFeatures",
    "MultiLabelEnergy",
    "NonNegative",
    "OpticalFlow",
    "Quadratic",
    "StronglyConvex",
    "StructuredEnergy",
    "cosine_filters",
    "filter_bank",
    "flow_to_color",
    "largest_response",
    "pyramid",
    "warp",
]
