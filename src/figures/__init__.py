"""The figures of the guides and the notebooks, in one style: ``python src/figure.py figure=NAME`` draws each."""
