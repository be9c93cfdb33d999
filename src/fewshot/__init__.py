"""Learn from a handful of examples: episodic few-shot training on PyTorch Lightning, configured by Hydra."""
