"""Train a few-shot method, choose its weights on validation classes, and test them once: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("train")
