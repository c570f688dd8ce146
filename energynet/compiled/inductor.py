"""Machine code of a graph, by Inductor: the only file that imports it, and only once something is compiled.

What is done to Inductor's graphs and to the text that it writes is listed in the README of this folder, with what it gains.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.graph
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from energynet.compiled.cpu_loops import in_place
from energynet.compiled.cpu_parts import in_parts
from energynet.compiled.cuda_graphs import with_replays
from energynet.compiled.fold import folded
from energynet.compiled.gemm import by_onednn, mkl_is_slow
from energynet.compiled.passes import dear_once, sums_apart

_FILES = tuple(str(path) for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in {".py", ".h"})


def compile_graph(graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any], parts: int
                  ) -> Callable[[list[Tensor]], Any]:  # fmt: skip
    """List of tensors -> results, without what PyTorch wraps around the machine code where nothing is left for that to do.

    The caller holds PyTorch's compile lock: `rewriting` patches a class of the whole process.

    Args:
        graph: of ATen operations, a list of tensors -> a list of tensors.
        inputs: fake tensors like those that it will be called with.
        options: of Inductor.
        parts: how many sets of inputs are worked on at once, see `in_parts`.

    Raises:
        RuntimeError: if the program cannot be run in parts; whatever Inductor raises.
    """
    inner: list[Any] = []
    simple: list[bool] = []
    expected = _outputs(graph)

    def compile_inner(inside: fx.GraphModule, examples: Sequence[Any], **options: Any) -> Any:
        outputs = _outputs(inside)
        alike = (len(examples), len(outputs)) == (len(inputs), len(expected))
        simple.append(alike and all(isinstance(o, fx.Node) and o.op != "placeholder" for o in outputs))
        inner.append(compile_fx_inner(inside, examples, **options))
        return inner[-1]

    with rewriting(parts):
        whole: Any = compile_fx(graph, inputs, compile_inner, {**options, "post_grad_custom_pre_pass": _Passes(parts)})
    if simple == [True]:
        run: Callable[[list[Tensor]], Any] = inner[0].current_callable
        return run
    if parts > 1:
        raise RuntimeError("a part of the batch cannot be computed by itself")
    return lambda tensors: whole(*tensors)


def _outputs(graph: fx.GraphModule) -> Sequence[Any]:
    outputs: Any = graph.graph.output_node().args[0]
    return list(outputs)


class _Passes(CustomGraphPass):
    """Our passes; what identifies them also tells PyTorch's disk cache our programs from others, and from older ones of ours."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __call__(self, graph: fx.Graph) -> None:
        sums_apart(graph)
        dear_once(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(_FILES, f"oneDNN {mkl_is_slow()}, {self.parts} parts")


def rewritten(source: str, parts: int) -> str:
    """What Inductor has written, with our changes; a change that does not recognize the text leaves it as it is."""
    source = in_place(folded(with_replays(source)))
    return in_parts(by_onednn(source) if mkl_is_slow() else source, parts)


@contextlib.contextmanager
def rewriting(parts: int) -> Iterator[None]:
    """In here, what Inductor writes is rewritten before it is compiled.

    The one place where PyTorch is patched. `GraphLowering._compile_to_module_lines` is handed the finished text of a program;
    a registered wrapper class would see it only in pieces, before memory is planned, and would stay registered for everyone.
    """
    lowering: Any = torch._inductor.graph.GraphLowering
    original = lowering._compile_to_module_lines

    def compile_lines(self: Any, wrapper_code: Any) -> Any:
        wrapper_code.value = rewritten(wrapper_code.value, parts)
        return original(self, wrapper_code)

    lowering._compile_to_module_lines = compile_lines
    try:
        with _without_remarks():
            yield
    finally:
        lowering._compile_to_module_lines = original


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """In here, Inductor does not say which operations it calls the slower way, such as a triangular solve, nor what it still
    uses that PyTorch has deprecated: a user cannot help it, and could not compile where warnings are errors.
    """
    log = logging.getLogger("torch._inductor.ir")
    log.addFilter(_worth_saying)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.removeFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return "missing a c-shim" not in record.getMessage()
