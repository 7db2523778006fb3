"""What eval.py writes: nothing of others is overwritten, nothing is half there, and every fault is one line."""
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import fuzz
from conftest import write_llama
from data import output
from data.cli import run_command
from data.files import UserError, fingerprint
from data.results import EVALUATION
from data.weights import save_pretrained
from gatera import load_adapter, save_adapter
from model import Transformer
from test_eval import SAMPLE, write_run

# Each process that gets killed is a fork of one that has torch loaded already and has computed nothing yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "train", "test_output", "matplotlib.figure"])

GATES = ("gates.json", "gates.html", "gates-layers.png", "gates-histogram.png", "gates-position.png", "training.png")
COMPARISON = ("compare.json", "losses.png")


def aside(name):
    """What a file that is moved aside is called: an a.png is still a picture."""
    return f"{Path(name).stem}-1{Path(name).suffix}"




@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A tiny base, the records, a gated run and an ungated one, as train.py leaves them, and their evaluations."""
    root = tmp_path_factory.mktemp("template")
    before = Path.cwd()
    os.chdir(root)
    write_llama(Path("llama"))
    for task in ("piqa", "boolq"):
        shutil.copytree(SAMPLE / task, Path("data") / task)
    for name, gate in (("run", "token"), ("plain", "none")):
        write_run(Path(name), "llama", gate=gate, data="data")
        evaluation.main(["--run", name])
        Path("evaluated").mkdir(exist_ok=True)
        Path(name, "eval").rename(Path("evaluated", name))
    os.chdir(before)
    return root


@pytest.fixture
def scored(place):
    """The place with both runs evaluated."""
    for name in ("run", "plain"):
        shutil.copytree(Path("evaluated", name), Path(name, "eval"))
    return place


OUT = Path("run/eval/best-cloze")


def score(*flags):
    return evaluation.main(["--run", "run", *map(str, flags)])


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def set_fields(file, **fields):
    file = Path(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(*argv) -> str:
    with pytest.raises(UserError) as caught:
        evaluation.main([*map(str, argv)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------- nothing is overwritten

@pytest.mark.parametrize("there", [
    {"predictions.jsonl": "mine"}, {"results.json": "mine"}, {"results.json": "[1]"}, {"results.json": '{"acc": 3}'},
    {"results.json": '{"acc": 3}', "predictions.jsonl": '{"task": "piqa"}\n'}])
def test_files_that_are_no_evaluation_are_moved_aside(there, place, capsys):
    expected = score("--out", "clean")["tasks"]
    OUT.mkdir(parents=True)
    for name, text in there.items():
        (OUT / name).write_text(text)
    assert score()["tasks"] == expected
    kept = {name: (OUT / aside(name)).read_text() for name in there}
    assert kept == there and len(contents(OUT)) == 2 + len(there)
    assert f"{OUT} held files that are no evaluation, now in {OUT}/" in capsys.readouterr().out
    assert score()["tasks"] == expected and len(contents(OUT)) == 2 + len(there)  # its own is no file of others


def test_results_without_their_predictions_are_moved_aside(place):
    expected = score()["tasks"]
    (OUT / "predictions.jsonl").unlink()
    assert score()["tasks"] == expected and set(contents(OUT)) == {*EVALUATION, "results-1.json"}


def test_predictions_of_older_rules_are_not_continued(place, monkeypatch, capsys):
    score()
    before = contents(OUT)
    monkeypatch.setattr(evaluation, "RULES", 3)
    score("--tasks", "piqa")
    assert {name: (OUT / aside(name)).read_bytes() for name in EVALUATION} == before
    assert "another evaluation (rules differ)" in capsys.readouterr().out
    facts = json.loads((OUT / "results.json").read_text())
    del facts["configuration"]["rules"]  # as it was before there were numbers
    (OUT / "results.json").write_text(json.dumps(facts))
    score("--tasks", "piqa")
    assert (OUT / "results-2.json").exists() and (OUT / "predictions-2.jsonl").exists()


MODES = {"gates": (GATES, ["--run", "run", "--gates", "--limit", "1"]),
         "compare": (COMPARISON, ["--compare", "run", "plain"])}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_others_are_moved_aside_and_ours_replaced(mode, scored, capsys):
    names, argv = MODES[mode]
    Path("out").mkdir()
    for name in names:
        Path("out", name).write_text(f"my {name}")
    Path("out/diary.txt").write_text("mine")
    evaluation.main([*argv, "--out", "out"])
    for name in names:
        assert Path("out", aside(name)).read_text() == f"my {name}" != Path("out", name).read_bytes()
    assert f"out held files of something else, now in out/{aside(names[0])} and out/" in capsys.readouterr().out
    everything = {*names, *(aside(name) for name in names), "diary.txt"}
    assert set(contents(Path("out"))) == everything
    evaluation.main([*argv, "--out", "out"])  # the same thing again
    assert set(contents(Path("out"))) == everything and "held" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_that_stands_alone_is_of_others(mode, scored):
    names, argv = MODES[mode]
    Path("out").mkdir()
    Path("out", names[-1]).write_text("mine")
    evaluation.main([*argv, "--out", "out"])
    assert Path("out", aside(names[-1])).read_text() == "mine"
    assert set(contents(Path("out"))) == {*names, aside(names[-1])}


def test_gates_of_another_run_are_moved_aside(place):
    for run in ("run", "again"):
        if run == "again":
            shutil.copytree("run", run)
        evaluation.main(["--run", run, "--gates", "--limit", "1", "--out", "out"])
    assert json.loads(Path("out/gates-1.json").read_text())["title"].startswith("run: ")
    assert json.loads(Path("out/gates.json").read_text())["title"].startswith("again: ")
    assert set(contents(Path("out"))) == {*GATES, *(aside(name) for name in GATES)}


def test_a_picture_that_we_did_not_draw_is_of_others(place):
    Path("run/metrics.jsonl").rename("metrics")
    argv = ["--run", "run", "--gates", "--limit", "1", "--out", "out"]
    evaluation.main(argv)
    Path("out/training.png").write_text("mine")
    Path("metrics").rename("run/metrics.jsonl")
    evaluation.main(argv)
    assert Path("out/training-1.png").read_text() == "mine" and set(contents(Path("out"))) == {*GATES, "training-1.png"}


def test_half_files_of_a_killed_process_go_and_those_of_others_stay(scored):
    for directory in (OUT, Path("run/eval/best-gates-cloze-1"), Path("out")):
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*EVALUATION, *GATES, *COMPARISON, "diary"):
            (directory / f".{name}.123.tmp").write_text("half")
    score()
    score("--gates", "--limit", "1")
    evaluation.main([*MODES["compare"][1], "--out", "out"])
    for directory, names in ((OUT, EVALUATION), (Path("run/eval/best-gates-cloze-1"), GATES), (Path("out"), COMPARISON)):
        left = {path.name for path in directory.glob(".*.tmp")}
        assert left == {f".{name}.123.tmp" for name in {*EVALUATION, *GATES, *COMPARISON, "diary"} - {*names}}


# ---------------------------------------------------------------------------------------------- killed, and again

def killed_at(number, argv):
    """Runs eval.py in this process, which kills itself before its `number`-th change of anything on the disk."""
    calls = []

    def counting(original):
        def call(*args, **options):
            calls.append(original)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        return call

    for name in ("replace", "rename", "fsync", "truncate", "mkdir", "chmod", "unlink"):
        setattr(os, name, counting(getattr(os, name)))
    evaluation.json_lines = counting(evaluation.json_lines)  # what follows appends lines
    shutil.copyfile = counting(shutil.copyfile)
    evaluation.main(argv)


def kill_at(number, argv) -> bool:
    """Whether it was killed; it was not if it has fewer calls."""
    process = PROCESSES.Process(target=killed_at, args=(number, argv))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def moments(argv, first=1, step=1):
    """Yields after each kill, at one moment later each time, until there is none left."""
    number = first
    while kill_at(number, argv):
        yield number
        number += step
    assert number > first + 3 * step


def test_an_evaluation_killed_at_any_moment_ends_the_same(place):
    score()
    whole = contents(OUT)
    shutil.rmtree("run/eval")
    for _ in moments(["--run", "run"]):
        score()
        assert contents(OUT) == whole
        shutil.rmtree("run/eval")


def test_killed_while_it_goes_on_it_ends_the_same(place):
    """With a task that joins others."""
    score("--tasks", "piqa")
    first = contents(OUT)
    score("--tasks", "boolq")
    whole = contents(OUT)
    for _ in moments(["--run", "run", "--tasks", "boolq"], step=2):
        score("--tasks", "boolq")
        assert contents(OUT) == whole
        for name, content in first.items():
            (OUT / name).write_bytes(content)


def test_killed_while_it_moves_another_evaluation_aside_pairs_stay_together(place):
    load_adapter(model := Transformer.from_pretrained("llama"), "run/best")
    score()
    old = contents(OUT)
    for p in model.parameters():
        p.data += 0.01 * p.requires_grad
    save_adapter(model, Path("run/best"))
    score("--out", "clean")
    new = contents(Path("clean"))
    shutil.rmtree("clean")
    for _ in moments(["--run", "run"], step=2):
        score()
        found = contents(OUT)
        assert {name: found[name] for name in EVALUATION} == new
        assert {name: found[aside(name)] for name in EVALUATION} == old and len(found) == 4
        shutil.rmtree(OUT)
        OUT.mkdir()
        for name, content in old.items():
            (OUT / name).write_bytes(content)


@pytest.mark.parametrize("name", EVALUATION)
def test_moved_aside_after_a_kill_a_pair_gets_one_number(name, tmp_path):
    """Also beside lone files of others that were moved aside before."""
    (tmp_path / aside(name)).write_text("of others")
    for file in EVALUATION:
        (tmp_path / file).write_text("a pair")
    (tmp_path / "results.json").rename(tmp_path / "results-2.json")  # killed here
    output.set_aside(tmp_path, EVALUATION, "a half")
    assert (tmp_path / "predictions-2.jsonl").read_text() == "a pair"
    output.set_aside(tmp_path, EVALUATION, "nothing")
    (tmp_path / "predictions.jsonl").write_text("alone")
    output.set_aside(tmp_path, EVALUATION, "a file")
    assert (tmp_path / "predictions-3.jsonl").read_text() == "alone"


def test_cut_at_any_byte_it_ends_the_same(place, monkeypatch):
    score()
    whole, lines = contents(OUT), (OUT / "predictions.jsonl").read_bytes()
    shutil.rmtree(OUT)
    rank, calls = evaluation.rank_choices, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rank(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "rank_choices", stop)
        score()
    first = contents(OUT)  # piqa is done, boolq was begun
    done = len(first["predictions.jsonl"])
    assert 0 < done < len(lines)
    for cut in (*range(done, len(lines), 97), len(lines) - 1, len(lines)):
        (OUT / "results.json").write_bytes(first["results.json"])
        (OUT / "predictions.jsonl").write_bytes(lines[:cut])
        score()
        assert contents(OUT) == whole


@pytest.mark.parametrize("kind", ["hf", "peft"])
def test_an_export_killed_at_any_moment_is_whole_the_next_time(kind, place):
    argv = ["--run", "plain", "--export", kind, "exports/model"]
    evaluation.main(argv)
    whole = contents(Path("exports"))
    shutil.rmtree("exports")
    for _ in moments(argv, step=2):
        model = Path("exports/model")
        assert not model.exists() or contents(model.parent) == whole  # nobody finds half of one
        if not model.exists():
            evaluation.main(argv)
        assert contents(Path("exports")) == whole and [path.name for path in Path("exports").iterdir()] == ["model"]
        shutil.rmtree("exports")


def test_gates_killed_at_any_moment_are_ours(place):
    argv = ["--run", "run", "--gates", "--limit", "1", "--out", "out"]
    for _ in moments(argv, step=9):
        evaluation.main(argv)
        assert set(contents(Path("out"))) == {*GATES}
        shutil.rmtree("out")


# ----------------------------------------------------------------------------------- what a run was trained on

def test_a_run_is_scored_on_its_own_data(place, capsys, monkeypatch):
    record = {"task": "piqa", "question": "Mine?", "choices": ["yes", "no"], "label": 0}
    Path("data/piqa/test.jsonl").write_text(json.dumps(record) + "\n")
    summary = score()
    assert summary["tasks"]["piqa"]["n"] == 1 and summary["data_directory"] == "data"
    assert json.loads((OUT / "results.json").read_text())["data_directory"] == "data"
    assert "questions (test) of data\n" in capsys.readouterr().out
    assert score("--data", SAMPLE, "--out", "other")["data_directory"] == str(SAMPLE)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    message = refused("--run", "../run", "--init", "../llama")
    assert "data: no such directory, from which ../run had its records" in message and "pass --data" in message
    evaluation.main(["--run", "../run", "--init", "../llama", "--prompt", "why"])  # no records are needed


@pytest.mark.parametrize("stored, loaded", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")])
def test_a_base_is_known_in_another_dtype(stored, loaded, llama):
    a, b = (Transformer.from_pretrained(llama, dtype=getattr(torch, name)) for name in (stored, loaded))
    assert fingerprint(a.named_parameters()) == fingerprint(b.named_parameters())


def test_another_base_is_refused_or_named(place, capsys):
    model = Transformer.from_pretrained("llama")
    set_fields("run/config.json", base_sha256=fingerprint(model.named_parameters()), dtype="torch.bfloat16")
    score()
    with torch.no_grad():
        model.blocks[1].attn.q_proj.weight[0, 0] += 0.5
    save_pretrained(model, "other", "llama")
    before = contents(Path("run"))
    told = "WARNING: other: its weights are not those that run was trained on (llama"
    evaluation.main(["--run", "run", "--init", "other", "--prompt", "why"])
    assert told in capsys.readouterr().out
    evaluation.main(["--run", "run", "--init", "other", "--dtype", "float16", "--prompt", "why"])  # cannot be told
    assert told not in capsys.readouterr().out and contents(Path("run")) == before
    set_fields("run/config.json", base_sha256=fingerprint(model.named_parameters()), dtype="torch.float32")
    assert "not those that run was trained on" in refused("--run", "run")  # llama has changed since


def test_the_advice_repeats_what_was_asked_for(place):
    message = refused("--compare", "run", "run", "--protocol", "generate", "--beams", "2", "--limit", "3", "--split",
                      "val", "--adapter", "last")
    command = message.partition("first: python eval.py ")[2]
    assert set(re.findall(r"--\S+ \S+", command)) == {
        "--run run", "--protocol generate", "--beams 2", "--limit 3", "--split val", "--adapter last"}
    assert refused("--compare", "my run", "my run").endswith("first: python eval.py --run 'my run'")
    message = refused("--compare", "my run", "plain", "--limit", "2")  # all that are missing, and one command for them
    assert message.startswith("my run, plain: no results called best-cloze-2 there") and message.endswith(
        """first: for run in 'my run' plain; do python eval.py --run "$run" --limit 2; done""")


# ---------------------------------------------------------------------------------------------------- faults

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_and_loses_nothing(error, place, monkeypatch):
    score("--out", "whole")
    ranked = evaluation.rank_choices

    def fail(model, tokenizer, records, *rest):
        if records[0]["task"] == "boolq":
            raise error
        return ranked(model, tokenizer, records, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "rank_choices", fail)
        message = refused("--run", "run")
    assert message.startswith("out of memory: use --dtype bfloat16, a smaller --max-len") and "goes on from there" in message
    monkeypatch.setattr(evaluation, "rank_choices", lambda model, tokenizer, records, *rest: (
        pytest.fail("scored twice") if records[0]["task"] == "piqa" else ranked(model, tokenizer, records, *rest)))
    score()
    assert contents(OUT) == contents(Path("whole"))


def test_other_errors_are_not_hidden(place, monkeypatch):
    monkeypatch.setattr(evaluation, "rank_choices", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score()
    monkeypatch.setattr(evaluation, "rank_choices", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch"):
        score()


def with_small_files(size, argv, scored):
    ranked, calls = evaluation.rank_choices, []

    def limit():
        if len(calls) == scored:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        calls.append(1)

    def main():
        limit()
        evaluation.rank_choices = lambda *args: (ranked(*args), limit())[0]
        try:
            evaluation.main(argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with open("message", "w") as sys.stderr:
        run_command(main)


def on_a_full_disk(size, *argv, scored=0) -> str:
    """The one line with which eval.py ends where no file can grow over `size` bytes, once so many tasks are scored."""
    Path("message").unlink(missing_ok=True)
    process = PROCESSES.Process(target=with_small_files, args=(size, list(argv), scored))
    process.start()
    process.join()
    message = Path("message").read_text()
    assert process.exitcode == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize("size, scored", [(100, 0), (1500, 0), (100, 1), (600, 2), (700, 2), (1500, 2)])
def test_a_full_disk_loses_no_prediction(size, scored, place):
    """In results.json at the start and later, and in the middle of predictions."""
    score("--out", "whole")
    assert "File too large" in on_a_full_disk(size, "--run", "run", scored=scored)
    score()
    assert contents(OUT) == contents(Path("whole"))


@pytest.mark.parametrize("kind, sizes", [("hf", [100, 7_000, 40_000]), ("peft", [100, 3_000])])
def test_a_full_disk_leaves_no_half_export(kind, sizes, place):
    argv = ["--run", "plain", "--export", kind, "model"]
    for size in sizes:
        assert "File too large" in on_a_full_disk(size, *argv)
        assert not Path("model").exists() and not list(Path().glob(".model*"))
    evaluation.main(argv)
    assert contents(Path("model"))


def test_a_full_disk_while_pictures_are_drawn_is_one_line(scored):
    for names, argv in MODES.values():
        assert "File too large" in on_a_full_disk(5_000, *argv, "--out", "out")
        evaluation.main([*argv, "--out", "out"])
        assert set(contents(Path("out"))) == {*names}
        shutil.rmtree("out")


def test_an_export_goes_where_nothing_is(place, monkeypatch):
    argv = ["--run", "plain", "--export", "hf"]
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    evaluation.main([*argv, "link"])
    assert Path("link").is_symlink() and Path("empty/model.safetensors").exists()
    assert "the directory is not empty" in refused(*argv, "link")
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert "expected a new directory, such as model" in refused("--run", "../plain", "--export", "hf", ".")
    assert Path("../here").exists()


def test_two_exports_at_once_do_not_mix(place):
    with output.written_whole(Path("model")) as whole:
        (whole / "half").write_text("of another process")
        assert "another run is writing there" in refused("--run", "plain", "--export", "peft", "model")
    assert set(contents(Path("model"))) == {"half"}


def test_a_prompt_needs_no_place_to_write(place, monkeypatch):
    Path("out").write_text("a file")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and access(path, mode))
    before = contents(Path("run"))
    evaluation.main(["--run", "run", "--prompt", "why"])
    evaluation.main(["--init", "llama", "--prompt", "why"])
    assert contents(Path("run")) == before
    assert "--out run/eval/best-cloze: no permission to write to" in refused("--run", "run")
    assert "--out run/eval/best-gates-cloze: no permission to write to" in refused("--run", "run", "--gates")


def damaged(file, change):
    """`change` of what a JSON file holds, or of the first line of a .jsonl file."""
    file = Path(file)
    first, rest = (file.read_text(), "") if file.suffix == ".json" else file.read_text().split("\n", 1)
    value = json.loads(first)
    value = change(value) or value
    file.write_text(json.dumps(value) + ("\n" + rest if rest else ""))


def put(*path):
    """Puts the last of `path` at the others, or takes that field away if the last is `put`."""
    def change(value):
        *keys, last, new = path
        for key in keys:
            value = value[key]
        if new is put:
            del value[last]
        else:
            value[last] = new
    return change


RESULTS = [put("tasks", None), put("tasks", []), put("tasks", "piqa", None), put("tasks", "piqa", "n", "4"),
           put("tasks", "piqa", "n", 10**400), put("tasks", "piqa", "n", -1), put("tasks", "piqa", "n", 3),
           put("tasks", "piqa", "acc", None), put("tasks", "piqa", "interval", 3), put("tasks", "piqa", "interval", [None, 1]),
           put("tasks", "piqa", "cut", []), put("tasks", "boolq", "acc_norm", put),
           put("data", None), put("data", 3), put("data", "piqa", put), put("data", "piqa", []),
           put("configuration", None), put("configuration", "base_sha256", 3), put("configuration", "dtype", None),
           put("configuration", "protocol", ["cloze"]), put("configuration", "protocol", "vibes"),
           put("settings", 3), put("settings", put), put("settings", []),
           put("predictions", None), put("predictions", "bytes", "3"), put("predictions", "bytes", -1),
           put("predictions", "bytes", 10), put("predictions", "bytes", 10**400), put("predictions", "sha256", []),
           put("predictions", "sha256", "0"), lambda value: [value], lambda value: {"acc": 1}]
PREDICTIONS = [put("label", []), put("label", 7), put("label", None), put("label", True), put("label", 10**400),
               put("index", 10**400), put("index", -1), put("index", "0"), put("index", 1), put("index", None),
               put("scores", put), put("scores", None), put("scores", {}), put("scores", ["1", "2"]), put("scores", []),
               put("prediction", put), put("prediction", 5), put("prediction", [0]), put("prediction_norm", None),
               put("task", []), put("task", "copa"), put("task", put), put("cut", 3), lambda value: [value],
               lambda value: {"a": 1}, put("label", 1), put("label", 0)]


@pytest.mark.parametrize("file, changes", [("results.json", RESULTS), ("predictions.jsonl", PREDICTIONS)],
                         ids=["results", "predictions"])
def test_damaged_results_are_one_line(file, changes, scored):
    """Or are moved aside as another evaluation; nothing is lost."""
    argv = ["--run", "run", "--tasks", "piqa"]
    before = contents(OUT)
    refusals = 0
    for number, change in enumerate(changes):
        for name, content in before.items():
            (OUT / name).write_bytes(content)
        damaged(OUT / file, change)
        now = contents(OUT)
        if now == before:  # it was the label already
            continue
        message = refused("--compare", "run", "plain")
        assert "run/eval/best-cloze" in message, number
        try:
            evaluation.main(argv)
        except UserError as error:
            assert "\n" not in str(error) and str(OUT) in str(error) and contents(OUT) == now
            refusals += 1
        else:
            moved = {name: (OUT / aside(name)).read_bytes() for name in before}
            assert moved == now, number
            shutil.rmtree(OUT)
            OUT.mkdir()
    assert refusals >= len(changes) * 2 // 3


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\xff\n", b"nonsense\n", b"[" * 99_999 + b"\n", b"9" * 9_999 + b"\n"])
def test_a_damaged_line_is_named(content, scored):
    argv = ["--run", "run"]
    file = OUT / "predictions.jsonl"
    whole = file.read_bytes()
    first = whole.split(b"\n")[0]
    file.write_bytes(content + whole[len(first) + 1:] if content.endswith(b"\n") else content)
    for flags in (argv, ["--compare", "run", "plain"]):
        message = refused(*flags)
        assert f"{file}, line 1: not a prediction" in message or f"{file}: not the predictions that" in message


def test_one_flipped_digit_is_noticed(scored):
    file = OUT / "predictions.jsonl"
    data = bytearray(file.read_bytes())
    place = data.index(b'"scores": [') + 16
    data[place] = ord("1") + (data[place] == ord("1"))
    file.write_bytes(data)
    for flags in (["--run", "run"], ["--compare", "run", "plain"]):
        assert f"{file}: not the predictions that results.json counts" in refused(*flags)


@pytest.mark.parametrize("kind", ["pipe", "directory"])
@pytest.mark.parametrize("mode, path", [
    ("score", OUT / "results.json"), ("score", OUT / "predictions.jsonl"), ("score", "run/config.json"),
    ("compare", OUT / "results.json"), ("compare", OUT / "predictions.jsonl"), ("compare", "run/config.json"),
    ("compare", "out/compare.json"), ("compare", "out/losses.png"),
    ("gates", "out/gates.json"), ("gates", "out/gates.html"), ("gates", "out/training.png")])
def test_what_is_no_file_is_refused_and_never_waited_for(kind, mode, path, scored):
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    argv = {"score": ["--run", "run"], "compare": ["--compare", "run", "plain", "--out", "out"],
            "gates": ["--run", "run", "--gates", "--limit", "1", "--out", "out"]}[mode]
    old = signal.signal(signal.SIGALRM, lambda *args: pytest.fail("waited for"))
    signal.alarm(100)
    try:
        assert str(path) in refused(*argv) or mode == "compare" and path.name == "config.json"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("content", [
    b"\0" * 50 + b"\n", b'{"step": 1, "loss": 2.0}\n{"st\n', b'{"step": 1, "loss": "two"}\n', b'{"step": [], "loss": 2}\n',
    b'{"loss": 2.0}\n', b"[]\n", b"3\n", b'{"step": 0, "loss": NaN}\n', b'{"step": 0, "loss": 1e400}\n', b"\xff\n",
    b'{"step": 0, "loss": 2.0, "gate_answer": null}\n', b"[" * 99_999 + b"\n", b'{"step": 1' + b"0" * 400 + b', "loss": 2}\n'])
def test_damaged_metrics_only_cost_their_picture(content, scored, capsys):
    Path("run/metrics.jsonl").write_bytes(content)
    score("--gates", "--limit", "1", "--out", "out")
    evaluation.main(["--compare", "run", "plain", "--out", "table"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("; its losses are not drawn")]
    assert len(told) == 2 and all(line.startswith("run/metrics.jsonl, line ") for line in told)
    assert not Path("out/training.png").exists() and Path("out/gates.html").exists() and Path("table/losses.png").exists()


def test_metrics_that_were_cut_short_are_drawn(place):
    with open("run/metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    score("--gates", "--limit", "1", "--out", "out")
    assert Path("out/training.png").exists()


@pytest.mark.parametrize("settings", [{"form": "poem"}, {"form": None}, {"max_len": True}, {"max_len": -3}, {"max_len": "512"},
                                      {"data": 3}, {"data": ["data"]}, {"data": "\ud800"}, {"tasks": ["piqa"]}, {"init": {}}])
def test_settings_of_a_wrong_type_are_one_line(settings, place):
    facts = json.loads(Path("run/config.json").read_text())
    set_fields("run/config.json", config=facts["config"] | settings)
    for argv in (["--run", "run"], ["--compare", "run", "plain"], ["--run", "run", "--gates"], ["--run", "run", "--prompt", "x"]):
        assert "run/config.json: not the config.json of a run" in refused(*argv)


def test_a_run_without_a_seed_can_be_compared(scored):
    for name in ("run", "plain"):
        file = Path(name, "eval/best-cloze/results.json")
        facts = json.loads(file.read_text())
        del facts["settings"]["seed"]
        file.write_text(json.dumps(facts))
    assert evaluation.main(["--compare", "run,plain", "plain", "--out", "table"])["rows"]


def test_a_path_may_hold_what_looks_like_a_formula(place):
    shutil.copytree("run", r"$\frac{$")
    evaluation.main(["--run", r"$\frac{$", "--gates", "--limit", "1", "--out", "out"])
    assert set(contents(Path("out"))) == {*GATES}


def test_random_damage_never_ends_in_a_traceback(scored):
    """A fixed number of tries of tests/fuzz.py's damage to all that eval.py reads of a run and of an evaluation."""
    files = [OUT / "results.json", OUT / "predictions.jsonl", Path("run/config.json"), Path("run/metrics.jsonl")]
    whole = {file: file.read_bytes() for file in files}
    refusals = 0
    for number in range(60):
        file, dice = files[number % len(files)], fuzz.random.Random(number)
        file.write_bytes(fuzz.damage_bytes(file.read_bytes(), dice, head=10_000))
        argv = ["--run", "run", "--data", "data", "--tasks", "piqa", "--dtype", "float32"]
        for flags in (["--compare", "run", "plain"], argv):
            try:
                evaluation.main(flags)
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error)
        shutil.rmtree(OUT)
        OUT.mkdir()
        for path, content in whole.items():
            path.write_bytes(content)
    assert refusals > 20
