"""What can be said about GPUs without one: nothing stays on the CPU, and training does not wait for the device.

Fake tensors have a shape, a dtype and a device, and no values. Their device here is one that PyTorch lets Python
define: it stands where a GPU would, with the rules of CUDA's autocast. An operation on tensors of two devices fails, as
it would on CUDA, and each one for which the host waits is noted. As such a device is there for a whole process, all
this runs in one of its own: this file as a program.
"""
import itertools
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from data.commonsense import Question  # noqa: E402
from eval import log_likelihoods  # noqa: E402
from gatera import (GATES, METHODS, AdapterConfig, adapter_state, cached_products, gated_layers,  # noqa: E402
                    inject_adapters)
from model import Transformer, TransformerConfig  # noqa: E402

aten = torch.ops.aten
OURS = (ROOT, ROOT / "data", ROOT / "tests")
SMALL = dict(vocab_size=64, n_layer=1, n_head=4, d_model=16, d_ff=24, max_len=32)
FAMILIES = {"gpt2": TransformerConfig(**SMALL, norm="layernorm", positions="learned", mlp="gelu", attention_bias=True,
                                      mlp_bias=True, tied_head=True),
            "llama": TransformerConfig(**SMALL, n_kv_head=2)}
TRAINING = [Question([1, 2, 3], [[4, 5]]), Question([6], [[7, 8, 9]])]
SCORING = [Question([1, 2, 3], [[4, 5], [6]]), Question([7], [[8], [9]])]


# -------------------------------------------------------------------------------------------------- the device

DUMMY = getattr(backend_registration, "_DummyBackendModule", None)


class Backend(DUMMY or object):
    """What torch.cuda is to CUDA, as far as anybody asks."""
    _initialized = True
    device = staticmethod(lambda index: nullcontext())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda *_: torch.zeros(16, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda *_: None)


# What CUDA's autocast runs in half precision, and what in float32 (PyTorch's "Autocast Op Reference").
IN_HALF = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
IN_FLOAT32 = ("layer_norm", "rms_norm", "softplus", "nll_loss", "exp", "log", "rsqrt", "softmax.int", "log_softmax.int")
LIBRARIES = [torch.library.Library(name, "IMPL", "AutocastPrivateUse1") for name in ("_", "aten")]


def make_device() -> torch.device:
    backend_registration._setup_privateuseone_for_python_backend("gpu", Backend())
    LIBRARIES[0].fallback(torch.library.fallthrough_kernel)
    for name in IN_HALF + IN_FLOAT32:
        LIBRARIES[1].impl(name, in_autocast(name))
    return torch.device("gpu", 0)


def in_autocast(name: str):
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def kernel(*args, **options):
        dtype = torch.float32 if name in IN_FLOAT32 else torch.get_autocast_dtype("gpu")
        args = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*args, **options)
    return kernel


class Waits(TorchDispatchMode):
    """Counts, for each of our functions, the operations for which it lets the host wait for the device."""

    def __enter__(self):
        self.places = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        options = options or {}
        if waits(operation, args, options):
            place = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent in OURS][-2]
            self.places[f"{Path(place.filename).stem}.{place.name}"] += 1
        if operation is aten._local_scalar_dense.default:
            return 0                                                       # there is no value: any will do
        return operation(*args, **options)


def waits(operation, args, options) -> bool:
    if operation in (aten._to_copy.default, aten.copy_.default):           # a copy between devices
        source = args[operation is aten.copy_.default].device
        target = args[0].device if operation is aten.copy_.default else options.get("device") or source
        return source.type != target.type and (target.type == "cpu" or not options.get("non_blocking"))
    if operation is aten.index_put_.default:                               # a mask is turned into numbers first
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return operation is aten._local_scalar_dense.default and args[0].device.type == "gpu"


# ------------------------------------------------------------------------------------------ what is run on it

def run(family: str, dtype: torch.dtype, checkpointing: bool, method: str, gate: str, device: torch.device) -> None:
    """A step of train.py's own loop, scoring, and decoding; files and the screen are left out."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Transformer(FAMILIES[family]).train()
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing = checkpointing
    inject_adapters(model, AdapterConfig(method, gate, r=2, dropout=0.1))
    c, team = train.Config(batch=2, warmup=0), train.Team(0, 1, device)
    optimizer = train.make_optimizer(model, c)
    nothing = mock.Mock(return_value={})
    directory = SimpleNamespace(begin=lambda *_: ({}, {}), start=nothing)
    with mock.patch.multiple(train, load_inputs=lambda *_: (None, 1, TRAINING, [], {}), load_model=lambda *_: model,
                             make_optimizer=lambda *_: optimizer, training_question=lambda record, **_: record,
                             run_facts=nothing, introduce=nothing, Progress=mock.MagicMock(), mean_gates=nothing,
                             save=nothing, finish=nothing), Waits() as waits:
        train.train(c, dtype, team, directory, mock.Mock(caught=[]))
    # The loop's one tolist() a step, of four numbers, and of two sums of gates where a step is logged.
    assert waits.places == {"train.train": 4 if gate == "none" else 6}, waits.places
    kept = [layer.gate_logit for layer in gated_layers(model).values() if layer.gate is not None]
    assert len(kept) == (len(gated_layers(model)) if gate != "none" else 0)
    moments = [value for p in adapter_state(model).values() for value in optimizer.state[p].values()]
    assert len(moments) == 3 * len(adapter_state(model))
    assert {x.device for x in [*model.parameters(), *model.buffers(), *kept, *moments]} == {device}

    if checkpointing:
        return  # the rest would be as without
    model.eval()
    with torch.autocast("gpu", dtype=dtype, enabled=dtype != torch.float32), Waits() as waits:
        scores = log_likelihoods(model, SCORING)
    assert [len(of_question) for of_question in scores] == [2, 2]
    assert waits.places == {"eval.log_likelihoods": 1}, waits.places
    with cached_products(model), Waits():
        assert {new.device for new in model.decode([[1, 2, 3], [4]], 2, never=[62, 63])} == {device}
        assert len(model.beam_search([[1, 2, 3], [4]], 2, beams=2, never=[62, 63])) == 2


def check_waits(device: torch.device) -> None:
    """Whether `Waits` sees what it is there for; FakeTensorMode itself refuses to pick by values."""
    x = torch.ones(2, 2, device=device)
    for read in (lambda: x.sum().item(), lambda: bool(x.sum()), lambda: x[:1, 0].tolist(),
                 lambda: x.cpu(), lambda: torch.ones(2, 2).to(device), lambda: torch.tensor([1, 2], device=device),
                 lambda: torch.ones(2, 2).copy_(x), lambda: x.index_put_((x > 0,), x[0, 0])):
        with Waits() as noted:
            read()
        assert noted.places == {"test_device.<lambda>": 1}, noted.places
    for read in (lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(DynamicOutputShapeException):
            read()


def main() -> None:
    device = make_device()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes a fake tensor, too
    with FakeTensorMode():
        check_waits(device)
        for family, dtype, checkpointing, method in itertools.product(
                FAMILIES, (torch.float32, torch.bfloat16), (False, True), itertools.product(METHODS, GATES)):
            print(family, dtype, f"checkpointing {checkpointing}", *method, flush=True)  # an error in a backward aborts
            with mock.patch("model.is_ampere", lambda device: dtype == torch.bfloat16):
                run(family, dtype, checkpointing, *method, device)


@pytest.mark.skipif(DUMMY is None, reason="this torch has no devices made in Python; 2.13 has")
def test_nothing_stays_on_the_cpu_and_no_step_waits():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr}"


if __name__ == "__main__":
    main()
