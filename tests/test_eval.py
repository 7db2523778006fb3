"""Scores against plain loops, beam search against transformers, runs against each other, and what the gates show."""
import itertools
import json
import math
import random
import re
import shlex
import sys
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from conftest import VOCAB, write_gpt2, write_llama
from data import compare as comparison
from data import pictures, results
from data.commonsense import Question, label_names, scoring_questions, to_text, without_tags
from data.files import UserError
from data.prepare import DEFAULT, TASKS, count_repeated, hold_out, load_records
from gatera import AdapterConfig, adapter_state, gate_values, inject_adapters, save_adapter
from data.weights import save_pretrained
from model import Transformer, load_tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "commonsense"


def adapted(base, method="hira", gate="token", seed=0, **options):
    """A model with an adapter that changes what it says."""
    model = Transformer.from_pretrained(base, **options)
    inject_adapters(model, AdapterConfig(method, gate, r=4))
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_state(model).values():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture
def run(llama, tmp_path):
    """A run directory as train.py leaves it, of piqa and boolq."""
    return write_run(tmp_path / "run", llama)


def write_run(directory, base, seed=0, gate="token", **settings):
    save_adapter(adapted(base, gate=gate, seed=seed), directory / "best")
    config = {"init": str(base), "tasks": "piqa,boolq", "form": "cloze", "max_len": 512, "seed": seed, "peft": "gatera",
              "lr": 0.01} | settings
    (directory / "config.json").write_text(json.dumps({"config": config, "steps": 2}))
    lines = [{"config": config}, {"step": 0, "loss": 2.0, "entropy": 0.69, "gate_prompt": 0.5, "gate_answer": 0.5},
             {"step": 1, "loss": 1.5, "entropy": 0.6, "gate_prompt": 0.4, "gate_answer": 0.6},
             {"step": 1, "validation_loss": 1.7}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def program(*flags):
    return evaluation.main([*map(str, flags), "--data", str(SAMPLE)])


def read_predictions(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- scores

def plain_scores(logits_of, tokenizer, record, form):
    """One forward pass a choice, nothing packed, nothing shared; logits_of: ids (1, T) -> logits (1, T, V)."""
    scores = []
    for prompt, answer in to_text(record, form):
        prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer)
        with torch.no_grad():
            log_p = logits_of(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1:-1]
        scores.append(log_p[range(len(answer)), answer].sum().item())
    return scores


def characters(record, form):
    """Of each choice, for acc_norm; 1 where choices are labels, or what is scored is the same text for all."""
    if form == "label" or record["task"] in ("boolq", "winogrande"):
        return [1] * len(record["choices"])
    return [len(without_tags(choice) if record["task"] == "hellaswag" else choice) for choice in record["choices"]]


def check_against_plain_loop(predictions, records, logits_of, tokenizer, form, tolerance):
    for record, prediction in zip(records, predictions):
        expected = plain_scores(logits_of, tokenizer, record, form)
        assert prediction["scores"] == pytest.approx(expected, abs=tolerance)
        per_character = [score / n for score, n in zip(expected, characters(record, form))]
        for name, values in (("prediction", expected), ("prediction_norm", per_character)):
            assert values[prediction[name]] >= max(values) - 2 * tolerance  # the best, up to ties


@pytest.mark.parametrize("form", ["cloze", "label"])
@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_a_plain_loop_and_do_not_depend_on_packing_or_order(task, form, llama):
    model, tokenizer = adapted(llama, dtype=torch.float64), load_tokenizer(llama)
    records = load_records(task, "test", out=SAMPLE)
    result = evaluation.evaluate(model, tokenizer, records, form)
    check_against_plain_loop(result["predictions"], records, model, tokenizer, form, 1e-8)
    hits = [p["prediction"] == p["label"] for p in result["predictions"]]
    assert result["acc"] == 100 * sum(hits) / len(records) and result["n"] == len(records)
    questions = [q for record in records for q in scoring_questions(record, form, tokenizer, 512)]
    reference = evaluation.log_likelihoods(model, questions, row_tokens=10**6)
    for row_tokens in (1, 300):
        for a, b in zip(evaluation.log_likelihoods(model, questions, row_tokens), reference):
            assert a == pytest.approx(b, abs=1e-8)
    order = random.Random(1).sample(range(len(records)), len(records))
    shuffled = evaluation.evaluate(model, tokenizer, [records[i] for i in order], form, chunk=3)["predictions"]
    for i, prediction in zip(order, shuffled):
        assert prediction["scores"] == pytest.approx(result["predictions"][i]["scores"], abs=1e-8)


def test_rows_are_filled_from_the_longest_down_and_no_further_than_asked():
    assert evaluation.in_rows([3, 10, 5, 4, 4], 8) == [[1], [2], [3, 4], [0]]
    assert evaluation.in_rows([3, 10, 5, 4, 4], 10**6) == [[1, 2, 3, 4, 0]] and evaluation.in_rows([], 8) == []


@pytest.mark.parametrize("protocol", evaluation.PROTOCOLS)
def test_a_model_in_training_is_evaluated_without_dropout_and_goes_on_training(protocol, llama):
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    inject_adapters(model, AdapterConfig(r=4, dropout=0.5))
    for p in adapter_state(model).values():
        p.data += 0.3
    records = load_records("ARC-Easy", "test", out=SAMPLE)[:2]
    expected = evaluation.evaluate(model, tokenizer, records, protocol, beams=1)
    assert not model.training
    assert evaluation.evaluate(model.train(), tokenizer, records, protocol, beams=1) == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("write", [write_gpt2, write_llama])
def test_scores_of_all_tasks_equal_transformers(write, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    base = write(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    ours, tokenizer = Transformer.from_pretrained(base, dtype=torch.float64), load_tokenizer(base)
    for task, form in itertools.product(TASKS, ("cloze", "label")):
        records = [r for r in load_records(task, "test", out=SAMPLE)
                   if max(len(tokenizer.encode(p + a)) for p, a in to_text(r, form)) <= ours.config.max_len]
        predictions = evaluation.evaluate(ours, tokenizer, records, form, ours.config.max_len)["predictions"]
        check_against_plain_loop(predictions, records, lambda ids: theirs(ids).logits, tokenizer, form, 1e-5)


def test_log_p_of_a_bfloat16_model_is_summed_in_float32(llama):
    model, ids = Transformer.from_pretrained(llama, dtype=torch.bfloat16), torch.arange(1, 60).tolist()
    with torch.no_grad():  # as one document: its attention is in float32 on a CPU
        logits = model(torch.tensor([ids]), documents=torch.arange(59)[None])
        log_p = logits.float().log_softmax(-1)[0, 4:-1]
    (score,), = evaluation.log_likelihoods(model, [Question(ids[:5], [ids[5:]])])
    assert score == pytest.approx(log_p[range(54), ids[5:]].sum().item(), abs=1e-3)


def real_records(task, count):
    for source in (DEFAULT, SHARED):
        if (source / task / "test.jsonl").is_file():
            return load_records(task, "test", out=source)[:count]
    if (SHARED / task / "test.json.gz").is_file():
        from data.sources import from_llm_adapters
        return from_llm_adapters(SHARED, task, "test")[:count]
    pytest.skip("the real tasks are not prepared: python data/prepare.py")


@pytest.mark.slow
def test_smollm2s_scores_on_real_questions_equal_transformers(smollm, tmp_path, count=1):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    ours, tokenizer = Transformer.from_pretrained(smollm), load_tokenizer(smollm)
    save_pretrained(ours, tmp_path / "hf", smollm)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for task, form in itertools.product(TASKS, ("cloze", "label")):
        records = real_records(task, count)
        predictions = evaluation.evaluate(ours, tokenizer, records, form, 8192)["predictions"]
        check_against_plain_loop(predictions, records, lambda ids: theirs(ids).logits, tokenizer, form, 2e-3)


@pytest.mark.slow
def test_smollm2_answers_better_than_chance(smollm):
    model, tokenizer = Transformer.from_pretrained(smollm), load_tokenizer(smollm)
    records = load_records("ARC-Easy", "test", out=SAMPLE)
    assert evaluation.evaluate(model, tokenizer, records, "cloze", quiet=True)["acc_norm"] >= 50


@pytest.mark.parametrize("task, choices", [
    ("piqa", ["éééé", "abcdef"]),              # not by tokens or bytes: -4/8 would win
    ("piqa", ["abcd", "abcd  "]),              # PIQA's choices carry spaces, and those count: -4.5/4 would lose
    ("hellaswag", ["abcd", "[step] abcd"])])   # and so does the one that a mark leaves behind
def test_acc_norm_divides_by_the_characters_that_the_harness_counts(task, choices, llama, monkeypatch):
    record = {"task": task, "question": "q", "choices": choices, "label": 0}
    monkeypatch.setattr(evaluation, "log_likelihoods", lambda model, questions: [[-4.0, -4.5]])
    prediction, = evaluation.rank_choices(None, load_tokenizer(llama), [record], "cloze", 512)
    assert (prediction["prediction"], prediction["prediction_norm"]) == (0, 1)


def test_a_score_that_is_no_number_is_an_error_and_no_prediction(llama):
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    (record,) = load_records("piqa", "test", SAMPLE)[:1]
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="a log-likelihood is nan, of piqa's .*--dtype float32"):
        evaluation.evaluate(model, tokenizer, [record], "cloze")


def test_a_long_prompt_is_cut_and_counted(llama):
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    record = {"task": "piqa", "question": "very " * 300 + "long?", "choices": ["yes it is", "no"], "label": 0}
    for protocol in evaluation.PROTOCOLS:
        records = [record, record | {"question": "Short?"}]
        result = evaluation.evaluate(model, tokenizer, records, protocol, 512, beams=2)
        assert result["cut"] == 1 and result["n"] == 2, protocol


def test_the_interval_is_wilsons():
    assert results.wilson(5, 10) == pytest.approx([23.66, 76.34], abs=0.01)      # published example values
    assert results.wilson(0, 10) == pytest.approx([0, 27.75], abs=0.01)
    assert results.wilson(0, 0) == [0, 100]


def test_a_summary_by_hand():
    predictions = [{"label": label, "prediction": said, "prediction_norm": 1, "cut": label == 1}
                   for label, said in ((0, 1), (0, 0), (0, None), (1, 1))]
    summary = results.summarise(predictions, "cloze")
    assert (summary["n"], summary["acc"], summary["acc_norm"]) == (4, 50, 25)
    assert (summary["majority"], summary["unparsed"], summary["cut"]) == (75, 1, 1)  # majority: of the labels


def test_the_mean_over_tasks_counts_each_task_once():
    tasks = {"piqa": {"n": 10, "acc": 50, "interval": [40, 70], "majority": 50, "unparsed": 1, "cut": 2},
             "boolq": {"n": 90, "acc": 90, "interval": [80, 95], "majority": 60, "unparsed": 0, "cut": 3}}
    mean = results.mean_result(tasks, "label")
    assert (mean["acc"], mean["majority"]) == (70, 55) and (mean["n"], mean["unparsed"], mean["cut"]) == (100, 1, 5)
    assert mean["interval"] == pytest.approx([70 - math.hypot(10, 10) / 2, 70 + math.hypot(20, 5) / 2])
    assert results.mean_result({"piqa": tasks["piqa"]}, "label")["interval"] == [40, 70]


# --------------------------------------------------------------------------------------------- generation

@pytest.mark.parametrize("write", [write_gpt2, write_llama])
def test_beam_search_equals_transformers(write, tmp_path):
    """For many end-of-text tokens, so that texts finish early, late and never; prompts of different lengths."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    base = write(tmp_path / "base")
    ours = Transformer.from_pretrained(base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (3, 9, 1)]
    frequent = {token for row in ours.beam_search(prompts, 6) for token in row}
    early = 0
    for stop in sorted(frequent)[:6]:
        found = ours.beam_search(prompts, 6, stop)
        for prompt, row in zip(prompts, found):
            with torch.no_grad():
                expected = theirs.generate(torch.tensor([prompt]), num_beams=4, do_sample=False, max_new_tokens=6,
                                           eos_token_id=stop, pad_token_id=0)[0, len(prompt):].tolist()
            assert row == (expected[:expected.index(stop)] if stop in expected else expected)
            early += len(row) < 6
        assert found == [ours.beam_search([prompt], 6, stop)[0] for prompt in prompts]  # alone as in company
    assert early > 0


def test_beam_search_among_few_tokens_equals_transformers(tmp_path):
    """All tokens are likely: texts end at any rank, and what is never chosen would have been."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    vocab, new = 12, 12
    base = write_gpt2(tmp_path / "base", vocab=vocab)
    ours = Transformer.from_pretrained(base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    prompts = [[1, 5, 7], [4] * 9, [8]]
    for stop, never in itertools.product(range(vocab), ([], [2, 6])):
        for prompt, row in zip(prompts, ours.beam_search(prompts, new, stop, never=never)):
            with torch.no_grad():
                expected = theirs.generate(torch.tensor([prompt]), num_beams=4, do_sample=False, max_new_tokens=new,
                                           eos_token_id=stop, pad_token_id=0, suppress_tokens=never or None)
            expected = expected[0, len(prompt):].tolist()
            assert row == (expected[:expected.index(stop)] if stop in expected else expected)


def test_a_beam_as_wide_as_the_vocabulary_searches_exhaustively(llama):
    model = Transformer.from_pretrained(llama)
    for prompt, stop in (([5, 6, 7], None), ([200], 17), ([3, 1, 4], 99)):
        with torch.no_grad():
            first = model(torch.tensor([prompt])).log_softmax(-1)[0, -1]                                   # (V,)
            rows = torch.tensor([prompt + [token] for token in range(VOCAB)])
            both = first[:, None] + model(rows).log_softmax(-1)[:, -1]                                     # (V, V)
        mean = both / 2
        if stop is not None:
            mean[stop] = -math.inf  # the text has ended there,
            mean[stop, stop] = first[stop]  # with one token
        best = divmod(int(mean.argmax()), VOCAB)
        expected = [] if best[0] == stop else [token for token in best if token != stop]
        assert model.beam_search([prompt], 2, stop, beams=VOCAB) == [expected]


def test_one_beam_is_greedy(llama):
    model = Transformer.from_pretrained(llama)
    prompts = [[1, 2, 3], [9], list(range(20))]
    for stop in (None, model.generate(prompts, 8)[0][4]):
        assert model.beam_search(prompts, 8, stop, beams=1) == model.generate(prompts, 8, stop)
    assert model.beam_search(prompts, 0) == [[], [], []]
    with pytest.raises(ValueError, match="beams 0"):
        model.beam_search(prompts, 1, beams=0)
    with pytest.raises(ValueError, match="exceed the context"):
        model.beam_search(prompts, 600)


@pytest.mark.parametrize("beams", [1, 4])
def test_generated_answers_do_not_depend_on_batching(beams, llama):
    model, tokenizer = adapted(llama), load_tokenizer(llama)
    records = [r for task in ("piqa", "boolq", "ARC-Easy") for r in load_records(task, "test", out=SAMPLE)[:2]]
    together = evaluation.generate_answers(model, tokenizer, records, 512, beams, row_tokens=10**6)
    assert together == evaluation.generate_answers(model, tokenizer, records, 512, beams, row_tokens=1)
    assert together[::-1] == evaluation.generate_answers(model, tokenizer, records[::-1], 512, beams)


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_is_what_beam_search_finds_up_to_the_end_of_text(beams, llama):
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    records = load_records("piqa", "test", out=SAMPLE)[:2]
    prompts = [scoring_questions(record, "label", tokenizer, 480)[0].prompt for record in records]
    texts = model.beam_search(prompts, 32, None, beams)
    missing = texts[0][0]  # a token that would be chosen, if the tokenizer had it
    tokenizer.ids -= {missing}
    tokenizer.eos = model.beam_search(prompts, 32, None, beams, [missing])[0][4]
    expected = model.beam_search(prompts, 32, tokenizer.eos, beams, [missing])
    assert min(map(len, expected)) < 32
    answers = evaluation.generate_answers(model, tokenizer, records, 512, beams)
    assert [answer["text"] for answer in answers] == [tokenizer.decode(new) for new in expected]


@pytest.mark.parametrize("task, text, expected", [
    ("boolq", "the correct answer is true", 0), ("boolq", "false, not true", 1), ("boolq", "yes", None),
    ("piqa", "solution2 or solution1", 1), ("winogrande", "option1", 0), ("hellaswag", "the ending4.", 3),
    ("ARC-Easy", "answer5", 4), ("openbookqa", "Answer1", None), ("social_i_qa", "", None)])
def test_the_first_label_in_a_text_is_the_prediction(task, text, expected):
    assert evaluation.parse_answer(task, text) == expected


@pytest.mark.parametrize("task", TASKS)
def test_every_label_parses_as_itself(task):
    for record in load_records(task, "test", out=SAMPLE):
        for i, name in enumerate(label_names(record)):
            assert evaluation.parse_answer(task, f"the correct answer is {name}") == i


def test_what_does_not_parse_is_wrong_and_counted(llama, monkeypatch):
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    records = [r | {"label": 0} for r in load_records("piqa", "test", out=SAMPLE)[:3]]
    texts = iter(["the correct answer is solution1", "I cannot say", "solution2"])
    monkeypatch.setattr(Transformer, "beam_search", lambda self, prompts, *rest: [tokenizer.encode(next(texts))])
    result = evaluation.evaluate(model, tokenizer, records, "generate", chunk=1)
    assert (result["acc"], result["unparsed"]) == (pytest.approx(100 / 3), 1)
    assert [p["prediction"] for p in result["predictions"]] == [0, None, 1]


# -------------------------------------------------------------------------------------------- the program

@pytest.mark.parametrize("protocol", evaluation.PROTOCOLS)
def test_the_program_scores_a_base_model(protocol, llama, tmp_path, capsys):
    summary = program("--init", llama, "--tasks", "piqa,boolq", "--limit", 3, "--protocol", protocol, "--out",
                      tmp_path / "scores", "--beams", 2)
    assert set(summary["tasks"]) == {"piqa", "boolq"} and summary["tasks"]["piqa"]["n"] == 3
    lines = read_predictions(tmp_path / "scores")
    assert [(p["task"], p["index"]) for p in lines] == [("piqa", 0), ("piqa", 1), ("piqa", 2),
                                                        ("boolq", 0), ("boolq", 1), ("boolq", 2)]
    assert all(("text" if protocol == "generate" else "scores") in p for p in lines)
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == summary
    values = [result[results.accuracy_key(protocol)] for result in summary["tasks"].values()]
    low, high = summary["mean"]["interval"]
    assert 0 <= low <= sum(values) / 2 <= high <= 100
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("majority", "mean", "unparsed", "cut", "95 % interval"))


def test_a_run_is_scored_on_its_own_tasks_and_form(run, capsys):
    summary = program("--run", run, "--split", "val")
    assert list(summary["tasks"]) == ["piqa", "boolq"] and summary["configuration"]["protocol"] == "cloze"
    assert summary["tasks"]["piqa"]["n"] == 1 and (run / "eval" / "best-cloze-val" / "results.json").exists()
    assert summary["settings"]["steps"] == 2 and "no_such" not in capsys.readouterr().out


def test_an_interrupted_evaluation_goes_on(run, monkeypatch, capsys):
    whole = program("--run", run, "--out", run / "whole")
    calls, rank = [], evaluation.rank_choices

    def failing(model, tokenizer, records, *rest):
        calls.append(len(records))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rank(model, tokenizer, records, *rest)

    monkeypatch.setattr(evaluation, "rank_choices", failing)
    monkeypatch.setattr(evaluation.evaluate, "__defaults__", (*evaluation.evaluate.__defaults__[:-1], 1))
    with pytest.raises(KeyboardInterrupt):
        program("--run", run)
    out = run / "eval" / "best-cloze"
    assert len(read_predictions(out)) == 3
    with open(out / "predictions.jsonl", "a") as file:
        file.write('{"task": "piqa", "ind')  # cut short in the middle of a line
    resumed = program("--run", run)
    assert len(calls) == 4 + 8 - 3 and "3 predictions were already in" in capsys.readouterr().out
    assert resumed["tasks"] == whole["tasks"]
    assert [p["scores"] for p in read_predictions(out)] == [
        pytest.approx(p["scores"], abs=1e-4) for p in read_predictions(run / "whole")]
    again = program("--run", run, "--tasks", "boolq,ARC-Easy")  # another task joins, what is there is not made again
    assert len(calls) == 9 + 4 and list(again["tasks"]) == ["piqa", "boolq", "ARC-Easy"]


def test_two_evaluations_at_once_do_not_share_a_directory(run):
    before = program("--run", run, "--tasks", "piqa")
    with results.claimed(run / "eval" / "best-cloze"), pytest.raises(UserError, match="another run is writing there"):
        program("--run", run, "--tasks", "boolq")
    assert json.loads((run / "eval" / "best-cloze" / "results.json").read_text()) == before
    assert set(program("--run", run, "--tasks", "boolq")["tasks"]) == {"piqa", "boolq"}


def test_results_of_another_adapter_are_never_mixed_in(run, llama, capsys):
    program("--run", run, "--tasks", "piqa")
    out = run / "eval" / "best-cloze"
    before = (out / "predictions.jsonl").read_bytes()
    shutil.rmtree(run / "best")
    save_adapter(adapted(llama, seed=5), run / "best")
    summary = program("--run", run, "--tasks", "boolq")
    assert list(summary["tasks"]) == ["boolq"] and {p["task"] for p in read_predictions(out)} == {"boolq"}
    assert (out / "predictions-1.jsonl").read_bytes() == before and (out / "results-1.json").exists()
    assert "adapter_sha256 differ" in capsys.readouterr().out
    (out / "predictions.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1: not a prediction"):
        program("--run", run, "--tasks", "boolq")


def test_results_of_other_questions_are_never_mixed_in(run, tmp_path, capsys):
    data = shutil.copytree(SAMPLE, tmp_path / "data")
    flags = ["--run", str(run), "--tasks", "piqa", "--data", str(data)]
    evaluation.main(flags)
    file = data / "piqa" / "test.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))  # as many
    evaluation.main(flags)
    assert "held another evaluation (piqa's records differ)" in capsys.readouterr().out
    evaluation.main([*flags, "--max-len", "100"])
    assert "held another evaluation (max_len differ)" in capsys.readouterr().out
    evaluation.main([*flags, "--max-len", "100"])
    assert "4 predictions were already in" in capsys.readouterr().out


def test_questions_are_as_long_as_in_training_and_fit_into_the_context(llama, gpt2, tmp_path):
    run = write_run(tmp_path / "run", llama, max_len=64)
    assert program("--run", run, "--tasks", "boolq")["configuration"]["max_len"] == 64
    for base, length in ((llama, 512), (gpt2, 256)):
        summary = program("--init", base, "--tasks", "piqa", "--out", tmp_path / str(length))
        assert summary["configuration"]["max_len"] == length


def test_an_adapter_directory_is_scored_with_its_adapter(llama, tmp_path):
    save_adapter(adapted(llama, "lora", "none"), tmp_path / "adapter")
    common = ["--init", llama, "--tasks", "piqa", "--protocol", "cloze"]
    program(*common, "--run", tmp_path / "adapter", "--out", tmp_path / "with")
    program(*common, "--out", tmp_path / "without")
    assert read_predictions(tmp_path / "with") != read_predictions(tmp_path / "without")


@pytest.mark.parametrize("argv, message", [
    ([], "nothing to evaluate"),
    (["--init", "x", "--tasks", "arc"], "--tasks arc: expected all or some of boolq"),
    (["--init", "x", "--protocol", "vibes"], "--protocol vibes: expected one of cloze, label, generate"),
    (["--init", "x", "--limit", "-1", "--max-len", "3", "--beams", "0"], "--limit -1.*--beams 0.*--max-len 3"),
    (["--run", "nowhere"], "nowhere: no such directory"),
    (["--run", str(SAMPLE)], "no adapter there"),
    (["--device", "gpu", "--init", "x"], "--device gpu: expected auto"),
    (["--init", "x", "--tasks", "piqa,piqa"], "--tasks piqa,piqa: a task is named twice"),
    (["--colour"], "unknown argument --colour"),
    (["--init", "./nowhere"], "no such model file or directory"),
    (["--init", "x", "--data", "nowhere"], "nowhere.*expected records"),
    (["--init", "x", "--split", "train"], "--split train: expected one of val, test"),
    (["--init", "x", "--gates"], "--gates needs --run"),
    (["--init", "x", "--gates", "--prompt", "y"], "--gates and --prompt: expected one of them"),
    (["--init", "x", "--chat"], "--chat needs --prompt TEXT"),
    (["--run", "x", "--gates", "--max-new-tokens", "3"], "--max-new-tokens with --gates: expected one of them"),
    (["--init", "x", "--prompt", "y", "--max-new-tokens", "-1"], "--max-new-tokens -1: expected 0 .32, or 256. or more"),
    (["--init", "x", "--out", __file__], "a file is there"),
    (["--compare", "nowhere", "x"], "nowhere, x: no results called best-cloze there; first"),
])
def test_bad_input_is_one_clear_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluation.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
    ({"label": 2}, "line 1: label is 2, expected a whole number from 0 to 1"),
    ({"choices": ["a", " "]}, "line 1: choices must be a list of texts that are not empty")])
