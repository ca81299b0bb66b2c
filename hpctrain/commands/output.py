"""Where commands print, under a launcher too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hpctrain.transport.launcher import launch_from_environment

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """Colours at a terminal, plain text elsewhere, ASCII where the locale is not UTF-8. Local."""
    import os

    from hpctrain.runs import console

    launched = launch_from_environment().family != "none"
    terminal = console.find_terminal(launched)
    display = console.choose_display("auto", terminal, os.environ)
    return console.make_console(display, terminal, os.environ)


def let_errors_speak() -> None:
    """Ranks above 0 were hushed; what goes wrong on one of them alone must be heard. Local."""
    if launch_from_environment().rank > 0 and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
