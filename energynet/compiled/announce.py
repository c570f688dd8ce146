"""A line on the terminal while a program is being compiled, so that nobody takes a long first call for a stuck one."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 2.0  # seconds without a word
_log = logging.getLogger("energynet")
_lasted: dict[str, float] = {}  # what -> seconds, the last time


@contextlib.contextmanager
def announced(what: str, why: str = "") -> Iterator[None]:
    """Say on a terminal what is being compiled, and why again, once it takes long; elsewhere only to the logger ``energynet``.

    Example:
        >>> with announced("the solve of Model.energy"):
        ...     pass

    Args:
        what: is compiled.
        why: it is compiled again, a sentence; empty the first time.
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
