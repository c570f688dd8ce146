"""`energynet.testing`: each check passes good work and names what is wrong with broken work."""

import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from energynet import (
    FPI_GD,
    FPI_NN,
    Anderson,
    DampedStep,
    Energy,
    GradientStep,
    MapStep,
    OneStepAdjoint,
    OptimalityStep,
    ProximalStep,
    Termination,
    UnrolledAdjoint,
)
from energynet.constraints import NonNegative
from energynet.testing import CheckError, check_energy, check_layer, check_step

X = torch.linspace(-1.0, 1.2, 8).reshape(4, 2)
Z = torch.linspace(0.3, 1.7, 8).reshape(4, 2)


def bowl(x, z):
    return torch.cosh(x - z).sum(-1) + x.square().sum(-1)


class Network(Energy):
    """A softplus network with a ridge, parameters and `encode`."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 5)
        self.shift = nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5))

    def encode(self, z):
        return self.shift(z)

    def evaluate(self, x, shift):
        return nn.functional.softplus(self.first(x) + shift).sum(-1) + x.square().sum(-1)

    def start(self, z):
        return torch.zeros_like(z)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.state, self.input = nn.Linear(2, 2), nn.Linear(2, 2)
        nn.init.orthogonal_(self.state.weight, gain=0.5)

    def forward(self, x, z):
        return torch.tanh(self.state(x) + self.input(z))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------- energies


def test_good_energies_pass():
    report = check_energy(bowl, X, Z)
    assert report.samples == 4 and report.batch_leak <= 1e-15 and report.gradient_error < 1e-7
    assert report.second_derivative_error < 1e-7 and report.asymmetry < 1e-14
    curvature = 2 + torch.cosh(X - Z).double()
    assert report.curvature == pytest.approx((float(curvature.min()), float(curvature.max())), rel=5e-3)
    assert report.step_size == pytest.approx(2 / sum(report.curvature))
    assert "curvature = (3." in repr(report) and repr(report).startswith("EnergyReport: passed\n")


def test_a_minimizer_is_as_good_a_point_as_any():
    """There the derivative vanishes, and all that differences see is their own truncation and rounding."""

    def skewed(x, z):  # flat and without height at x = z, and a third derivative of 1000
        u = 10 * (x - z)
        return (u.exp() - u - 1).sum(-1)

    x = Z + 1e-9
    assert check_energy(skewed, x, Z).gradient_error < 1e-6
    with pytest.raises(CheckError, match="detach"):  # a wrong derivative is still seen there
        check_energy(lambda x, z: skewed(x, z) + 1e-3 * (x.detach() * x).sum(-1), x, Z)


def test_a_leak_that_vanishes_at_the_given_point_is_seen():
    with pytest.raises(CheckError, match="batch"):
        check_energy(lambda x, z: x.square().sum(-1) + (z * x).sum(), torch.zeros(4, 2), Z)


def test_energy_with_parameters_dropout_in_encode_and_frozen_context_passes():
    network = Network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    generator = torch.get_rng_state()
    check_energy(network, X, Z.requires_grad_(False))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator), "the caller's random numbers go on as if nothing had been"


def test_energy_without_batch_dimension_and_pytrees_pass():
    report = check_energy(lambda x, z: torch.cosh(x["a"] - z).sum() + (x["b"][0] - 1).square(), _tree(), Z[0])
    assert report.samples == 0 and report.batch_leak is None and report.curvature == pytest.approx((1.128, 2), rel=1e-3)
    assert "batch_leak = not tested" in repr(report)
    check_energy(lambda x, n, name: (x[0] ** n).sum(-1) + x[1].square().flatten(1).sum(-1), (X + 3, X[..., None]), 2, "text")


def _tree():
    return {"a": torch.ones(2), "b": (torch.ones(()),)}


def test_energy_concave_somewhere_passes_without_step_size():
    report = check_energy(lambda x: (x.square() - 4).square().sum(-1), X)
    assert report.curvature[0] < 0 and report.step_size is None


class Stored:
    calls = 0.0

    def __call__(self, x):
        Stored.calls += 1.0
        return x.square().sum(-1) * (1 + Stored.calls)


def hidden_write(x):
    x.numpy()[...] = 1.0
    return x.square().sum(-1)


def hidden_write_of_context(x, z):
    z.detach().numpy()[0, 0] += 1.0
    return (x - z).square().sum(-1)


class WrongSecond(torch.autograd.Function):
    """x -> x whose derivative is not the identity, nor symmetric."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, v):
        return v + v.roll(1, -1) * torch.tensor([0.0, 1.0], dtype=v.dtype)


