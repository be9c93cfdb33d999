"""Run the ``fewshot`` command with ``python -m fewshot``."""

from fewshot.cli import main

if __name__ == "__main__":
    main()
