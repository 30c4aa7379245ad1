"""Layer Memory's Triton kernels without a GPU: what they need of one, and how many bytes they move.

    python tools/bench/kernels.py

The launches are those of the paper's refiner (40 layers of 5120 channels, 7,440 tokens, bfloat16), recorded on
PyTorch's meta device. Triton compiles each kernel for each card, and its cuobjdump reads from the binary the registers,
the stack, which is where spilt registers go, and the shared memory. Bytes are counted, not measured: of an operation
all that it reads and writes, as if no cache held anything; of a kernel, a state as often as the kernel goes over it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fsdit.kernels import layer_memory as fused
from fsdit.layers import layer_memory as plain
from fsdit.layers.layer_memory import LayerRouter

KERNELS = ("_forward", "_backward", "_collect")
CARDS = {80: ("A100", 164), 90: ("H100", 228), 100: ("B200", 228)}
"""By compute capability: a card, and KiB of shared memory of one of its multiprocessors."""
DIM, LAYERS, TOKENS = 5120, 40, 7440
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """A kernel, the values of its parameters in their order, and the compiler's options."""

    kernel: Any
    values: list[Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """With what it works on: one state, or the mixture of all."""
        mixed = dict(zip(self.kernel.arg_names, self.values, strict=True)).get("MIXED", True)
        return f"{self.kernel.__name__.strip('_')}, {'l states' if mixed else 'one state'}"

    @property
    def bytes(self) -> int:
        """What it reads and writes: the states as often as it goes over them, everything else once."""
        given = dict(zip(self.kernel.arg_names, self.values, strict=True))
        state = given.pop("states_ptr")
        if not given.get("MIXED", True):
            del given["offsets_ptr"], given["weights_ptr"]
            given.pop("grad_weights_ptr", None)
        passes = 2 if "grad_weights_ptr" in given else 1
        return passes * given["states"] * state.nbytes + sum(v.nbytes for v in given.values() if isinstance(v, Tensor))


@contextmanager
def recorded(note: Callable[[Launch], None]) -> Iterator[None]:
    """A context in which the kernels do not run; each launch is noted."""

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*values: Any, **named: Any) -> None:
                names = self.kernel.arg_names
                constants = [named.pop(name) for name in names[len(values) :]]
                note(Launch(self.kernel, [*values, *constants], named))

            return launch

    originals = {name: getattr(fused, name) for name in KERNELS}
    for name, kernel in originals.items():
        setattr(fused, name, Noted(kernel))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(fused, name, kernel)


# --- what a kernel needs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Of one block: registers and stack bytes a thread, shared bytes, threads; and blocks that fit a multiprocessor."""

    registers: int
    stack: int
    shared: int
    threads: int
    blocks: int


def compiled(launch: Launch, capability: int) -> Need:
    """What the kernel needs as Triton compiles this launch for cards of a capability such as 90."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.values, strict=True)):
        kind = TYPES[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
        if parameter.is_constexpr:
            kind, constants[(index,)] = "constexpr", value
        elif kind != "fp32" and not parameter.do_not_specialize:  # allocations are aligned, and so is the paper's D
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    use = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    # What Triton asks for at the launch comes on top of what the binary names.
    shared = use["SHARED"] + binary.metadata.shared
    threads = 32 * binary.metadata.num_warps
    return Need(
        use["REG"],
        use["STACK"] + use["LOCAL"],
        shared,
        threads,
        blocks(use["REG"], shared, threads, 1024 * CARDS[capability][1]),
    )


def blocks(registers: int, shared: int, threads: int, memory: int) -> int:
    """Blocks that a multiprocessor holds: 65,536 registers, given to warps by 256; 64 warps; 32 blocks; its memory."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, 64 // warps, 32, memory // (shared or 1))


# --- what is moved -----------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operations read and write."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and "empty" not in name and name not in ("detach", "view_as", "_unsafe_view"):
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor):  # what is expanded is read once
                    self.bytes += min(tensor.nbytes, tensor.untyped_storage().nbytes())
        return result


