"""Benchmark this project against other implementations: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("bench")
