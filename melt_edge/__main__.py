"""The script `melt-edge`, and `python -m melt_edge`: the command line."""

import sys


def main() -> None:
    """Run the process's command line and exit; Ctrl-C while it is still being imported shows no traceback."""
    try:
        from melt_edge.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
