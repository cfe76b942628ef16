"""What a bug report needs to know of a machine, and the environment switches in one table."""

import contextlib
import datetime
import getpass
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from hawk_compile.versions import NOT_INSTALLED, RANGES, difference, installed

SWITCHES = {
    "HAWK_DUMP": "a folder: write the graph before the first pass and after each one",
    "HAWK_DISABLE": "names of optional passes to leave out, separated by commas",
    "HAWK_FUEL": "a whole number: run at most so many optional passes",
}
"""Every environment variable that this package reads, at each compilation."""

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "safetensors", "numpy", "pillow")
BESIDE = (
    "accelerate", "peft", "torchao", "bitsandbytes", "optimum-quanto", "compressed-tensors", "gptqmodel", "autoawq",
    "flash-attn", "torchvision", "timm", "vllm", "onnxruntime", "openvino", "tensorrt-rtx", "executorch", "lmms-eval",
)  # fmt: skip
"""Packages that change what is run, where they are installed."""
RELATED = (
    "HAWK_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "CUDA_", "HF_HUB_OFFLINE", "TRANSFORMERS_", "ACCELERATE_",
    "VLLM_", "CC", "CXX", "WORLD_SIZE",
)  # fmt: skip
"""Variables, or beginnings of their names, that change how a model is compiled or loaded."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH")
"""What the names of variables hold whose values nobody else may read."""


def describe() -> dict[str, str]:
    """Name -> value, in the order in which a bug report should give them."""
    import torch

    found = {"hawk_compile": installed("hawk-compile"), "python": platform.python_version()}
    found["platform"] = f"{platform.platform()} ({platform.machine()})"
    found["processor"] = f"{processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    found |= {name: installed(name) + tested(name) for name in PACKAGES}
    found["beside them"] = ", ".join(f"{name} {installed(name)}" for name in BESIDE if is_installed(name))
    found["gpu"] = gpus()
    found["c++ compiler"] = compiler()
    found["hawk backend"] = "registered" if "hawk" in backends() else "not registered: is hawk-compile installed?"
    found["other backends"] = ", ".join(name for name in backends() if name != "hawk")
    found["switches"] = ", ".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if is_switch(name))
    return {name: value or "none" for name, value in found.items()}


def is_switch(variable: str) -> bool:
    """Whether a report gives a variable of the environment."""
    return variable.startswith(RELATED) and not SECRET.search(variable)


def anonymous(text: str) -> str:
    """A text without the names of home folders and users, and without what URLs hold of passwords."""
    text, (home, user) = re.sub(r"(?<=://)[^/@\s]+@", "", text), home_and_user()
    text = text.replace(home, "~") if home.strip("/") else text
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", text) if user else text


def home_and_user() -> tuple[str, str]:
    """The home folder and the name of who runs this, each empty where the system knows none, as in many containers."""
    home = user = ""
    with contextlib.suppress(RuntimeError):
        home = str(Path.home())
    with contextlib.suppress(KeyError, OSError):
        user = getpass.getuser()
    return home, user


def is_installed(package: str) -> bool:
    return installed(package) != NOT_INSTALLED


def tested(package: str) -> str:
    """Whether this release of a package is one that hawk_compile is tested with; empty where any will do."""
    if package not in RANGES:
        return ""
    first, last = RANGES[package]
    return f" (not supported: {first} to {last} are)" if difference(package) else f" (supported: {first} to {last})"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use" if torch.version.cuda else "none (torch is a CPU build)"
    named = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        named.append(f"{found.name} (sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB)")
    return f"{', '.join(named)}; CUDA {torch.version.cuda}"


def machine(device: str) -> str:
    """What a device of torch's is, and over how many threads a CPU's work is spread."""
    import torch

    return gpus() if device.startswith("cuda") else f"{processor()}, {torch.get_num_threads()} threads"


def measured_on(device: str) -> str:
    """The line above a figure: machine, versions, date."""
    seen = f"torch {installed('torch')}, transformers {installed('transformers')}, Python {platform.python_version()}"
    return f"{machine(device)}; {seen}; {datetime.date.today().isoformat()}"


def compiler() -> str:
    """What Inductor compiles CPU kernels with, unless CXX says otherwise."""
    name = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    path = shutil.which(name) if name else None
    if path is None:
        return "none: Inductor cannot compile for the CPU without one"
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return next(iter(shown.stdout.splitlines()), path)


def backends() -> list[str]:
    import torch

    return sorted(torch.compiler.list_backends())
