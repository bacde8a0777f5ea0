"""
README.md and docs/: every command is known, those that can run offline run, and every name they
mention exists.

    ./test.sh tests/test_docs.py            # the names and the list of commands
    ./test.sh --all tests/test_docs.py      # and the commands, in a folder with a run of two steps
"""
import ast
import glob
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

import convert
from common import ROOT, launcher, python, text_of_words
from model import GPT, GPTConfig

PAGES = ["README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]

# Commands that the test does not run, as regular expressions, and why.
NOT_RUN = {
    r"\./train\.sh.*": "installs and trains for minutes",
    r"\./test\.sh.*": "is what runs this test",
    r"source .*": "only changes the shell",
    r"python fineweb\.py( --dataset .*)?": "downloads from the Hub",
    r"hf download .*": "downloads from the Hub",
    r"python hellaswag\.py": "downloads the examples",
    r"python sample\.py gpt2-xl .*": "downloads OpenAI's weights",
    r"python plots\.py log/gpt2-124M --reference.*": "needs a run on FineWeb-Edu",
    r"torchrun .*": "needs several GPUs or machines; tests/test_parallel.py runs two ranks",
    r"sbatch .*": "needs Slurm; tests/test_faults.py runs it with stand-ins",
    r"python -m bench .*": "takes minutes; tests/test_bench.py runs the package",
    r"python train_gpt2\.py --data SHARDS .*": "takes minutes",
}


def read(page):
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        return f.read()


def commands(page):
    """The lines of a page's sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", read(page), re.M | re.S)
    return "".join(blocks).splitlines()


def is_run(command):
    return not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def names_in(path):
    """Functions and classes of a Python file, methods as Class.method, and its constants."""
    names = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body
                      if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_there_are_commands_of_both_kinds():
    found = [command for page in PAGES for command in commands(page)]
    num_run = sum(map(is_run, found))
    assert num_run >= 12 and len(found) - num_run >= 12
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for command in found), pattern


def test_every_flag_of_a_command_exists():
    for page in PAGES:
        for command in commands(page):
            found = re.search(r" (\w+\.py)\b(.*)", command)
            if not found:
                continue
            script, arguments = found.groups()
            text = read(script)
            if script == "train_gpt2.py":
                text += read("run/config.py")
            for flag in re.findall(r" --([a-z][a-z-]*)", arguments):
                field = flag.replace("-", "_")
                assert f'"--{flag}"' in text or f"    {field}: " in text, (command, flag)


def test_the_file_table_names_every_tracked_file():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("not a git repository")
    table = read("README.md").split("## The files")[1].split("##")[0]
    top = {name.split("/")[0] + "/" * ("/" in name) for name in files.stdout.split()}
    hidden = {name for name in top if name.startswith(".")}
    usual = {"README.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "constraints.txt",
             "pyproject.toml"}
    for name in top - hidden - usual:
        assert f"`{name}`" in table, name
    allowed = {name.rstrip("/") for name in top} | {"DataLoaderLite"}
    for name in re.findall(r"`([\w/.]+)`", table):
        assert name.rstrip("/") in allowed, name


def test_every_row_of_the_lecture_map_is_found():
    rows = read("README.md").split("## From the lecture to the code")[1].split("\n##")[0]
    checked = 0
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", rows):
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in names_in(path), (path, name)
            checked += 1
    assert checked > 30


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", read(page)):
            path = os.path.join(ROOT, os.path.dirname(page), target)
            assert target.startswith("https://") or os.path.exists(path), (page, target)


def tables(page):
    """The tables of a page: a list of rows, each a list of cells, the header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", read(page), re.M)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            for block in blocks]


def test_published_figures_have_an_address():
    """Hours of other people's runs were attributed to the wrong project."""
    sources = []
    for page in PAGES:
        for header, _, *rows in tables(page):
            if "source" in header:
                sources += [row[header.index("source")] for row in rows]
    assert len(sources) > 15
    for source in filter(None, sources):
        assert "](https://" in source or re.search(r"\bours?\b", source), source


@pytest.mark.slow
def test_the_script_that_does_by_hand_what_ddp_does_runs_on_two_ranks(tmp_path):
    """Docs/hardware.md's; each rank compares three gradients with DDP's."""
    script, = re.findall(r"^```python\n(.*?)^```", read("docs/hardware.md"), re.M | re.S)
    (tmp_path / "ddp_steps.py").write_text(script)
    process = python(*launcher(2), "ddp_steps.py", cwd=tmp_path, timeout=200,
                     env={"PYTHONPATH": ROOT})
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.count("True") == 6 and "False" not in process.stdout


@pytest.mark.slow
def test_every_command_that_can_run_offline_runs(tmp_path):
    """In a folder with input.txt, the files that the commands name, and a run of two steps as
    log/shakespeare."""
    shutil.copy(os.path.join(ROOT, "input.txt"), tmp_path)
    shutil.copy(os.path.join(ROOT, "input.txt"), tmp_path / "my_book.txt")
    os.makedirs(tmp_path / "my_texts")
    for i in range(20):
        (tmp_path / "my_texts" / f"{i}.txt").write_text(text_of_words(200))
    os.makedirs(tmp_path / "hellaswag")
    endings = ["is king.", "will come to this house.", "is not", "and my lord"]
    example = {"ctx": "the queen", "activity_label": "Reigning", "endings": endings}
    lines = [json.dumps({**example, "label": label}) + "\n" for label in range(4)]
    (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text("".join(lines))

    # --init-from gpt2 reads a local folder of that name
    convert.write_hf(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16)), str(tmp_path / "gpt2"))

    def run(command, *more):
        _, script, *arguments = shlex.split(command)
        return python(os.path.join(ROOT, script), *arguments, *more, cwd=tmp_path, timeout=300,
                      input="Once upon a time\n")

    short = ["--max-steps", "2", "--val-tokens", "2048", "--sample-every", "0", "--compile", "off"]
    process = run("python train_gpt2.py --preset shakespeare", *short)
    assert process.returncode == 0, process.stderr
    shutil.copytree(tmp_path / "log" / "shakespeare", tmp_path / "log" / "gpt2-124M")
    for page in PAGES:
        for command in filter(is_run, commands(page)):
            more = []
            if "train_gpt2.py" in command and not re.search("--resume|--dry-run", command):
                more = short
            elif "convert.py" in command and "info" not in command:
                more = ["--overwrite"]
            process = run(command, *more)
            assert process.returncode == 0, (command, process.stderr[-2000:])
            assert process.stdout, command
