"""Checks for your own energies, maps and layers; `energynet.testing.strategies` generates random ones with hypothesis."""

from energynet.testing.energy_check import EnergyReport, check_energy
from energynet.testing.layer_check import LayerReport, check_layer
from energynet.testing.measure import CheckError
from energynet.testing.step_check import StepReport, check_step

__all__ = ["CheckError", "EnergyReport", "LayerReport", "StepReport", "check_energy", "check_layer", "check_step"]
