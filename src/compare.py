"""Compare runs and sweeps with each other, in a table and a figure: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("compare")
