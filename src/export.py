"""Write the encoder of a checkpoint as ONNX, for other programs: see ``--help``."""

from fewshot import cli

if __name__ == "__main__":
    cli.run("export")
