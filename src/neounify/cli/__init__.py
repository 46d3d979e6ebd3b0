"""The command `neounify`: everything the package does, from a shell.

The library never imports this. The modules named in `app.py`, one per command, are light, so that
`--help` answers at once; what needs torch is imported when a command runs.
"""

import sys


def main() -> None:
    """Run the command line; the entry point of the package."""
    from neounify.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows a question mark, not a traceback.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app(prog_name="neounify")
