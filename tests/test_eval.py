"""Scores against a plain loop, and the evaluation program."""
import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
from conftest import write_llama
from data.commonsense import scoring_questions, to_text
from data.download import UserError
from data.prepare import TASKS, load_records
from gatera import AdapterConfig, adapter_state, inject_adapters, save_adapter
from model import Transformer, load_tokenizer

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


def plain_scores(model, tokenizer, record, form):
    """One forward pass a choice, nothing packed, nothing shared."""
    scores = []
    for prompt, answer in to_text(record, form):
        prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer)
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1:-1]
        scores.append(log_p[range(len(answer)), answer].sum().item())
    return scores


@pytest.mark.parametrize("form", ["cloze", "label"])
@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_a_plain_loop_and_do_not_depend_on_packing(task, form, llama):
    model, tokenizer = Transformer.from_pretrained(llama, dtype=torch.float64), load_tokenizer(llama)
    torch.manual_seed(0)
    inject_adapters(model, AdapterConfig("hira", "token", r=4))
    for p in adapter_state(model).values():
        p.data += 0.2 * torch.randn_like(p)
    records = load_records(task, "test", out=SAMPLE)
    result = evaluation.evaluate(model, tokenizer, records, form, max_len=512)
    for record, prediction in zip(records, result["predictions"]):
        expected = plain_scores(model, tokenizer, record, form)
        assert prediction["scores"] == pytest.approx(expected, abs=1e-5)
        lengths = [len(answer.strip().encode()) for _, answer in to_text(record, form)]
        assert prediction["prediction"] == max(range(len(expected)), key=lambda i: expected[i])
        assert prediction["prediction_norm"] == max(range(len(expected)), key=lambda i: expected[i] / lengths[i])
    hits = [p["prediction"] == p["label"] for p in result["predictions"]]
    assert result["acc"] == 100 * sum(hits) / len(records) and result["n"] == len(records)
    questions = [q for record in records for q in scoring_questions(record, form, tokenizer, 512)]
    reference = evaluation.log_likelihoods(model, questions, row_tokens=10**6)
    for row_tokens in (1, 300):
        for a, b in zip(evaluation.log_likelihoods(model, questions, row_tokens), reference):
            assert a == pytest.approx(b, abs=1e-5)


def test_the_program_scores_a_base_model(llama, tmp_path, capsys):
    summary = evaluation.main(["--init", str(llama), "--tasks", "piqa,boolq", "--data", str(SAMPLE), "--limit", "3",
                               "--out", str(tmp_path / "scores")])
    assert set(summary["tasks"]) == {"piqa", "boolq"} and summary["tasks"]["piqa"]["n"] == 3
    lines = (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["task"] == "piqa"
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == summary
    printed = capsys.readouterr().out
    assert "majority" in printed and "mean" in printed


def test_an_adapter_directory_is_scored_with_its_adapter(llama, tmp_path):
    model = Transformer.from_pretrained(llama)
    inject_adapters(model, AdapterConfig("lora", "none", r=4))
    for p in adapter_state(model).values():
        p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    common = ["--init", str(llama), "--tasks", "piqa", "--data", str(SAMPLE), "--out", str(tmp_path / "out")]
    evaluation.main([*common, "--run", str(tmp_path / "adapter"), "--protocol", "cloze"])
    adapted = (tmp_path / "out" / "predictions.jsonl").read_text()
    evaluation.main(common)
    assert adapted != (tmp_path / "out" / "predictions.jsonl").read_text()


@pytest.mark.parametrize("argv, message", [
    ([], "nothing to evaluate"),
    (["--init", "x", "--tasks", "arc"], "unknown task 'arc'; expected all or boolq"),
    (["--init", "x", "--protocol", "vibes"], "--protocol vibes: expected one of cloze, label"),
    (["--init", "x", "--limit", "-1", "--max-len", "3"], "--limit -1.*--max-len 3"),
    (["--run", "nowhere"], "nowhere: no such directory"),
    (["--device", "gpu", "--init", "x"], "--device gpu: expected auto"),
    (["--init", "x", "--tasks", "piqa,piqa"], "piqa is named twice"),
    (["--colour"], "unknown argument --colour"),
    (["--init", "./nowhere"], "no such model file or directory"),
    (["--init", "x", "--data", "nowhere"], "nowhere.*expected records"),
])
def test_bad_input_is_one_clear_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluation.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_smollm2_answers_better_than_chance(smollm):
    model, tokenizer = Transformer.from_pretrained(smollm), load_tokenizer(smollm)
    records = load_records("ARC-Easy", "test", out=SAMPLE)
    assert evaluation.evaluate(model, tokenizer, records, "cloze", quiet=True)["acc_norm"] >= 50


def test_a_model_of_another_shape_is_named(llama, tmp_path):
    model = Transformer.from_pretrained(llama)
    inject_adapters(model, AdapterConfig("lora", "none", r=4))
    save_adapter(model, tmp_path / "adapter")
    other = write_llama(tmp_path / "wide", d=64)
    with pytest.raises(UserError, match="does not fit this base model"):
        evaluation.main(["--init", str(other), "--run", str(tmp_path / "adapter"), "--data", str(SAMPLE)])
