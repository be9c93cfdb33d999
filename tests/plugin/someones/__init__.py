"""A package of someone who uses fewshot: each part is one file of Python and one of YAML, in a group of ``conf``."""
