"""Write the tables of ``notebooks/guides/layouts.md``: the outcome of each layout and command line, before and now.

    git archive COMMIT | tar x -C DIR
    python tests/tried.py DIR

DIR is an earlier version, with which the same scripts are run.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "notebooks" / "guides" / "layouts.md"
LONGEST = 130  # characters of an outcome


@cache
def outcomes(script: str, version: Path) -> dict[str, str]:
    """Run a script with a version of the package; returns each line's outcome by what comes before it."""
    env = os.environ | {"PYTHONPATH": str(version / "src"), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script], env=env, cwd=version, stdout=subprocess.PIPE, text=True, check=True
    )
    rows = (line.rpartition("\t") for line in done.stdout.splitlines())
    return {name: outcome.replace(str(version), "") for name, _, outcome in rows}


def cell(text: str) -> str:
    """Format text as a table cell of Markdown."""
    text = re.sub(r"^\w*Error: ", "", text)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return re.sub(r"([\\`*_{}\[\]<>~|$])", r"\\\1", " ".join(text.split()))


def table(title: str, script: str, before: Path, only: str = "") -> str:
    """Return a Markdown table of the lines that begin with ``only``, with a heading that counts them."""
    now = {name: outcome for name, outcome in outcomes(script, ROOT).items() if name.startswith(only)}
    then = outcomes(script, before)
    rows = [
        f"| {cell(name.removeprefix(only))} | {cell(then.get(name, 'not tried'))} | {cell(outcome)} |"
        for name, outcome in now.items()
    ]
    good = [
        sum(re.match("read|accepted|done$", side.get(name, "")) is not None for name in now) for side in (then, now)
    ]
    tried = sum(name in then for name in now)
    counts = f"{good[0]} of {tried} worked before, {good[1]} of {len(now)} work now; other messages say what to change."
    return "\n".join([f"## {title}", "", counts, "", "| tried | before | now |", "| --- | --- | --- |", *rows, ""])


def main() -> None:
    """Rewrite everything below the introduction of the guide."""
    before = Path(sys.argv[1]).resolve()
    introduction = GUIDE.read_text().partition("\n## ")[0]
    sections = [
        *(table(name, "layouts.py", before, f"{name}\t") for name in ("miniImageNet", "Omniglot", "folder")),
        table("Paths", "path_lines.py", before),
        table("Command lines", "command_lines.py", before),
    ]
    GUIDE.write_text("\n".join([introduction, *sections]))


if __name__ == "__main__":
    main()
