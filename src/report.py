"""Set the results of runs beside the published ones: see ``--help``."""

import sys

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.report import report
from fewshot.text import say


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
@cli.job
def main(config: DictConfig) -> None:
    """Write the report into the folder ``out``."""
    for path in report(config.runs, config.tables, config.sources, config.out, config.readme):
        say(path)


if __name__ == "__main__":
    cli.name_leading("runs", sys.argv)
    cli.run(main)
