"""Classify your own images from a few examples of each class: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("predict")
