"""Test the weights of a checkpoint, at any way and shot, class by class, alone or against others: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("evaluate")
