"""Records -> prompts -> token ids -> one packed row.

A record of multiple choice is {"task", "question", "choices", "label"} (boolq has a "passage" too). It becomes text in
one of two forms:

    label   the papers' (LLM-Adapters, DoRA, HiRA, GateRA): an instruction that lists the choices, answered by
            "the correct answer is answer2". Small models are near chance here before training.
    cloze   lm-evaluation-harness's: the question alone, and each choice's own text as a possible continuation.

A record with a free answer is {"task", "prompt", "answer"}, already text (data/own.py). Either way a question is a
prompt and an answer, the text that continues it, for each choice, or the one answer. `pack` lays any number
of questions, with the right answer alone (training) or all of them (scoring), into one row without padding. A prompt
with one of its answers is a document, and attention sees one document at a time.
"""
import math
import re
from typing import NamedTuple

import torch

from data.files import UserError

FORMS = ("cloze", "label")

# ------------------------------------------------------------------------------------------ record -> text

# How a task words its instruction, names its choices, and separates them.
CHOOSE = "Please choose the correct "
INSTRUCTION = {
    "boolq": ("Please answer the following question with true or false, question: {question}?", None, ""),
    "piqa": (CHOOSE + "solution to the question: {question}", "solution", "\n\n"),
    "hellaswag": (CHOOSE + "ending to complete the given sentence: {question}", "ending", " "),
    "winogrande": (CHOOSE + "answer to fill in the blank to complete the given sentence: {question}", "option", " "),
}
DEFAULT_INSTRUCTION = (CHOOSE + "answer to the question: {question}", "answer", " ")
# HiRA's template. The two spaces are the papers' own.
PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.  "
          "\n\n### Instruction:\n{instruction}\n\n### Response:\n")


def label_names(record: dict) -> list[str]:
    """What the label form calls the choices: true and false, or solution1, solution2, ..."""
    _, word, _ = INSTRUCTION.get(record["task"], DEFAULT_INSTRUCTION)
    return record["choices"] if word is None else [f"{word}{i + 1}" for i in range(len(record["choices"]))]


def instruction(record: dict) -> str:
    """The instruction of the label form, byte for byte the papers'."""
    text, word, separator = INSTRUCTION.get(record["task"], DEFAULT_INSTRUCTION)
    text = text.format(question=record["question"])
    names = label_names(record)
    if word is not None:
        named = (f"{name.capitalize()}: {choice}" for name, choice in zip(names, record["choices"]))
        text += "\n\n" + separator.join(named)
    return text + (" " if record["task"] == "winogrande" else "\n\n") + "Answer format: " + "/".join(names)


def label_form(record: dict) -> list[tuple[str, str]]:
    """[(prompt, answer)] for each choice of a record: the answer names the choice."""
    prompt = PROMPT.format(instruction=instruction(record))
    return [(prompt, f"the correct answer is {name}") for name in label_names(record)]


def without_tags(text: str) -> str:
    """HellaSwag's WikiHow texts carry [header] marks, which the cloze form drops as lm-evaluation-harness does: with
    the space that a mark at the start of an ending leaves behind."""
    # With a "[" that is never closed the match goes on to the end of the line, where no other mark can begin: without
    # that, many of them would take time by the square of their number.
    kept = lambda match: "" if match[1] else match[0]  # noqa: E731
    return re.sub(r"\[[^\]\n]*(\])?", kept, text.strip().replace(" [title]", ". ")).replace("  ", " ")


def with_capital(question: str) -> str:
    """HellaSwag's ActivityNet texts end with the start of a sentence, "... sits on a roof. he", to which
    lm-evaluation-harness gives a capital. It begins behind the last word with . ! or ? in it. (WikiHow texts end with a
    full stop.)"""
    words = question.split(" ")
    if not question.endswith("."):
        for i in range(len(words) - 1, 0, -1):
            if re.search("[.!?]", words[i - 1]):
                words[i] = words[i].capitalize()
                break
    return " ".join(words)


