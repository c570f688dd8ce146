"""Write the prior of a trained denoiser as weights of the package: ``python -m energynet.experiments.ship RUN_FOLDER``."""

import sys
from pathlib import Path

from energynet.energies import pretrained

from .denoising_models import EnergyDenoiser
from .results import read_json, write_tensors
from .runs import load_model


def ship(folder: Path, target: Path | None = None) -> Path:
    """Write NAME.safetensors in half precision, with how it was trained as metadata.

    Args:
        folder: of a run of the experiment on denoising, such as ``results/ridge/seed-0``.
        target: folder; none: that of the package.

    Raises:
        ValueError: if the run is not of an energy whose prior can be built by name.
    """
    name = folder.parent.name
    model, _ = load_model(folder)
    if name not in pretrained.PRIORS or not isinstance(model, EnergyDenoiser):
        raise ValueError(f"{folder} holds {name!r}; weights can ship for {', '.join(pretrained.PRIORS)}.")
    path = (target or pretrained.WEIGHTS) / f"{name}.safetensors"
    options = read_json(folder / "model.json")["options"]
    told = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items() if isinstance(value, int | float))
    done = folder / "metrics.json"
    time = f" ({read_json(done)['seconds'] / 60:.0f} minutes)" if done.is_file() else ""
    write_tensors(path, {key: value.half() for key, value in model.prior.state_dict().items()},
                  {"trained": f"energynet run denoising --method {name} {told}{time}"})  # fmt: skip
    return path


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(ship(Path(given)))
