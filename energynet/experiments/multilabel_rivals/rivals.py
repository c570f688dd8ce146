"""The rivals as the experiment sees them."""

from abc import abstractmethod
from dataclasses import replace

from torch import Tensor, nn

from energynet.experiments.data import Rows
from energynet.experiments.models import Size
from energynet.experiments.task import Rates, Rival, Task

from .base import Ensemble, LabelModel
from .dvn import DVN
from .icnn import ICNN
from .infnet import InfNet
from .paper import PaperFPI
from .row_threshold import RowThreshold, threshold_loss
from .spen import SPEN
from .unrolled_spen import UnrolledSPEN

DIAGNOSED_ROWS = 64


class Network(Rival):
    """A rival that is a `LabelModel`, or several of them averaged."""

    @abstractmethod
    def make(self, size: Size) -> LabelModel:
        """One model."""

    def build(self, size: Size) -> nn.Module:
        models = [self.make(size) for _ in range(size.num_experts)]
        return models[0] if len(models) == 1 else Ensemble(models)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        model = getattr(model, "module", model)  # of several processes
        assert isinstance(model, LabelModel)
        return model.training_loss(batch.inputs, batch.targets, lambda u, y: task.loss(u, replace(batch, targets=y)))


class Spen(Network):
    """SPEN (Belanger and McCallum 2016): structured hinge loss, inference by gradient descent."""

    name = "spen"

    def make(self, size: Size) -> LabelModel:
        return SPEN(size)


class EndToEndSpen(Network):
    """End-to-end SPEN (Belanger, Yang and McCallum 2017): backpropagation through the steps of its inference."""

    name = "spen-e2e"

    def make(self, size: Size) -> LabelModel:
        return UnrolledSPEN(size)


class Icnn(Network):
    """ICNN (Amos, Xu and Kolter 2017): convex in the labels, minimized with an entropy."""

    name = "icnn"

    def make(self, size: Size) -> LabelModel:
        return ICNN(size)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        return spectrum(model, rows)


class Dvn(Network):
    """DVN (Gygli, Norouzi and Angelova 2017): a network that predicts the F1 of any labels, climbed to find the best."""

    name = "dvn"

    def make(self, size: Size) -> LabelModel:
        return DVN(size)


class InferenceNetwork(Network):
    """InfNet (Tu and Gimpel 2018): a network that is trained to minimize a SPEN's energy."""

    name = "infnet"

    def make(self, size: Size) -> LabelModel:
        return InfNet(size)


class FpiGdThreshold(Rival):
    """`FPI_GD` on the energy of a row's threshold, whose minimizer makes the expected F1 of the row's labels largest."""

    name = "fpi-gd-threshold"

    def build(self, size: Size) -> nn.Module:
        return RowThreshold(size)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        model = getattr(model, "module", model)
        assert isinstance(model, RowThreshold)
        return threshold_loss(model, batch.inputs, batch.targets, lambda u, y: task.loss(u, replace(batch, targets=y)))


class FpiGdPaper(Network):
    """FPI_GD in the paper's own setting: logits from zero, its stopping rule, its three-term backward."""

    name = "fpi-gd-paper"
    rates = Rates(learning_rate=1e-2)  # its gradients are small: a mean over hidden units, and logits that start at 0

    def make(self, size: Size) -> LabelModel:
        return PaperFPI(size)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        return spectrum(model, rows)


def spectrum(model: nn.Module, rows: Rows) -> dict[str, float]:
    """The spectral radius of the iteration at the answers of some rows: mean and largest; of an ensemble its first member's."""
    one = model.members[0] if isinstance(model, Ensemble) else model
    assert isinstance(one, ICNN | PaperFPI)
    radius = one.eval().spectral_radius(rows.inputs[:DIAGNOSED_ROWS])
    return {"spectral_radius": radius.mean().item(), "largest_spectral_radius": radius.amax().item()}


RIVALS = (Spen(), EndToEndSpen(), Icnn(), Dvn(), InferenceNetwork(), FpiGdThreshold(), FpiGdPaper())
