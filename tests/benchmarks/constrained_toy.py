"""The paper's toy problems: constrained energies learned end to end, by `FPI_GD` with a prox and by cvxpylayers.

``python -m tests.benchmarks.constrained_toy`` writes docs/results/constrained_toy.json and constrained_toy.png. Each
method trains in a process of its own, so that memory is its own too; seconds are those of the processor.
"""

import json
import multiprocessing
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from energynet.experiments.constrained import Constrained, ConstrainedOptions
from energynet.experiments.task import Rival

RESULTS = Path(__file__).parents[2] / "docs" / "results"
UPDATES = {"box": 100, "simplex": 100, "matching": 30}
BATCH = 32


def task_of(problem: Any) -> Constrained:
    return Constrained(ConstrainedOptions(problem=problem, rows=200))


def measured(problem: str, method: str, updates: int) -> dict[str, Any]:
    """Train one method from the same weights on the same batches as the other."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    task, rival = task_of(problem), rival_of(method)
    data = task.load(None)
    torch.manual_seed(0)
    model = rival.build(task.size(data))
    first = data.train[torch.arange(BATCH)]
    x = model(first.inputs)
    gradients = torch.autograd.grad(task.loss(x, first), list(model.parameters()))
    memory, optimizer, losses = peak_mib(), torch.optim.Adam(model.parameters(), lr=1e-2), []
    order = torch.Generator().manual_seed(0)
    began = time.process_time()
    for _ in range(updates):
        batch = data.train[torch.randperm(len(data.train), generator=order)[:BATCH]]
        loss = task.loss(model(batch.inputs), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (time.process_time() - began) / updates
    figures = task.evaluate(task.predict(model, data.test), data.test, {})
    return {"losses": losses, "seconds_per_update": seconds, "peak_mib": peak_mib(), "growth_mib": peak_mib() - memory,
            "test_error": figures["error"], "active": task.evaluate(data.test.targets, data.test, {})["active"],
            "solution": x.detach().tolist(), "gradient": torch.cat([g.flatten() for g in gradients]).tolist()}  # fmt: skip


def rival_of(name: str) -> Rival:
    return next(rival for rival in Constrained.rivals() if rival.name == name)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def compared(problem: str, updates: int) -> dict[str, Any]:
    """Both methods, and how far their first solutions and gradients are apart."""
    found = {}
    for rival in Constrained.rivals():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[rival.name] = pool.apply(measured, (problem, rival.name, updates))
    ours, theirs = found.values()
    x, y, g, h = (torch.tensor(one.pop(key), dtype=torch.float64) for key in ("solution", "gradient") for one in (ours, theirs))
    difference = {"solutions": (x - y).abs().max().item(), "gradients": ((g - h).norm() / h.norm()).item()}
    ratio = ours["seconds_per_update"] / theirs["seconds_per_update"]
    return {"methods": found, "largest_difference": difference, "time_ratio": ratio}


def draw(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3), layout="constrained")
    for axis, (problem, result) in zip(axes, results.items(), strict=True):
        for (name, one), style in zip(result["methods"].items(), ("-", ":"), strict=True):
            axis.semilogy(one["losses"], style, label=name)
        axis.set(title=problem, xlabel="update", ylabel="loss")
        axis.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    results = {problem: compared(problem, updates) for problem, updates in UPDATES.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "constrained_toy.json").write_text(json.dumps(rounded(results), indent=1) + "\n")
    draw(results, RESULTS / "constrained_toy.png")
    for problem, result in results.items():
        for name, one in result["methods"].items():
            print(f"{problem:9} {name:12} {1000 * one['seconds_per_update']:7.1f} ms an update, {one['peak_mib']:.0f} MiB, "
                  f"loss {one['losses'][0]:.2e} → {one['losses'][-1]:.2e}, test error {one['test_error']:.2e}")  # fmt: skip
        print(f"{problem:9} largest difference {result['largest_difference']}, time ratio {result['time_ratio']:.2f}")


def rounded(value: Any) -> Any:
    """Four digits are enough to draw and to read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
