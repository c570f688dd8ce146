"""The `Compiled` driver, which compiles a solve into one program of machine code. Start with the README of this folder."""

from energynet.compiled.driver import CompilationError, Compiled

__all__ = ["CompilationError", "Compiled"]
