"""Data of one's own, instruction data and GSM8K: what a record may be, what is trained, and how free answers are scored."""
import json
import math
import random
import shlex
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from conftest import write_llama
from data import answers, prepare, results, sources
from data.answers import final_number, is_right
from data.commonsense import PROMPT, check_question, instruction, label_names, prompt_question, training_question
from data.files import UserError
from data.own import ACCEPTED, INSTRUCTIONS, fill_prompt, read_template, to_record
from gatera import AdapterConfig, adapter_state, inject_adapters
from model import Transformer, load_tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
ALPACA = SAMPLE / "instructions.json"
TINY = "--device cpu --dtype float32 --r 4 --batch 2 --warmup 1 --max-steps 3 --validation 1 --lr 0.01 --init".split()


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def solution(i):
    """A record in GSM8K's fields, and short enough for a tiny base."""
    return {"question": f"{i} and {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}


@pytest.fixture
def mixed(tmp_path):
    """Four data sets of both kinds: two of the eight tasks, quizzes of twelve choices, sums, and one without a test set."""
    data = tmp_path / "mixed"
    for split, n in (("train", 12), ("test", 4)):
        write_lines(data / "piqa" / f"{split}.jsonl", prepare.load_records("piqa", split, SAMPLE))
        write_lines(data / "quiz" / f"{split}.jsonl", [{"question": f"Which is {i}?", "choices": list(map(str, range(12))),
                                                        "label": i} for i in range(n)])
        write_lines(data / "gsm8k" / f"{split}.jsonl", map(solution, range(n)))
        write_lines(data / "alpaca" / f"{split}.jsonl", json.loads(ALPACA.read_text())[:n])
    return data


# ------------------------------------------------------------------------------------------------- records

WORDS = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
         "### Instruction:\nAdd.\n\n### Response:\n")
WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
              "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n"
              "### Response:\n")
FORMS = {
    "alpaca": ({"instruction": "Add.", "input": "", "output": "5"}, WORDS),
    "without input": ({"instruction": "Add.", "output": "5"}, WORDS),
    "null input": ({"instruction": "Add.", "input": None, "output": "5", "source": 7}, WORDS),
    "blank input": ({"instruction": "Add.", "input": " \n", "output": "5"}, WORDS),
    "input": ({"instruction": "Add.", "input": "2, 3", "output": "5"}, WITH_INPUT),
    "metamath": ({"query": "Add.", "response": "5", "type": "GSM_Rephrased", "original_question": "Sum."}, WORDS),
    "gsm8k": ({"question": "Add.", "answer": "5"}, WORDS),
    "verbatim": ({"prompt": "2 + 3 =", "completion": "5"}, "2 + 3 ="),
    "chat": ({"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "5"}]}, WORDS),
    "empty system": ({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Add."},
                                   {"role": "assistant", "content": "5"}]}, WORDS),
    "system": ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."},
                             {"role": "assistant", "content": "5"}]}, WORDS.replace("Add.", "Be brief.\n\nAdd.")),
}


@pytest.mark.parametrize("raw, prompt", FORMS.values(), ids=FORMS)
def test_what_is_trained_is_the_prompt_the_answer_and_the_end_byte_for_byte(raw, prompt, llama, tmp_path):
    file = write_lines(tmp_path / "mine.jsonl", [raw])
    record, = prepare.load_records("mine", "train", file)
    assert record == {"task": "mine", "prompt": prompt, "answer": "5"}
    tokenizer = load_tokenizer(llama)
    for form in ("cloze", "label"):
        question = training_question(record, form, tokenizer, 512)
        assert tokenizer.decode(question.prompt) == prompt and question.answers == [tokenizer.encode("5") + [tokenizer.eos]]


@pytest.mark.parametrize("template, raw, prompt", [
    ("Q: {instruction} {input}\\nA:", FORMS["input"][0], "Q: Add. 2, 3\nA:"),
    ("Q: {instruction} {input}\\nA:", FORMS["alpaca"][0], "Q: Add. \nA:"),
    ('{"q": "{instruction}"} \\boxed{x}', FORMS["gsm8k"][0], '{"q": "Add."} \\boxed{x}'),
    ("{instruction}|{input}", {"instruction": "Say {input}", "input": "{instruction}", "output": "x"},
     "Say {input}|{instruction}"),
    ("{instruction}!", FORMS["verbatim"][0], "2 + 3 =")])
def test_a_template_of_ones_own(template, raw, prompt):
    assert to_record("mine", raw, read_template(template))["prompt"] == prompt


