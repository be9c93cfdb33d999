"""A user's package for fewshot: each part is one Python file and one YAML file in a group of ``conf``."""
