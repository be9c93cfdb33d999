"""The figures of the guides and notebooks: ``python src/figure.py figure=NAME``."""