def layers_of_memory(form: ModuleType, training: bool, dim: int, layers: int, tokens: int) -> tuple[int, int]:
    """Bytes that H and Ĥ of all layers move in a forward and a backward, the rest of the model left out."""
    device = torch.device("meta")
    buffer = torch.empty(layers, 1, tokens, dim, dtype=torch.bfloat16, device=device)
    modulation = torch.empty(2, 1, 1, dim, device=device).requires_grad_(training)
    routers = [LayerRouter(dim, count, 1.0).to(device) if count > 1 else None for count in range(1, layers + 1)]
    outputs: list[Tensor] = []
    states: Any = ()
    traffic = Traffic()

    def note(launch: Launch) -> None:
        traffic.bytes += launch.bytes

    with recorded(note), torch.set_grad_enabled(training), traffic:
        for number, router in enumerate(routers, start=1):
            new = torch.empty_like(buffer[0]).requires_grad_(training)
            states = form.record(states, new) if training else buffer[:number]
            hidden = form.modulate(states[-1], *modulation, 1e-6)
            outputs.append(hidden)
            if router is not None:
                outputs.append(form.retrieve(states, router(hidden), *modulation, 1e-6))
        forward, traffic.bytes = traffic.bytes, 0
        if outputs and training:  # what follows a block's H and Ĥ, and its residual, give each a gradient
            outputs += states
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return forward, traffic.bytes


def table(head: str, rows: list[list[Any]]) -> str:
    """A Markdown table; the head's columns are separated by bars."""
    columns = head.split(" | ")
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [columns, ["---"] * len(columns), *rows])


def launches(dim: int, tokens: int) -> list[Launch]:
    """One of each kernel, as training launches them."""
    noted: dict[str, Launch] = {}
    with recorded(lambda launch: noted.setdefault(launch.name, launch)):
        x, grad = (torch.empty(1, tokens, dim, dtype=torch.bfloat16, device="meta") for _ in range(2))
        modulation = torch.empty(2, 1, 1, dim, device="meta")
        weights = torch.empty(1, tokens, LAYERS, device="meta")
        for given in (weights, None):
            fused._run_forward([x] * (1 if given is None else LAYERS), given, *modulation, 1e-6)
            fused._run_backward([x] * (1 if given is None else LAYERS), given, modulation[0], 1e-6, grad)
        fused._run_collect([(x, weights[..., 0])] * LAYERS, grad)
    return list(noted.values())


def needs() -> str:
    """Of each kernel on each card. The number of states is an argument: one binary serves every layer."""
    head = "kernel | card | registers | bytes spilt | shared bytes | threads | blocks a multiprocessor"
    return table(
        head,
        [
            [launch.name, f"sm_{capability} ({card})", *astuple(compiled(launch, capability))]
            for launch in launches(DIM, TOKENS)
            for capability, (card, _) in CARDS.items()
        ],
    )


def moved() -> str:
    """Of all layers together, and of some: what a model of l layers moves more than one of l - 1."""

    def gigabytes(form: ModuleType, training: bool, layers: int) -> Tensor:
        return torch.tensor(layers_of_memory(form, training, DIM, layers, TOKENS)) / 1e9

    rows = []
    for layers in (LAYERS, 1, LAYERS // 2, LAYERS):
        figures = []
        for form in (plain, fused):
            inference, training = (gigabytes(form, training, layers) for training in (False, True))
            if rows:
                inference -= gigabytes(form, False, layers - 1)
                training -= gigabytes(form, True, layers - 1)
            figures.append((inference[0], *training))
        name = f"layer {layers}" if rows else f"all {layers} layers"
        rows.append([name, *(f"{a:.4g} : {b:.4g} = {a / b:.1f}" for a, b in zip(*figures, strict=True))])
    return table("GB, plain : fused | inference | training, forward | training, backward", rows)


def main() -> int:
    """Compile, count and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}\n\n{needs()}\n\n{moved()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
