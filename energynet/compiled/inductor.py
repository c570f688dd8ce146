"""Compiles a graph by Inductor; this is the only file that imports it, and it is imported only when something is compiled.

The README of this folder lists all changes to Inductor's graphs and to its generated code, with their benefits.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx as inductor
import torch._inductor.graph
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import get_inputs_devices
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config, cpp_builder
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import output_node
from torch._inductor.virtualized import V

from energynet.compiled import decompositions
from energynet.compiled.cpu_loops import in_place
from energynet.compiled.cpu_parts import in_parts
from energynet.compiled.cuda_graphs import with_replays
from energynet.compiled.fold import folded
from energynet.compiled.gemm import by_onednn, mkl_is_slow
from energynet.compiled.passes import dear_once

_FILES = tuple(str(path) for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in {".py", ".h"})


@functools.cache
def recorded_as() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions of this package, followed by those of Inductor."""
    theirs: dict[Any, Callable[..., Any]] = select_decomp_table()
    ours = decompositions.recorded_as()
    return {**theirs, **{op: _first(way, theirs[op]) if op in theirs else way for op, way in ours.items()}}


def _first(way: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition that tries one way, and the other if the first does not apply."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = way(*args, **kwargs)
        return other(*args, **kwargs) if result is NotImplemented else result

    return call


def compile_graph(graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any], parts: int
                  ) -> Callable[[list[Tensor]], Any]:  # fmt: skip
    """A function from a list of tensors to results, without PyTorch's wrappers around the machine code where none is needed.

    A graph without in-place operations that computes everything it returns goes to Inductor directly. Other graphs go through
    AOTAutograd, which records all operations again and takes as long as Inductor itself.

    The caller holds PyTorch's compile lock, because `rewriting` patches a class globally.

    Args:
        graph: a graph after the decompositions of `recorded_as`; it maps a list of tensors to a list of tensors.
        inputs: fake tensors like the inputs of later calls.
        options: Inductor's options.
        parts: the number of input sets to process in parallel; see `in_parts`.

    Raises:
        RuntimeError: if the program cannot be run in parts, or if Inductor raises it.
    """
    options = {**options, "post_grad_custom_pre_pass": _Passes(parts), **_KEPT_ON_DISK}
    with rewriting(parts):
        if not _changes_memory(graph) and _makes_all(_outputs(graph)):
            with config.patch(options), config.patch(inductor.get_cpp_wrapper_config() if config.cpp_wrapper else {}):
                return _machine_code(graph, inputs)
        if parts > 1:
            raise RuntimeError("a part of the batch cannot be computed by itself")
        whole: Any = inductor.compile_fx(graph, inputs, config_patches=options)
    return lambda tensors: whole(*tensors)


_KEPT_ON_DISK = {"unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": "a loop is its graphs"}}
"""Lets PyTorch's disk cache keep programs with loops, which is safe because its keys include the graphs of their bodies."""


def _machine_code(graph: fx.GraphModule, inputs: list[Any]) -> Callable[[list[Tensor]], Any]:
    """Performs the steps of `compile_fx` after AOTAutograd."""
    mode = detect_fake_mode(inputs)
    with V.set_real_inputs(inputs), enable_python_dispatcher(), V.set_fake_mode(mode), tracing(TracingContext(mode)):
        extra = inductor.create_compiler_config_extra(graph)
        device = next(iter(get_inputs_devices(inputs, graph)))
        graph = inductor._recursive_joint_graph_passes(graph, input_device=device)
        output = output_node(graph)
        output.args = (tuple(_outputs(graph)),)
        output.meta["user_visible_output_idxs"] = list(range(len(_outputs(graph))))
        compiled: Any = inductor.compile_fx_inner(
            graph, inputs, static_input_idxs=range(0), cudagraphs=extra.cudagraphs, graph_id=extra.graph_id, is_inference=True,
            boxed_forward_device_index=extra.forward_device, cpp_wrapper=config.cpp_wrapper,
        )  # fmt: skip
    run: Callable[[list[Tensor]], Any] = compiled.current_callable
    return run


def _changes_memory(graph: fx.GraphModule) -> bool:
    graphs = [module.graph for module in graph.modules() if isinstance(module, fx.GraphModule)]
    targets = [node.target for each in graphs for node in each.nodes]
    return any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets)


def _makes_all(outputs: Sequence[Any]) -> bool:
    return all(isinstance(o, fx.Node) and o.op != "placeholder" for o in outputs)


def _outputs(graph: fx.GraphModule) -> Sequence[Any]:
    outputs: Any = graph.graph.output_node().args[0]
    return list(outputs)


class _Passes(CustomGraphPass):
    """The passes of this package; their uuid distinguishes its programs in PyTorch's disk cache, also from older versions."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __call__(self, graph: fx.Graph) -> None:
        dear_once(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(_FILES, f"oneDNN {mkl_is_slow()}, {self.parts} parts")


def rewritten(source: str, parts: int) -> str:
    """Inductor's source code with the rewrites of this package; a rewrite that does not recognize the code has no effect."""
    source = in_place(folded(with_replays(source)))
    return in_parts(by_onednn(source) if mkl_is_slow() else source, parts)


@contextlib.contextmanager
def rewriting(parts: int) -> Iterator[None]:
    """A context in which Inductor's source code is rewritten before it is compiled.

    This is the only place where PyTorch is patched; it also changes the optimization level of the C++ compiler.
    `GraphLowering._compile_to_module_lines` receives the complete source code of a program. A registered wrapper class would
    only see it in pieces, before memory is planned, and would stay registered globally.
    """
    lowering: Any = torch._inductor.graph.GraphLowering
    original, flags = lowering._compile_to_module_lines, cpp_builder._get_optimization_cflags

    def compile_lines(self: Any, wrapper_code: Any) -> Any:
        wrapper_code.value = rewritten(wrapper_code.value, parts)
        return original(self, wrapper_code)

    def fewer(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiling, linking = flags(*args, **kwargs)
        return [one for flag in compiling for one in (_ENOUGH if flag == "O3" else (flag,))], linking

    lowering._compile_to_module_lines, cpp_builder._get_optimization_cflags = compile_lines, fewer
    try:
        with _without_remarks():
            yield
    finally:
        lowering._compile_to_module_lines, cpp_builder._get_optimization_cflags = original, flags


_ENOUGH = ("O2", "fvect-cost-model=dynamic", "fpeel-loops", "ftree-partial-pre", "fgcse-after-reload")
"""The flags of O3 that speed up a program; with all of O3, compiling a program with several loops takes four times as long."""


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """A context that suppresses Inductor's messages about slow fallbacks and about its own use of deprecated functions.

    A user cannot change these, and could not compile at all where warnings are errors.
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
