"""Train a few-shot method, choose its weights on validation classes, and test them once: see ``--help``."""

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.training import train


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@cli.job
def main(config: DictConfig) -> float:
    """Run one training; returns the validation accuracy of the chosen weights, for sweepers to maximise."""
    return train(config)


if __name__ == "__main__":
    cli.run(main)
