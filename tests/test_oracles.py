"""Solutions and gradients against other people's software and against closed forms, in float64.

``python -m tests.benchmarks.oracles`` prints the errors that are reached.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import TIGHT
from scipy.optimize import minimize as scipy_minimize
from scipy.optimize import nnls
from torch import Tensor
from torch.autograd import grad

from energynet import Anderson, ImplicitAdjoint, Solution, Termination, fixed_point, minimize
from energynet.constraints import L1, Affine, Box, NonNegative, Simplex
from energynet.linear import GMRES
from energynet.proximal import ProximalStep
from energynet.solvers import Nesterov, Newton, NewtonCG, Solver


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ERRORS: list[tuple[int, float, float]] = []
"""Order of the derivative, error reached and error allowed, of each comparison: for the benchmark's table."""


def close(got: Tensor, expected: Any, tolerance: float, order: int = 0) -> None:
    expected = torch.as_tensor(np.asarray(expected) if not isinstance(expected, Tensor) else expected, dtype=torch.float64)
    within((got - expected).detach().norm() / expected.detach().norm(), tolerance, order)


def within(error: Tensor | float, tolerance: float, order: int = 0) -> None:
    ERRORS.append((order, float(error), tolerance))
    assert error <= tolerance, f"error {float(error):.2e} in derivatives of order {order}"


def proximal(energy: Callable[..., Tensor], gamma: float, prox: Any, start: Tensor, *context: Tensor,
             solver: Solver | None = None) -> Solution:  # fmt: skip
    """One problem, context (...) without a batch dimension."""
    return fixed_point(ProximalStep(energy, gamma, prox), start, *context, batch_dims=0, solver=solver or Nesterov(),
                       termination=TIGHT, adjoint=ImplicitAdjoint(GMRES(), TIGHT))  # fmt: skip


def fit(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (A @ x - b).square().sum()


def inverse_curvature(A: Tensor) -> float:
    return float(1 / torch.linalg.matrix_norm(A.detach(), 2) ** 2)


def prox_residual(x: Tensor, gamma: float, prox: Any, A: Tensor, b: Tensor) -> float:
    return float((ProximalStep(fit, gamma, prox)(x, A, b) - x).detach().norm() / gamma)


# ------------------------------------------------------------------------------------------------- cvxpylayers

# Clarabel stops at 1e-5 on squares written as cones, whatever its tolerances; SCS goes on.
EXACT_SCS = {"solve_method": "SCS", "eps": 1e-12, "max_iters": 1_000_000, "acceleration_lookback": 0, "mode": "dense"}


def cvxpy_layer(make: Callable[[Any, Any], tuple[Any, Any]], *shapes: tuple[int, ...]) -> Callable[..., Tensor]:
    """The layer of a problem that ``make(cvxpy, parameters)`` returns with its variable."""
    cp, torch_layers = pytest.importorskip("cvxpy"), pytest.importorskip("cvxpylayers.torch")
    parameters = [cp.Parameter(shape) for shape in shapes]
    problem, variable = make(cp, parameters)
    layer = torch_layers.CvxpyLayer(problem, parameters, [variable], solver_args=EXACT_SCS)
    return lambda *tensors: layer(*tensors)[0]


def agree(ours: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: tuple[Tensor, ...],
          tolerance: float = 1e-6) -> None:  # fmt: skip
    """Values, and gradients of a random linear function, in every input."""
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    mine, theirs = ours(*inputs), oracle(*inputs)
    close(mine, theirs, tolerance)
    weight = randn(*mine.shape, seed=99)
    for got, expected in zip(grad((weight * mine).sum(), inputs), grad((weight * theirs).sum(), inputs), strict=True):
        close(got, expected, tolerance, 1)


@pytest.mark.filterwarnings("ignore")
def test_box_constrained_least_squares_as_cvxpylayers() -> None:
    A, b = randn(8, 5, seed=1), 2 * randn(8, seed=5)
    low, high = torch.full((5,), -0.3).double(), torch.full((5,), 0.3).double()

    def make(cp: Any, parameters: Any) -> Any:
        x = cp.Variable(5)
        A, b, low, high = parameters
        return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ x - b)), [x >= low, x <= high]), x

    def ours(A: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return proximal(fit, inverse_curvature(A), Box(low, high), torch.zeros(5).double(), A, b).value

    x = ours(A, b, low, high)
    assert (x == low).any() and (x == high).any() and ((x > low) & (x < high)).sum() > 1
    agree(ours, cvxpy_layer(make, (8, 5), (8,), (5,), (5,)), (A, b, low, high))


@pytest.mark.filterwarnings("ignore")
def test_projection_onto_the_simplex_as_cvxpylayers() -> None:
    def make(cp: Any, parameters: Any) -> Any:
        x = cp.Variable(6)
        return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - parameters[0])), [x >= 0, cp.sum(x) == parameters[1]]), x

    oracle = cvxpy_layer(make, (6,), ())
    inputs = (randn(6, seed=3), torch.tensor(1.0).double())
    agree(lambda z, radius: Simplex(radius)(z, 1.0), oracle, inputs)
    energy = lambda x, z: 0.5 * (x - z).square().sum()  # noqa: E731
    agree(lambda z, radius: proximal(energy, 0.7, Simplex(radius), torch.zeros(6).double(), z).value, oracle, inputs)


