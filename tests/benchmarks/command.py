"""Command lines of the benchmarks."""

import argparse


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """One whose usage is what can be typed."""
    prog = f"python -m tests.benchmarks{'.' if name else ''}{name}"
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number ≥ 1 is needed, got {number}")
    return number
