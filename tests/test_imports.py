"""
What imports what: the modules have no cycle and follow DESIGN's layers, importing a module loads none of the slow packages,
and a script parses its flags before it imports torch.

    .venv/bin/python -m pytest tests/test_imports.py

Needs only requirements-dev.txt.
"""
import ast
import glob
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# each module imports only modules of the layers above it in this list
LAYERS = [
    {"run.cli", "run.files", "sources", "model"},
    {"run.config", "run.runtime", "data"},
    {"run.folder", "fineweb"},
    {"run.weights", "run.reference"},
    {"run.checkpoint", "run.parallel"},
    {"run.settings", "convert", "plots", "sample", "hellaswag"},
    {"train_gpt2"},
]
SCRIPTS = ["train_gpt2", "fineweb", "hellaswag", "sample", "plots", "convert"]
# what only the functions that need it import, and what a script needs whatever its flags are
RARE = {"torch.distributed.fsdp", "datasets", "transformers", "matplotlib"}
SLOW = {"torch", "tiktoken", "pyarrow", "numpy", "requests", "tqdm", *RARE}


def imports_of(path):
    """Names of the modules that a file imports anywhere in it, inside of functions too: {"os", "torch.nn", "model", ...}."""
    with open(path, encoding="utf-8") as f:
        nodes = list(ast.walk(ast.parse(f.read())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"run.{alias.name}" for alias in node.names} if node.module == "run" else {node.module}
    return names


def our_imports():
    """{module: set of our own modules that it imports}, of the root and of run/: {"data": {"run.files"}, ...}."""
    paths = {os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, "."): path for pattern in ("*.py", "run/[!_]*.py")
             for path in glob.glob(os.path.join(ROOT, pattern))}
    return {module: imports_of(path) & paths.keys() for module, path in paths.items()}


def test_every_module_imports_only_modules_of_the_layers_below_it():
    """Hence there is no cycle. bench is a package above all of them."""
    layer_of = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    imports = our_imports()
    imports["model"].discard("run.weights")  # inside from_pretrained, which the lecture has there
    imports["run.config"].discard("model")   # inside functions: flags are parsed before PyTorch is imported
    assert imports.keys() == layer_of.keys()
    wrong = [f"{module} imports {other}" for module in sorted(imports) for other in sorted(imports[module])
             if layer_of[other] >= layer_of[module]]
    assert wrong == []
    assert "model" in imports["run.weights"] and "run.checkpoint" in imports["train_gpt2"]  # imports_of finds them


def test_only_training_imports_a_command():
    imports = our_imports()
    found = {(module, command) for module in imports for command in imports[module] & set(SCRIPTS)}
    assert found == {("train_gpt2", "hellaswag"), ("train_gpt2", "sample"), ("train_gpt2", "plots")}


def test_imports_inside_of_functions_are_found(tmp_path):
    (tmp_path / "a.py").write_text("import os, sys as system\ndef f():\n    if 1:\n        from torch.nn import Linear as L\n")
    assert imports_of(tmp_path / "a.py") == {"os", "sys", "torch.nn"}


def loaded_by(*arguments, status=0):
    """Names of the modules that `python arguments`, which ends with this status, loads."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == status, [line for line in done.stderr.splitlines() if line not in imports]
    return {line.split("|")[-1].strip() for line in imports}


def test_import_model_loads_nothing_slow():
    names = loaded_by("-c", "import model")
    assert names & {*RARE, "huggingface_hub", "tiktoken", "run"} == set() and "torch.nn.modules.linear" in names


def test_importing_the_scripts_loads_nothing_that_is_rarely_needed():
    names = loaded_by("-c", f"import {', '.join(SCRIPTS)}")
    assert names & RARE == set() and {"torch.nn.modules.linear", "pyarrow"} <= names


@pytest.mark.parametrize("flag, status", [("--help", 0), ("--no-such-flag", 2)])
def test_flags_are_parsed_before_anything_slow_is_imported(flag, status):
    """--help took 1.4 s, of which torch's import was 1.2 s."""
    for script in [*([f"{script}.py"] for script in SCRIPTS), ["-m", "bench"]]:
        names = loaded_by(*script, flag, status=status)
        assert names & SLOW == set() and "run.cli" in names, script