def limited_multi_label(x: Tensor, y: Tensor) -> Tensor:
    """−xᵀy − H_b(x)."""
    return (x * x.log() + (1 - x) * (-x).log1p() - x * y).sum()


@pytest.mark.filterwarnings("ignore")
def test_limited_multi_label_layer_as_cvxpylayers() -> None:
    """max xᵀy + H_b(x) with Σ x = k: Amos, Koltun and Kolter (2019), The limited multi-label projection layer."""

    def make(cp: Any, parameters: Any) -> Any:
        x = cp.Variable(5)
        entropy = cp.sum(cp.entr(x) + cp.entr(1 - x))
        return cp.Problem(cp.Maximize(parameters[0] @ x + entropy), [cp.sum(x) == parameters[1]]), x

    def ours(y: Tensor, k: Tensor) -> Tensor:
        prox = Affine(torch.ones(1, 5).double(), k.reshape(1))
        return proximal(limited_multi_label, 0.1, prox, torch.full((5,), 0.4).double(), y).value

    agree(ours, cvxpy_layer(make, (5,), ()), (0.7 * randn(5, seed=4), torch.tensor(2.0).double()))


def test_limited_multi_label_layer_against_its_closed_form_to_second_order() -> None:
    """x = σ(y + ν) with Σ x = k, hence dx = D (dy + dν) with D = x (1 − x) and dν = (dk − Σ D dy) / Σ D."""
    y, k = (0.7 * randn(5, seed=4)).requires_grad_(), torch.tensor(2.0).double().requires_grad_()
    start = torch.full((5,), 0.4).double()
    x = proximal(limited_multi_label, 0.1, Affine(torch.ones(1, 5).double(), k.reshape(1)), start, y).value
    assert (x.logit() - y).std() <= 1e-11 and abs(x.sum() - k) <= 1e-14
    weight = randn(5, seed=5)
    got = grad((weight * x).sum(), (y, k), create_graph=True)
    diagonal = x * (1 - x)
    mean = (diagonal * weight).sum() / diagonal.sum()
    expected = (diagonal * (weight - mean), mean)
    for g, e in zip(got, expected, strict=True):
        close(g, e, 1e-9, 1)
    second = [grad(sum((p**2).sum() for p in pair), (y, k), retain_graph=True) for pair in (got, expected)]
    for g, e in zip(*second, strict=True):
        close(g, e, 1e-8, 2)


