"""Time this project beside the ways others do the same: see ``--help``."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.benchmarks.contest import bench
from fewshot.benchmarks.suite import choose


@hydra.main(version_base="1.3", config_path="../conf", config_name="bench")
@cli.job
def main(config: DictConfig) -> None:
    """Run the contests asked for."""
    bench(choose(config.only), config.rounds, Path(config.out).expanduser())


if __name__ == "__main__":
    cli.run(main)
