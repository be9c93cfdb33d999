"""Learn classes from photos, and write what was learned to one file: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("teach")
