"""An adapter's directory: adapter.safetensors with its tensors and adapter.json with its settings, or what peft wrote."""
import json
from dataclasses import fields
from pathlib import Path

import torch

from data.files import UserError, misfits, read_json, read_tensors, reading, write_atomically, write_tensors
from data.peft_format import read_peft
from data.weights import llama_name


def write_adapter(directory: Path, settings: dict, tensors: dict[str, torch.Tensor]) -> None:
    text = json.dumps(settings, indent=2) + "\n"
    write_tensors(directory / "adapter.safetensors", tensors, text)  # there too, where its checksum covers it
    write_atomically(directory / "adapter.json", lambda path: path.write_text(text))


def read_adapter(directory: Path, make_config, layers: dict[str, list[str]], methods: dict, changes: dict) -> tuple:
    """(The file that holds the tensors, the config, the tensors by our names.)

    make_config: the dataclass of the settings. layers, methods: as `read_peft` wants them. changes: settings that shall be
    others than were saved. UserError names the file that is missing, damaged, or not as it was saved."""
    file, about = directory / "adapter.safetensors", directory / "adapter.json"
    if (directory / "adapter_config.json").exists() and not file.exists():
        with reading(directory):
            settings, parts = read_peft(directory, layers, methods)
            config = make_config(**settings | changes)
        return directory / "adapter_model.safetensors", config, {
            f"{name}.update.{leaf}": tensor for name, part in parts.items() for leaf, tensor in part.items()}
    settings = read_json(about, "; expected a directory with adapter.safetensors and adapter.json, or one that peft wrote")
    if unknown := set(settings) - {field.name for field in fields(make_config)}:
        raise UserError(f"{about}: unknown fields {', '.join(sorted(unknown))}")
    with reading(about):
        config = make_config(**settings | changes)
    tensors, text = read_tensors(file, with_info=True)
    with reading(file):
        saved = make_config(**json.loads(text) | changes) if text else config
    if saved != config:
        raise UserError(f"{directory}: adapter.json is not what was saved with adapter.safetensors; it was edited or "
                        "damaged, copy it again")
    return file, config, tensors


@torch.no_grad()
def fill(state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors from a file into those of `state`, which has the names of the model at hand: ours, or those of a
    Llama of transformers, with either in the file. UserError, and nothing copied, if they are not the same tensors."""
    names = {llama_name(name): name for name in state}
    tensors = {names.get(llama_name(name), name): tensor for name, tensor in tensors.items()}
    if wrong := misfits(tensors, state):
        raise UserError(f"does not fit this base model: {wrong}")
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
