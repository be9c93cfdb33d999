"""Test the weights of a checkpoint, at any way and shot, class by class, alone or against others: see ``--help``."""

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.evaluation import evaluate


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
@cli.job
def main(config: DictConfig) -> float:
    """Write the results into the folder ``out``; returns the accuracy."""
    return evaluate(config)


if __name__ == "__main__":
    cli.run(main)
