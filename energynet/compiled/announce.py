"""Prints a line on the terminal while a program is being compiled, so that a long first call does not seem stuck."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 2.0  # the number of seconds before the line is printed
_log = logging.getLogger("energynet")
_lasted: dict[str, float] = {}  # what -> seconds of the last compilation


@contextlib.contextmanager
def announced(what: str, why: str = "") -> Iterator[None]:
    """Announce a long compilation and its reason on a terminal; elsewhere, only log it to the logger ``energynet``.

    Example:
        >>> with announced("the solve of Model.energy"):
        ...     pass

    Args:
        what: a description of what is compiled.
        why: a sentence that states why it is compiled again; empty the first time.
    """
    _log.info("compiling %s. %s", what, why)
    begin = time.monotonic()
    last = f"; the last time it took {_lasted[what]:.0f} s" if what in _lasted else ""
    text = f"energynet: compiling {what}{last}. {why}".rstrip()
    timer = threading.Timer(PATIENCE, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if sys.stderr is not None and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _lasted[what] = time.monotonic() - begin
