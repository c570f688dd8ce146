"""`--tune`: learning rate and regularization, chosen for each method on held-out rows from one small grid."""

from dataclasses import asdict, replace
from typing import Any

from .fits import Setup
from .results import read_json, write_json
from .runs import Plan, Watcher, train
from .task import Rates


def tuned_rates(setup: Setup, plan: Plan, watcher: Watcher) -> Rates:
    """The rates of the rival's grid with the best held-out figure, trained with the setup's seed.

    What was tried is kept in the results folder, point by point, and not tried again.

    Args:
        setup: what to tune; its seed draws the held-out rows.
        plan: where results go.
        watcher: the callbacks for progress.

    Returns:
        The rates; `METHOD/tuning.json` says what they were chosen from and what that cost.
    """
    path = plan.tuning_file(setup.rival)
    if path.is_file():
        return Rates(**read_json(path)["rates"])
    tried = [_try(replace(setup, rates=rates), plan, watcher) for rates in setup.rival.grid]
    best = tried[0]
    for point in tried[1:]:
        if setup.task.better(point["figure"], best["figure"]):
            best = point
    if setup.processes.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"rates": best["rates"], "seconds": sum(point["seconds"] for point in tried), "tried": tried})
    return Rates(**best["rates"])


def _try(setup: Setup, plan: Plan, watcher: Watcher) -> dict[str, Any]:
    point = f"rate-{setup.rates.learning_rate:g}-decay-{setup.rates.weight_decay:g}"
    trainer = train(setup, replace(plan, out=plan.out / "tuning" / point, resume=True, test=False, tuned=False), watcher)
    assert trainer.best is not None
    figure = trainer.best.figures[setup.task.choice]
    told = {"figure": figure, "still_rising": trainer.still_rising, "chosen_updates": trainer.best.updates}
    return {"rates": asdict(setup.rates), **told, "seconds": trainer.history[-1].seconds}
