"""What devices can do: figures of their makers, or a short measurement of this CPU."""

import re
import time
from dataclasses import dataclass

from rlhf.errors import UserError, did_you_mean

# shares of the peak that programs reach: assumed, and shown with every estimate. Learning with LoRA
# on one H100 is reported between 11 and 25 % for small models and up to 40 % for large ones
LEARNING_SHARE, SAMPLING_SHARE = 0.30, 0.50
# of the rate of a large matrix product on a CPU (benchmarks/results/2026-11-29-speed.md)
CPU_SHARE, CPU_SAMPLING_SHARE = 0.75, 0.35
# bytes that a CUDA context, NCCL and the gaps of the allocator take, by experience: the context,
# and a share of what is allocated
CONTEXT, GAPS = 1.0e9, 0.03


@dataclass(frozen=True)
class Device:
    """A kind of device: bytes of memory, FLOPs a second in bfloat16 without sparsity, and bytes that
    it reads a second.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


GPUS = {
    device.name.lower(): device
    for device in (
        Device("A100-40GB", 40e9, 312e12, 1.555e12),
        Device("A100", 80e9, 312e12, 2.039e12),
        Device("H100", 80e9, 989e12, 3.35e12),
        Device("H200", 141e9, 989e12, 4.8e12),
        Device("B200", 180e9, 2250e12, 7.7e12),
        Device("L4", 24e9, 121e12, 0.3e12),
        Device("L40S", 48e9, 362e12, 0.864e12),
        Device("A10G", 24e9, 70e12, 0.6e12),
        Device("RTX-4090", 24e9, 165e12, 1.008e12),
        Device("RTX-3090", 24e9, 71e12, 0.936e12),
    )
}


def find_gpu(name: str) -> Device:
    """Return a GPU of the table. Raises UserError for a name that is not in it."""
    key = name.lower().removeprefix("rtx-")
    for known, device in GPUS.items():
        if key in (known, known.removeprefix("rtx-")):
            return device
    raise UserError(
        f"gpu: '{name}' is not in the table.{did_you_mean(name.lower(), GPUS)} Known: "
        f"{', '.join(device.name for device in GPUS.values())}; with another one's memory: "
        "--gpu H100 --gpu_memory 64GB"
    )


def read_bytes(text: str) -> float:
    """Return the bytes that "80GB" (1e9) or "80GiB" (2^30) names. Raises UserError for other text."""
    found = re.fullmatch(r"\s*([\d.]+)\s*(G|GB|GiB|M|MB|MiB|T|TB|TiB)\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if number <= 0:
        raise UserError(f"gpu_memory: '{text}' is no size of memory. For example: 80GB or 24GiB")
    unit = found[2].lower()
    power = {"m": 2, "g": 3, "t": 4}[unit[0]]
    return number * (1024**power if unit.endswith("ib") else 1000**power)


def this_cpu(dtype: str, ranks: int, seconds: float = 0.3) -> Device:
    """Measure how fast this CPU multiplies matrices, for a moment; return what each of its ranks has
    of its speed and memory.
    """
    import psutil
    import torch

    size = 768
    first = torch.ones(size, size, dtype=getattr(torch, dtype))
    second = torch.ones_like(first)
    # the first product starts the threads
    first @ second
    made, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        first @ second
        made += 1
    # by one thread's clock: others may use the cores meanwhile
    threads = torch.get_num_threads() / ranks
    rate = made * 2 * size**3 / (time.process_time() - began) * threads
    memory = psutil.virtual_memory().total / ranks
    return Device("this CPU", memory, rate, 20e9 * threads)


def usable(device: Device, is_gpu: bool) -> float:
    """Return the bytes of a device that tensors can take."""
    return (device.memory - CONTEXT) / (1 + GAPS) if is_gpu else device.memory