def cloze_form(record: dict) -> list[tuple[str, str]]:
    """[(prompt, answer)] for each choice of a record: the answer is the choice, or what follows it in WinoGrande."""
    task, question, choices = record["task"], record["question"], record["choices"]
    if task == "winogrande":  # "partial" scoring: the choice goes into the blank, the rest of the sentence is scored
        before, blank, after = question.partition("_")
        if not blank:
            raise UserError(f"a winogrande question without its blank '_': {question!r}")
        return [(before + choice, " " + after.strip()) for choice in choices]
    if task == "boolq":
        passage = f"{record['passage']}\n" if record.get("passage") else ""
        prompt = f"{passage}Question: {question}?\nAnswer:"
        return [(prompt, " yes" if choice == "true" else " no") for choice in choices]
    if task == "hellaswag":
        prompt = without_tags(with_capital(question))
        return [(prompt, " " + without_tags(choice)) for choice in choices]
    if task == "social_i_qa":
        prompt = f"Q: {question}\nA:"
    elif task == "openbookqa":
        prompt = question
    else:  # ARC, PIQA, and a task of your own
        prompt = f"Question: {question}\nAnswer:"
    return [(prompt, f" {choice}") for choice in choices]


def is_free(record: dict) -> bool:
    """Whether a record has a free answer, and no choices."""
    return "choices" not in record


def to_text(record: dict, form: str) -> list[tuple[str, str]]:
    """[(prompt, answer)] for each choice of a record, or the one pair of a free answer, whatever the form. UserError
    where there is nothing of an answer to score."""
    if is_free(record):
        return [(record["prompt"], record["answer"])]
    pairs = {"label": label_form, "cloze": cloze_form}[form](record)
    if not all(answer.strip() for _, answer in pairs):  # a choice of [tags] alone, a blank at the end
        raise UserError(f"a {record['task']} choice without text in {form} form: {record['question']!r}, "
                        f"{record['choices']}")
    return pairs


# ------------------------------------------------------------------------------------------- text -> tokens

class Question(NamedTuple):
    """A prompt and possible answers, as token ids. `cut` counts the prompt tokens that did not fit."""
    prompt: list[int]
    answers: list[list[int]]
    cut: int = 0


def encode(tokenizer, prompt: str, answers: list[str], max_len: int, end: bool = False) -> Question:
    """Token ids of a prompt and answers that continue it.

    Prompt and answer are tokenised apart, so that they are cut into the same tokens in training and in scoring. A
    question longer than `max_len` tokens loses the start of its prompt, never any of its answer; UserError where an
    answer alone does not fit. With `end` the answers close with the end-of-text token: trained, so that generation
    stops, but not scored.
    """
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = [tokenizer.encode(answer, continues=True) for answer in answers]
    if end and tokenizer.eos is not None:
        answer_ids = [ids + [tokenizer.eos] for ids in answer_ids]
    if not all(answer_ids) or not bos + prompt_ids:
        raise UserError(f"an empty prompt or answer: {prompt!r}, {answers!r}")
    longest = max(map(len, answer_ids))
    room = max_len - len(bos) - (longest - 1)  # the last token of an answer is predicted but never read
    if room < 1:
        raise UserError(f"an answer of {longest} tokens does not fit into {max_len}: raise --max-len")
    cut = max(0, len(prompt_ids) - room)
    return Question(bos + prompt_ids[cut:], answer_ids, cut)


def training_question(record: dict, form: str, tokenizer, max_len: int) -> Question:
    """The record's prompt and its right answer, closed by the end-of-text token."""
    prompt, answer = to_text(record, form)[record.get("label", 0)]
    return encode(tokenizer, prompt, [answer], max_len, end=True)


def scoring_questions(record: dict, form: str, tokenizer, max_len: int) -> list[Question]:
    """All choices of a record. They share one Question where they share a prompt (all tasks but cloze WinoGrande)."""
    pairs = to_text(record, form)
    if len({prompt for prompt, _ in pairs}) == 1:
        return [encode(tokenizer, pairs[0][0], [answer for _, answer in pairs], max_len)]
    return [encode(tokenizer, prompt, [answer], max_len) for prompt, answer in pairs]


