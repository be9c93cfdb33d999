"""Write the API reference from the docstrings; ``make docs`` calls it."""

import sys
from pathlib import Path
from pkgutil import iter_modules

import pdoc

import fewshot

# The package imports its public names on first use; pdoc only documents those that are there.
for name in fewshot.__all__:
    setattr(fewshot, name, getattr(fewshot, name))
modules = [module.name for module in iter_modules(fewshot.__path__, "fewshot.") if module.name != "fewshot.__main__"]
pdoc.render.configure(docformat="google")
pdoc.pdoc("fewshot", *modules, output_directory=Path(sys.argv[1]))
