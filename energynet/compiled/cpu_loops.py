"""Rewrites loops in Inductor's C++ wrapper so that they reuse their memory.

In Inductor's code, each iteration of a loop allocates a new tensor for everything that it computes and a new handle for
everything that it reads; on a small problem this takes ten times as long as the arithmetic. Here the tensors are allocated
once, before the loop, and an iteration swaps the old values with the new ones. Unrecognized code stays unchanged.
"""

import re

_HANDLE = re.compile(r"\s*AtenTensorHandle (\w+)_handle;$")
_CHECK = "AOTI_TORCH_ERROR_CODE_CHECK"
_MAKE = re.compile(rf"\s*{_CHECK}\((aoti_torch_empty_strided\(.*), &(\w+)_handle\)\);$")
_ALIAS = re.compile(rf"\s*{_CHECK}\(aoti_torch_assign_tensors_out\((\w+), &(\w+)_handle\)\);$")
_CONSTANT = re.compile(r"\s*static constexpr int64_t ")
_ARRAY = re.compile(r"\bint_array_\d+\b")
_REUSE = re.compile(r"\s*auto (\w+) = std::move\((\w+)\);  // reuse$")
_MOVE = re.compile(r"\s*(\w+) = std::move\((\w+)\);$")
_VIEW = re.compile(r"auto \w+ = .*\breinterpret_tensor_wrapper\((\w+),")
_SWAP = re.compile(r"std::swap\((\w+), (\w+)\);$")
_RESET = re.compile(r"\s*(\w+)\.reset\(\);$")
_ITEM = re.compile(rf"\s*{_CHECK}\(aoti_torch_item_bool\((\w+), &(\w+)\)\);$")
_WHILE = re.compile(r"\s*while \(1\) \{$")


class UnknownFormError(ValueError):
    """Inductor's code has another form than a rewrite expects."""


def in_place(source: str) -> str:
    """The same program, with loops that reuse their memory.

    Example:
        >>> in_place("int main() { return 0; }")
        'int main() { return 0; }'
    """
    try:
        return "\n".join(_block(source.split("\n")))
    except UnknownFormError:
        return source


def _block(lines: list[str]) -> list[str]:
    """A sequence of statements, in which each loop is rewritten, inner ones first."""
    result: list[str] = []
    k = 0
    while k < len(lines):
        if not _WHILE.match(lines[k]):
            result.append(lines[k])
            k += 1
            continue
        end = _end(lines, k)
        before, loop = _loop(_block(lines[k + 1 : end]))
        result = _owned(result, before)
        result += [*before.lines, lines[k], *loop, lines[end]]
        k = end + 1
    return result


def _end(lines: list[str], k: int) -> int:
    depth = 0
    for end in range(k, len(lines)):
        depth += lines[end].count("{") - lines[end].count("}")
        if depth == 0:
            return end
    raise UnknownFormError


class _Hoisted:
    """The code that is moved before a loop."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.made: dict[str, str] = {}  # name -> the call that allocates it
        self.swapped: dict[str, str] = {}  # carried name -> the hoisted tensor with which it is swapped


def _loop(lines: list[str]) -> tuple[_Hoisted, list[str]]:
    """The body of a loop, and the part of it that can run once."""
    before = _Hoisted()
    aliases: set[str] = set()
    constants: set[str] = set()
    moved = {match[1] for line in lines if (match := _MOVE.match(line) or _SWAP.match(line))}
    viewed = _viewed(lines)
    body: list[str] = []
    depth = k = 0
    while k < len(lines):
        line = lines[k]
        depth += line.count("{") - line.count("}")
        made, alias = _statement(_MAKE, lines, k), _statement(_ALIAS, lines, k)
        if depth:  # a line of an inner loop, which has been rewritten already
            body.append(line)
        elif _CONSTANT.match(line):
            before.lines.append(line)
            constants.update(_ARRAY.findall(line.partition("=")[0]))
        elif made and made[2] not in viewed and not _symbolic(made[1], constants):
            before.lines += lines[k : k + 3]
            before.made[made[2]] = made[1]
            k += 2
        elif alias and alias[2] not in moved:
            body.append(f"auto& {alias[2]} = {alias[1]};")
            aliases.add(alias[2])
            k += 2
        elif (reuse := _REUSE.match(line)) and reuse[2] in before.made:
            body.append(f"auto& {reuse[1]} = {reuse[2]};")
            before.made[reuse[1]] = before.made[reuse[2]]
        elif item := _ITEM.match(line):
            body.append(f"{item[2]} = *static_cast<const bool*>({item[1]}.data_ptr());")
        elif (reset := _RESET.match(line)) and reset[1] in {*aliases, *before.made}:
            pass
        elif (move := _MOVE.match(line)) and move[2] in before.made:
            if body and (reset := _RESET.match(body[-1])) and reset[1] == move[1]:
                body.pop()
            body.append(f"std::swap({move[1]}, {move[2]});")
            before.swapped[move[1]] = move[2]
        else:
            body.append(line)
        k += 1
    return before, body


def _viewed(lines: list[str]) -> set[str]:
    """Names whose memory may be reused under another name and with another shape."""
    viewed = {match[1] for line in lines if (match := _VIEW.search(line))}
    for line in reversed(lines):
        if (reuse := _REUSE.match(line)) and reuse[1] in viewed:
            viewed.add(reuse[2])
    return viewed


def _statement(pattern: re.Pattern[str], lines: list[str], k: int) -> re.Match[str] | None:
    """A match of the second of the three lines that create a tensor."""
    return pattern.match(lines[k + 1]) if k + 2 < len(lines) and _HANDLE.match(lines[k]) else None


def _symbolic(call: str, constants: set[str]) -> bool:
    """Whether memory is allocated for sizes that are unknown at compile time."""
    return not constants.issuperset(_ARRAY.findall(call)) or bool(re.search(r"\bs\d+\b", call))


def _owned(lines: list[str], before: _Hoisted) -> list[str]:
    """The lines before a loop, in which each carried tensor gets its own memory, so that it can be swapped."""
    result: list[str] = []
    owned: set[str] = set()
    k = 0
    while k < len(lines):
        alias = _statement(_ALIAS, lines, k)
        if alias and alias[2] in before.swapped:
            before.lines += _make(alias[2], before)
            before.lines.append(f"{_CHECK}(aoti_torch_copy_({alias[2]}, {alias[1]}, 0));")
            owned.add(alias[2])
            k += 3
            continue
        declared = re.match(r"\s*RAIIAtenTensorHandle (\w+);$", lines[k])
        if declared and declared[1] in before.swapped:
            before.lines += _make(declared[1], before)
            owned.add(declared[1])
        else:
            result.append(lines[k])
        k += 1
    if owned != set(before.swapped):  # a tensor would be swapped with memory that it does not own
        raise UnknownFormError
    return result


def _make(name: str, before: _Hoisted) -> list[str]:
    made = before.made[before.swapped[name]]
    return [
        f"AtenTensorHandle {name}_handle;",
        f"{_CHECK}({made}, &{name}_handle));",
        f"RAIIAtenTensorHandle {name}({name}_handle);",
    ]
