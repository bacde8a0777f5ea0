"""
What imports what: every module imports only modules of lower layers, importing one loads no slow
package, and a script parses its flags before it imports PyTorch.

    ./test.sh tests/test_imports.py
"""
import ast
import glob
import os

import pytest

from common import ROOT, python

# from the lowest to the highest: a module imports only modules of the layers above its own line
LAYERS = [
    {"run.cli", "run.files", "model"},
    {"run.config", "run.runtime", "data"},
    {"run.folder", "run.prepare"},
    {"run.weights", "run.reference", "sources"},
    {"run.checkpoint", "run.parallel", "run.tokenizer", "fineweb"},
    {"run.settings", "convert", "plots", "sample", "hellaswag"},
    {"train_gpt2"},
]
# imports inside of functions that the layers do not count
EXCEPTIONS = {
    ("model", "run.weights"),  # in from_pretrained, which the lecture has in model.py
    ("run.config", "model"),   # the flags are parsed before PyTorch is imported
}
SCRIPTS = ["train_gpt2", "fineweb", "hellaswag", "sample", "plots", "convert"]

# imported only inside of the functions that need them
RARE = {"torch.distributed.fsdp", "datasets", "transformers", "matplotlib"}
# not imported before the flags are parsed
SLOW = {"torch", "tiktoken", "pyarrow", "numpy", "requests", "tqdm", *RARE}


def imports_of(path):
    """The modules that a file imports, inside of functions too: {"os", "torch.nn", ...}."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "run":
            names |= {f"run.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def our_imports():
    """{(importing, imported)}: the pairs of our modules, of the root and of run/."""
    paths = glob.glob("*.py", root_dir=ROOT) + glob.glob("run/[!_]*.py", root_dir=ROOT)
    modules = {path.removesuffix(".py").replace(os.sep, "."): path for path in paths}
    return {(module, imported) for module, path in modules.items()
            for imported in imports_of(os.path.join(ROOT, path)) if imported in modules}


def test_every_module_imports_only_modules_of_lower_layers():
    """Hence there is no cycle. bench is a package above all of them."""
    layer_of = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    imports = our_imports()
    assert ("run.weights", "model") in imports and ("train_gpt2", "run.checkpoint") in imports
    wrong = [f"{module} imports {imported}" for module, imported in sorted(imports - EXCEPTIONS)
             if layer_of[imported] >= layer_of[module]]
    assert wrong == []


def test_only_training_imports_a_command():
    found = {pair for pair in our_imports() if pair[1] in SCRIPTS}
    assert found == {("train_gpt2", "hellaswag"), ("train_gpt2", "sample"), ("train_gpt2", "plots")}


def loaded_by(*arguments, status=0, stdout=None):
    """The modules that `python arguments` loads; asserts its exit status, and stdout if given."""
    process = python("-X", "importtime", *arguments)
    assert process.returncode == status, process.stderr[-2000:]
    assert stdout is None or process.stdout == stdout
    return {line.split("|")[-1].strip() for line in process.stderr.splitlines()
            if line.startswith("import time:")}


IMPORT_MODEL = """
import torch
before = torch.get_rng_state()
import model
assert torch.equal(before, torch.get_rng_state())
"""


def test_import_model_loads_nothing_slow_prints_nothing_and_uses_no_random_numbers():
    loaded = loaded_by("-c", IMPORT_MODEL, stdout="")
    assert "torch.nn.modules.linear" in loaded
    assert not loaded & {*RARE, "huggingface_hub", "tiktoken", "run"}


def test_importing_the_scripts_loads_nothing_that_is_rarely_needed():
    loaded = loaded_by("-c", f"import {', '.join(SCRIPTS)}")
    assert {"torch.nn.modules.linear", "pyarrow"} <= loaded
    assert not loaded & RARE


@pytest.mark.parametrize("flag, status", [("--help", 0), ("--no-such-flag", 2)])
def test_flags_are_parsed_before_anything_slow_is_imported(flag, status):
    """--help took 1.4 s, of which PyTorch's import was 1.2 s."""
    for script in [*([f"{name}.py"] for name in SCRIPTS), ["-m", "bench"]]:
        loaded = loaded_by(*script, flag, status=status)
        assert "run.cli" in loaded and not loaded & SLOW, script