def test_a_template_from_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "t.txt").write_text("\\nabla {instruction}\n")
    assert read_template(str(tmp_path / "t.txt")) == "\\nabla {instruction}\n"
    for content, message in ((b"none", "no {instruction}"), (b"\xff{instruction}", "UTF-8"), (b"\0{instruction}", "UTF-8"),
                             (b"{instruction} {output}", "{output}: expected no other"),
                             (b"x" * 30_001 + b"{instruction}", "30,000")):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(UserError, match=message.replace("{", r"\{")):
            read_template(str(tmp_path / "t.txt"))
    for value in ("", "nowhere.txt", "Q: {instuction}", "x" * 10_000, "a\0b"):
        with pytest.raises(UserError, match=r"expected a text with \{instruction\} in it"):
            read_template(value)
    with pytest.raises(UserError, match="input has a text, for which --template has no place"):
        fill_prompt("Q: {instruction}", "Add.", "2, 3")


DEEP = [[]]
for _ in range(400):
    DEEP = [DEEP]
USER, REPLY = {"role": "user", "content": "Add."}, {"role": "assistant", "content": "5"}
BAD = [
    (None, "expected an object"), (7, "expected an object"), ([], "expected an object"), ("text", "expected an object"),
    ({}, "no field: no record has these fields alone"), ({"text": "hello"}, "text: no record has these fields alone"),
    ({"instruction": "Add."}, "instruction: no record has these fields alone"),
    ({"instruction": None, "output": "5"}, "instruction is missing or null"),
    ({"instruction": "", "output": "5"}, "instruction is an empty text"),
    ({"instruction": "Add.", "output": None}, "output is missing or null"),
    ({"instruction": "Add.", "output": 5}, "output is a number"),
    ({"instruction": "Add.", "output": math.nan}, "output is a number"),
    ({"instruction": "Add.", "output": True}, "output is true or false"),
    ({"instruction": DEEP, "output": "5"}, "instruction is a list"),
    ({"instruction": "Add.", "input": 0, "output": "5"}, "input is a number"),
    ({"instruction": "Add.", "input": {"a": 1}, "output": "5"}, "input is an object"),
    ({"instruction": "Add.", "output": "x" * 300_001}, "output has 300,001 characters"),
    ({"instruction": "\ud800", "output": "5"}, r"instruction holds '\\ud800'"),
    ({"query": "", "response": "5"}, "query is an empty text"),
    ({"question": "Add.", "answer": ["5"]}, "answer is a list"),
    ({"prompt": " ", "completion": "5"}, "prompt is an empty text"),
    ({"prompt": "Add.", "completion": None}, "completion is missing or null"),
    ({"prompt": [USER], "completion": [REPLY]}, "prompt is a list"),
    ({"messages": None}, "messages: none, expected one exchange"), ({"messages": []}, "messages: none"),
    ({"messages": "hello"}, "messages: none"), ({"messages": [USER]}, "messages: 1 with the roles user"),
    ({"messages": [USER, REPLY, USER]}, "messages: 3 with the roles user, assistant, user"),
    ({"messages": [USER, REPLY, USER, REPLY]}, "messages: 4 with the roles user, assistant, user, assistant"),
    ({"messages": [None, 3]}, "messages: 2 with the roles None, None"),
    ({"messages": [{"role": ["user"], "content": "a"}, REPLY]}, "messages: 2 with the roles"),
    ({"messages": [{"role": "user"}, REPLY]}, r"messages\[0\].content is missing"),
    ({"messages": [USER, {"role": "assistant", "content": [{"text": "5"}]}]}, r"messages\[1\].content is a list"),
    ({"question": "a", "choices": ["b", "c"]}, "no label"), ({"choices": ["b", "c"], "label": 0}, "no question"),
    ({"question": "a", "choices": ["b"], "label": 0}, "1 choices, expected 2 or more"),
    ({"question": "a", "choices": ["b", "c"], "label": 2}, "label is 2"),
    ({"question": "a", "choices": ["b", "c"], "label": 10**4000}, "label is 1000"),
    ({"question": "a", "choices": ["b", 3], "label": 0}, "choices must be"),
    ({"task": "other", "question": "a", "choices": ["b", "c"], "label": 0}, "task is 'other', expected 'mine'"),
]


