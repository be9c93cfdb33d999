"""Compare the results of runs with published ones: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("report")
