"""What eval.py does not measure: what a run still knows, and what its gates go by.

    python assets/evidence/measures.py base out/gatera/1 ...      a line of JSON for each, base being SmolLM2 alone

A line of knowledge.json, with its "tokens": the nats of the first 200 different passages of BoolQ's test set, all tokens
but the first; of the first 200 test questions of each task that was not trained, the nats of the right answer in cloze
form, and "hits", whether acc_norm's choice is right. Of a run with token gates, also long.json's "surprise": rank
correlations (Spearman's) of a token's gate with how well the base predicts it and what follows it, over 60 test questions
with their right answers of each task that was trained; and their 5th and 95th percentiles over single gates.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from data.cli import run_command  # noqa: E402
from data.commonsense import Question, scoring_questions, training_question  # noqa: E402
from data.prepare import load_records  # noqa: E402
from eval import evaluate, log_likelihoods  # noqa: E402
from gatera import adapters_off, gate_values, load_adapter  # noqa: E402
from model import Transformer, load_tokenizer  # noqa: E402

TRAINED = ("ARC-Easy", "openbookqa", "piqa")
OTHERS = ("boolq", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge")
N, MAX_LEN = 200, 576


def knowledge(model, tokenizer) -> dict:
    passages = list(dict.fromkeys(record["passage"] for record in load_records("boolq", "test")))[:N]
    texts = [tokenizer.encode(passage)[:MAX_LEN] for passage in passages]
    scores = log_likelihoods(model, [Question(ids[:1], [ids[1:]]) for ids in texts])
    measured, hits = {"passages": [round(-score, 1) for (score,) in scores]}, {}
    tokens = {"passages": [len(ids) - 1 for ids in texts]}
    for task in OTHERS:
        records = load_records(task, "test")[:N]
        predictions = evaluate(model, tokenizer, records, "cloze", MAX_LEN, quiet=True)["predictions"]
        questions = [scoring_questions(record, "cloze", tokenizer, MAX_LEN) for record in records]
        answers = [[ids for question in of_record for ids in question.answers] for of_record in questions]
        measured[task] = [round(-made["scores"][made["label"]], 2) for made in predictions]
        tokens[task] = [len(choices[record["label"]]) for choices, record in zip(answers, records)]
        right = [made["prediction_norm"] == made["label"] for made in predictions]
        hits[task] = np.packbits(right).tobytes().hex()
    return measured | {"hits": hits, "tokens": tokens}


def ranks(values: np.ndarray) -> np.ndarray:
    """Of equal values, the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


@torch.no_grad()
def surprise(model, tokenizer) -> dict:
    """{"prompt" and "answer" tokens: {what of the base: [rank correlation with the token's mean gate over layers, its 5th
    and 95th percentile over the gates of single layers]}}"""
    seen = {"prompt": [], "answer": []}
    for record in (record for task in TRAINED for record in load_records(task, "test")[:60]):
        question = training_question(record, "cloze", tokenizer, MAX_LEN)
        ids = torch.tensor([question.prompt + question.answers[0]], device=model.embed.weight.device)
        with adapters_off(model):
            log_p = model(ids).float().log_softmax(-1)[0]                                          # (T, V)
        model(ids)
        gates = torch.cat(list(gate_values(model).values())).float()                               # (gates, T)
        loss = -log_p[:-1].gather(1, ids[0, 1:, None])[:, 0]                                        # (T - 1,)
        entropy = -(log_p.exp() * log_p).sum(-1)                                                    # (T,)
        for t in range(1, ids.shape[1] - 1):  # token t, and what it and t + 1 cost the base
            row = torch.cat([loss[t - 1:t + 1], entropy[t:t + 1], gates[:, t]])
            seen["answer" if t >= len(question.prompt) else "prompt"].append(row.cpu().numpy())
    measured = {}
    for side, rows in seen.items():
        base, gates = np.array(rows)[:, :3], np.array(rows)[:, 3:]
        for what, value in zip(("its own loss", "the next token's loss", "the next token's entropy"), base.T):
            single = [np.corrcoef(ranks(value), ranks(gate))[0, 1] for gate in gates.T if np.ptp(gate)]
            measured.setdefault(side, {})[what] = [round(float(number), 3) for number in (
                np.corrcoef(ranks(value), ranks(gates.mean(1)))[0, 1], *np.percentile(single, [5, 95]))]
    return measured


def main() -> None:
    device, tokenizer = "cuda" if torch.cuda.is_available() else "cpu", load_tokenizer("smollm2-135m")
    for run in sys.argv[1:]:
        model = Transformer.from_pretrained("smollm2-135m", dtype=torch.bfloat16, device=device)
        if run != "base":
            load_adapter(model, Path(run) / "last")
        has_gates = run != "base" and model.adapter_config.gate == "token"
        more = {"surprise": surprise(model, tokenizer)} if has_gates else {}
        print(json.dumps({"run": run} | knowledge(model, tokenizer) | more), flush=True)


if __name__ == "__main__":
    run_command(main)
