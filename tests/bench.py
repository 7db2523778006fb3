"""Speed and memory, side by side with what people use today: transformers + peft.

    python tests/bench.py                                      # LoRA, DoRA, HiRA, GateRA on SmolLM2-135M, CPU
    python tests/bench.py --method gatera --form label --records 64
    python tests/bench.py --model llama-3-8b --device cuda --batch 16    # random bf16 weights of that shape

Both sides train on the same records in the same batches, with the same weights, rank, targets and AdamW; each is a
process of its own, and they take turns, round after round. peft's side is the ordinary way: AutoModelForCausalLM,
get_peft_model, batches padded to the longest, labels of -100, the model's own loss. GateRA stands beside peft's ungated
HiRA, as peft has no gates. A real token is a token that is not padding.

The floor is the time that the method's needed products take at the matrix rate measured in the same run. In units of a
product with W0: 2 for a frozen layer (forward, input gradient); LoRA and DoRA add 3 with A and with B; HiRA with its
update as a branch is 5, and makes B A anew; the head counts where there is a target; attention is not counted.
"""
import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from data.commonsense import pack, training_question  # noqa: E402
from data.prepare import load_records  # noqa: E402
from gatera import AdapterConfig, GatedLinear, adapter_state, gate_entropy, inject_adapters  # noqa: E402
from model import CONFIGS, Transformer, TransformerConfig, compile_blocks, load_tokenizer  # noqa: E402

METHODS = {"lora": ("lora", "none"), "dora": ("dora", "none"), "hira": ("hira", "none"), "gatera": ("hira", "token"),
           "lora+gate": ("lora", "token"), "dora+gate": ("dora", "token")}
LR = 1e-3


def load_base(args, dtype):
    """Pretrained weights of smollm2-135m or a path, on the CPU; random ones, on the device, for a named larger shape."""
    if args.model == "smollm2-135m" or args.model not in CONFIGS:
        return Transformer.from_pretrained(args.model, dtype=dtype, device=args.device)
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_name(args.model))
    model = model.to(dtype).to_empty(device=args.device)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(0, 0.02)
    return model


def batches(args):
    """[[Question]]: the same records in the same order on both sides."""
    tokenizer = load_tokenizer(args.model if args.model not in CONFIGS else "smollm2-135m")
    questions = [training_question(r, args.form, tokenizer, 512) for r in load_records("ARC-Easy", "train")[:args.records]]
    return [questions[i:i + args.batch] for i in range(0, len(questions), args.batch)]


