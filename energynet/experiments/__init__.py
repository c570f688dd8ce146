"""The paper's experiments and their competitors: data, training, results, the command line."""

from importlib.util import find_spec

EXTRAS = 'pip install "energynet[experiments,cli,plot]"'
_NEEDED = ("numpy", "sklearn", "scipy", "arff", "safetensors", "tyro", "rich", "matplotlib")

_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"energynet.experiments needs packages that are not installed: {', '.join(_missing)}. "
        f"The core of energynet needs torch only; the experiments come with: {EXTRAS}"
    )
