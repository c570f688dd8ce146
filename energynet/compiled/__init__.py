"""The `Compiled` driver: a solve as one program of machine code. Begin with the README of this folder."""

from energynet.compiled.driver import CompilationError, Compiled

__all__ = ["CompilationError", "Compiled"]
