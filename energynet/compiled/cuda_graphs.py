"""Loops of Inductor's Python wrapper on a GPU, each iteration recorded as one CUDA graph.

As Inductor writes it, a turn launches its kernels from Python one by one: on a small problem ten times the work of the kernels.
Here they are recorded once for some shapes, and a turn is one call that launches them all. What is not recognized, or
cannot be recorded, stays as it was.
"""

import logging
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

Graph = Callable[[list[Any]], Sequence[Any]]
"""What Inductor makes of a part of a loop: it empties the list of its inputs."""

SMALL: Final = 2**24
"""Elements of a loop's inputs; beyond, the kernels take longer than their launches, and memory is dear."""

SHAPES: Final = 4
"""For how many shapes a loop is recorded, as for batches of some sizes; the rest are computed as Inductor has it."""

_LOOP: Final = re.compile(
    r"""
(?P<indent>\ *)while\ should_loop:\n
(?:\s*\n|\ *\#.*\n)*
\ *(?P<body>\w+)_args\ =\ \[(?P<inputs>.*)\]\n
\ *\((?P<outputs>[^()\n]*)\)\ =\ (?P=body)\((?P=body)_args\)\n
(?:\s*\n|\ *\#.*\n)*
\ *(?P<test>\w+)_args\ =\ \[(?P=inputs)\]\n
\ *\((?P<result>\w+),\)\ =\ (?P=test)\((?P=test)_args\)\n
\ *should_loop\ =\ (?P=result)\n
""",
    re.VERBOSE,
)
_ENTRY: Final = re.compile(r"(\w+)\[(\d+)\]")
_WHILE: Final = "while should_loop:"


def with_replays(source: str) -> str:
    """The same program, in which loops without loops inside are objects that may record them.

    Example:
        >>> with_replays("def call(args): return args")
        'def call(args): return args'
    """
    found = [match for match in _LOOP.finditer(source) if _is_simple(source, match)]
    for match in reversed(found):
        source = source[: match.start()] + _call(match) + source[match.end() :]
    return f"from {__name__} import loop_of\n{source}" if found else source


def _is_simple(source: str, loop: re.Match[str]) -> bool:
    """Whether its carry is a list whose entries come first in the inputs, and its body has no loop."""
    outputs = _ENTRY.findall(loop["outputs"])
    in_order = outputs == [(outputs[0][0], str(k)) for k in range(len(outputs))]
    first = loop["inputs"].startswith(loop["outputs"].rstrip(", "))
    return in_order and first and _WHILE not in _function(source, loop["body"])


def _call(loop: re.Match[str]) -> str:
    indent, carry = loop["indent"], _ENTRY.findall(loop["outputs"])
    call = f"loop_of({loop['body']}, {loop['test']}, {len(carry)})([{loop['inputs']}])"
    return f"{indent}if should_loop:\n{indent}    {carry[0][0]} = {call}\n"


def _function(source: str, name: str) -> str:
    """The text of a function of the module."""
    _, _, after = source.partition(f"\ndef {name}(args):\n")
    return re.split(r"\n(?=\S)", after, maxsplit=1)[0]


class Recordings:
    """A program together with what its loops record, which goes when it goes.

    Args:
        run: the program: list of tensors -> results.
    """

    def __init__(self, run: Callable[[list[Tensor]], Any]) -> None:
        self.run = run
        self.loops: dict[Graph, Loop] = {}

    def __call__(self, tensors: list[Tensor]) -> Any:
        before, _running.loops = _running.loops, self.loops
        try:
            return self.run(tensors)
        finally:
            _running.loops = before


class _Running(threading.local):
    loops: dict[Graph, "Loop"] | None = None


_running = _Running()


def loop_of(body: Graph, test: Graph, carried: int) -> Callable[[list[Any]], list[Tensor]]:
    """The loop of the program that runs which consists of these functions of its module."""
    if _running.loops is None:
        return Loop(body, test, carried).launched
    return _running.loops.setdefault(body, Loop(body, test, carried))


