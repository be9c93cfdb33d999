"""Serve a web page that classifies images from a few examples of each class, until Ctrl-C: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("demo")
