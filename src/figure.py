"""Draw one of the project's figures: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("figure")
