"""What the programs need of a machine: versions, accelerator, compiler, room, ports, addresses.

Each check yields its findings. torch is imported by the one for GPUs alone, and only where there
are some.
"""

import ipaddress
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rlhf.doctor.findings import Finding

# The room below which a start is likely to fail. DeepSpeed takes 67 MB of shared memory for each
# rank of a CPU run, and NCCL about as much for each pair of GPUs.
LEAST_DISK = 2 * 2**30
LEAST_SHARED = 2**30
SHARED_MEMORY = Path("/dev/shm")
PORT = 29500
# numbers of machines, as launchers set them
MACHINES = ("PET_NNODES", "CROSS_SIZE", "SLURM_JOB_NUM_NODES")
COMPILERS = {"remedy": "install g++ and Python's headers (Debian: apt install g++ python3-dev)"}


def versions(extras: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Compare each package that is needed, with `extras`, to the versions that were tested."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("rlhf") or []
    except metadata.PackageNotFoundError:
        yield Finding("versions", "rlhf itself is not installed", "pip install --no-deps -e .")
        return

    count = 0
    # a marker such as "extra == 'wandb'" is about what the run needs
    environments = [{"extra": extra} for extra in ("", *extras)]
    for line in lines:
        needed = Requirement(line)
        if needed.marker and not any(map(needed.marker.evaluate, environments)):
            continue
        count += 1
        remedy = f"pip install '{needed.name}{needed.specifier}'"
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", f"{needed.name} is not installed", remedy)
            continue
        # a build such as 2.13.0+cpu counts as 2.13.0, and a pre-release as what it will be
        if not needed.specifier.contains(found.partition("+")[0], prereleases=True):
            asked = f"{needed.name} {found}, and {needed.specifier} is needed"
            yield Finding("versions", asked, remedy)
    yield Finding("versions", f"Python {platform.python_version()}; {count} packages looked at")


def has_driver() -> bool:
    """Return whether NVIDIA's driver is here, without torch."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def accelerator() -> Iterator[Finding]:
    """Look for GPUs, and for a torch that can use them."""
    cores = len(os.sched_getaffinity(0))
    if not has_driver():
        yield Finding("accelerator", f"no NVIDIA GPU; programs use {cores} CPU cores")
        return

    # the seconds that this takes are spent only where there may be a fault
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden == "":
            remedy = "CUDA_VISIBLE_DEVICES is empty: unset it to use the GPUs"
        elif torch.version.cuda is None:
            remedy = "install torch with CUDA: pip install torch, from the package index itself"
        else:
            remedy = f"a driver for CUDA {torch.version.cuda} or newer (nvidia-smi shows which)"
        found = f"there is a GPU, and torch {torch.__version__} cannot use it"
        yield Finding("accelerator", found, remedy)
        return

    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found = f"GPU {number}: {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        remedy = ""
        # CUDA itself takes less than that
        if free < 0.8 * total:
            remedy = "another process uses it (nvidia-smi): wait, or choose others in CUDA_VISIBLE_DEVICES"
        elif torch.cuda.get_device_capability(number) < (8, 0):
            remedy = "it has no bfloat16: dtype float32 works, slowly"
        yield Finding("accelerator", found, remedy)


def compiler() -> Iterator[Finding]:
    """Compile nothing, but with Python's headers: DeepSpeed's operators need both."""
    program = os.environ.get("CXX", "g++")
    if shutil.which(program) is None:
        yield Finding("compiler", f"{program} is not there", **COMPILERS)
    else:
        # the headers are in a package of their own, so a compiler alone is no proof
        command = [program, "-x", "c++", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            yield Finding("compiler", f"{program}: {lines[0]}", **COMPILERS)
        else:
            yield Finding("compiler", f"{program} finds Python's headers")
    # beside python, in an environment that may not be activated
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        yield Finding("compiler", "ninja is not there", "pip install ninja")


def operators() -> Iterator[Finding]:
    """Look for DeepSpeed's compiled operators, in the folder that the programs use."""
    # the same choice as in rlhf.ranks.distributed, which imports torch
    default = Path(sys.prefix) / "torch_extensions"
    if not os.access(sys.prefix, os.W_OK):
        default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    parent = _nearest(folder)
    if not os.access(parent, os.W_OK):
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        yield Finding("operators", f"{folder} cannot be written", remedy)
        return
    built = sorted({path.parent.name for path in folder.rglob("*.so")})
    if built:
        yield Finding("operators", f"compiled: {', '.join(built)}")
    else:
        yield Finding(
            "operators", "none compiled yet: the first launched CPU run takes a minute more"
        )


def room(folders: tuple[str, ...] = (".",)) -> Iterator[Finding]:
    """Look at the space in folders that are written to, and in shared memory."""
    # the same place twice is one line
    for name in dict.fromkeys(folders):
        folder = _nearest(Path(name).expanduser().absolute())
        free = shutil.disk_usage(folder).free
        remedy = ""
        if not os.access(folder, os.W_OK):
            remedy = "choose a place that can be written, or change its permissions"
        elif free < LEAST_DISK:
            remedy = f"free some space: at least {LEAST_DISK / 2**30:.0f} GiB for checkpoints"
        yield Finding("disk", f"{name}: {free / 2**30:.1f} GiB free", remedy)

    # not every system has it
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    remedy = ""
    if free < LEAST_SHARED:
        remedy = (
            "ranks meet there: docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory "
            "(launch/cluster/job.yaml)"
        )
    yield Finding("shared memory", f"{SHARED_MEMORY}: {free / 2**30:.1f} GiB free", remedy)


def ports() -> Iterator[Finding]:
    """Look whether the port at which the ranks meet is free on this machine."""
    text = os.environ.get("PET_MASTER_PORT") or os.environ.get("MASTER_PORT") or str(PORT)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        yield Finding("ports", f"MASTER_PORT is {text!r}", "a number from 1 to 65535")
        return
    with socket.socket() as probe:
        # what is left over from a run that ended a moment ago is no hindrance
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            remedy = f"another run uses it: deepspeed --master_port {int(text) % 65000 + 1} ..."
            yield Finding("ports", f"port {text}: {error.strerror}", remedy)
            return
    yield Finding("ports", f"port {text} is free")


def addresses() -> Iterator[Finding]:
    """Look how other machines would find this one: by its name, its interface, and the first rank's
    address.
    """
    has_several = False
    for name in MACHINES:
        count = os.environ.get(name, "")
        has_several |= count.isdecimal() and int(count) > 1
    interfaces = {name for _, name in socket.if_nameindex()}
    chosen = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL takes lists, prefixes and exclusions
        wanted = os.environ.get(variable, "")
        if not wanted:
            continue
        chosen.append(variable)
        if variable.startswith("GLOO") and not set(wanted.split(",")) <= interfaces:
            remedy = f"one of {', '.join(sorted(interfaces))} (ip address)"
            yield Finding("addresses", f"{variable} is {wanted}: no such interface", remedy)

    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = None
    # that is enough on one machine, and an interface that was chosen counts before the name
    is_local = address is None or ipaddress.ip_address(address).is_loopback
    told = f"{name} is {address}" if address else f"{name} resolves to no address"
    if is_local and has_several and not chosen:
        remedy = "GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME) names the interface to the others"
        yield Finding("addresses", f"{told}, where other machines do not reach it", remedy)
    else:
        yield Finding("addresses", told)

    # of a run that is being set up here
    first = os.environ.get("PET_MASTER_ADDR") or os.environ.get("MASTER_ADDR")
    if first:
        try:
            yield Finding("addresses", f"the first rank, {first}, is {socket.gethostbyname(first)}")
        except OSError as error:
            remedy = "MASTER_ADDR is a name or address that every machine resolves"
            yield Finding("addresses", f"the first rank, {first}: {error.strerror}", remedy)


def _nearest(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
