"""The notebooks: they hold what they showed when they were run, and they run."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "scripts" / "notebooks"
# what is given in the place of the numbers of the cell `parameters`, so that a run takes some seconds
FEW = {
    "best_of_n": "SAMPLES, PROMPTS = 4, 8",
    "gpt2-sentiment": "STEPS, BATCH, HELD_OUT = 2, 8, 6",
    "gpt2-control": "FIRST_STEPS, STEPS, BATCH, HELD_OUT = 2, 2, 8, 6",
}
SHOWN = {
    "best_of_n": "rm-reviews: best of 1",
    "gpt2-sentiment": "after   reward model",
    "gpt2-control": "[positive]  mean sentiment",
}


def read(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def said(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream"), outputs


def parameters(notebook):
    return next(at for at, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))


@pytest.mark.parametrize("name", FEW)
def test_it_is_clean_and_shows_a_whole_run(name):
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(FEW)
    notebook = read(name)
    text, outputs = said(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, 1 + len(codes)))
    assert SHOWN[name] in text and "/root/" not in text and "Traceback" not in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 100_000
    given = codes[[cell.cell_type for cell in notebook.cells[: parameters(notebook)]].count("code")].source
    assert "lvwerra/gpt2-imdb" in given and "lvwerra/distilbert-imdb" in given
    numbers = {part.strip() for part in FEW[name].split("=")[0].split(",")}
    assert all(f"\n{number} = " in given for number in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_it_runs(name, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parents[1]))
    notebook = read(name)
    notebook.cells.insert(parameters(notebook) + 1, nbformat.v4.new_code_cell(FEW[name]))
    client.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert SHOWN[name] in said(notebook)[0] and not any(tmp_path.iterdir())
