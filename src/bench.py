"""Time this project beside the ways others do the same: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("bench")
