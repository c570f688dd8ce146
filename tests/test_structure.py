"""The shape of the package: the straight line of imports, what the core depends on, what is documented."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import energynet

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "energynet"

# From right to left of the straight line: a file imports only from files above it. The parts of a folder count as one.
ORDER = [
    "_torch.numbers",
    "_torch.tree",
    "_torch.attention",
    "_torch.normalization",
    "_torch.autodiff",
    "_torch.while_loop",
    "energy",
    "step",
    "proximal",
    "termination",
    "solution",
    "solvers",
    "linear",
    "engine.ambient",
    "engine.newton_step",
    "engine.error_estimate",
    "engine.saddle",
    "engine.loop",
    "engine.code",
    "engine.shared_state",
    "engine.functions",
    "engine.binding",
    "engine.held",
    "engine.approximations",
    "engine.equation",
    "engine.row_inputs",
    "engine.tasks",
    "engine.options",
    "engine.driver",
    "engine.failed_samples",
    "engine.post_mortem",
    "engine.advice",
    "engine.root_gradient",
    "engine.adjoint",
    "engine.purity",
    "engine.envelope",
    "engine.curvature",
    "engine.validation",
    "solve",
    "implicit",
    "projections",
    "total_variation",
    "constraints",
    "layer",
    "warm_start",
    "diagnostics",
    "regularizers",
    "losses",
    "compiled",
    "__init__",
]
ON_TOP = {"__main__", "energies", "experiments", "plotting", "testing"}  # they import the core, and the core none of them
CORE = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0].removesuffix(".py") not in ON_TOP)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def part_of(name: str) -> str:
    """The file of `_torch` or `engine`; the folder of others."""
    parts = name.removesuffix(".__init__").split(".")[1:]
    return ".".join(parts[: 2 if parts[0] in {"_torch", "engine"} else 1]) if parts else "__init__"


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    package = name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                found.add(f"{module}.{alias.name}" if is_module else module)
    return found


def own(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "energynet"}


def test_order_names_every_file() -> None:
    assert {part_of(name_of(path)) for path in CORE} - {"_torch", "engine"} == set(ORDER)


def test_top_floor_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 20


@pytest.mark.parametrize("path", [p for p in CORE if p.parent.name != "compiled"], ids=name_of)
def test_core_does_without_the_compiler(path: Path) -> None:
    """Only `__init__` names it, and does without it where it is missing."""
    found = {n for n in imports(path) if n.startswith(("energynet.compiled", "torch._inductor", "torch._dynamo", "torch.fx"))}
    assert found <= ({"energynet.compiled"} if part_of(name_of(path)) == "__init__" else set())


def test_one_file_imports_inductor() -> None:
    having = [p.name for p in PACKAGE.rglob("*.py") if any(n.startswith("torch._inductor") for n in imports(p))]
    assert having == ["inductor.py"]


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_no_file_imports_one_to_its_left(path: Path) -> None:
    here = part_of(name_of(path))
    for name in own(path):
        there = part_of(name)
        assert there not in ON_TOP, f"{name_of(path)} imports {name}"
        inside_folder = here == there and here in {"solvers", "linear", "engine.advice", "diagnostics", "compiled"}
        assert inside_folder or ORDER.index(there) < ORDER.index(here), f"{name_of(path)} imports {name}"


def test_no_cycles() -> None:
    graph = {name_of(path).removesuffix(".__init__"): own(path) for path in PACKAGE.rglob("*.py")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_core_needs_torch_only(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - {"torch", "energynet"}
    assert outside <= sys.stdlib_module_names, outside - sys.stdlib_module_names


def test_pytrees_are_touched_in_one_file() -> None:
    assert [path.name for path in PACKAGE.rglob("*.py") if any("_pytree" in name for name in imports(path))] == ["tree.py"]


def test_one_loop() -> None:
    """Whatever is iterated goes through `while_loop` of _torch; the others are what becomes of it, or walk a graph."""
    having = {p.name for p in CORE if any(isinstance(node, ast.While) for node in ast.walk(ast.parse(p.read_text())))}
    assert having <= {"loops.py", "autodiff.py", "cpu_loops.py", "cuda_graphs.py", "fingerprint.py", "purity.py"}


@pytest.mark.parametrize("name", energynet.__all__)
def test_public_name_has_docstring_and_page(name: str) -> None:
    thing = getattr(energynet, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    is_example = not is_error and not inspect.isabstract(thing) and not inspect.ismodule(thing)
    if is_example:
        assert ">>>" in (thing.__doc__ or ""), f"{name} has no example"
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    assert any(f":: energynet.{name}\n" in page for page in pages), f"{name} is on no page of docs/api"


def cpu_seconds(statement: str) -> float:
    """Of a fresh interpreter."""
    program = f"import os, {statement}; print(sum(os.times()[:2]))"
    return float(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))


@pytest.mark.slow
def test_import_takes_little_longer_than_that_of_torch() -> None:
    """Wall-clock time would depend on what else the machine does; the least of three ratios, each of neighbors, hardly does."""
    ratios = [cpu_seconds("energynet") / cpu_seconds("torch") for _ in range(3)]
    print("import energynet takes", *(f"{ratio:.2f}" for ratio in ratios), "times as long as import torch")
    assert min(ratios) < 1.5


def test_import_and_first_gradient_leave_the_compiler_alone() -> None:
    """Importing Dynamo takes as long as importing PyTorch."""
    program = """
import sys, torch, energynet
z = torch.ones(2, 3, requires_grad=True)
energynet.minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(2, 3), z).value.sum().backward()
print([name for name in ("torch._dynamo", "torch._inductor", "matplotlib") if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


WITHOUT_COMPILER = """
import torch
import energynet
z = torch.ones(2, 3, requires_grad=True)
energynet.minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(2, 3), z).value.sum().backward()
assert torch.allclose(z.grad, torch.ones(2, 3), rtol=1e-3)
print(hasattr(energynet, "Compiled"), energynet.__file__)
"""


@pytest.mark.slow
def test_package_works_without_its_compiler(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "energynet", ignore=shutil.ignore_patterns("compiled", "__pycache__"))
    output = subprocess.check_output([sys.executable, "-c", WITHOUT_COMPILER], cwd=tmp_path, text=True)
    assert output.split() == ["False", str(tmp_path / "energynet" / "__init__.py")]
