"""Which modules of the package import which.

    python tests/modules.py [CHECKOUT]

prints the modules of ``src/fewshot`` in levels: each imports only from levels above its own.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports(checkout: Path = ROOT) -> dict[str, set[str]]:
    """Return the modules of the package, each with those that it imports, also within functions."""
    source = checkout / "src"
    found: dict[str, set[str]] = {}
    for path in sorted((source / "fewshot").rglob("*.py")):
        name = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        found[name] = set(_named(ast.parse(path.read_text(encoding="utf-8"))))
    return {name: {_module(one, found) for one in named} - {"", name} for name, named in found.items()}


def levels(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the names in levels: each imports only from levels before its own.

    Raises:
        graphlib.CycleError: names import each other in a circle.
    """
    list(TopologicalSorter(graph).static_order())

    @cache
    def level(name: str) -> int:
        return 1 + max(map(level, graph[name]), default=-1)

    deepest = max(map(level, graph))
    return [sorted(name for name in graph if level(name) == number) for number in range(deepest + 1)]


def _named(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield from _named(node)
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _module(name: str, modules: Mapping[str, object]) -> str:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def main() -> None:
    """Print the levels."""
    modules = imports(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    count = sum(map(len, modules.values()))
    sys.stdout.write(f"{len(modules)} modules with {count} imports between them\n\n")
    for names in levels(modules):
        sys.stdout.write(f"{', '.join(name.removeprefix('fewshot.') for name in names)}\n")


if __name__ == "__main__":
    main()
