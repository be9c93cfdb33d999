"""Draw one of the project's figures: see ``--help``."""

from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from fewshot import cli
from fewshot.config import check_types
from fewshot.text import say


@hydra.main(version_base="1.3", config_path="../conf", config_name="figure")
@cli.job
def main(config: DictConfig) -> None:
    """Draw the figure into the folder ``out``."""
    check_types("figure", config.figure)
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for path in instantiate(config.figure, out=out):
        say(path)


if __name__ == "__main__":
    cli.run(main)
