"""Every notebook of the documentation runs, offline, and is stored without outputs."""

import tempfile
from pathlib import Path

import pytest
from test_docs_site import load_script

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
# What a notebook needs beyond the package's own dependencies.
NEEDS = {
    "fine_tuning": ["datasets", "matplotlib"],
    "image_index_faiss": ["faiss", "matplotlib", "pyarrow"],
    "text_index_datasets": ["datasets", "faiss"],
    "zero_shot_labels": ["matplotlib"],
}
notebooks = load_script("notebooks")


def test_there_are_notebooks():
    assert set(NEEDS) <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow  # `make docs` runs them too
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_its_page_shows_what_it_prints(path, tmp_path, monkeypatch):
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # so that the variable is read again
    before = set(path.parent.iterdir())
    page = notebooks.as_page(notebooks.run(path), path.stem)
    assert "```text\n" in page
    assert "](data:image/png;base64," in page
    assert f"({path.name})" in page
    assert (list(tmp_path.iterdir()), set(path.parent.iterdir())) == ([], before), "the run has left something behind"


def test_every_notebook_is_a_page_of_the_site():
    for path in NOTEBOOKS:
        assert path.with_suffix(".md").read_text() == f"<!-- notebook: {path.stem} -->\n"


def test_output_comes_behind_its_cell():
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell(
            "print(1)\n2",
            outputs=[
                nbformat.v4.new_output("stream", name="stderr", text="a warning"),
                nbformat.v4.new_output("stream", name="stdout", text="\x1b[1m1\x1b[0m\n"),
                nbformat.v4.new_output("execute_result", data={"text/plain": "2", "text/html": "<b>2</b>"}),
                nbformat.v4.new_output("display_data", data={"text/plain": "<Figure>", "image/png": "iVBO\n"}),
            ],
        ),
    ]
    page = notebooks.as_page(nbformat.v4.new_notebook(cells=cells), "some")
    title, _, rest = page.partition("\n\n!!! note")
    assert title == "# Title"
    shown = ["```python\nprint(1)\n2\n```", "```text\n1\n```", "```text\n2\n```"]
    assert rest.endswith("\n\n".join([*shown, "![What the code draws](data:image/png;base64,iVBO)\n"]))
    assert "a warning" not in rest