class Loop:
    """``while test(carry, fixed): carry = body(carry, fixed)``, of which the first test has been made.

    Args:
        body: carry and fixed inputs -> carry.
        test: carry and fixed inputs -> a bool.
        carried: how many of the inputs are carried.
    """

    def __init__(self, body: Graph, test: Graph, carried: int) -> None:
        self.body, self.test, self.carried = body, test, carried
        self.recorded: dict[Hashable, Recorded | None] = {}
        self._busy = threading.Lock()

    def __call__(self, inputs: list[Any]) -> list[Tensor]:
        """Carry and fixed inputs -> the carry at the end."""
        key = kind(inputs)
        if key is None or not self._busy.acquire(blocking=False):  # another thread is in here
            return self.launched(inputs)
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._replayed(key, inputs)
        finally:
            self._busy.release()

    def launched(self, inputs: list[Any]) -> list[Tensor]:
        """The same, kernel by kernel."""
        carry, fixed, go = inputs[: self.carried], inputs[self.carried :], True
        while go:
            *carry, go = self.turn([*carry, *fixed])
        return carry

    def turn(self, inputs: list[Any]) -> list[Any]:
        """Carry and fixed inputs -> carry, and whether to go on."""
        carry = self.body(list(inputs))
        return [*carry, *self.test([*carry, *inputs[self.carried :]])]

    def _replayed(self, key: Hashable, inputs: list[Any]) -> list[Tensor]:
        if key not in self.recorded and len(self.recorded) < SHAPES:
            *carry, go = self.turn(inputs)  # which also loads what is to be recorded
            inputs = [*carry, *inputs[self.carried :]]
            self.recorded[key] = self._recorded(inputs)
            if not go:
                return carry
        found = self.recorded.get(key)
        return self.launched(inputs) if found is None else found(inputs)

    def _recorded(self, inputs: list[Any]) -> "Recorded | None":
        try:
            return Recorded(self.turn, inputs, self.carried)
        except Exception as error:  # an operation that waits for the device, say; if it is the body's, it comes again
            _log.info("A loop's kernels are launched one by one, since they could not be recorded: %s", error)
            return None


class Recorded:
    """A turn of a loop in memory of its own, as one graph of kernels.

    Args:
        turn: inputs -> carry, and whether to go on.
        inputs: tensors like those that it will be called with, and numbers.
        carried: how many of the inputs are carried.
    """

    def __init__(self, turn: Callable[[list[Any]], list[Any]], inputs: list[Any], carried: int) -> None:
        self.own = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
        self.carried = carried
        if any(isinstance(t, Tensor) and t.stride() != own.stride() for t, own in zip(inputs, self.own, strict=True)):
            raise RuntimeError("an input has gaps in its memory")
        memory = {t.untyped_storage().data_ptr() for t in self.own if isinstance(t, Tensor)}

        def update() -> Tensor:
            *carry, go = turn(self.own)
            # What only changes places is read before it is written.
            carry = [t.clone() if t.untyped_storage().data_ptr() in memory else t for t in carry]
            copy(carry, self.own[:carried])
            return go.clone()

        self.replay, self.go = record(update, self.own[0].device)

    def __call__(self, inputs: list[Any]) -> list[Tensor]:
        """Carry and fixed inputs -> the carry at the end."""
        copy(inputs, self.own)
        go: Any = True
        while go:
            self.replay()
            go = self.go
        return [t.clone() for t in self.own[: self.carried]]


def copy(sources: Sequence[Any], places: Sequence[Any]) -> None:
    """The values of all tensors of the first one's device, those of one dtype by one kernel."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for source, place in zip(sources, places, strict=True):
        if isinstance(source, Tensor) and source.device == places[0].device:
            pairs.setdefault(source.dtype, []).append((place, source))
    for several in pairs.values():
        torch._foreach_copy_([place for place, _ in several], [source for _, source in several])


def record(update: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """What makes the update on the current stream whenever it is called, and the place of its result."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()  # no two graphs share one, which may run at the same time
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = update()
        finally:
            graph.capture_end()
            torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.current_stream(device).wait_stream(side)
    return graph.replay, result


def kind(inputs: list[Any]) -> Hashable:
    """Shapes, numbers and the stream for which one recording serves; None where it does not pay or cannot be."""
    device = inputs[0].device
    stream = stream_of(device)
    size = sum(t.numel() for t in inputs if isinstance(t, Tensor))
    told = [_told(t, device) for t in inputs]
    return None if stream is None or size > SMALL or None in told else (device, stream, *told)


def _told(value: Any, device: torch.device) -> Hashable:
    """What a recording has of an input: a number as it is, also as a tensor on the CPU; None of a tensor elsewhere."""
    if not isinstance(value, Tensor):
        return type(value), repr(value)  # which tells zeros from one another, and not a NaN from itself
    if value.device == device:
        return value.shape, value.stride(), value.dtype
    return (value.dtype, repr(value.item())) if value.device.type == "cpu" and value.dim() == 0 else None


def stream_of(device: torch.device) -> int | None:
    """The stream that is current there; None where kernels cannot be recorded."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
