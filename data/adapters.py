"""What an adapter's settings may be, the layers of a model that they name, and its directory: adapter.safetensors with
its tensors and adapter.json with its settings, or what peft wrote.

gatera.py needs this module and the three that it imports, and nothing else of this project: README, "In transformers".
"""
import json
import math
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn

from data.files import UserError, is_number, misfits, read_json, read_tensors, reading, write_atomically, write_tensors
from data.names import ends_in, llama_name, transformers_names, whole_name
from data.peft_format import read_peft

# ------------------------------------------------------------------------------------------ settings and layers


def check_adapter(fields: dict, methods: dict, gates: dict) -> None:
    """UserError that names all fields of an AdapterConfig that are wrong; methods and gates are those there are."""
    targets, below_one = fields["targets"], math.nextafter(1, 0)
    if isinstance(targets, str) or not isinstance(targets, (list, tuple)):
        raise UserError(f"adapter: targets {targets!r}: expected a list of layer names")
    wrong = [f"{name} {fields[name]!r}: expected {expected}" for name, fine, expected in (
        ("method", fields["method"] in list(methods), "one of " + ", ".join(methods)),
        ("gate", fields["gate"] in list(gates), "one of " + ", ".join(gates)),
        ("r", isinstance(fields["r"], int) and is_number(fields["r"], 1, math.inf), "a positive whole number"),
        ("alpha", fields["alpha"] is None or is_number(fields["alpha"], 1e-12, 1e12), "a positive number"),
        ("gate_bias", is_number(fields["gate_bias"], -1e6, 1e6), "a finite number up to 1e6"),
        ("dropout", is_number(fields["dropout"], 0, below_one), "a number from 0 up to, not including, 1"),
        ("targets", targets and all(isinstance(name, str) and name for name in targets),
         "at least one layer name, and no empty one"),
    ) if not fine]
    if wrong:
        raise UserError("adapter: " + "; ".join(wrong))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, which torch.compile and DistributedDataParallel put into a module of their own."""
    while list(model._modules) in (["_orig_mod"], ["module"]):
        model = next(model.children())
    return model


def find_layers(model: nn.Module, targets: tuple[str, ...], r: int) -> dict[str, nn.Linear]:
    """{name: layer} of all layers that the targets name, in the order of the blocks. UserError for a target that names
    none, for a layer that is no nn.Linear, or a quantised one, and for a rank r larger than the smaller side of one."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise UserError("the model has adapters of peft; load the base again, without them")
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    found = {target: [name for name in leaves if ends_in(whole_name(name), llama_name(target))] for target in targets}
    chosen = {name: module for name, module in leaves.items() if any(name in names for names in found.values())}
    wrong = hint = ""
    if unknown := [target for target, names in found.items() if not names]:
        linears = sorted({name.rpartition(".")[2] for name, module in leaves.items() if not unfit(module)})
        wrong = f"no layer is named {', '.join(unknown)}; this model has {', '.join(linears) or 'no nn.Linear'}"
    elif unfits := [name for name in chosen if unfit(chosen[name])]:
        wrong = f"{unfits[0]} is a {unfit(chosen[unfits[0]])}, expected an nn.Linear with a floating-point weight"
        hint = "; load the base without quantisation and offloading"
    if any(is_conv1d(module) for module in leaves.values()):
        hint = (". It is made of Conv1D layers, as transformers' GPT-2 is, and one is q, k and v together; load the "
                "same weights into gatera's own GPT-2, which has a layer for each: "
                "model.Transformer.from_pretrained(name or directory)")
    if wrong:
        raise UserError(f"targets: {wrong}{hint}")
    smallest = min(min(layer.weight.shape) for layer in chosen.values())
    if r > smallest:
        raise UserError(f"r {r} is larger than the smallest adapted matrix side, {smallest}")
    return chosen


def unfit(module: nn.Module) -> str:
    """What a module is, if it does not compute W0 x + b with a W0 of plain numbers; else "". A subclass of nn.Linear or
    of nn.Parameter may be anything, and those of quantised models are."""
    if type(module) is not nn.Linear:
        return type(module).__name__
    W0 = module.weight
    if W0.is_meta and hasattr(module, "_hf_hook"):
        return "Linear whose weight accelerate has offloaded"
    plain = type(W0).__name__ in ("Parameter", "FakeTensor")  # the latter is torch's, for planning without memory
    plain = plain and W0.is_floating_point() and W0.itemsize > 1
    return "" if plain else f"Linear whose weight is a {type(W0).__name__} of {W0.dtype}"


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer with its weight transposed, of which GPT-2 is made there."""
    return type(module).__name__ == "Conv1D"


def peft_layers(model: nn.Module) -> dict[str, list[str]]:
    """{transformers' name of a layer that peft can adapt, adapted here or not: our names}."""
    model = unwrapped(model)
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) or hasattr(module, "gate_logit") or is_conv1d(module)]
    return transformers_names(names, getattr(model, "config", None))


def untie_head(model: nn.Module) -> None:
    """Where merging has made a tied head a weight of its own, the config of a model of transformers says so: loading
    would tie it again."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        model.config.tie_word_embeddings = head is None or head.weight is embeddings.weight


# ----------------------------------------------------------------------------------------------------- on disk

def write_adapter(directory: Path, settings: dict, tensors: dict[str, torch.Tensor]) -> None:
    text = json.dumps(settings, indent=2) + "\n"
    write_tensors(directory / "adapter.safetensors", tensors, text)  # there too, where its checksum covers it
    write_atomically(directory / "adapter.json", lambda path: path.write_text(text))


def read_adapter(directory: Path, make_config, layers: dict[str, list[str]], methods: dict) -> tuple:
    """(The file that holds the tensors, the config, the tensors by our names.)

    make_config: the dataclass of the settings. layers, methods: as `read_peft` wants them. UserError names the file that is
    missing, damaged, or not as it was saved."""
    file, about = directory / "adapter.safetensors", directory / "adapter.json"
    if (directory / "adapter_config.json").exists() and not file.exists():
        with reading(directory):
            settings, parts = read_peft(directory, layers, methods)
            config = make_config(**settings)
        return directory / "adapter_model.safetensors", config, {
            f"{name}.update.{leaf}": tensor for name, part in parts.items() for leaf, tensor in part.items()}
    settings = read_json(about, "; expected a directory with adapter.safetensors and adapter.json, or one that peft wrote")
    if unknown := set(settings) - {field.name for field in fields(make_config)}:
        raise UserError(f"{about}: unknown fields {', '.join(sorted(unknown))}")
    with reading(about):
        config = make_config(**settings)
    tensors, text = read_tensors(file, with_info=True)
    with reading(file):
        saved = make_config(**json.loads(text)) if text else config
    if saved != config:
        raise UserError(f"{directory}: adapter.json is not what was saved with adapter.safetensors; it was edited or "
                        "damaged, copy it again")
    return file, config, tensors


@torch.no_grad()
def fill(state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors from a file into those of `state`, which has the names of the model at hand: ours, or those of a
    Llama of transformers, with either in the file. UserError, and nothing copied, if they are not the same tensors."""
    names = {whole_name(name): name for name in state}
    tensors = {names.get(whole_name(name), name): tensor for name, tensor in tensors.items()}
    if wrong := misfits(tensors, state):
        raise UserError(f"does not fit this base model: {wrong}")
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
