"""``python -m energynet``, and the console script ``energynet``."""

import sys


def main() -> None:
    """Run the command line, or name the extra that it needs."""
    try:
        from energynet.experiments.cli import main as command_line
    except ImportError as error:
        sys.exit(f"energynet: {error}")
    command_line()


if __name__ == "__main__":
    main()
