"""List the trained models that come with the package, or print their cards: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("models")
