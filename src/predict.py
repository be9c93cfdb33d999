"""Classify your own images by a few examples of each class: see ``--help``."""

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.prediction import predict


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
@cli.job
def main(config: DictConfig) -> None:
    """Write the predictions into the folder ``out``, and print the first."""
    predict(config)


if __name__ == "__main__":
    cli.run(main)