def prompt_question(record: dict, form: str, tokenizer, max_len: int) -> Question:
    """What is asked where the model writes the answer itself. A free answer's length does not count: nobody has it yet."""
    if not is_free(record):
        return scoring_questions(record, form, tokenizer, max_len)[0]
    return encode(tokenizer, record["prompt"], ["."], max_len)


def check_question(record: dict, form: str, tokenizer, max_len: int, trained: bool) -> None:
    """UserError where `training_question`, or else `scoring_questions`, would refuse a record. Few records have to be
    tokenised for that: a token stands for a byte of text at least, so that a short answer fits for sure."""
    pairs, trained = to_text(record, form), trained or is_free(record)
    if trained:
        pairs = [pairs[record.get("label", 0)]]
    longest = max(len(answer.encode()) for _, answer in pairs) + 3  # the start and end of a text, SentencePiece's space
    if longest > max_len or not all(prompt.strip() for prompt, _ in pairs):
        (training_question if trained else scoring_questions)(record, form, tokenizer, max_len)


# ------------------------------------------------------------------------------------- tokens -> packed row

class Packed(NamedTuple):
    """Questions laid end to end in one row of N tokens: each prompt once, then its answers. See Transformer.forward.
    A token's place is its index in the row. The row's end is filler, of no document: nobody sees it, and it predicts
    nothing (a target of -100, which cross_entropy leaves out)."""
    ids: torch.Tensor        # (1, N)  token ids
    documents: torch.Tensor  # (D, L)  for each answer, the places of its prompt's tokens and its own, then -1
    select: torch.Tensor     # (M,)    the places whose logits predict an answer token
    targets: torch.Tensor    # (M,)    that token
    owner: torch.Tensor      # (M,)    the document, 0 to D - 1, whose answer it belongs to
    is_prompt: torch.Tensor  # (1, N)  True on prompt tokens
    is_answer: torch.Tensor  # (1, N)  True on answer tokens

    @property
    def is_real(self) -> torch.Tensor:
        """(1, N) False on filler."""
        return self.is_prompt | self.is_answer

    def to(self, device: torch.device) -> "Packed":
        pinned = [tensor.pin_memory() for tensor in self] if device.type == "cuda" else self
        return Packed(*(tensor.to(device, non_blocking=True) for tensor in pinned))  # a GPU goes on computing meanwhile


def few_lengths(n: int) -> int:
    """n, rounded up by a sixteenth at most. For each length that is new to it, a CPU's product of matrices is prepared,
    and what that takes is kept: with 16 lengths from n to 2 n instead of n, memory stops growing after some steps."""
    step = max(1, 2 ** (n.bit_length() - 5))
    return math.ceil(n / step) * step


def pack(questions: list[Question]) -> Packed:
    """Packs questions into one row, which holds what is read: all of a prompt, and an answer but its last token."""
    ids, documents, select, targets, owner, is_answer = [], [], [], [], [], []
    for prompt, answers, _ in questions:
        shared = list(range(len(ids), len(ids) + len(prompt)))
        ids += prompt
        is_answer += [False] * len(prompt)
        for answer in answers:
            own = list(range(len(ids), len(ids) + len(answer) - 1))
            ids += answer[:-1]
            is_answer += [True] * len(own)
            select += [shared[-1], *own]  # the last prompt token predicts the first answer token
            targets += answer
            owner += [len(documents)] * len(answer)
            documents.append(torch.tensor(shared + own))

    def filled(values: list, filler) -> torch.Tensor:
        return torch.tensor(values + [filler] * (few_lengths(len(values)) - len(values)))

    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-1)
    is_prompt = [not answer for answer in is_answer]
    return Packed(filled(ids, 0)[None], padded, filled(select, 0), filled(targets, -100), filled(owner, 0),
                  filled(is_prompt, False)[None], filled(is_answer, False)[None])
