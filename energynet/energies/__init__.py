"""Ready-made energies."""

from energynet.energies.multilabel import BoundedNorm, LabelContraction, LabelFeatures, MultiLabelEnergy

__all__ = ["BoundedNorm", "LabelContraction", "LabelFeatures", "MultiLabelEnergy"]
