"""Test a checkpoint at any way and shot, per class, alone or against a second one: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("evaluate")
