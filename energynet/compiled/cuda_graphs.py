"""Records each iteration of a loop in Inductor's Python wrapper on a GPU as one CUDA graph.

In Inductor's code, an iteration launches its kernels from Python one by one; on a small problem this takes ten times as long as
the kernels. Here they are recorded once per shape, and an iteration is one call that launches them all. Code that is not
recognized or cannot be recorded stays unchanged.
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
"""A function that Inductor generates for a part of a loop; it clears the list of its inputs."""

SMALL: Final = 2**24
"""The largest number of elements in a loop's inputs; beyond it, kernels take longer than their launches, and memory is scarce."""

SHAPES: Final = 4
"""The number of shapes for which a loop is recorded; for other shapes it runs as Inductor generates it."""

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
    """The same program, in which each loop without inner loops becomes an object that may record it.

    Example:
        >>> with_replays("def call(args): return args")
        'def call(args): return args'
    """
    found = [match for match in _LOOP.finditer(source) if _is_simple(source, match)]
    for match in reversed(found):
        source = source[: match.start()] + _call(match) + source[match.end() :]
    return f"from {__name__} import loop_of\n{source}" if found else source


def _is_simple(source: str, loop: re.Match[str]) -> bool:
    """Whether the carry is a list whose entries come first in the inputs, and the body contains no loop."""
    outputs = _ENTRY.findall(loop["outputs"])
    in_order = outputs == [(outputs[0][0], str(k)) for k in range(len(outputs))]
    first = loop["inputs"].startswith(loop["outputs"].rstrip(", "))
    return in_order and first and _WHILE not in _function(source, loop["body"])


def _call(loop: re.Match[str]) -> str:
    indent, carry = loop["indent"], _ENTRY.findall(loop["outputs"])
    call = f"loop_of({loop['body']}, {loop['test']}, {len(carry)})([{loop['inputs']}])"
    return f"{indent}if should_loop:\n{indent}    {carry[0][0]} = {call}\n"


def _function(source: str, name: str) -> str:
    """The source of a function in the module."""
    _, _, after = source.partition(f"\ndef {name}(args):\n")
    return re.split(r"\n(?=\S)", after, maxsplit=1)[0]


class Recordings:
    """A program together with the recordings of its loops, which are deleted with it.

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
    """The loop with these functions in the running program."""
    if _running.loops is None:
        return Loop(body, test, carried).launched
    return _running.loops.setdefault(body, Loop(body, test, carried))


class Loop:
    """``while test(carry, fixed): carry = body(carry, fixed)``, after the first test has succeeded.

    Args:
        body: carry and fixed inputs -> carry.
        test: carry and fixed inputs -> a bool.
        carried: the number of inputs that are carried.
    """

    def __init__(self, body: Graph, test: Graph, carried: int) -> None:
        self.body, self.test, self.carried = body, test, carried
        self.recorded: dict[Hashable, Recorded | None] = {}
        self._busy = threading.Lock()

    def __call__(self, inputs: list[Any]) -> list[Tensor]:
        """Carry and fixed inputs -> the carry at the end."""
        key = kind(inputs)
        if key is None or not self._busy.acquire(blocking=False):  # another thread is using this loop
            return self.launched(inputs)
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._replayed(key, inputs)
        finally:
            self._busy.release()

    def launched(self, inputs: list[Any]) -> list[Tensor]:
        """The same, without a recording."""
        carry, fixed, go = inputs[: self.carried], inputs[self.carried :], True
        while go:
            *carry, go = self.turn([*carry, *fixed])
        return carry

    def turn(self, inputs: list[Any]) -> list[Any]:
        """Carry and fixed inputs -> carry, and whether to continue."""
        carry = self.body(list(inputs))
        return [*carry, *self.test([*carry, *inputs[self.carried :]])]

    def _replayed(self, key: Hashable, inputs: list[Any]) -> list[Tensor]:
        if key not in self.recorded and len(self.recorded) < SHAPES:
            *carry, go = self.turn(inputs)  # this also loads the kernels before they are recorded
            inputs = [*carry, *inputs[self.carried :]]
            self.recorded[key] = self._recorded(inputs)
            if not go:
                return carry
        found = self.recorded.get(key)
        return self.launched(inputs) if found is None else found(inputs)

    def _recorded(self, inputs: list[Any]) -> "Recorded | None":
        try:
            return Recorded(self.turn, inputs, self.carried)
        except Exception as error:  # such as an operation that synchronizes; an error in the body itself is raised again later
            _log.info("A loop's kernels are launched one by one, since they could not be recorded: %s", error)
            return None


class Recorded:
    """An iteration of a loop as one graph of kernels with its own memory.

    Args:
        turn: inputs -> carry, and whether to continue.
        inputs: example inputs: tensors and numbers.
        carried: the number of inputs that are carried.
    """

    def __init__(self, turn: Callable[[list[Any]], list[Any]], inputs: list[Any], carried: int) -> None:
        self.own = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
        self.carried = carried
        if any(isinstance(t, Tensor) and t.stride() != own.stride() for t, own in zip(inputs, self.own, strict=True)):
            raise RuntimeError("an input has gaps in its memory")
        memory = {t.untyped_storage().data_ptr() for t in self.own if isinstance(t, Tensor)}

        def update() -> Tensor:
            *carry, go = turn(self.own)
            # A carried tensor that is only moved to another position must be read before it is overwritten.
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
    """Copy the values of all tensors on the first one's device, with one kernel per dtype."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for source, place in zip(sources, places, strict=True):
        if isinstance(source, Tensor) and source.device == places[0].device:
            pairs.setdefault(source.dtype, []).append((place, source))
    for several in pairs.values():
        torch._foreach_copy_([place for place, _ in several], [source for _, source in several])


def record(update: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A function that replays the update on the current stream, and the tensor that receives its result."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()  # graphs that may run concurrently must not share a workspace
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
    """A key of the shapes, numbers and stream for which a recording is valid; None if recording is impossible or does not pay."""
    device = inputs[0].device
    stream = stream_of(device)
    size = sum(t.numel() for t in inputs if isinstance(t, Tensor))
    keys = [_key(t, device) for t in inputs]
    return None if stream is None or size > SMALL or None in keys else (device, stream, *keys)


def _key(value: Any, device: torch.device) -> Hashable:
    """The part of an input that a recording fixes: the value of a number or CPU scalar, a tensor's layout; None otherwise."""
    if not isinstance(value, Tensor):
        return type(value), repr(value)  # this distinguishes 0.0 from -0.0, and equates NaN with itself
    if value.device == device:
        return value.shape, value.stride(), value.dtype
    return (value.dtype, repr(value.item())) if value.device.type == "cpu" and value.dim() == 0 else None


def stream_of(device: torch.device) -> int | None:
    """The current stream of a device; None where kernels cannot be recorded."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
