"""What a record of yours may be, and the two kinds that all other code knows.

    multiple choice   {"task", "question", "choices", "label"}: the label is the index of the right choice
    free answer       {"task", "prompt", "answer"}: a text, and the text that is trained to follow it

`to_record` makes one of these of whatever ACCEPTED lists: instruction data get their prompt here, and so nothing behind
it asks how a file words its fields. The task of a record is the name of its directory, or of its file.
"""
import os
import re
from pathlib import Path

from data.commonsense import PROMPT
from data.files import UserError, read_file
from data.sources import TABLE

# The fields of an instruction, of its input, which may be missing, and of the answer: one line for each layout.
INSTRUCTIONS = [
    ("instruction", "input", "output"),  # Alpaca's
    ("query", None, "response"),         # MetaMathQA's (arXiv 2309.12284)
    ("question", None, "answer"),        # GSM8K's (arXiv 2110.14168)
]
ACCEPTED = ", ".join("{" + ", ".join(filter(None, fields)) + "}" for fields in (
    ("question", "choices", "label"), *INSTRUCTIONS, ("prompt", "completion"))) + " or {messages}"
LONGEST = 30_000  # characters of a multiple-choice record: six times the eight tasks' longest
LONGEST_TEXT = 300_000  # of a text of instruction data; a longer one is a mistake in the file
# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca) where there is an input. Where there is none, it is
# PROMPT, but for the papers' two spaces.
WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
              "response that appropriately completes the request.\n\n"
              "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
KINDS = {dict: "an object", list: "a list", str: "an empty text", type(None): "missing or null", bool: "true or false",
         int: "a number", float: "a number"}  # of JSON


def to_record(task: str, raw: object, template: str = "") -> dict:
    """The record that an object from a file of `task` stands for. UserError, naming the field, if it stands for none. An
    answer may be empty, as some of LLM-Adapters' and Alpaca's are: then the end of text is all that is learnt of it."""
    if task in TABLE or isinstance(raw, dict) and "choices" in raw:
        if problem := record_problem(task, raw):
            raise UserError(problem)
        # Of like order and without other fields, such as an id, so that twins are equal.
        return {"task": task} | {name: raw[name] for name in ("question", "choices", "label", "passage") if name in raw}
    if not isinstance(raw, dict):
        raise UserError("expected an object with named fields")
    fields = next((fields for fields in INSTRUCTIONS if fields[0] in raw and fields[2] in raw), None)
    if fields:
        instruction, given, answer = (raw.get(name) for name in fields)
        given = text_of("" if given is None else given, fields[1], may_be_empty=True)
        prompt = fill_prompt(template, text_of(instruction, fields[0]), given)
        answer = text_of(answer, fields[2], may_be_empty=True)
    elif "prompt" in raw and "completion" in raw:  # as they stand: nothing is added, no space between them either
        prompt, answer = text_of(raw["prompt"], "prompt"), text_of(raw["completion"], "completion", may_be_empty=True)
    elif "messages" in raw:
        instruction, answer = one_exchange(raw["messages"])
        prompt = fill_prompt(template, instruction)
    else:
        raise UserError(f"{', '.join(raw)[:200] or 'no field'}: no record has these fields alone")
    return {"task": task, "prompt": prompt, "answer": answer}


