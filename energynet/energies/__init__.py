"""Ready-made energies."""

from energynet.energies.banks import Composed, CosineStart, FilterBank
from energynet.energies.contraction import ImageContraction
from energynet.energies.convex import ConvexNetwork, NonNegative, Quadratic, StronglyConvex
from energynet.energies.deep import ResidualPrior
from energynet.energies.denoiser import Denoiser
from energynet.energies.filters import Boundary, BoundedFilters, cosine_filters, filter_bank, largest_response
from energynet.energies.flow import FlowEnergy
from energynet.energies.flow_candidates import Candidates
from energynet.energies.flow_correction import FlowCorrection
from energynet.energies.flow_fields import flow_to_color, pyramid, warp
from energynet.energies.flow_solver import Effort, FlowEstimate, OpticalFlow
from energynet.energies.image import ImageEnergy
from energynet.energies.multilabel import BoundedNorm, LabelContraction, LabelFeatures, MultiLabelEnergy, StructuredEnergy
from energynet.energies.operators import Blur, Identity, Mask, Operator, Pair
from energynet.energies.potentials import Huber, Potential, Spline
from energynet.energies.pretrained import denoiser
from energynet.energies.priors import AdaptivePrior, HalfResolution, Prior, RidgePrior
from energynet.energies.restoration import Restoration

__all__ = [
    "AdaptivePrior",
    "Blur",
    "Boundary",
    "BoundedFilters",
    "BoundedNorm",
    "Candidates",
    "Composed",
    "ConvexNetwork",
    "CosineStart",
    "Denoiser",
    "Effort",
    "FilterBank",
    "FlowCorrection",
    "FlowEnergy",
    "FlowEstimate",
    "HalfResolution",
    "Huber",
    "Identity",
    "ImageContraction",
    "ImageEnergy",
    "LabelContraction",
    "LabelFeatures",
    "Mask",
    "MultiLabelEnergy",
    "NonNegative",
    "Operator",
    "OpticalFlow",
    "Pair",
    "Potential",
    "Prior",
    "Quadratic",
    "ResidualPrior",
    "Restoration",
    "RidgePrior",
    "Spline",
    "StronglyConvex",
    "StructuredEnergy",
    "cosine_filters",
    "denoiser",
    "filter_bank",
    "flow_to_color",
    "largest_response",
    "pyramid",
    "warp",
]
