"""Learn from a handful of examples: episodic few-shot training on PyTorch Lightning, configured by Hydra."""

__version__ = "0.2.0"