class GradientAsFunction(torch.autograd.Function):
    """½‖x‖² with a correct gradient, the derivative of which is wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x.square().sum(-1)

    @staticmethod
    def backward(ctx, v):
        return v[..., None] * WrongSecond.apply(ctx.saved_tensors[0])


class OwnForward(Energy):
    def evaluate(self, x, z):
        return bowl(x, z)

    def forward(self, x, z):
        return bowl(x, z) + x.square().sum(-1)


class Constant32(nn.Module):
    def forward(self, x, z):
        return (x @ torch.eye(2) - z).square().sum(-1)


CAPTURED = torch.ones(2, requires_grad=True)
BROKEN_ENERGIES = {
    "mean over the batch": (
        lambda x, z: bowl(x - x.mean(0), z),
        "of sample .* changes by .* when the order|batch-mates|left out",
    ),
    "neighbor": (lambda x, z: bowl(x, z) + 0.1 * (x * x.roll(1, 0)).sum(-1), r"sum, norm or softmax over the batch"),
    "context over the batch": (lambda x, z: bowl(x, z.cumsum(0)), "changes by"),
    "fixed batch size": (lambda x, z: bowl(x.reshape(4, 2), z), "Evaluating rows .* raised RuntimeError"),
    "random": (lambda x, z: bowl(x + torch.rand_like(x), z), "draws random numbers, so it is not the same function"),
    "random, Python's": (lambda x, z: bowl(x, z) * random.random(), "Two evaluations of E at the same point differ by"),
    "dropout": (lambda x, z: bowl(nn.functional.dropout(x), z), "dropout in training mode"),
    "in place": (lambda x, z: bowl(x.mul_(2), z), r"changes its input in place \(mul_, shape \(4, 2\)\)"),
    "in place, context": (lambda x, z: bowl(x, z.clamp_(0, 1)), "changes its input in place"),
    "in place, NumPy": (lambda x, z: hidden_write(x.detach()) + bowl(x, z), "changed x or its context in place"),
    "in place, NumPy, context": (hidden_write_of_context, "changed x or its context in place"),
    "one column": (lambda x, z: bowl(x, z)[:, None], r"returned shape \(4, 1\) for x of shape \(4, 2\)"),
    "one a number": (lambda x, z: (x - z).square(), r"returned shape \(4, 2\) for x of shape \(4, 2\).*flatten\(1\)"),
    "a float": (lambda x, z: bowl(x, z).sum().item(), "but returned float"),
    "integers": (lambda x, z: bowl(x, z).long(), "returned torch.int64, which has no gradient"),
    "booleans": (lambda x, z: bowl(x, z) > 0, "returned torch.bool"),
    "linear": (lambda x, z: (x * z).sum(-1), "E has no curvature in x for sample 0, 1, 2, 3: .* a ridge"),
    "linear in one sample": (
        lambda x, z: (x * z).sum(-1) + x.square().sum(-1) * (z[:, 0] > 0.4),
        "no curvature in x for sample 0:",
    ),
    "piecewise linear": (
        lambda x, z: torch.relu(x @ torch.ones(2, 9).to(x) + z[:, :1]).sum(-1) + x.abs().sum(-1),
        "ReLU network is",
    ),
    "constant": (lambda x, z: z.square().sum(-1), "does not depend on x"),
    "captured": (lambda x, z: bowl(x * CAPTURED, z), r"uses a tensor of shape \(2,\) from outside that requires grad"),
    "captured layer": ((lambda lost: lambda x, z: bowl(lost(x), z))(nn.Linear(2, 2)), "Pass it as context, or make it"),
    "detached x": (
        lambda x, z: bowl(x, z) * x.detach().square().sum(-1),
        "The derivative of E in x is .* finite differences give",
    ),
    "detached context": (
        lambda x, z: bowl(x, z.detach()),
        "The second derivative of E in context 0 is 0 along a random direction",
    ),
    "wrong second derivative": (lambda x, z: GradientAsFunction.apply(x) + z.sum(-1), "The Hessian of E is not symmetric"),
    "not finite": (lambda x, z: x.log().sum(-1), "E is NaN or Inf for sample .* outside the domain"),
    "own forward": (OwnForward(), "differ by .* forward is overridden"),
    "float32 inside": (Constant32(), "cannot be evaluated in float64"),
    "stateful": ((lambda s: lambda x, z: s(x))(Stored()), "differ by .* keeps state between calls"),
}


NO_HESSIAN = "has a Hessian that does not agree with differences of its gradient"  # which a solve sees at once


@pytest.mark.parametrize("name", BROKEN_ENERGIES)
def test_broken_energies_are_reported(name):
    energy, sentence = BROKEN_ENERGIES[name]
    x, z = X.clone(), Z.clone()
    with pytest.raises(CheckError, match=f"(?s){sentence}|{NO_HESSIAN}"):
        check_energy(energy, x, z)
    assert torch.equal(x, X) and torch.equal(z, Z), "a check works on copies"


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, z):
        return bowl(self.norm(x), z)


def test_batch_norm_in_training_mode_is_named_and_its_statistics_kept():
    energy = Normed()
    before = energy.norm.running_mean.clone()
    with pytest.raises(CheckError, match=r"BatchNorm in training mode.*LayerNorm"):
        check_energy(energy, X, Z)
    assert torch.equal(energy.norm.running_mean, before)
    check_energy(energy.eval(), X, Z)


def test_integer_x_and_shared_context_of_the_batch_size_are_named():
    with pytest.raises(CheckError, match=r"x0 must be floating point, got torch.int64"):
        check_energy(lambda x: x.square().sum(-1), torch.ones(3, 2, dtype=torch.long))
    quadratic = lambda x, A: ((x @ A) * x).sum(-1)  # noqa: E731
    with pytest.raises(CheckError, match="repeat the check with another batch size"):
        check_energy(quadratic, X[:2], torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    check_energy(quadratic, X, torch.tensor([[2.0, 0.5], [0.5, 1.0]]))


def test_parameters_are_checked():
    class Detached(Network):
        def evaluate(self, x, shift):
            return nn.functional.softplus(x @ self.first.weight.detach().T + shift).sum(-1) + x.square().sum(-1)

    with pytest.raises(CheckError, match=r"in parameter 0 of shape \(5, 2\) is 0 along"):
        check_energy(Detached(), X, Z)


# ------------------------------------------------------------------------------------------------- steps


def test_good_steps_pass():
    report = check_step(Cell(), X, Z)
    assert report.norm <= 0.5 + 1e-9 and report.rate <= report.norm + 1e-9 and report.asymmetry > 1e-3
    gradient = check_step(DampedStep(GradientStep(bowl, torch.full((4,), 0.2)), 0.5), X, Z)
    assert gradient.asymmetry < 1e-14 and gradient.norm == pytest.approx(gradient.rate, rel=1e-3)
    assert check_step(lambda x: torch.cos(x), torch.ones(2), batch_dims=0).samples == 0
    tree = {"a": X, "b": (X[:, 0],)}
    check_step(lambda x: {"a": x["a"] * 0.5 + x["b"][0][:, None], "b": (x["b"][0] * 0.1,)}, tree)


def test_rate_and_norm_are_those_of_the_jacobian():
    matrix = torch.tensor([[0.5, 3.0], [0.0, 0.4]])  # contracts in the end, not in one step
    report = check_step(lambda x: x @ matrix.to(x).T, X)
    assert report.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
    assert report.rate == pytest.approx(0.5, rel=0.02)


def test_a_map_that_does_not_contract_is_reported_and_passes():
    assert check_step(lambda x: 1 - 3 * x, X).norm == pytest.approx(3)


class OwnCall(GradientStep):
    def __call__(self, x, *context):
        return 0.5 * super().__call__(x, *context)


class ClaimsSymmetry(MapStep):
    symmetric = True


BROKEN_STEPS = {
    "shape": (lambda x, z: x[:, :1], r"must return the structure and shapes of x, \(4, 2\), but returned \(4, 1\)"),
    "structure": (lambda x, z: (x, z), "must return the structure and shapes of x"),
    "dtype": (lambda x, z: 0.5 * x.double(), "g.x. is torch.float64 for x of torch.float32"),
    "integers": (lambda x, z: x.long(), "returned torch.int64; it must be floating point"),
    "mixes samples": (lambda x, z: 0.5 * torch.softmax(x, 0) + z, r"g\(x\) of sample .* changes by"),
    "random": (lambda x, z: 0.5 * x + torch.randn_like(z), "draws random numbers"),
    "random, Python's": (lambda x, z: 0.5 * x + random.random(), r"Two evaluations of g\(x\)"),
    "in place": (lambda x, z: x.mul_(0.5), "changes its input in place"),
    "batch norm": (lambda x, z: nn.functional.batch_norm(x, None, None, training=True) * 0.5, "BatchNorm in training mode"),
    "captured": (lambda x, z: 0.5 * x * CAPTURED + z, "from outside that requires grad"),
    "detached": (lambda x, z: 0.5 * torch.tanh(x) + z.detach(), r"The derivative of x − g\(x\) in context 0 is 0"),
    "shift": (lambda x, z: x + z, "every point is a fixed point, or none"),
    "own call": (OwnCall(bowl, 0.1), r"step\(x\) and x − step_size · optimality\(x\) differ by"),
    "symmetry": (ClaimsSymmetry(lambda x, z: 0.5 * x.cumsum(-1) + z), "claims a symmetric .* conjugate gradients"),
    "not finite": (lambda x, z: x.sqrt(), "NaN or Inf for sample"),
}


@pytest.mark.parametrize("name", BROKEN_STEPS)
def test_broken_steps_are_named(name):
    step, sentence = BROKEN_STEPS[name]
    with pytest.raises(CheckError, match=f"(?s){sentence}"):
        check_step(step, X.clone(), Z.clone())


# ------------------------------------------------------------------------------------------------- layers


OTHERS = [pytest.param(options, marks=pytest.mark.slow) for options in ({"solver": Anderson(3)}, {"adjoint": UnrolledAdjoint()})]


@pytest.mark.parametrize("options", [{}, *OTHERS], ids=str)
def test_good_layers_pass(options):
    report = check_layer(FPI_GD(Network().eval(), 0.3, **options), Z)
    assert report.pickles and report.samples == 4 and report.gradient_error < 1e-6 and report.second_derivative_error < 1e-4
    assert report.float32_error < 3e-6 and report.vmap_change < 1e-10 and report.start_change < 1e-10
    assert check_layer(FPI_NN(Cell(), **options), Z, x0=X).adjoint_change < 1e-9


@pytest.mark.slow
def test_layers_with_trees_own_step_sizes_and_no_batch_pass():
    layer = FPI_GD(bowl, torch.tensor([0.1, 0.2, 0.15, 0.1]), start=torch.zeros_like)
    assert check_layer(layer, Z).vmap_change is None
    tree = FPI_GD(lambda x, z: bowl(torch.cat([x[0], x[1]], -1), z["z"]), 0.2, start=(X[:, :1], X[:, 1:]))
    assert not check_layer(tree, {"z": Z}).pickles
    single = check_layer(FPI_GD(lambda x, z: bowl(x, z), nn.Parameter(torch.tensor(0.2))), Z[0], x0=X[0])
    assert single.samples == 0 and single.batch_leak is None


class Dropped(Network):
    pass


class KeepsStart(Network):
    def start(self, z):
        self.last = z
        return torch.zeros_like(z)


def flat_direction(x, z):
    return (x.sum(-1) - z.sum(-1)).square()


def canceling(x, z):
    return ((x + 3e4) - (z + 3e4)).square().sum(-1)


def reads_values(x, z):
    return bowl(x, z) if float(x.detach().sum()) > -1e6 else bowl(x, -z)


BROKEN_LAYERS = {
    "step size": (FPI_GD(bowl, 5.0), "The solve failed. DIVERGED|NONFINITE"),
    "budget": (FPI_GD(bowl, 0.01, termination=Termination(max_steps=3)), "MAX_STEPS: 4 of 4 samples"),
    "dropout": (FPI_GD(Dropped(), 0.2), r"Two calls with the same arguments differ by .* layer.eval\(\)"),
    "keeps": (FPI_GD(KeepsStart().eval(), 0.2), "A call added or removed attributes: {'energy': \\['last'\\]}"),
    "flat": (FPI_GD(flat_direction, 0.2), "when the solve starts elsewhere, 1 % away"),
    "mixes samples": (FPI_GD(lambda x, z: bowl(x, z - z.mean(0)), 0.2), "The solution of sample .* changes by"),
    "inexact": (
        FPI_GD(bowl, 0.2, adjoint=OneStepAdjoint()),
        "The gradient of a loss of the solution in context 0 .* inexact custom",
    ),
    "detached": (FPI_GD(lambda x, z: bowl(x, z.detach()), 0.2), "in context 0 is 0 along a random direction"),
    "float32": (FPI_GD(canceling, 0.5), "Solved in float32, the solution is wrong by"),
    "reads values": (FPI_GD(reads_values, 0.2), r"Under torch.func.vmap the layer raised"),
    "captured": (FPI_GD(lambda x, z: bowl(x * CAPTURED, z), 0.2), "from outside that requires grad"),
    "no start": (FPI_GD(lambda x, z: bowl(x, z), 0.2), "was given no x0 and no start"),
}


@pytest.mark.parametrize("name", BROKEN_LAYERS)
def test_broken_layers_are_named(name):
    layer, sentence = BROKEN_LAYERS[name]
    x0 = None if name in ("no start", "keeps") else torch.zeros_like(X)
    with pytest.raises(CheckError, match=f"(?s){sentence}"):
        check_layer(layer, Z.clone(), x0=x0)


# ------------------------------------------------------------------------------------------------- the package


@pytest.mark.slow
def test_checks_import_without_hypothesis_and_strategies_name_the_remedy():
    program = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import energynet.testing\n"
        "try:\n    import energynet.testing.strategies\n"
        "except ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 'pip install "energynet[test]"' in found.stdout


# ------------------------------------------------------------------------------------------------- no false alarms


def test_small_numbers_and_large_curvatures_are_no_fault() -> None:
    """Finite differences stay within the domain, and tolerances are in proportion to the answer."""
    entropy = lambda x: (x * x.log()).sum(-1)  # noqa: E731
    assert check_energy(entropy, torch.full((4, 3), 1e-6)).gradient_error < 1e-6
    walled = lambda x, z: ((x - z) / 1e-6).square().sum(-1) - x.log().sum(-1)  # noqa: E731
    assert check_energy(walled, torch.full((4, 3), 1e-8), torch.full((4, 3), 1e-6)).gradient_error < 1e-6
    quartic = lambda x, z: (x - z).square().sum(-1) + x.pow(4).sum(-1)  # noqa: E731
    assert check_layer(FPI_GD(quartic, start=torch.ones_like), 1e-9 * torch.randn(4, 3)).start_change < 1e-7


def test_an_answer_that_is_zero_but_for_rounding_is_no_fault() -> None:
    layer = FPI_NN(lambda x, z: 0.5 * x.tanh() + z, start=torch.ones_like)
    assert check_layer(layer, torch.zeros(4, 3)).start_change < 1e-7


def test_a_step_without_a_step_size_is_checked_but_for_its_contraction() -> None:
    report = check_step(OptimalityStep(lambda x: x**3 + x), torch.ones(4, 3))
    assert report.norm is None and report.rate is None and report.derivative_error < 1e-6
    assert check_step(GradientStep(lambda x: x.cosh().sum(-1)), torch.ones(4, 3)).rate is None
    with pytest.raises(CheckError, match="no step_size"):
        check_step(ProximalStep(lambda x: x.cosh().sum(-1), None, NonNegative()), torch.ones(4, 3))
    wrong = OptimalityStep(lambda x: x.detach() ** 3 + x)
    with pytest.raises(CheckError, match="finite differences"):
        check_step(wrong, torch.ones(4, 3))
