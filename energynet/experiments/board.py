"""`--tensorboard`: the curves of a run as TensorBoard's events."""

from pathlib import Path

from .trainer import Round


class TensorBoardMissingError(ImportError):
    """The package tensorboard is not installed."""


def write_board(folder: Path, history: list[Round]) -> None:
    """Write the last round into the events of a run; an event of a round that is trained again replaces the first.

    Args:
        folder: the run's folder.
        history: its rounds so far.

    Raises:
        TensorBoardMissingError: when tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TensorBoardMissingError('--tensorboard needs: pip install "energynet[tensorboard]"') from error
    one = history[-1]
    values = {"loss": one.loss, "failed": one.failed, **one.figures, **one.calibration}
    solves = {"forward_steps": one.forward_steps, "adjoint_steps": one.adjoint_steps, "converged": one.converged}
    with SummaryWriter(str(folder / "tensorboard"), purge_step=one.updates) as writer:
        for name, value in {**values, **solves}.items():
            if value is not None:
                writer.add_scalar(name, value, one.updates)
