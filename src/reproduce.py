"""Re-measure rows of the tables from their shipped weights: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("reproduce")
