"""The notebooks, executed with small settings in place of their first cell of code."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, write_images

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> str:
    """Execute a notebook in a folder with other values of its parameters; return what its cells print."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    known: dict[str, object] = {}
    exec(cell.source, known)
    assert parameters.keys() <= known.keys()
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for variable, value in {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(variable, value)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs) + f"{pictures} pictures"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_without_outputs_and_have_parameters(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata["tags"] == ["parameters"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    for cell in code:
        if not cell.source.startswith("%%bash"):
            compile(cell.source, path.name, "exec")


@pytest.mark.slow
def test_the_quickstart_goes_from_own_images_to_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "discs")
    said = execute("quickstart", tmp_path, monkeypatch, PROFILE="smoke", IMAGES="discs", CHANNELS=1)
    assert said.endswith("5 pictures")  # grid, interpolation, nearest, curves, more
    assert "finished" in said and "fd_classifier_" in said
    assert (tmp_path / "my-study" / "exported" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_toy_notebook_draws_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        "toy.seeds=2",
        "toy.width=16",
        "toy.batch_size=64",
        "toy.pairs=20",
        "toy.flow_updates=40",
        "toy.points=256",
    ]
    said = execute("toy", tmp_path, monkeypatch, OVERRIDES=[*small, "toy.guidance.pairs=20"])
    assert said.endswith("3 pictures") and "afm_1 " in said and "rms_mean" in said
