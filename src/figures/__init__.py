"""The figures of the README and the notebooks, in one style: ``python src/figure.py figure=NAME`` draws each."""
