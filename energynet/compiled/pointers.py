"""Rewrites loops in Inductor's C++ wrapper so that they look up each tensor's pointer once and not in each iteration.

A lookup takes longer than the arithmetic of a small kernel. Where tensors are swapped, their pointers are swapped as well.
"""

import re
from collections.abc import Sequence

_ALIAS = re.compile(r"\s*auto& (\w+) = (\w+);$")
_POINTER = re.compile(r"\b(\w+)\.data_ptr\(\)")
_SWAP = re.compile(r"\s*std::swap\((\w+), (\w+)\);$")
_TAKEN = re.compile(r"std::move\((\w+)\)")
_OTHER = re.compile(r"\s*(?:(?:auto|RAIIAtenTensorHandle|AtenTensorHandle) )?(\w+)(?: = |\(|_handle;|\.reset\(\);)")


def with_pointers(body: Sequence[str]) -> tuple[list[str], list[str]]:
    """The code before a loop, and the loop body with pointers in place of tensors that are used only in this loop.

    Example:
        >>> with_pointers(["auto& x = a;", "f((double*)(x.data_ptr()), (double*)(b.data_ptr()));", "std::swap(a, b);"])[1]
        ['auto& x = a;', 'f((double*)(a_at), (double*)(b_at));', 'std::swap(a, b);', 'std::swap(a_at, b_at);']
    """
    outer = _at_depth_0(body)
    own = [line for line, mine in zip(body, outer, strict=True) if mine]
    names: dict[str, str] = {}
    for alias in filter(None, map(_ALIAS.match, own)):
        names[alias[1]] = names.get(alias[2], alias[2])
    swaps = [tuple(names.get(name, name) for name in swap.groups()) for swap in filter(None, map(_SWAP.match, own))]
    moved = _made_or_moved(body, outer, swaps)
    asked = {names.get(name, name) for line in own for name in _POINTER.findall(line)}
    kept = asked.union(*swaps) - moved
    result: list[str] = []
    for line, mine in zip(body, outer, strict=True):
        result.append(_POINTER.sub(lambda found: _pointer(found, names, kept), line) if mine else line)
        if mine and (swap := _SWAP.match(line)):
            pair = [names.get(name, name) for name in swap.groups()]
            result += [f"std::swap({pair[0]}_at, {pair[1]}_at);"] if pair[0] in kept else []
    return [f"void* {name}_at = {name}.data_ptr();" for name in sorted(kept)], result


def _pointer(found: re.Match[str], names: dict[str, str], kept: set[str]) -> str:
    name = names.get(found[1], found[1])
    return f"{name}_at" if name in kept else found[0]


def _at_depth_0(body: Sequence[str]) -> list[bool]:
    """Which lines do not belong to an inner loop."""
    depth, result = 0, []
    for line in body:
        after = depth + line.count("{") - line.count("}")
        result.append(depth == 0 and after == 0)
        depth = after
    return result


def _made_or_moved(body: Sequence[str], outer: Sequence[bool], swaps: Sequence[tuple[str, ...]]) -> set[str]:
    """Names that do not exist before the loop, that get other memory inside it, or that are swapped with such names."""
    found = {match[1] for line in body if not _ALIAS.match(line) and (match := _OTHER.match(line))}
    found |= {name for line in body for name in _TAKEN.findall(line)}
    found |= {name for line, mine in zip(body, outer) if not mine and (swap := _SWAP.match(line)) for name in swap.groups()}
    for _ in swaps:
        found |= {name for pair in swaps if found.intersection(pair) for name in pair}
    return found