def our_side(args, method, dtype):
    """A function of a batch that makes one training step."""
    model = load_base(args, dtype)
    kind, gate = METHODS[method]
    torch.manual_seed(0)
    inject_adapters(model, AdapterConfig(kind, gate, r=args.r))
    parameters = list(adapter_state(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0, fused=True)
    if args.compile:
        compile_blocks(model)

    def step(questions):
        batch = pack(questions).to(args.device)
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(batch.ids, documents=batch.documents, select=batch.select)
            loss = F.cross_entropy(logits.float(), batch.targets) + 0.01 * gate_entropy(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def their_side(args, method, dtype):
    """The same with transformers and peft."""
    import peft
    import transformers
    base = load_base(args, dtype)
    c = base.config
    if c.positions == "learned":
        raise SystemExit("the comparison with peft covers Llama shapes")
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied_head, max_position_embeddings=c.max_len, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
    names = {"embed": "embed_tokens", "norm": "norm", "attn_norm": "input_layernorm",
             "mlp_norm": "post_attention_layernorm", "attn": "self_attn", "mlp": "mlp"}
    state = {}
    for name, tensor in base.named_parameters():
        prefix, rest = "model.", name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        first, dot, rest = rest.partition(".")
        state["lm_head.weight" if first == "head" else f"{prefix}{names[first]}{dot}{rest}"] = tensor
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(state, assign=True)  # the very same tensors: no second copy on their side either
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(args.device)
    del base
    kind = METHODS[method][0]
    targets = list(AdapterConfig().targets)
    if kind == "hira":
        adapter = peft.HiraConfig(r=args.r, target_modules=targets, task_type="CAUSAL_LM")
    else:
        adapter = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, use_dora=kind == "dora", target_modules=targets,
                                  lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0, fused=True)

    def step(questions):
        rows = [torch.tensor(q.prompt + q.answers[0]) for q in questions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, q in enumerate(questions):
            labels[i, len(q.prompt):len(rows[i])] = rows[i][len(q.prompt):]
            mask[i, :len(rows[i])] = 1
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids.to(args.device), attention_mask=mask.to(args.device), labels=labels.to(args.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def memory(args) -> float:
    """Peak so far, GiB."""
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def worker(pipe, side, args, method):
    """Answers each "go" with (seconds, peak GiB) of one pass over all batches."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    step, work = side(args, method, dtype), batches(args)
    step(work[0])
    pipe.send("ready")
    while pipe.recv() == "go":
        start = time.perf_counter()
        for questions in work:
            step(questions)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start, memory(args)))


def needed_operations(args, method, work) -> tuple[float, float]:
    """(floating-point operations, real tokens) of one pass: products with weights and with A and B; no attention."""
    config = TransformerConfig.from_name(args.model) if args.model in CONFIGS else load_base(args, torch.float32).config
    with torch.device("meta"):
        model = Transformer(config)
        inject_adapters(model, AdapterConfig(*METHODS[method], r=args.r))
    hira = METHODS[method][0] == "hira"
    tokens = sum(len(q.prompt) + len(q.answers[0]) - 1 for batch in work for q in batch)
    targets = sum(len(q.answers[0]) for batch in work for q in batch)
    total = targets * 2 * model.head.weight.numel()
    for name, layer in model.named_modules():
        if isinstance(layer, GatedLinear):
            total += tokens * (5 if hira else 2) * layer.weight.numel()
            # HiRA makes B A twice a step and its gradient once each for A and B; LoRA has 3 products with A and with B
            total += 4 * len(work) * args.r * layer.weight.numel() if hira else tokens * 3 * args.r * sum(layer.weight.shape)
        elif isinstance(layer, torch.nn.Linear) and name != "head":
            total += tokens * 2 * layer.weight.numel()
    return 2.0 * total, tokens


def matrix_rate(args, work) -> float:
    """Operations a second of x @ W.T for the MLP's shape and a typical number of tokens."""
    config = TransformerConfig.from_name(args.model) if args.model in CONFIGS else load_base(args, torch.float32).config
    tokens = sum(len(q.prompt) + len(q.answers[0]) - 1 for q in work[0])
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    x = torch.randn(tokens, config.d_model, device=args.device, dtype=dtype)
    W = torch.randn(config.d_ff, config.d_model, device=args.device, dtype=dtype)
    rates = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(10):
            x @ W.t()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        rates.append(20 * x.numel() * len(W) / (time.perf_counter() - start))
    return statistics.median(rates)


def bench(args, method):
    sides = {"ours": our_side}
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
        sides["peft"] = their_side
    except ImportError:
        pass
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, side, args, method), daemon=True))
        processes[-1].start()
        assert pipes[name].recv() == "ready"
    work = batches(args)
    operations, tokens = needed_operations(args, method, work)
    speeds, peaks, rates = {name: [] for name in sides}, {}, []
    for _ in range(args.rounds):
        rates.append(matrix_rate(args, work))
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds, peaks[name] = pipe.recv()
            speeds[name].append(tokens / seconds)
    for pipe, process in zip(pipes.values(), processes):
        pipe.send("stop")
        process.join()
    median = {name: statistics.median(values) for name, values in speeds.items()}
    floor = tokens / (operations / statistics.median(rates))
    show = lambda name: f"{median[name]:,.0f} ({min(speeds[name]):,.0f}-{max(speeds[name]):,.0f})" if name in median else "-"  # noqa: E731
    ratio = lambda a, b: f"{a / b:.2f}" if b else "-"  # noqa: E731
    print(f"| {method} | {show('ours')} | {show('peft')} | {ratio(median['ours'], median.get('peft'))} | {peaks['ours']:.2f} | "
          f"{peaks.get('peft', 0):.2f} | {ratio(peaks['ours'], peaks.get('peft'))} | {floor:,.0f} | {floor / median['ours']:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora,dora,hira,gatera", help=f"some of {', '.join(METHODS)}, with commas between")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--form", default="cloze", choices=("cloze", "label"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="our side compiled")
    options = parser.parse_args()
    print(f"{options.model}, r {options.r}, {options.form} form, batches of {options.batch} of the first {options.records} "
          f"ARC-Easy training records, {options.device}, torch {torch.__version__}, {options.rounds} rounds: median (range)\n")
    print("| method | real tokens/s | peft's | ratio | peak GiB | peft's | ratio | floor, tokens/s | floor / ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for chosen in options.method.split(","):
        bench(options, chosen)