@pytest.mark.parametrize("raw, message", BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("layout", ["directory", "lines", "list"])
def test_a_bad_record_is_named_by_file_place_and_field_and_the_accepted_ones_are_shown(layout, raw, message, tmp_path):
    good, out = {"instruction": "Add.", "output": "5"}, tmp_path / {"lines": "mine.jsonl", "list": "mine.json"}.get(layout, "")
    file = write_lines(out / "mine" / "train.jsonl" if layout == "directory" else out, [good, raw])
    if layout == "list":
        file.write_text(json.dumps([good, raw], indent=2))
    place = "record 2" if layout == "list" else "line 2"
    with pytest.raises(UserError, match=f"{file}, {place}: {message}") as caught:
        prepare.load_records("mine", "train", out)
    assert str(caught.value).endswith(f"; expected one of {ACCEPTED}") and "\n" not in str(caught.value)
    assert all(name in ACCEPTED for fields in INSTRUCTIONS for name in fields if name)


def test_random_damage_is_one_line_or_a_record():
    """Values of every kind, in every place of every form: a record comes out whole, or a UserError."""
    rng = random.Random(0)
    values = [None, True, 0, -1, 1e308, "", " ", "a", "\ud800", "\0", [], {}, [1], {"a": 1}, DEEP, "x" * 400_000,
              [USER, REPLY], 10**50]
    wholes = [raw for raw, _ in FORMS.values()] + [{"question": "a", "choices": ["b", "c"], "label": 0}]
    made = 0
    for _ in range(3000):
        raw = json.loads(json.dumps(rng.choice(wholes)))
        for _ in range(rng.randint(1, 2)):
            key = rng.choice([*raw, "instruction", "output", "choices", "messages", "task"])
            raw[key] = rng.choice(values)
        if isinstance(raw.get("messages"), list) and raw["messages"] and rng.random() < 0.5:
            raw["messages"] = raw["messages"] + [rng.choice(values)]
        try:
            record = to_record("mine", raw)
        except UserError as error:
            assert len(str(error)) < 500
            continue
        made += 1
        assert "choices" in record or record["prompt"].strip() and isinstance(record["answer"], str)
    assert 200 < made < 2800


def test_a_file_holds_one_kind(tmp_path):
    records = [{"question": "a", "choices": ["b", "c"], "label": 0}, {"question": "a", "answer": "b"}]
    file = write_lines(tmp_path / "mine.jsonl", records)
    with pytest.raises(UserError, match="mine.jsonl, line 2: with choices where those before have none, or the other way"):
        prepare.load_records("mine", "train", file)


def test_an_empty_answer_trains_the_end_of_text_and_is_told(llama, tmp_path, monkeypatch, capsys):
    """3 of the 3,260 records in LLM-Adapters' math_data.json have one, and 6 of the 1,319 in their GSM8K."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "mine.jsonl", [{"instruction": f"Add {i}.", "output": ""} for i in range(12)])
    tokenizer = load_tokenizer(llama)
    (record, *_) = prepare.load_records("mine", "train", "mine.jsonl")
    assert training_question(record, "label", tokenizer, 99).answers == [[tokenizer.eos]]
    train.main([*TINY, str(llama), "--data", "mine.jsonl", "--log-every", "1", "--out", "o"])
    assert "10 records have an empty answer, of which the end of text is learnt: mine " in capsys.readouterr().out
    found = evaluation.main(["--run", "o"])["tasks"]["mine"]
    assert found["n"] == found["tokens"] == 2 and found["loss"] > 0
    evaluation.main(["--run", "o", "--protocol", "generate", "--beams", "1", "--max-new-tokens", "4"])
    evaluation.main(["--run", "o", "--gates"])


def test_a_json_file_may_hold_a_list_or_lines(tmp_path):
    expected = prepare.load_records("instructions", "train", ALPACA)
    assert len(expected) == 12 and all(record["task"] == "instructions" for record in expected)
    lines = write_lines(tmp_path / "instructions.json", json.loads(ALPACA.read_text()))
    assert prepare.load_records("instructions", "train", lines) == expected
    for content, message in ((b"[]", "empty"), (b"", "empty"), (b"[1", "not valid JSON"), (b"\xff", "not UTF-8"),
                             (b"[1]", "record 1: expected an object"), (b'{"a": 1}', "record 1: a: no record has")):
        lines.write_bytes(content)
        with pytest.raises(UserError, match=f"{lines}.*{message}"):
            prepare.load_records("instructions", "train", lines)


def test_names_are_those_of_directories_or_of_the_file(mixed, tmp_path, capsys):
    assert prepare.data_sets(mixed) == ["piqa", "gsm8k", "alpaca", "quiz"]  # known ones first, in their order
    assert prepare.data_sets(ALPACA) == ["instructions"] and prepare.data_sets() == list(prepare.TASKS)
    assert prepare.data_sets(SAMPLE) == list(prepare.TASKS)  # the file beside them is another data set
    (mixed / "quiz" / "test.jsonl").unlink()
    assert "quiz" in prepare.data_sets(mixed)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.csv").touch()
    (tmp_path / "a.json").mkdir()
    for data, problem in (("nodir", "--data nodir: no such file or directory; expected records: a directory of <name>/train"),
                          (tmp_path / "empty", "no records there; expected a directory"), (tmp_path / "words.csv", "no records there"),
                          (mixed / "quiz", f"; for those in it pass --data {mixed}"),
                          (tmp_path / "a.json", "no records there")):
        wrong, = prepare.task_problems("all", data)
        assert problem in wrong
    assert prepare.task_problems("quiz,arc", mixed) == [
        "--tasks arc: expected all or some of piqa, gsm8k, alpaca, quiz"]
    for program, flags in ((train.main, "--init x --data nodir"), (evaluation.main, "--init x --data nodir")):
        with pytest.raises(UserError, match="--data nodir: no such file or directory"):
            program(flags.split())


def test_choices_of_ones_own_are_worded_as_the_papers_do_and_read_back(mixed):
    record = prepare.load_records("quiz", "train", mixed)[11]
    assert record["task"] == "quiz" and instruction(record).endswith("Answer11: 10 Answer12: 11\n\nAnswer format: "
                                                                     + "/".join(f"answer{i + 1}" for i in range(12)))
    for i, name in enumerate(label_names(record)):
        assert evaluation.parse_answer("quiz", f"the correct answer is {name}", label_names(record)) == i
    assert evaluation.parse_answer("quiz", "answer99", label_names(record)) == 8  # the ninth, as the papers' pattern reads
    assert evaluation.parse_answer("quiz", "answer5", ["answer1", "answer2"]) == 4  # theirs knows five, wherever


def test_an_answer_too_long_is_named_by_file_and_line(llama, tmp_path):
    tokenizer = load_tokenizer(llama)
    file = write_lines(tmp_path / "mine.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "b " * 40}])
    with pytest.raises(UserError, match="mine.jsonl, line 2: an answer of .* does not fit into 64"):
        train.main([*TINY, str(llama), "--data", str(file), "--max-len", "64", "--out", str(tmp_path / "out")])
    record = {"task": "mine", "prompt": "a" * 100, "answer": "b" * 64}  # scored as trained: with the end of text
    for trained in (True, False):
        check_question(record, "label", tokenizer, 65, trained)
        with pytest.raises(UserError, match="65 tokens does not fit into 64"):
            check_question(record, "label", tokenizer, 64, trained)
    assert len(prompt_question(record, "label", tokenizer, 64).prompt) == 64  # where it is written, its length is not known


def test_what_is_held_out_is_nowhere_trained_on(tmp_path):
    """Not with another id beside it, with another answer, or in another file."""
    marked = write_lines(tmp_path / "a.jsonl", [
        {"id": i, "question": f"q{i % 5}", "choices": ["a", "b"], "label": 0} for i in range(40)])
    kept, held = prepare.hold_out(prepare.load_records("a", "train", marked))
    assert len(held) == 4 and kept and not {record["question"] for record in kept} & {record["question"] for record in held}
    sampled = write_lines(tmp_path / "b.jsonl", [{"prompt": f"p{i % 30}", "completion": f"c{i}"} for i in range(300)])
    kept, held = prepare.hold_out(prepare.load_records("b", "train", sampled))
    assert kept and not {record["prompt"] for record in kept} & {record["prompt"] for record in held}
    twins = [{"query": f"q{i}", "response": "r"} for i in range(50)]
    for name in ("a", "b"):
        random.Random(name).shuffle(twins)
        write_lines(tmp_path / "twins" / name / "train.jsonl", twins)
    training, validation, _ = train.load_data(train.Config(data=str(tmp_path / "twins"), validation=10))
    assert training and not {record["prompt"] for record in training} & {record["prompt"] for record in validation}


# -------------------------------------------------------------------------------------------------- GSM8K

@pytest.mark.parametrize("text, number", [
    ("#### 72", 72), ("so 5 + 5 = <<5+5=10>>10\n#### 1,234", 1234), ("####72", 72), ("#### $1,080.50.", "1080.5"),
    ("#### 72 dollars for 3 people", 72), ("#### 5\n#### 6", 6), ("the answer is: 72.", 72), ("The answer is 72.00", 72),
    (r"\boxed{72}", 72), (r"\boxed{72} in 5 steps", 72), (r"\boxed{5} and \boxed{6}", 6), (r"\boxed{1{,}234}", 1234),
    (r"\boxed{1,\!234}", 1234), (r"\boxed{\$72}", 72), (r"\boxed{x} = 4", 4), (r"\boxed{", None), ("-5", -5), ("\u22125", -5),
    ("-$5", -5), ("10-3", 3), ("it is 10 - 3", 3), ("(4)-3", 3), ("x-3", 3), ("1,234,567", 1234567), ("1,2,3", 3),
    ("12,34", 34), (".5", "0.5"), ("007", 7), ("1/2", 2), ("3%", 3), ("no number", None), ("", None), ("####", None),
    ("12 apples ####", 12), ("9" * 5000, Decimal("9" * 5000)), ("0", 0), ("-0", 0), ("\u0664\u0662", None), ("1.", 1),
    ("#### ten, that is 10", 10), ("- 5 apples", 5), ("1e3", 3)])
def test_the_number_that_an_answer_comes_to(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_found_in_time():
    for text in ("-" * 10**5, "1," * 10**5, "#### " * 10**5, "\\boxed{" * 10**5, "{,}" * 10**5, "$" * 10**5 + "1"):
        final_number(text)


def test_a_number_counts_where_the_reference_has_the_mark():
    gold = "Half of 144 is 72.\n#### 72"
    for text, right in (("The answer is: 72", True), ("72.0", True), ("#### 73", False), ("", False), (gold, True)):
        assert is_right({"text": text, "reference": gold}) is right
    assert is_right({"text": " Pear\n", "reference": "Pear"}) and not is_right({"text": "pear", "reference": "Pear"})
    assert not is_right({"text": "it is 4", "reference": "4"})  # no mark: all words count
    rows = [{"task": "gsm8k", "index": i, "text": text, "reference": gold, "cut": False, "full": i == 2}
            for i, text in enumerate(("72", gold, "none", "5"))]
    summary = results.summarise(rows, "generate")
    assert (summary["acc"], summary["exact"], summary["unparsed"], summary["full"]) == (50, 25, 1, 1)
    assert summary["interval"] == results.wilson(2, 4) and results.is_prediction(rows[0], "generate")
    for heading in ("#### Summary\nAll is well.", "#### Steps\n1. a\n2. b"):
        assert is_right({"text": heading, "reference": heading})
        assert not is_right({"text": "banana 2", "reference": heading})


def test_gsm8k_comes_from_the_hub_or_from_openais_files(monkeypatch, tmp_path, capsys):
    import sys
    import types
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [solution(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    prepare.main(["--tasks", "gsm8k", "--out", str(tmp_path / "hub")])
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    for split in ("train", "test"):
        write_lines(tmp_path / "openai" / f"{split}.jsonl", [solution(3)])
    prepare.main(["--tasks", "gsm8k", "--source", str(tmp_path / "openai"), "--out", str(tmp_path / "own")])
    assert (tmp_path / "own/gsm8k/test.jsonl").read_bytes() == (tmp_path / "hub/gsm8k/test.jsonl").read_bytes()
    record, = prepare.load_records("gsm8k", "test", tmp_path / "own")
    assert record == {"task": "gsm8k", "prompt": PROMPT.format(instruction="3 and 3?"),
                      "answer": "3 + 3 = <<3+3=6>>6\n#### 6"}
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="gsm8k is not on the package index; it comes from the hub, or by data/prepare.py --source"):
        prepare.main(["--tasks", "gsm8k", "--out", str(tmp_path / "none")])
    with pytest.raises(UserError, match="train.jsonl: not found; expected a directory with gsm8k's train.jsonl"):
        prepare.main(["--tasks", "gsm8k", "--source", str(tmp_path), "--out", str(tmp_path / "none")])
    assert "gsm8k" not in prepare.task_names("all") and not prepare.task_problems("gsm8k")


# --------------------------------------------------------------------------------------------------- losses

def adapted(base, **options):
    model = Transformer.from_pretrained(base, **options)
    inject_adapters(model, AdapterConfig("hira", "token", r=4))
    generator = torch.Generator().manual_seed(0)
    for p in adapter_state(model).values():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def test_loss_and_perplexity_equal_a_plain_computation_in_float64(llama):
    model, tokenizer = adapted(llama, dtype=torch.float64), load_tokenizer(llama)
    records = prepare.load_records("instructions", "train", ALPACA)
    found = evaluation.evaluate(model, tokenizer, records, "label", quiet=True)
    nats, count = 0.0, 0
    for record, prediction in zip(records, found["predictions"]):
        prompt, answer = tokenizer.encode(record["prompt"]), tokenizer.encode(record["answer"]) + [tokenizer.eos]
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer])).log_softmax(-1)[0]
        expected = -sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert prediction["nats"] == pytest.approx(expected, abs=1e-9) and prediction["tokens"] == len(answer)
        nats, count = nats + expected, count + len(answer)
    assert found["loss"] == pytest.approx(nats / count, abs=1e-10) and found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(nats / count))
    low, high = found["interval"]
    assert low < found["loss"] < high and found["perplexity_interval"] == [math.exp(low), math.exp(high)]
    assert evaluation.evaluate(model, tokenizer, records, "cloze", quiet=True)["predictions"] == found["predictions"]


def test_loss_equals_transformers_on_the_same_ids(llama):
    transformers = pytest.importorskip("transformers", reason="the loss is compared with transformers'")
    theirs = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64)
    tokenizer, records = load_tokenizer(llama), prepare.load_records("instructions", "train", ALPACA)
    ours = evaluation.evaluate(Transformer.from_pretrained(llama, dtype=torch.float64), tokenizer, records, "label", quiet=True)
    for record, prediction in zip(records, ours["predictions"]):
        question = training_question(record, "label", tokenizer, 512)
        ids = torch.tensor([question.prompt + question.answers[0]])
        labels = ids.clone()
        labels[0, :len(question.prompt)] = -100
        with torch.no_grad():
            loss = theirs(input_ids=ids, labels=labels).loss.item()
        assert prediction["nats"] / prediction["tokens"] == pytest.approx(loss, abs=1e-6)


def test_the_interval_covers_as_it_says():
    """Of 200 samples from one population, about 95 % of the intervals hold its mean."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        tokens = rng.integers(5, 50, 60)
        nats = tokens * rng.gamma(4, 0.5, 60)  # a mean of 2 nats a token
        low, high = answers.resampled_interval(nats, tokens, times=300)
        hits += low < 2 < high
    assert 0.88 < hits / 200 < 0.99


# ------------------------------------------------------------------------------------------- whole programs

def last_command(capsys):
    """The command that train.py's last line tells."""
    return shlex.split(capsys.readouterr().out.split("score it on all questions with:\n")[1])[2:]


def test_both_kinds_are_trained_scored_compared_and_resumed(mixed, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = "Q: {instruction} {input}\\nA: "
    trained = train.main([*TINY, str(llama), "--data", "mixed", "--template", template, "--test", "2", "--out", "o"])
    assert {task: set(scores) for task, scores in trained["tasks"].items()} == {
        "piqa": {"acc", "acc_norm"}, "quiz": {"acc", "acc_norm"}, "gsm8k": {"loss", "perplexity"},
        "alpaca": {"loss", "perplexity"}}
    text = capsys.readouterr().out
    assert "of piqa, gsm8k, alpaca, quiz\nlabel form and instruction data, loss" in text
    assert "gsm8k: perplexity of an answer token on 2 held-out test records" in text
    config = json.loads(Path("o/config.json").read_text())["config"]
    assert config["template"] == "Q: {instruction} {input}\nA: " and "q" not in config

    found = evaluation.main(["--run", "o"])
    assert set(found["tasks"]["gsm8k"]) == {"n", "tokens", "loss", "interval", "perplexity", "perplexity_interval", "cut"}
    choice = [found["tasks"][task] for task in ("piqa", "quiz")]
    assert found["mean"]["n"] == 8 and found["mean"]["acc"] == np.mean([task["acc"] for task in choice])  # of choices alone
    out = tmp_path / "o/eval/best-label"
    whole = (out / "predictions.jsonl").read_bytes()
    first, *_ = [json.loads(line) for line in whole.splitlines() if b'"gsm8k"' in line]
    question = training_question(to_record("gsm8k", solution(0), config["template"]), "label", load_tokenizer(llama), 512)
    assert first["tokens"] == len(question.answers[0])  # the run's template, without a flag
    kept = b"".join(whole.splitlines(keepends=True)[:6])  # within gsm8k
    summary = json.loads((out / "results.json").read_text())
    import hashlib
    summary |= {"tasks": {"piqa": summary["tasks"]["piqa"]}, "predictions": {"bytes": len(kept),
                                                                             "sha256": hashlib.sha256(kept).hexdigest()}}
    (out / "results.json").write_text(json.dumps(summary))
    (out / "predictions.jsonl").write_bytes(kept)
    again = evaluation.main(["--run", "o"])
    assert (out / "predictions.jsonl").read_bytes() == whole and again["tasks"] == found["tasks"]
    assert "gsm8k: 2 predictions were already" in capsys.readouterr().out

    written = evaluation.main(["--run", "o", "--protocol", "generate", "--beams", "1", "--max-new-tokens", "40"])
    lines = [json.loads(line) for line in
             Path("o/eval/best-generate-beams1-new40/predictions.jsonl").read_text().splitlines()]
    assert {line["reference"] for line in lines if line["task"] == "gsm8k"} == {solution(i)["answer"] for i in range(4)}
    assert written["tasks"]["alpaca"]["full"] == sum(line["full"] for line in lines if line["task"] == "alpaca") > 0
    assert {"acc", "exact", "unparsed", "full"} < set(written["tasks"]["gsm8k"]) and written["mean"]["n"] == 8
    assert "acc_norm" not in written["tasks"]["gsm8k"] and evaluation.main(["--run", "o", "--gates", "--limit", "1"])["gates"]

    train.main([*TINY, str(llama), "--data", "mixed", "--template", template, "--seed", "5", "--out", "p"])
    for protocol in ("label", "generate"):
        for run in ("o", "p"):
            evaluation.main(["--run", run, "--protocol", protocol, "--beams", "1"])
        capsys.readouterr()
        compared = evaluation.main(["--compare", "o", "p", "--protocol", protocol, "--beams", "1"] if protocol == "generate"
                                   else ["--compare", "o", "p"])
        assert set(compared["rows"]) == {"piqa", "quiz", "gsm8k", "alpaca", "mean"}
        assert capsys.readouterr().out.count("| minus [1]") == 3  # choices, and each task with free answers

    with pytest.raises(UserError, match="--template"):
        train.main(["--resume", "o", "--template", "{instruction}"])
    train.main(["--resume", "o", "--max-steps", "4", "--test", "0"])
    assert "going on after 3 of 4 steps" in capsys.readouterr().out


def test_losses_are_paired_by_record():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 9, 50)
    first = rng.gamma(4, 5, 50)
    seeds = [[{"nats": float(x), "tokens": int(t)} for x, t in zip(first + shift, tokens)] for shift in (0, 1, 3)]
    one, other = answers.compare_losses([seeds[:1], seeds[1:]])
    assert one == {"loss": first.sum() / tokens.sum(), "spread": None}
    assert other["difference"] == pytest.approx(2 * 50 / tokens.sum()) and other["spread"] > 0
    low, high = other["interval"]  # of a difference that is the same for all: far narrower than the losses' own
    assert low < other["difference"] < high and high - low < 0.1 < np.ptp(answers.resampled_interval(first, tokens))
    seeds[1][3]["tokens"] += 1
    with pytest.raises(UserError, match="their answers have other tokens"):
        answers.compare_losses([seeds[:1], seeds[1:2]])


def test_one_file_is_trained_on_and_its_held_out_part_is_scored(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, str(llama), "--data", str(ALPACA), "--out", "a run"])
    told = last_command(capsys)
    assert told[-2:] == ["--split", "val"]
    as_told, by_default = evaluation.main(told), evaluation.main(["--run", "a run"])
    assert as_told["tasks"] == by_default["tasks"] and by_default["configuration"]["split"] == "val"
    assert by_default["tasks"]["instructions"]["n"] == 2 and by_default["mean"] is None
    evaluation.main(["--init", str(llama), "--data", str(ALPACA), "--out", "base"])
    assert len(evaluation.main(["--compare", "base", "a run"])["rows"]["instructions"]) == 2  # cloze and label are one here
    assert evaluation.main(["--run", "a run", "--prompt", "Hi"])
    for program, flags in ((evaluation.main, ["--run", "a run", "--split", "test"]),
                           (train.main, [*TINY, str(llama), "--data", str(ALPACA), "--test", "1", "--out", "b"])):
        with pytest.raises(UserError, match="instructions has no test set there; --split val of eval.py scores"):
            program(flags)