@pytest.mark.filterwarnings("ignore")
def test_equality_constrained_quadratic_programs_as_cvxpylayers() -> None:
    """min ½‖F x‖² + cᵀx with A x = b; cvxpylayers needs the root of Q = FᵀF."""
    F, c, A, b = randn(6, 5, seed=1), randn(5, seed=2), randn(2, 5, seed=3), randn(2, seed=4)

    def make(cp: Any, parameters: Any) -> Any:
        x = cp.Variable(5)
        F, c, A, b = parameters
        return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(F @ x) + c @ x), [A @ x == b]), x

    def ours(F: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
        energy = lambda x, F, c: 0.5 * (F @ x).square().sum() + c @ x  # noqa: E731
        return proximal(energy, inverse_curvature(F), Affine(A, b), torch.zeros(5).double(), F, c).value

    def dense(F: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
        kkt = torch.cat((torch.cat((F.mT @ F, A.mT), 1), torch.cat((A, torch.zeros(2, 2).double()), 1)))
        return torch.linalg.solve(kkt, torch.cat((-c, b)))[:5]

    agree(ours, dense, (F, c, A, b), 1e-9)
    agree(ours, cvxpy_layer(make, (6, 5), (5,), (2, 5), (2,)), (F, c, A, b))


# ------------------------------------------------------------------------------------------------- smooth: scikit-learn

SAMPLES, FEATURES = 40, 5
DESIGN = randn(SAMPLES, FEATURES, seed=11)
TRUTH = torch.linspace(-0.6, 0.6, FEATURES, dtype=torch.float64)


def linear_model(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """w = (coefficients, intercept) -> loss(prediction, target) summed, plus ½ penalty ‖coefficients‖²."""

    def energy(w: Tensor, X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        return loss(X @ w[:-1] + w[-1], y).sum() + 0.5 * penalty * w[:-1].square().sum()

    return energy


def ours(energy: Callable[..., Tensor], X: Tensor, y: Tensor, penalty: Tensor, solver: Solver | None = None) -> Tensor:
    start = torch.zeros(FEATURES + 1).double()
    return minimize(energy, start, X, y, penalty, solver=solver, termination=MODELS).value


MODELS = Termination(atol=1e-12, rtol=1e-11, max_steps=20_000)
SQUARE = linear_model(lambda p, y: 0.5 * (p - y).square())
LOGISTIC = linear_model(lambda p, y: torch.nn.functional.softplus(p) - y * p)
POISSON = linear_model(lambda p, y: p.exp() - y * p)
GAMMA = linear_model(lambda p, y: y * (-p).exp() + p)


def models() -> list[tuple[Any, Callable[..., Tensor], Tensor, float]]:
    """Energies as scikit-learn writes them: a sum of losses with penalty 1/C, or n times its mean with n α."""
    linear = pytest.importorskip("sklearn.linear_model")
    eta, noise = DESIGN @ TRUTH + 0.3, randn(SAMPLES, seed=12)
    newton = {"solver": "newton-cholesky", "tol": 1e-13, "max_iter": 1000}
    return [
        (linear.Ridge(alpha=2.0, solver="cholesky"), SQUARE, eta + noise, 2.0),
        (linear.LogisticRegression(C=0.5, **newton), LOGISTIC, (eta + noise > 0).double(), 2.0),
        (linear.PoissonRegressor(alpha=0.1, **newton), POISSON, (eta + 0.5 * noise).exp().round(), 0.1 * SAMPLES),
        (linear.GammaRegressor(alpha=0.1, **newton), GAMMA, (eta + 0.5 * noise).exp(), 0.1 * SAMPLES),
    ]


def fitted(model: Any, y: Tensor) -> Tensor:
    """The coefficients and the intercept that scikit-learn finds, as they are."""
    model.fit(DESIGN.numpy(), y.numpy())
    return torch.cat((torch.as_tensor(model.coef_).reshape(-1), torch.as_tensor(model.intercept_).reshape(-1))).double()


@pytest.mark.filterwarnings("ignore")  # scikit-learn's line search, at the last digits
@pytest.mark.parametrize("solver", [None, Newton(), NewtonCG(), Anderson(), Nesterov()], ids=str)
@pytest.mark.parametrize("which", range(4), ids=["Ridge", "LogisticRegression", "PoissonRegressor", "GammaRegressor"])
def test_generalized_linear_models_as_scikit_learn(which: int, solver: Solver | None) -> None:
    model, energy, y, penalty = models()[which]
    close(ours(energy, DESIGN, y, torch.tensor(penalty).double(), solver), fitted(model, y), 1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", range(4), ids=["Ridge", "LogisticRegression", "PoissonRegressor", "GammaRegressor"])
def test_hypergradients_of_generalized_linear_models_to_second_order(which: int) -> None:
    """Two Newton steps from scikit-learn's answer have its derivatives, by automatic differentiation, to third order."""
    model, energy, y, penalty = models()[which]
    found = fitted(model, y)

    def polished(X: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        w = found
        for _ in range(2):
            arguments = (w, X, y, penalty)
            w = w - torch.linalg.solve(torch.func.hessian(energy)(*arguments), torch.func.grad(energy)(*arguments))
        return w

    inputs = tuple(t.clone().requires_grad_() for t in (DESIGN, y, torch.tensor(penalty).double()))
    same_derivatives(lambda *inputs: ours(energy, *inputs), polished, inputs)


def test_ridge_hypergradients_to_second_order() -> None:
    """x = (AᵀA + λ)⁻¹ Aᵀ b by automatic differentiation of the dense solve."""
    A, b, penalty = (t.requires_grad_() for t in (randn(8, 4, seed=1), randn(8, seed=2), torch.tensor(0.7).double()))

    def layer(A: Tensor, b: Tensor, penalty: Tensor) -> Tensor:
        energy = lambda x, A, b, penalty: fit(x, A, b) + 0.5 * penalty * x.square().sum()  # noqa: E731
        start = torch.zeros(4).double()
        return minimize(energy, start, A, b, penalty, step_size=0.05, solver=Anderson(), termination=TIGHT).value

    def dense(A: Tensor, b: Tensor, penalty: Tensor) -> Tensor:
        return torch.linalg.solve(A.mT @ A + penalty * torch.eye(4).double(), A.mT @ b)

    same_derivatives(layer, dense, (A, b, penalty))


def same_derivatives(f: Callable[..., Tensor], g: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Values to 1e-10, first and second derivatives of a loss to 1e-8."""
    results = []
    for function in (f, g):
        x = function(*inputs)
        first = grad(x.sin().sum(), inputs, create_graph=True)
        second = grad(sum(p.square().sum() for p in first), inputs)
        results.append((x, first, second))
    close(results[0][0], results[1][0].detach(), 1e-10)
    for order in (1, 2):
        for got, expected in zip(results[0][order], results[1][order], strict=True):
            close(got, expected, 1e-8, order)


# ------------------------------------------------------------------------------------------------- sparse and nonnegative


def sparse_problem() -> tuple[Tensor, Tensor, Tensor]:
    A = randn(30, 8, seed=21)
    b = A @ torch.tensor([1.5, 0, 0, -2, 0, 0, 0.7, 0]).double() + 0.3 * randn(30, seed=22)
    return A, b, torch.tensor(6.0).double()


def lasso(A: Tensor, b: Tensor, penalty: Tensor) -> Tensor:
    return proximal(fit, inverse_curvature(A), L1(penalty), torch.zeros(8).double(), A, b).value


@pytest.mark.parametrize("solver", [Anderson(), Nesterov()], ids=str)
def test_lasso_and_elastic_net_as_scikit_learn(solver: Solver) -> None:
    """Both have ‖A x − b‖² / 2n; here everything is multiplied by n."""
    linear = pytest.importorskip("sklearn.linear_model")
    A, b, penalty = sparse_problem()
    alpha = float(penalty) / len(b)
    for ratio in (1.0, 0.6):
        model = linear.ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=100_000)
        if ratio == 1:
            model = linear.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000)
        model.fit(A.numpy(), b.numpy())
        ridge = float(penalty) * (1 - ratio)
        energy = lambda x, A, b, ridge=ridge: fit(x, A, b) + 0.5 * ridge * x.square().sum()  # noqa: E731
        gamma = 1 / (1 / inverse_curvature(A) + ridge)
        x = proximal(energy, gamma, L1(ratio * penalty), torch.zeros(8).double(), A, b, solver=solver).value
        step = ProximalStep(energy, gamma, L1(ratio * penalty))
        within((step(x, A, b) - x).detach().norm() / gamma, 1e-8)
        close(x, model.coef_, 1e-8)
        assert ((x.abs() > 1e-12).numpy() == (model.coef_ != 0)).all() and 0 < (model.coef_ != 0).sum() < 8


@pytest.mark.parametrize("solver", [Anderson(), Nesterov()], ids=str)
def test_nonnegative_least_squares_as_scipy(solver: Solver) -> None:
    A, b, _ = sparse_problem()
    x = proximal(fit, inverse_curvature(A), NonNegative(), torch.zeros(8).double(), A, b, solver=solver).value
    within(prox_residual(x, inverse_curvature(A), NonNegative(), A, b), 1e-8)
    expected, _ = nnls(A.numpy(), b.numpy())
    close(x, expected, 1e-10)
    assert 0 < (expected == 0).sum() < 8


def test_box_constrained_energy_that_is_no_quadratic_as_scipy() -> None:
    A, b, _ = sparse_problem()
    energy = lambda x, A, b: (A @ x - b).cosh().log().sum()  # noqa: E731
    x = proximal(energy, inverse_curvature(A), Box(-0.5, 0.5), torch.zeros(8).double(), A, b).value
    slope = torch.func.grad(energy)
    found = scipy_minimize(
        lambda x: float(energy(torch.from_numpy(x), A, b)), np.zeros(8), jac=lambda x: slope(torch.from_numpy(x), A, b).numpy(),
        method="L-BFGS-B", bounds=[(-0.5, 0.5)] * 8, options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 10_000},
    )  # fmt: skip
    close(x, found.x, 1e-7)


def test_lasso_hypergradients_on_the_active_set_to_second_order() -> None:
    """x_S = (A_SᵀA_S)⁻¹ (A_Sᵀ b − λ sign), zero elsewhere."""
    A, b, penalty = sparse_problem()
    x = lasso(A, b, penalty)
    active, sign = x.abs() > 1e-9, x.sign()

    def closed_form(A: Tensor, b: Tensor, penalty: Tensor) -> Tensor:
        part = A[:, active]
        values = torch.linalg.solve(part.mT @ part, part.mT @ b - penalty * sign[active])
        return torch.zeros(8).double().index_put((active.nonzero()[:, 0],), values)

    same_derivatives(lasso, closed_form, tuple(t.clone().requires_grad_() for t in (A, b, penalty)))
    jacobian = torch.func.jacrev(lasso, argnums=2)(A, b, penalty)
    part = A[:, active]
    close(jacobian[active], -torch.linalg.solve(part.mT @ part, sign[active]), 1e-9)
    assert (jacobian[~active] == 0).all()


def test_elastic_net_hypergradients_on_the_active_set_to_second_order() -> None:
    """x_S = (A_SᵀA_S + μ)⁻¹ (A_Sᵀ b − λ sign), zero elsewhere."""
    A, b, penalty = sparse_problem()
    ridge = torch.tensor(2.4).double()

    def net(A: Tensor, b: Tensor, penalty: Tensor, ridge: Tensor) -> Tensor:
        energy = lambda x, A, b, ridge: fit(x, A, b) + 0.5 * ridge * x.square().sum()  # noqa: E731
        gamma = 1 / (1 / inverse_curvature(A) + float(ridge.detach()))
        return proximal(energy, gamma, L1(penalty), torch.zeros(8).double(), A, b, ridge).value

    x = net(A, b, penalty, ridge)
    active, sign = x.abs() > 1e-9, x.sign()
    assert 0 < active.sum() < 8

    def closed_form(A: Tensor, b: Tensor, penalty: Tensor, ridge: Tensor) -> Tensor:
        part = A[:, active]
        gram = part.mT @ part + ridge * torch.eye(part.shape[1]).double()
        values = torch.linalg.solve(gram, part.mT @ b - penalty * sign[active])
        return torch.zeros(8).double().index_put((active.nonzero()[:, 0],), values)

    same_derivatives(net, closed_form, tuple(t.clone().requires_grad_() for t in (A, b, penalty, ridge)))


def test_nonnegative_least_squares_hypergradients_on_the_free_set_to_second_order() -> None:
    A, b, _ = sparse_problem()
    nonnegative = lambda A, b: proximal(fit, inverse_curvature(A), NonNegative(), torch.zeros(8).double(), A, b).value  # noqa: E731
    free = nonnegative(A, b) > 1e-9

    def closed_form(A: Tensor, b: Tensor) -> Tensor:
        values = torch.linalg.lstsq(A[:, free], b).solution
        return torch.zeros(8).double().index_put((free.nonzero()[:, 0],), values)

    same_derivatives(nonnegative, closed_form, (A.clone().requires_grad_(), b.clone().requires_grad_()))
