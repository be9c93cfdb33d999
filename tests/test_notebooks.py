import base64
import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from fewshot.config import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?<![\w.:/~<])/[\w.-]+/[\w./-]*|\b[A-Z]:\\""")
TINY = {"EPISODES": 4, "TESTED": 3}


def test_all_notebooks_exist():
    assert [path.stem for path in NOTEBOOKS] == ["episodes", "maml", "matching_networks", "prototypes", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_it_runs(path, tmp_path, cache_dir, monkeypatch):
    monkeypatch.setenv("FEWSHOT_CACHE_DIR", str(cache_dir))
    notebook = nbformat.read(path, as_version=4)
    (position,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    changed = TINY | {"RUNS": str(tmp_path)}
    names = re.findall(r"^(\w+) = ", notebook.cells[position].source, re.MULTILINE)
    assert set(names) == set(changed)
    tiny = "\n".join(f"{name} = {changed[name]!r}" for name in names)
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(tiny))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small_and_machine_independent(path):
    assert path.stat().st_size < 300_000
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells[0]["source"][1] == 'PROJECT = ""\n' and not cells[0]["outputs"]  # nothing is installed in a clone
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not any("execution" in cell["metadata"] for cell in cells)  # time stamps
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 1
    for output in outputs:
        assert output["output_type"] in ("stream", "execute_result", "display_data")
        assert output.get("name") != "stderr", output["text"]
        data = output.get("data", {"text/plain": output.get("text", "")})
        for kind, content in data.items():
            if kind == "image/png":
                assert base64.b64decode(content).startswith(b"\x89PNG")
            else:
                assert not ABSOLUTE.findall("".join(content)), content
