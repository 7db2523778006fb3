"""The shape of the project: imports run one way, every file and function is as long as one reads at a sitting, and what is
started says something at once."""
import ast
import os
import pty
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["data", "model", "gatera", "eval", "train"]  # each imports from those before it alone
FILES = [*(ROOT / f"{name}.py" for name in ORDER[1:]), *sorted((ROOT / "data").glob("*.py"))]
NAMES = [str(file.relative_to(ROOT)) for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_imports_run_one_way(file):
    own = ORDER.index("data" if file.parent.name == "data" else file.stem)
    for node in ast.walk(ast.parse(file.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected an absolute import"
            modules = [node.module]
        for module in modules:
            top = module.split(".")[0]
            assert top not in ORDER or ORDER.index(top) < max(own, 1), f"line {node.lineno} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_no_function_is_longer_than_a_screen(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 75, f"{node.name} has {lines} lines, expected at most 75"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_module_has_one_plain_job(file):
    text = file.read_text()
    longest = 300 if file.parent.name == "data" else 600
    assert len(text.splitlines()) <= longest, f"{len(text.splitlines())} lines, expected at most {longest}"
    assert "leave out" not in text, "expected nothing that a reading can leave out"
    assert file.name == "__init__.py" or ast.get_docstring(ast.parse(text)), "expected a docstring that says what it is for"


PROGRAMS = ("train.py", "eval.py", "data/prepare.py", "data/download.py", "data/render.py", "data/__init__.py")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PROGRAMS])
def test_a_module_that_is_started_says_what_to_run_instead(name, monkeypatch):
    """As `python NAME` would: from its own folder, where `import data` has not found anything yet."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / name)])
    monkeypatch.setattr(sys, "path", [str((ROOT / name).parent), *(path for path in sys.path if Path(path) != ROOT)])
    for module in [module for module in sys.modules if module.split(".")[0] == "data"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match=f"^{name} is .*python train.py --preset quickstart"):
        runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.mark.parametrize("name", ["train.py", "eval.py", "data/prepare.py"])
def test_a_terminal_hears_of_the_start_before_the_slow_imports(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit")
    (tmp_path / "numpy.py").write_text("raise SystemExit")
    ours, theirs = pty.openpty()
    start = [sys.executable, str(ROOT / name), "--help"]
    there = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(start, env=there, stderr=theirs, check=True)
    os.close(theirs)  # so that reading ends
    assert os.read(ours, 1000) == b"importing PyTorch\r\n"
    assert subprocess.run(start, env=there, capture_output=True, check=True).stderr == b""


def test_what_few_need_is_not_imported_at_the_start():
    """torch._dynamo, the compiler, takes as long as all the rest; fully_shard would bring it, too."""
    imports = "import sys, train; assert not {'torch._dynamo', 'matplotlib', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", imports], cwd=ROOT, check=True)