def record_problem(task: str, record: object) -> str | None:
    """What is wrong with a multiple-choice record of this task, or None."""
    if not isinstance(record, dict):
        return "expected an object with task, question, choices and label"
    named = ("task",) if task in TABLE else ()
    missing = [key for key in (*named, "question", "choices", "label") if key not in record]
    if missing not in ([], ["task"]):  # the task is the name of the directory
        return f"no {' and no '.join(missing)}"
    question, choices, label = record["question"], record["choices"], record["label"]
    if record.get("task", task) != task:
        return f"task is {record['task']!r:.100}, expected {task!r}"
    if not isinstance(question, str) or not question.strip():
        return "question must be a text that is not empty"
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return "choices must be a list of texts that are not empty"
    if task in TABLE and len(choices) not in TABLE[task].choices:
        return f"{len(choices)} choices, expected {' or '.join(map(str, sorted(TABLE[task].choices)))}"
    if len(choices) < 2:
        return f"{len(choices)} choices, expected 2 or more"
    if task == "boolq" and choices != ["true", "false"]:
        return 'boolq\'s choices must be ["true", "false"]'
    if task == "winogrande" and question.count("_") != 1:
        return "a winogrande question needs one blank, '_'"
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        return f"label is {label!r:.100}, expected a whole number from 0 to {len(choices) - 1}"
    if not isinstance(record.get("passage", ""), str):
        return "passage must be a text"
    text = "".join([question, *choices, record.get("passage", "")])
    if len(text) > LONGEST:
        return f"{len(text):,} characters, expected up to {LONGEST:,}"
    if half := re.search("[\ud800-\udfff]", text):
        return f"a text holds {half.group()!a}, which is half of a character"
    return None


def text_of(value: object, name: str | None, may_be_empty: bool = False) -> str:
    """The text in the field `name`; UserError if it is none."""
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise UserError(f"{name} is {KINDS[type(value)]}, expected a text{'' if may_be_empty else ' that is not empty'}")
    if len(value) > LONGEST_TEXT:
        raise UserError(f"{name} has {len(value):,} characters, expected up to {LONGEST_TEXT:,}")
    if half := re.search("[\ud800-\udfff]", value):
        raise UserError(f"{name} holds {half.group()!a}, which is half of a character")
    return value


def one_exchange(messages: object) -> tuple[str, str]:
    """(instruction, answer) of a chat of one question and its answer. What a system message says comes before the
    question, with an empty line between."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in
             (messages if isinstance(messages, list) else [])]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        found = f"{len(roles)} with the roles {', '.join(f'{role!s:.20}' for role in roles[:8])}" if roles else "none"
        raise UserError(f"messages: {found}, expected one exchange: user, then assistant; before them system, or nothing")
    texts = [text_of(message.get("content"), f"messages[{i}].content", may_be_empty=role != "user")
             for i, (role, message) in enumerate(zip(roles, messages))]
    return "\n\n".join(text for text in texts[:-1] if text.strip()), texts[-1]


# ----------------------------------------------------------------------------------------------- the prompt

def fill_prompt(template: str, instruction: str, given: str = "") -> str:
    """The prompt of an instruction with the input `given`, in a template of one's own or else the papers' words."""
    given = given if given.strip() else ""
    template = template or (WITH_INPUT if given else PROMPT)
    if given and "{input}" not in template:
        raise UserError("input has a text, for which --template has no place; put {input} there")
    values = {"instruction": instruction, "input": given}
    return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], template)  # in one go: texts may hold {input}


def read_template(value: str) -> str:
    """The template that --template means: the value itself, where "\\n" is a new line, if it holds {instruction}; else
    what the file of that name holds, as it is."""
    if "{instruction}" in value:
        text = value.replace("\\n", "\n")
    elif os.path.isfile(value):
        text = read_file(Path(value)).decode("utf-8", errors="surrogateescape")
    else:
        raise UserError(f"--template {value}: expected a text with {{instruction}} in it, and {{input}} if records have "
                        "one, or a file that holds such a text")
    if problem := template_problem(text):
        raise UserError(f"--template {value}: {problem}")
    return text


def template_problem(template: str) -> str | None:
    """What is wrong with a template, or None. Braces of other uses, as in JSON and in LaTeX's \\boxed{x}, are text."""
    others = set(re.findall(r"(?<!\w)\{([A-Za-z]\w*)\}", template)) - {"instruction", "input"}
    if "{instruction}" not in template:
        return "no {instruction} in it"
    if others:
        return f"{{{min(others)}}}: expected no other names than {{instruction}} and {{input}}; the answer comes behind it all"
    if len(template) > LONGEST or re.search("[\ud800-\udfff]|\0", template):
        return f"expected a text in UTF-8 of up to {LONGEST:,} characters"
    return None
