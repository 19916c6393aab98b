"""`python -m melt_edge`: the command line."""

from melt_edge.cli import main

if __name__ == "__main__":
    main()