def test_bad_records_are_one_clear_line(change, message, llama, tmp_path):
    (tmp_path / "piqa").mkdir()
    record = {"task": "piqa", "question": "q", "choices": ["a", "b"], "label": 0} | change
    (tmp_path / "piqa" / "test.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        evaluation.main(["--init", str(llama), "--tasks", "piqa", "--data", str(tmp_path)])


def test_a_model_of_another_shape_is_named(llama, tmp_path):
    model = Transformer.from_pretrained(llama)
    inject_adapters(model, AdapterConfig("lora", "none", r=4))
    save_adapter(model, tmp_path / "adapter")
    other = write_llama(tmp_path / "wide", d=64)
    with pytest.raises(UserError, match="does not fit this base model"):
        program("--init", other, "--run", tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------- comparing

def test_mcnemar_and_bootstrap_by_hand():
    d = np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 90)
    assert comparison.mcnemar(d) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert comparison.mcnemar(np.zeros(5)) == 1 and comparison.mcnemar(np.array([1.0, -1.0])) == 1
    draws = comparison.bootstrap(d, np.random.default_rng(1))
    assert draws.mean() == pytest.approx(6, abs=0.2)
    assert draws.std() == pytest.approx(100 * d.std() / 10, rel=0.05)


def accuracy_on(run, task):
    predictions = [p for p in read_predictions(run / "eval" / "best-cloze") if p["task"] == task]
    return 100 * np.mean([p["prediction_norm"] == p["label"] for p in predictions])


def test_runs_are_compared_by_question(run, llama, tmp_path, capsys):
    other = write_run(tmp_path / "other", llama, seed=3, lr=0.02)
    for directory in (run, other):
        program("--run", directory)
    result = program("--compare", run, other, "--out", tmp_path / "table")
    piqa = [accuracy_on(directory, "piqa") for directory in (run, other)]
    row = result["rows"]["piqa"]
    assert [cell["accuracy"] for cell in row] == piqa and row[1]["difference"] == piqa[1] - piqa[0]
    assert row[1]["interval"][0] <= row[1]["difference"] <= row[1]["interval"][1] and 0 < row[1]["p"] <= 1
    assert result["compared"] == ["lr: 0.01 / 0.02"] and result["warnings"] == ["seed: 0 / 3"]
    one = program("--compare", run, other, "--tasks", "boolq", "--out", tmp_path / "one")
    assert list(one["rows"]) == ["boolq", "mean"]
    assert (tmp_path / "table" / "losses.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "WARNING: what should be the same differs: seed: 0 / 3" in printed and "compared: lr: 0.01 / 0.02" in printed


def test_seeds_are_joined(llama, tmp_path, capsys):
    runs = {name: write_run(tmp_path / name, llama, seed=int(name[1]), peft={"a": "lora", "b": "gatera"}[name[0]])
            for name in ("a1", "a2", "b1", "b2")}
    for directory in runs.values():
        program("--run", directory)
    groups = [f"{runs['a1']},{runs['a2']}", f"{runs['b1']},{runs['b2']}"]
    capsys.readouterr()
    result = program("--compare", *groups, "--out", tmp_path / "table")
    printed = capsys.readouterr().out
    for name in runs:  # the seeds of a method in a directory of its own
        shutil.copytree(runs[name], tmp_path / name[0] / name[1])
    assert program("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "same")["rows"] == result["rows"]
    shutil.copytree(runs["a1"], tmp_path / "a" / "1-1")
    with pytest.raises(UserError, match="a/1, .*a/1-1, .*a/2 have the same seed"):
        program("--compare", tmp_path / "a", tmp_path / "b")
    assert result["warnings"] == [] and result["compared"] == ["peft: lora / gatera"]
    head, line, first, second = (row[2:-2].split(" | ") for row in printed.splitlines() if row.startswith("|"))
    assert head[1].strip() == "piqa, n 4" and [cell.strip() for cell in head[-3:]] == ["minus [1]", "95 % interval", "p"]
    assert " ± " in first[1] and float(second[-3]) == pytest.approx(result["rows"]["mean"][1]["difference"], abs=0.006)
    accuracy = [[accuracy_on(runs[name], "boolq") for name in pair] for pair in (("a1", "a2"), ("b1", "b2"))]
    first, second = result["rows"]["boolq"]
    assert first["accuracy"] == np.mean(accuracy[0]) and first["spread"] == pytest.approx(np.std(accuracy[0], ddof=1))
    assert second["difference"] == np.mean(accuracy[1]) - np.mean(accuracy[0]) and second["p"] is None


def write_results(directory, hits, settings=None, backwards=False, **changed):
    """An evaluation's results, of {task: whether each question is answered rightly}."""
    directory.mkdir(parents=True)
    configuration = {"base_sha256": "b", "dtype": "d", "protocol": "label", "split": "test", "beams": None, "limit": 0}
    (directory / "results.json").write_text(json.dumps({
        "configuration": configuration | changed, "settings": settings, "data": dict.fromkeys(hits, "x"),
        "tasks": {task: results.summarise([], "label") | {"n": len(right)} for task, right in hits.items()}}))
    said = {"text": "", "scores": [0.0, -1.0], "prediction": 0, "prediction_norm": 0, "cut": False}
    lines = [json.dumps({"task": task, "index": i, "label": int(not hit)} | said) + "\n"
             for task, right in hits.items() for i, hit in enumerate(right)]
    (directory / "predictions.jsonl").write_text("".join(lines[::-1] if backwards else lines))
    return directory


def test_a_shifted_copy_is_found_better_and_a_copy_the_same(tmp_path):
    """100 questions of which the second run gets 20 more right, and the third the same; in any order of their lines."""
    runs = [write_results(tmp_path / name, {"piqa": [i < right for i in range(100)]}, backwards=name == "b")
            for name, right in (("a", 40), ("b", 60), ("c", 40))]
    result = program("--compare", *runs, "--out", tmp_path / "table")
    first, better, same = result["rows"]["mean"]
    assert (first["accuracy"], better["difference"], same["difference"]) == (40, 20, 0)
    assert 10 < better["interval"][0] < 20 < better["interval"][1] < 30 and better["p"] == pytest.approx(2 / 2**20)
    assert same["interval"] == [0, 0] and same["p"] == 1


def test_the_same_runs_compared_again_are_renewed_in_place(tmp_path, monkeypatch):
    """Named one by one or by their directory; other runs are another comparison, and the earlier one stays."""
    monkeypatch.chdir(tmp_path)
    for seed, run in enumerate(("a/1", "a/2", "b")):
        write_results(Path(run), {"piqa": [True, False]}, {"seed": seed})
        Path(run, "config.json").write_text("{}")
    for groups in (("a/1,a/2", "b"), ("a", "b/"), ("./a", "b")):
        assert program("--compare", *groups)["runs"] == ["a/1,a/2", "b"]
        assert [path.name for path in Path("out/compare").iterdir()] == ["compare.json"]
    program("--compare", "b", "a")
    assert {path.name for path in Path("out/compare").iterdir()} == {"compare.json", "compare-1.json"}


def test_only_a_difference_that_matters_is_warned_of_and_in_few_digits(tmp_path):
    def warnings(*settings):
        runs = [write_results(tmp_path / f"{len(list(tmp_path.iterdir()))}", {"piqa": [True]}, s) for s in settings]
        return program("--compare", *runs, "--out", tmp_path / "table")["warnings"]

    digests = {"data_sha256": "d" * 64, "train_sha256": "t" * 64}
    assert warnings(digests, digests | {"data_sha256": "e" * 64}) == []  # other validation records
    assert warnings(digests, digests | {"train_sha256": "u" * 64}) == ["train_sha256: tttttttt / uuuuuuuu"]
    old = {"data_sha256": "d" * 64}  # before there was train_sha256
    assert warnings(old, digests) == [] and warnings(old, {"data_sha256": "e" * 64}) == ["data_sha256: dddddddd / eeeeeeee"]


def test_a_compared_mean_counts_each_task_once(tmp_path):
    """20 points more in the larger of two tasks, and none in the other."""
    runs = [write_results(tmp_path / name, {"piqa": [i < right for i in range(400)], "boolq": [True] * 10})
            for name, right in (("a", 200), ("b", 280))]
    first, second = program("--compare", *runs, "--out", tmp_path / "table")["rows"]["mean"]
    assert (first["accuracy"], second["difference"]) == (75, 10)
    assert 7 < second["interval"][0] < 10 < second["interval"][1] < 13


def test_what_differs_between_the_seeds_of_a_method_is_a_warning(tmp_path):
    right = {"piqa": [True] * 4}
    a, b, c, d = (write_results(tmp_path / name, right, settings={"seed": seed, "lr": lr})
                  for name, seed, lr in (("a", 1, 0.1), ("b", 2, 0.2), ("c", 1, 0.2), ("d", 2, 0.2)))
    result = program("--compare", f"{a},{b}", f"{c},{d}", "--out", tmp_path / "table")
    assert result["warnings"] == ["lr: 0.1, 0.2 / 0.2"] and result["compared"] == []


def test_results_that_are_not_whole_or_of_other_beams_are_not_compared(tmp_path):
    right = {"piqa": [True] * 4}
    four, one = (write_results(tmp_path / str(beams), right, protocol="generate", beams=beams) for beams in (4, 1))
    with pytest.raises(UserError, match="cannot be compared: their beams is 1 and 4"):
        program("--compare", four, one)
    file = write_results(tmp_path / "half", right) / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="half.predictions.jsonl: not all predictions of piqa"):
        program("--compare", tmp_path / "half", four)


@pytest.mark.parametrize("flags, message", [
    (["--limit", "2"], "the questions of piqa, boolq differ"),
    (["--protocol", "label"], "their protocol is cloze and label"),
    (["--split", "val"], "their split is test and val"),
    (["--tasks", "ARC-Easy"], "no task in common")])
def test_what_cannot_be_paired_is_refused(flags, message, run, tmp_path):
    program("--run", run)
    program("--run", run, "--out", tmp_path / "other", *flags)
    with pytest.raises(UserError, match=message):
        program("--compare", run, tmp_path / "other")


def test_a_base_model_can_be_the_first(run, llama, tmp_path, capsys):
    program("--run", run)
    program("--init", llama, "--tasks", "boolq", "--out", tmp_path / "base")
    result = program("--compare", tmp_path / "base", run, "--out", tmp_path / "table")
    assert result["warnings"] == [] and list(result["rows"]) == ["boolq", "mean"]
    printed = capsys.readouterr().out
    assert "its training is unknown" in printed and "left out: piqa" in printed
    other = write_llama(tmp_path / "wide", d=64)
    program("--init", other, "--tasks", "boolq", "--out", tmp_path / "wide-base")
    assert "base: " in program("--compare", tmp_path / "wide-base", run, "--out", tmp_path / "table")["warnings"][0]


def test_several_results_of_a_run_are_named(run):
    program("--run", run, "--limit", 2)
    program("--run", run, "--limit", 2, "--protocol", "label")
    there = "called best-cloze there; there are best-cloze-2, best-label-2: choose with --protocol"
    with pytest.raises(UserError, match=there):
        program("--compare", run, run)
    result = program("--compare", run, run, "--protocol", "label", "--limit", 2, "--out", run / "table")
    assert result["rows"]["mean"][1]["difference"] == 0


@pytest.mark.parametrize("data, flags, name", [
    ("mine.jsonl", ["--tasks", "boolq"], "best-label"),  # not in that file, so in the prepared ones
    ("mine.jsonl", [], "best-label-val"),
    ("gone", ["--tasks", "boolq"], "best-label"),
    ("mine.jsonl", ["--data", SAMPLE], "best-label"),
    ("", ["--data", SAMPLE / "instructions.json"], "best-label-val")])
def test_results_are_looked_for_where_they_were_written(data, flags, name, tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        write_results(run / "eval" / name, {"boolq": [True, False]})
        (run / "config.json").write_text(json.dumps({"config": {"data": data, "tasks": "all"}}))
    argv = ["--compare", *runs, *flags, "--protocol", "label", "--out", tmp_path / "table"]
    assert list(evaluation.main(argv)["rows"]) == ["boolq", "mean"]


def test_the_advice_on_what_to_evaluate_has_all_flags(run):
    flags = "--tasks boolq --template 'Q: {instruction}\\nA:' --max-len 99"
    with pytest.raises(UserError, match=re.escape(flags)):
        program("--compare", run, run, *shlex.split(flags))


# ----------------------------------------------------------------------------------------------- the gates

@pytest.mark.parametrize("stops", [False, True])
def test_gates_while_decoding_equal_those_of_one_forward(stops, llama):
    model, tokenizer = adapted(llama, dtype=torch.float64), load_tokenizer(llama)
    record = load_records("piqa", "test", out=SAMPLE)[0]
    prompt = scoring_questions(record, "cloze", tokenizer, 512)[0].prompt
    tokenizer.eos = model.generate([prompt], 32)[0][5] if stops else None
    trace, = evaluation.trace_gates(model, tokenizer, [record], "cloze", 512)
    ids = prompt + model.generate([prompt], 32, tokenizer.eos)[0]
    assert (len(ids) < len(prompt) + 32) == stops
    assert trace["prompt"] == len(prompt) and "".join(trace["tokens"]) == tokenizer.decode(ids)
    with torch.no_grad():
        model(torch.tensor([ids]))
    expected = torch.cat(list(gate_values(model).values()))
    torch.testing.assert_close(trace["gates"].double(), expected, rtol=0, atol=1e-5)


def test_gate_numbers_by_hand():
    names = ["blocks.0.attn.q_proj", "blocks.1.mlp.up_proj"]
    traces = [{"prompt": 2, "cut": 3, "gates": torch.tensor([[0.5, 0.5, 1.0], [0.0, 0.0, 0.01]])}]
    numbers = evaluation.gate_numbers(traces, names)
    prompt, answer = numbers["prompt"], numbers["answer"]
    assert (numbers["questions"], numbers["cut"]) == (1, 1)
    assert (prompt["tokens"], prompt["mean"], prompt["below_0.05"], prompt["entropy_bits"]) == (2, 0.25, 0.5, 0.5)
    assert (prompt["between_tokens"], answer["between_tokens"]) == (0, 0)  # each gate is the same on all its tokens
    mixed = evaluation.gate_numbers([{"prompt": 4, "cut": 0, "gates": torch.tensor([[0, 0.5, 0.5, 1], [0.5] * 4])}], names)
    assert mixed["prompt"]["between_tokens"] == pytest.approx(1)  # and here the gates have the same mean
    assert prompt["projections"] == {"q_proj": 0.5, "up_proj": 0.0} and prompt["layers"] == {0: 0.5, 1: 0.0}
    assert (answer["tokens"], answer["above_0.95"], answer["below_0.05"]) == (1, 0.5, 0.5)
    bits = -(0.01 * math.log2(0.01) + 0.99 * math.log2(0.99)) / 2
    assert answer["entropy_bits"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("gate", ["token", "static"])
def test_gates_are_shown(gate, llama, tmp_path, capsys):
    run = write_run(tmp_path / "run", llama, gate=gate)
    numbers = program("--run", run, "--gates", "--limit", 2)["gates"]
    out = run / "eval" / "best-gates-cloze-2"
    assert json.loads((out / "gates.json").read_text())["gates"]["questions"] == 4 == numbers["questions"]
    for name in ("gates-layers", "gates-histogram", "gates-position", "training"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "gates.html").read_text()
    assert "http" not in page and "{{" not in page and "prefers-color-scheme: dark" in page
    assert "mean gate" in capsys.readouterr().out


def test_gates_are_of_ten_questions_as_generation_reads_them(llama, tmp_path):
    run, lines = write_run(tmp_path / "run", llama), (SAMPLE / "piqa" / "test.jsonl").read_text()
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    (tmp_path / "data" / "piqa" / "test.jsonl").write_text(lines * 3)
    evaluation.main(["--run", str(run), "--data", str(tmp_path / "data"), "--tasks", "piqa", "--gates",
                     "--protocol", "generate"])
    written = json.loads((run / "eval" / "best-gates-generate" / "gates.json").read_text())
    assert written["form"] == "label" and written["gates"]["questions"] == 10


def test_the_page_opens_where_gates_differ_most_between_tokens(tmp_path):
    names = ["blocks.0.attn.q_proj", "blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]
    apart, low, high = torch.tensor([[0.9, 0.9], [0.2, 0.4], [0.1, 0.1]]), torch.full((3, 1), 0.1), torch.full((3, 1), 0.9)
    for several, start in (([apart], 1), ([apart, low], 0), ([apart, high], 2), ([low], None)):
        traces = [{"task": "piqa", "tokens": ["x"] * gates.shape[1], "prompt": 1, "gates": gates} for gates in several]
        pictures.write_gate_page(traces, names, "", tmp_path / "gates.html")
        found = re.search(r'id="data">(.*)</script>', (tmp_path / "gates.html").read_text()).group(1)
        assert json.loads(found)["start"] == start


def test_what_stands_in_a_picture_is_not_clipped(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: (kept.append(figure), figure.savefig(path)))
    trace = {"prompt": 2, "gates": torch.rand(5, 3, generator=torch.Generator().manual_seed(0))}  # an answer of one token
    pictures.draw_positions([trace, trace], "", tmp_path / "x.png")
    (axis,), legend = kept[0].axes, kept[0].axes[0].get_legend()
    for part in (*axis.texts, legend):
        box = part.get_window_extent()
        assert axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1, part
    assert "right: answer" in legend.get_texts()[-1].get_text()


def test_texts_in_the_page_are_harmless(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    trace = {"task": "piqa", "tokens": ["a", evil, "<!--"], "prompt": 1, "gates": torch.tensor([[0.0, 0.5, 1.0]])}
    pictures.write_gate_page([trace], ["blocks.0.attn.q_proj"], evil, tmp_path / "gates.html")
    page = (tmp_path / "gates.html").read_text()
    template = (Path(evaluation.__file__).parent / "assets" / "gates.html").read_text()
    assert page.count("<") == template.count("<") and "innerHTML" not in template
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', page).group(1))
    assert data["title"] == evil and data["questions"][0]["tokens"] == ["a", evil, "<!--"]
    assert data["start"] == 0 and data["places"] == [[0, "q_proj"]] and data["questions"][0]["gates"] == "AID/"  # bytes 0, 128, 255


def test_a_run_without_gates_has_none_to_show(llama, tmp_path):
    with pytest.raises(UserError, match="its adapter has no gates to show"):
        program("--run", write_run(tmp_path / "run", llama, gate="none"), "--gates")


class Terminal:
    """Stands in for stdout."""
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_an_answer_is_streamed_with_and_without_the_adapter(run, llama, capsys, monkeypatch):
    answers = program("--run", run, "--prompt", "Question: why?\\nAnswer:")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and re.search(r"Question|Q\[0\.\d\d\]", printed) and printed.count(">>>") == 2
    tokenizer = load_tokenizer(llama)
    prompt = tokenizer.encode("Question: why?\nAnswer:")
    base = Transformer.from_pretrained(llama).generate([prompt], 32, tokenizer.eos)[0]
    with_adapter, without = answers.values()
    assert without == tokenizer.decode(base) != with_adapter
    program("--run", run, "--prompt", "why? " * 300, "--max-len", "64")
    assert "the prompt is longer than 64 tokens and lost its first" in capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    program("--run", run, "--prompt", "why")
    assert "\x1b[30;48;5;" in terminal.text
    terminal.text = ""
    monkeypatch.setenv("NO_COLOR", "1")
    program("--run", run, "--prompt", "why")
    assert "\x1b" not in terminal.text and "[0." in terminal.text


def test_an_answer_may_be_as_long_as_one_asks_for(llama, capsys):
    """How long it was, is said where it may not have been all."""
    tokenizer, model = load_tokenizer(llama), Transformer.from_pretrained(llama)
    for new, flags in ((32, []), (5, ["--max-new-tokens", 5]), (60, ["--max-new-tokens", 60])):
        answer = program("--init", llama, "--prompt", "why", *flags)["the base"]
        ids = model.generate([tokenizer.encode("why")], new, tokenizer.eos)[0]
        cut = f"[cut: {new} new tokens are all that --max-new-tokens allows]" in capsys.readouterr().out
        assert answer == tokenizer.decode(ids) and cut == (len(ids) == new)
    model.decode = lambda prompts, *_: iter(torch.tensor([i]) for i in (5, 6, tokenizer.eos, 7))
    assert evaluation.show_decoding(model, tokenizer, "why", 20, 8)["the base"] == tokenizer.decode([5, 6])
    assert "[cut" not in capsys.readouterr().out
    with pytest.raises(UserError, match="the base's context of 512 leaves no room for 500 new tokens"):
        program("--init", llama, "--prompt", "why", "--max-new-tokens", 500)


def test_a_long_prompt_loses_its_start_but_for_the_begin_of_text(llama, capsys):
    model, tokenizer = Transformer.from_pretrained(llama), load_tokenizer(llama)
    text, tokenizer.bos = "".join(map(chr, range(33, 120))), 7
    for room, read in ((20, [7] + tokenizer.encode(text)[-19:]), (200, [7] + tokenizer.encode(text))):
        answer = evaluation.show_decoding(model, tokenizer, text, room)["the base"]
        assert answer == tokenizer.decode(model.generate([read], 32, tokenizer.eos)[0])
        assert (f"lost its first {len(text) + 1 - room}" in capsys.readouterr().out) == (room == 20)


def test_control_characters_do_not_reach_the_terminal():
    for colour in (False, True):
        assert "\x1b[2J" not in pictures.paint("a\x1b[2Jb\x07", 0.5, colour)
    assert pictures.paint("one\n", 0.25, False) == "one[0.25]\n"


# -------------------------------------------------------------------------------------------- what is said

def test_a_run_in_cloze_form_has_never_seen_the_instruction(llama, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", llama)
    for flags, warned in ((["generate"], 1), (["label"], 0), (["cloze"], 0)):
        program("--run", run, "--limit", 1, "--protocol", *flags)
        printed = capsys.readouterr().out
        assert printed.count("WARNING: ") == warned
    monkeypatch.setattr(evaluation.Transformer, "from_pretrained", lambda *args, **options: pytest.fail("costly"))
    with pytest.raises(pytest.fail.Exception, match="costly"):
        program("--run", run, "--protocol", "generate")
    assert "was trained in cloze form and has never seen the instruction" in capsys.readouterr().out


def test_gates_say_whose_questions_they_are_of(run, capsys):
    program("--run", run, "--gates", "--limit", 1)
    assert f"cloze, 2 questions (test) of {SAMPLE}\n" in capsys.readouterr().out


def test_the_source_of_the_data_is_told_once(llama, tmp_path, monkeypatch, capsys):
    module = sys.modules["data.prepare"]
    for place in (module, evaluation, sys.modules["data.results"]):
        monkeypatch.setattr(place, "DEFAULT", tmp_path / "commonsense")
    monkeypatch.setattr(module.prepare, "__defaults__", (("train", "test"), "auto", tmp_path / "commonsense"))
    monkeypatch.setattr(sys.modules["data.sources"], "hub_reachable", lambda: False)
    monkeypatch.setattr(module, "fetch_records", lambda task, split, source: load_records(task, split, SAMPLE))
    argv = ["--init", str(llama), "--tasks", "piqa,boolq", "--limit", "1", "--out", str(tmp_path / "out")]
    evaluation.main(argv)
    assert capsys.readouterr().out.count("the Hugging Face hub cannot be reached") == 1
    assert {file.name for file in (tmp_path / "commonsense" / "piqa").iterdir()} == {"test.jsonl"}
    evaluation.main([*argv, "--split", "val"])
    assert {file.name for file in (tmp_path / "commonsense" / "boolq").iterdir()} == {"test.jsonl", "train.jsonl"}


# ------------------------------------------------------------------------------------------------- splits

def test_the_val_slice_is_the_same_for_everybody_and_has_no_twin_in_training():
    records = [{"task": "piqa", "question": str(i % 3000), "choices": []} for i in range(5000)]  # 2,000 of them twice
    training, val = hold_out(records)
    assert len(val) == 200 and hold_out(records) == (training, val)
    assert not {r["question"] for r in training} & {r["question"] for r in val}
    assert {r["question"] for r in training + val} == {r["question"] for r in records}
    assert len(training) == sum(record not in val for record in records)
    assert [len(hold_out(records[:n])[1]) for n in (1, 6, 10, 11, 1999, 3000)] == [1, 1, 1, 2, 200, 200]
    assert 60 < sum(int(record["question"]) < 1500 for record in hold_out(records[:3000])[1]) < 140  # from all over
    assert count_repeated(records) == 2000 and count_repeated(records[:3000]) == 0


@pytest.mark.parametrize("task", TASKS)
def test_val_records_come_from_the_training_set(task):
    assert load_records(task, "val", out=SAMPLE) == hold_out(load_records(task, "train", out=SAMPLE))[1]


def test_a_run_is_evaluated_in_the_dtype_that_it_was_trained_in(llama, tmp_path):
    argv = ["--init", str(llama), "--data", str(SAMPLE), "--tasks", "piqa", "--max-steps", "1", "--warmup", "0", "--batch", "2",
            "--validation", "1", "--r", "4", "--device", "cpu", "--out", str(tmp_path / "run")]
    train.main([*argv, "--dtype", "bfloat16"])
    dtypes = [program("--run", tmp_path / "run", "--limit", "1", *flags)["configuration"]["dtype"]
              for flags in ([], ["--dtype", "float32"])]
    assert dtypes == ["torch.bfloat16", "torch.float32"]
