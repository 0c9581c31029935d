"""The files in examples/: the scripts run, and the notebook has the outputs of its code.

The outputs are committed, since code hosts show a notebook without running it. `python -m tests.test_examples` runs the
notebook and writes them anew.
"""

import ast
import base64
import runpy
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from typing import Any

import nbformat
import pytest
from PIL import Image

from lorabench.api import judge
from lorabench.store.io import read_table

from .conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"


def run_cell(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell as Jupyter does and return its outputs: what it prints, and the value of a last expression."""
    *statements, last = ast.parse(code).body
    printed, value = StringIO(), None
    with redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            statements.append(last)
        exec(compile(ast.Module(statements, []), NOTEBOOK.name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
    outputs = [nbformat.v4.new_output("stream", text=printed.getvalue())] if printed.getvalue() else []
    if value is not None:
        outputs.append(nbformat.v4.new_output("execute_result", _data(value)))
    return outputs


def _data(value: Any) -> dict[str, str]:
    """Return a value in the forms that a notebook shows."""
    if isinstance(value, Image.Image):
        png = BytesIO()
        value.quantize(64).save(png, "png", optimize=True)
        return {"text/plain": "a picture", "image/png": base64.b64encode(png.getvalue()).decode()}
    page = getattr(value, "_repr_html_", None)
    return {"text/plain": repr(value)} | ({} if page is None else {"text/html": page()})


def executed() -> nbformat.NotebookNode:
    """Return the notebook with the outputs of its code, run from the top."""
    notebook, names = nbformat.read(NOTEBOOK, as_version=4), {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.update(execution_count=number, outputs=run_cell(cell.source, names))
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    nbformat.validate(notebook)
    return notebook


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the outputs of all cells as text; the bytes of pictures depend on versions."""
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return [output.text if output.output_type == "stream" else output.data["text/plain"] for output in outputs]


@pytest.mark.slow
def test_the_notebook_has_the_outputs_of_its_code():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert texts(executed()) == texts(committed), "run `python -m tests.test_examples` and look at the changes"
    assert NOTEBOOK.stat().st_size < 150_000


@pytest.mark.slow
def test_the_script_compares_best_and_recommended_learning_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "optimal_lrs.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sum("recommended" in line and line.startswith("batch") for line in lines) == 12
    assert any(line.startswith("The optimal LR of LoRA is 10 times") for line in lines)
    assert any(line.startswith("axolotl.yaml, line 7: the learning rate 1e-05 of LoRA is") for line in lines)


@pytest.mark.slow
def test_the_runs_of_the_example_of_the_callback_reach_verdicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "finetune.py"), run_name="__main__")
    assert capsys.readouterr().out.count("trl: SFT of") == 6
    runs = read_table(tmp_path / "runs", "runs")
    assert runs.groupby("method")["lr"].nunique().to_dict() == {"fullft": 3, "lora": 3}
    claims = judge(tmp_path / "runs", claims=["B2"])
    assert (claims["n_runs"].item(), claims["verdict"].item()) == (6, "inconclusive")
    page, script = ((REPOSITORY / path).read_text() for path in ("docs/your-model.md", "examples/finetune.py"))
    assert script[script.index("callback = ") :] in page


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
