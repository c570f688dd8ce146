"""Rewrites Inductor's C++ wrapper so that it processes several parts of a batch in parallel, each on its own thread."""

import re
from pathlib import Path

from energynet.compiled.cpu_loops import UnknownFormError

_ENTRY = "void inductor_entry_impl("
_END = "} // inductor_entry_impl"
_RELEASE = "py::gil_scoped_release_simple release;"
_INPUTS = re.compile(r"steal_from_raw_handles_to_raii_handles\(input_handles, (\d+)\)")
_DIVIDES = re.compile(r"_integral\(|\bmod\(")
_OUTPUT = re.compile(r"output_handles\[(\d+)\] =")
_AT_ONCE = Path(__file__).with_name("parts.h").read_text()


def in_parts(source: str, parts: int) -> str:
    """The program that runs this one ``parts`` times in parallel; its inputs and outputs are those of the parts in sequence.

    Raises:
        UnknownFormError: if the wrapper has another form than expected, or if it divides integers, because this records a
            division by zero in a global variable.
    """
    if parts == 1:
        return source
    inputs, outputs = _INPUTS.search(source), {int(k) for k in _OUTPUT.findall(source)}
    if any(source.count(known) != 1 for known in (_ENTRY, _END, _RELEASE)) or inputs is None or not outputs:
        raise UnknownFormError("Inductor's C++ wrapper has another form than expected")
    if _DIVIDES.search(source):
        raise UnknownFormError("integers are divided")
    count = max(outputs) + 1
    sizes = f"static constexpr int PARTS = {parts}, INPUTS = {inputs[1]}, OUTPUTS = {count};"
    source = source.replace(_RELEASE, "").replace(_ENTRY, "static void one_part(").replace(_END, f"}}\n{sizes}\n{_AT_ONCE}")
    return re.sub(rf"num_outputs={count}\b", f"num_outputs={parts * count}", source)
