"""
play.ipynb runs from top to bottom on a fresh clone without a network, says what it should, and is committed as it ran.

    ./test.sh tests/test_notebook.py      # no network, no GPU, no log/: a copy of the scripts in a temporary folder

Executed once, with fewer steps of the training that a reader watches: the one number that is changed here, in its first cell.
"""
import ast
import base64
import math
import os
import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOTEBOOK = os.path.join(ROOT, "play.ipynb")


def code_cells(notebook):
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All that the cells printed, to stdout and stderr."""
    return "".join(output.text for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream")


def pictures(notebook):
    """The bytes of the PNGs that the cells show."""
    return [base64.b64decode(output.data["image/png"]) for cell in code_cells(notebook) for output in cell.outputs
            if output.get("data", {}).get("image/png")]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run in a folder that holds what a fresh clone holds, with the Hub out of reach."""
    clone = tmp_path_factory.mktemp("clone")
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".tiktoken", ".txt", ".ipynb")):
            shutil.copy(os.path.join(ROOT, name), clone)
    shutil.copytree(os.path.join(ROOT, "figures"), clone / "figures")
    notebook = nbformat.read(clone / "play.ipynb", as_version=4)
    setting = code_cells(notebook)[0]
    assert len(re.findall(r"(?m)^STEPS = \d+ ", setting.source)) == 1
    setting.source = re.sub(r"(?m)^STEPS = \d+ ", "STEPS = 4 ", setting.source)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(clone / "no-cache"), "HF_HUB_OFFLINE": "1"}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(clone)}}).execute(env=env)
    return notebook


def test_no_cell_raises_or_warns(executed):
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert len(pictures(executed)) == 10


def test_the_outputs_say_what_they_must(executed):
    text = printed(executed)
    loss, ln_v = map(float, re.search(r"loss at initialisation ([\d.]+), ln\(50304\) = ([\d.]+)", text).groups())
    assert ln_v == round(math.log(50304), 3) and abs(loss - ln_v) < 0.1
    assert re.search(r"lm_head.weight begins at (\d+)\nwte.weight     begins at (\d+)\nthe same memory: True", text)
    alone, scaled = (float(std) for std in re.findall(r"std (\d+\.\d\d)\n", text)[:2])
    assert 8.5 < alone < 11.5 and 0.85 < scaled < 1.15  # sqrt(100), and 1
    first, last = map(float, re.search(r"loss ([\d.]+) at first, .* ([\d.]+) after 49", text).groups())
    assert first > 10 and last < 0.5
    assert "loss / 4: equal to the big batch's gradient: True, 1.000 times as long" in text
    assert "loss / 1: equal to the big batch's gradient: False, 4.000 times as long" in text
    assert "the same tokens: True" in text
    assert "and 11 more blocks like h.0: 124,439,808 parameters" in text
    assert "checkpoints of steps [1, 2, 3, 4]" in text
    assert len(re.findall(r"(?m)^   loss +[\d.]+ \*", text)) == 3  # an answer to each HellaSwag example


def test_without_the_weights_of_openai_it_says_so(executed):
    text = printed(executed)
    assert "GPT-2's weights are not on this machine" in text and "these are of log/play, step 4" in text


def test_it_is_committed_with_its_outputs_and_names_no_machine(committed):
    assert all(cell.execution_count for cell in code_cells(committed))
    assert len(pictures(committed)) == 10 and all(picture.startswith(b"\x89PNG") for picture in pictures(committed))
    assert os.path.getsize(NOTEBOOK) < 1_000_000
    with open(NOTEBOOK, encoding="utf-8") as f:
        text = re.sub(r'"image/png": "[^"]*"', "", f.read())
    assert re.findall(r"(?<![\w.])(?:/(?:home|root|tmp|work|usr|opt|mnt|Users)/|[A-Z]:\\\\)[\w./-]*", text) == []
    assert os.uname().nodename not in text


def test_it_defines_nothing_that_the_scripts_have(committed):
    ours = set()
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            with open(os.path.join(ROOT, name), encoding="utf-8") as f:
                ours |= {node.name for node in ast.parse(f.read()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"train_step", "generate", "GPT"} <= ours
    for cell in code_cells(committed):
        tree = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))
        assert [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))] == [], cell.source
        assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not assigned & ours, assigned & ours


def test_the_committed_outputs_are_of_the_committed_code(executed, committed):
    assert [cell.source for cell in executed.cells][2:] == [cell.source for cell in committed.cells][2:]
    # what does not depend on the machine or on chance is the same again
    for name in ("h.0.attn.c_attn", "<|endoftext|>First Citizen", "GPT-3", "Hello, I'm a language model,"):
        again, there = ([line for line in printed(notebook).splitlines() if name in line] for notebook in (executed, committed))
        assert again == there and there
