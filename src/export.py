"""Write the encoder of a checkpoint as ONNX, for other programs: see ``--help``."""

import hydra
from omegaconf import DictConfig

from fewshot import cli
from fewshot.export import export


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
@cli.job
def main(config: DictConfig) -> None:
    """Write the file ``out``, checked against PyTorch."""
    export(config.checkpoint, config.out, config.trust)


if __name__ == "__main__":
    cli.run(main)
