"""Entry point: `hpctrain` and `python -m hpctrain`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its documented code."""
    from hpctrain.runs.signals import note_early_signals

    note_early_signals()
    from hpctrain.cli import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
