"""What is drawn: the numbers in the lines, the axes that are used; and the module without matplotlib."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from problems import Contraction, rosenbrock, some_context

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

import matplotlib.pyplot as plt  # noqa: E402

from energynet import GradientStep  # noqa: E402
from energynet.energies import Quadratic  # noqa: E402
from energynet.plotting import plot_landscape, plot_spectrum, plot_trace  # noqa: E402


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def trace(batch: int, energy: bool) -> SimpleNamespace:
    residual = torch.logspace(0, -9, 10)[:, None] * torch.rand(1, batch)
    residual[4:, 0] = residual[4, 0]
    residual[9, 1:] = 0
    return SimpleNamespace(error=residual, energy=residual.square() if energy else None)


def test_trace_draws_each_sample_until_it_rests_and_energies_on_a_twin() -> None:
    seen = trace(3, energy=True)
    axes = plot_trace(seen)
    lines = axes.get_lines()
    assert axes.get_yscale() == "log" and len(lines) == 3
    assert lines[0].get_ydata() == pytest.approx(seen.error[:5, 0].tolist())
    assert lines[1].get_ydata()[:9] == pytest.approx(seen.error[:9, 1].tolist())
    twin = next(other for other in axes.figure.axes if other is not axes)
    assert [len(line.get_ydata()) for line in twin.get_lines()] == [10, 10, 10]
    axes.figure.canvas.draw()


def test_trace_of_many_samples_has_no_legend_and_uses_the_given_axes() -> None:
    _, given = plt.subplots()
    assert plot_trace(trace(40, energy=False), ax=given) is given
    assert given.get_legend() is None and len(given.figure.axes) == 1


def test_landscape_of_rosenbrock_has_logarithmic_levels_and_the_path() -> None:
    path = torch.tensor([[[-1.2, 1.0]], [[-1.0, 1.1]], [[1.0, 1.0]]])
    axes = plot_landscape(lambda x: rosenbrock(x).square().sum(-1), (-2, 2), (-1, 3), path=path, points=60)
    levels = axes.collections[0].levels
    ratios = levels[2:] / levels[1:-1]
    assert ratios.std() < 0.1 * ratios.mean() and levels[-1] > 100 * levels[0]
    assert axes.get_lines()[0].get_xdata() == pytest.approx([-1.2, -1.0, 1.0])
    axes.figure.canvas.draw()


def test_landscape_takes_the_context_of_one_sample_and_evaluates_at_the_right_points() -> None:
    Q, b = torch.eye(2)[None], torch.tensor([[0.5, -0.5]])
    axes = plot_landscape(Quadratic(), (-1, 1), (-1, 1), Q, b, points=41)
    lowest = axes.collections[0].get_paths()[0].vertices  # the innermost band surrounds the minimum
    assert lowest.mean(0) == pytest.approx([0.5, -0.5], abs=0.1)
    plot_landscape(lambda x: 0 * x.sum(-1), (-1, 1), (-1, 1), points=5)  # a constant has no level lines
    with pytest.raises(ValueError, match=r"path must be of shape"):
        plot_landscape(Quadratic(), (-1, 1), (-1, 1), Q, b, path=torch.zeros(4, 3), points=5)


def test_spectrum_shows_the_dense_eigenvalues() -> None:
    network, z = Contraction(), some_context(2)
    x = torch.zeros(2, 4, dtype=torch.float64)
    axes = plot_spectrum(network, x, z)
    for k in range(2):
        J = torch.func.jacrev(lambda x, k=k: network(x[None], z[k, None])[0])(x[k]).detach()
        expected = torch.linalg.eigvals(J)
        got = torch.view_as_complex(torch.tensor(axes.collections[k].get_offsets().data))
        assert (got[:, None] - expected).abs().amin(0).amax() < 1e-10
    plot_spectrum(GradientStep(lambda x: x.square().sum(-1), 0.25), torch.ones(1, 2), ax=axes)
    assert axes.get_title() == "spectral radius 0.5"
    axes.figure.canvas.draw()


@pytest.mark.slow
def test_module_imports_without_matplotlib_and_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, energynet.plotting as p\n"
        "try: p.plot_spectrum(lambda x: x, torch.ones(1, 1))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install energynet[plot]" in done.stdout
