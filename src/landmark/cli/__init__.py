"""The command line: parse and print, no logic."""

import sys


def main() -> None:
    """Runs the command line and exits; interrupted while it is loaded as later, with code 130."""
    try:
        from landmark.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