def test_a_directory_without_a_test_set_is_trained_on(mixed, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (mixed / "alpaca" / "test.jsonl").unlink()
    train.main([*TINY, str(llama), "--data", "mixed", "--tasks", "alpaca,piqa", "--out", "o"])
    assert evaluation.main(last_command(capsys))["tasks"].keys() == {"alpaca", "piqa"}
    with pytest.raises(UserError, match="mixed: alpaca has no test set there; --split val of eval.py"):
        evaluation.main(["--run", "o"])
    assert evaluation.main(["--run", "o", "--tasks", "piqa"])["configuration"]["split"] == "test"


def test_a_run_on_metamath_is_scored_on_gsm8k(mixed, llama, tmp_path, capsys, monkeypatch):
    """gsm8k is not in the run's own file: it is taken from where prepare.py puts it, here a directory of the test's."""
    monkeypatch.chdir(tmp_path)
    for module in (prepare, results, evaluation, train):
        monkeypatch.setattr(module, "DEFAULT", mixed)
    items = [{"query": f"{i} and {i}?", "response": f"{2 * i}\n#### {2 * i}\nThe answer is: {2 * i}", "type": "GSM_AnsAug"}
             for i in range(12)]
    Path("MetaMathQA.json").write_text(json.dumps(items))
    train.main([*TINY, str(llama), "--data", "MetaMathQA.json", "--out", "o"])
    assert evaluation.main(last_command(capsys))["tasks"]["MetaMathQA"]["n"] == 2
    found = evaluation.main(["--run", "o", "--tasks", "gsm8k", "--protocol", "generate", "--beams", "1"])
    assert found["tasks"]["gsm8k"]["n"] == 4 and found["configuration"]["split"] == "test"
    assert "gsm8k: not in MetaMathQA.json, which o was trained on, but in" in capsys.readouterr().out
    with pytest.raises(UserError, match="--tasks quiz: expected all or some of MetaMathQA"):
        evaluation.main(["--run", "o", "--tasks", "quiz"])


def test_an_emptied_directory_is_not_taken_for_another(mixed, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, str(llama), "--data", "mixed", "--tasks", "quiz", "--out", "o"])
    for file in [*mixed.glob("*/*.jsonl")]:
        file.unlink()
    with pytest.raises(UserError, match="mixed"):
        evaluation.main(["--run", "o", "--tasks", "all"])


