"""Show a page where images are told apart by a few examples of each class: see ``--help``."""

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.demo import serve


@hydra.main(version_base="1.3", config_path="../conf", config_name="demo")
@cli.job
def main(config: DictConfig) -> None:
    """Serve the page until Ctrl-C."""
    serve(config)


if __name__ == "__main__":
    cli.run(main)
