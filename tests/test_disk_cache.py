"""Programs survive the process: PyTorch's cache on disk keeps them, and tells loops with different bodies apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import compiles

SOLVE = """
import sys, torch
from torch._dynamo.utils import counters
from energynet import Compiled, Picard, fixed_point
c = float(sys.argv[1])
step = lambda x, z: c * x.sin() + z
x = fixed_point(step, torch.zeros(1, 2), torch.ones(1, 2), solver=Picard(), driver=Compiled(strict=True)).value
print(x[0, 0].item(), counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@compiles
def test_another_process_finds_a_program_and_none_of_another_loop(tmp_path: Path) -> None:
    def solve(c: float) -> tuple[float, int]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", SOLVE, str(c)], env=environment, capture_output=True, text=True, check=True)
        value, hits = done.stdout.split()
        return float(value), int(hits)

    for c, found in ((0.3, False), (0.3, True), (0.5, False)):
        value, hits = solve(c)
        x = torch.tensor(value).double()
        assert abs(c * x.sin() + 1 - x) < 1e-3 and (hits > 0) == found