def test_a_template_that_nothing_uses_is_refused(mixed, llama):
    with pytest.raises(UserError, match="--template: it is for instruction data, of which there are none"):
        train.main([*TINY, str(llama), "--data", mixed, "--tasks", "quiz", "--template", "{instruction}"])


def test_a_run_from_before_templates_goes_on(llama, tmp_path, monkeypatch):
    """Its config.json and its checkpoint do not have the setting."""
    from data.files import read_tensors, write_tensors
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, str(llama), "--data", str(SAMPLE), "--tasks", "piqa", "--out", "o"])
    facts = json.loads(Path("o/config.json").read_text())
    assert facts["config"].pop("template") == ""
    Path("o/config.json").write_text(json.dumps(facts))
    tensors, text = read_tensors(Path("o/state.safetensors"), with_info=True)
    info = json.loads(text)
    info["facts"]["config"].pop("template")
    write_tensors(Path("o/state.safetensors"), tensors, json.dumps(info))
    assert evaluation.main(["--run", "o"])["tasks"]["piqa"]["n"] == 4
    assert train.main(["--resume", "o", "--max-steps", "4"])["steps"] == 4


@pytest.mark.parametrize("template", ["no place", 3, "{instruction} {output}", "\ud800{instruction}"])
def test_a_template_in_a_config_is_checked_where_it_enters(template, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, str(llama), "--data", str(ALPACA), "--out", "o"])
    facts = json.loads(Path("o/config.json").read_text())
    facts["config"]["template"] = template
    Path("o/config.json").write_text(json.dumps(facts))
    for program, flags in ((evaluation.main, ["--run", "o"]), (train.main, ["--resume", "o"])):
        with pytest.raises(UserError, match="config.json.*template"):
            program(flags)


