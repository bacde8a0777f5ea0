"""
play.ipynb runs from top to bottom in a fresh clone without a network, and its committed outputs
agree with code and text.

    ./test.sh tests/test_notebook.py   # no network, no GPU, no log/: a copy of the scripts

It is executed once, with smaller sizes (SMALLER).
"""
import ast
import base64
import glob
import json
import math
import os
import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from common import ENV, ROOT

NOTEBOOK = os.path.join(ROOT, "play.ipynb")
# what the executed copy has instead, each found in one cell
SMALLER = {
    "STEPS = 100 ": "STEPS = 4 ",
    "--val-tokens 8192": "--val-tokens 1024",
    "(16, 64, 256)": "(4, 8, 16)",
}


def code_cells(notebook):
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(notebook):
    """What the cells printed, to stdout and stderr."""
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook):
    """The bytes of the PNGs among the cells' outputs."""
    found = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [base64.b64decode(png) for png in found if png]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


class Client(NotebookClient):
    """A NotebookClient that counts the updates of displayed pictures."""
    updates = 0

    def process_message(self, msg, *args):
        self.updates += msg["msg_type"] == "update_display_data"
        return super().process_message(msg, *args)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook executed in a copy of a fresh clone, without access to the Hub; .updates as
    Client counts them."""
    clone = tmp_path_factory.mktemp("clone")
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".txt", ".ipynb")):
            shutil.copy(os.path.join(ROOT, name), clone)
    for name in ("docs", "run"):
        shutil.copytree(os.path.join(ROOT, name), clone / name)
    notebook = nbformat.read(clone / "play.ipynb", as_version=4)
    for ours, smaller in SMALLER.items():
        cell, = [cell for cell in code_cells(notebook) if ours in cell.source]
        cell.source = cell.source.replace(ours, smaller)
    env = {**ENV, "HF_HOME": str(clone / "no-cache"), "HF_HUB_OFFLINE": "1"}
    client = Client(notebook, timeout=300, kernel_name="python3",
                    resources={"metadata": {"path": str(clone)}})
    client.execute(env=env)
    notebook.updates = client.updates
    return notebook


def test_no_cell_raises_or_warns(executed):
    for output in outputs(executed):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
    assert len(pictures(executed)) == 11


def numbers(pattern, text):
    """The groups of a pattern's first match."""
    return map(float, re.search(pattern, text).groups())


def test_the_outputs_have_the_expected_values(executed):
    text = printed(executed)
    loss, ln_v = numbers(r"loss at initialization ([\d.]+), ln\(50304\) = ([\d.]+)", text)
    assert ln_v == round(math.log(50304), 3) and abs(loss - ln_v) < 0.1
    assert re.search(r"lm_head.weight starts at (\d+)\nwte.weight     starts at \1\n"
                     "the same memory: True", text)
    unscaled, scaled = (float(std) for std in re.findall(r"std (\d+\.\d\d)\n", text)[:2])
    assert 8.5 < unscaled < 11.5 and 0.85 < scaled < 1.15  # sqrt(100), and 1
    first, last = numbers(r"loss ([\d.]+) before the first step, .* ([\d.]+) after 49", text)
    assert first > 10 and last < 0.5
    assert "loss / 4: equal to the whole batch's gradient: True, norm 1.000 times as large" in text
    assert "loss / 1: equal to the whole batch's gradient: False, norm 4.000 times as large" in text
    assert "the same tokens: True" in text
    assert "and 11 more blocks like h.0: 124,439,808 parameters" in text
    assert "checkpoints of steps [1, 2, 3, 4]" in text
    predictions = re.findall(r"(?m)^   loss +[\d.]+ \*", text)
    assert len(predictions) == 3  # one for each HellaSwag example


def test_the_training_is_shown_while_it_runs(executed):
    """The training cell once printed only a summary, after minutes without output."""
    text = printed(executed)
    assert re.search(r"(?m)^step +\d+ \| val ", text)
    assert "step 0/4 | loss " in text
    assert executed.updates >= 2  # of the loss curve: at the first step, and at the end


def test_the_cache_is_faster_where_the_text_says_so(executed, committed):
    """The stored times once showed the sampler with the cache slower than the one without it."""
    pattern = r"tokens: .*, ratio +([\d.]+)"
    ratios = [float(ratio) for ratio in re.findall(pattern, printed(committed))]
    assert len(ratios) == 3 and ratios == sorted(ratios) and ratios[-1] > 2
    assert len(re.findall(pattern, printed(executed))) == 3


def test_without_openais_weights_it_uses_the_trained_model(executed):
    text = printed(executed)
    assert "GPT-2's weights are not on this machine" in text
    assert "these are the weights of log/play, step 4" in text


def test_the_text_explains_the_optimizations_that_are_slower(committed):
    """Flash attention and the vocabulary of 50304 were shown as slower without a word."""
    with open(os.path.join(ROOT, "docs", "figures", "ladder.json"), encoding="utf-8") as f:
        rows = json.load(f)["benchmarks"]["ladder"]
    slower = [row["ladder"] for row in rows if row["gain"] < 0.95]
    text, = [cell.source for cell in committed.cells if "## 13. Speed" in cell.source]
    assert slower and all(name in text.lower() for name in slower)


def test_it_is_committed_with_outputs_that_name_no_machine(committed):
    assert all(cell.execution_count for cell in code_cells(committed))
    assert len(pictures(committed)) == 11
    assert all(picture.startswith(b"\x89PNG") for picture in pictures(committed))
    assert os.path.getsize(NOTEBOOK) < 700_000
    with open(NOTEBOOK, encoding="utf-8") as f:
        text = re.sub(r'"image/png": "[^"]*"', "", f.read())
    absolute_path = (r"(?<![\w.])"
                     r"(?:/(?:home|root|tmp|work|usr|opt|mnt|Users)/|[A-Z]:\\\\)[\w./-]*")
    assert re.findall(absolute_path, text) == []
    assert os.uname().nodename not in text


def definitions(nodes):
    """The names of the functions and classes among the nodes of a syntax tree."""
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_it_defines_nothing_that_the_scripts_have(committed):
    ours = set()
    for name in glob.glob("*.py", root_dir=ROOT):
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            ours |= definitions(ast.parse(f.read()).body)
    assert {"train_step", "generate", "GPT"} <= ours
    for cell in code_cells(committed):
        python = re.sub(r"(?m)^%.*$", "", cell.source)  # without the lines of IPython
        nodes = list(ast.walk(ast.parse(python)))
        assert definitions(nodes) == set(), cell.source
        names = [node for node in nodes if isinstance(node, ast.Name)]
        assigned = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        assert not assigned & ours, assigned & ours


def test_the_committed_outputs_are_of_the_committed_code(executed, committed):
    # output that depends neither on the machine nor on random numbers is the same
    for name in ("h.0.attn.c_attn", "<|endoftext|>First Citizen", "GPT-3",
                 "play is not compared with", "Hello, I'm a language model,"):
        before, after = ([line for line in printed(notebook).splitlines() if name in line]
                         for notebook in (committed, executed))
        assert before and before == after
