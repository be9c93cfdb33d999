"""Measure lines of the tables again, from their shipped weights: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("reproduce")