@pytest.mark.parametrize("protocol", ["label", "generate"])
def test_damaged_predictions_and_results_of_free_answers_are_refused(protocol, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--init", str(llama), "--data", str(ALPACA), "--protocol", protocol, "--beams", "1", "--max-new-tokens", "8"]
    evaluation.main([*flags, "--out", "e"])
    evaluation.main([*flags, "--out", "e"])  # all is there
    lines, summary = (Path(f"e/{name}").read_text() for name in ("predictions.jsonl", "results.json"))
    first = json.loads(lines.splitlines()[0])
    for key in first.keys() - {"task", "index"}:
        for value in (None, -1, [], "x" if not isinstance(first[key], str) else 3):
            damaged = json.dumps(first | {key: value}) + "\n" + "".join(lines.splitlines(keepends=True)[1:])
            Path("e/predictions.jsonl").write_text(damaged)
            with pytest.raises(UserError, match="predictions.jsonl, line 1: not a prediction"):
                evaluation.main([*flags, "--out", "e"])
    Path("e/predictions.jsonl").write_text(lines)
    task = json.loads(summary)["tasks"]["instructions"]
    for key in task.keys() - {"loss", "exact"}:
        damaged = json.loads(summary)
        damaged["tasks"]["instructions"][key] = "x"
        Path("e/results.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="results.json: damaged, its tasks"):
            evaluation.main([*flags, "--out", "e"])


def test_a_context_without_room_for_a_free_answer_is_refused(tmp_path):
    base = write_llama(tmp_path / "short", extra={"max_position_embeddings": 256})
    flags = ["--init", str(base), "--data", str(ALPACA), "--protocol", "generate", "--out", str(tmp_path / "e")]
    with pytest.raises(UserError, match="context of 256 leaves no room for 256 new tokens"):
        evaluation.main(flags)
    assert evaluation.main([*flags, "--max-new-tokens", "4", "--beams", "1"])["tasks"]["instructions"]["full"] == 2
    with pytest.raises(UserError, match="--max-new-tokens -1: expected 0"):
        evaluation.main([*flags, "--max-new-tokens", "-1"])
