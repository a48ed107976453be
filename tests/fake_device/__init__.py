"""A device that is no CPU, on a machine without one: PyTorch's open registration over plain memory.

Every operator falls back to the CPU, but tensors of two devices do not mix, as on a GPU. After `ready()`,
`model.to("fake")` works. Tied weights come apart when a model moves there, which they do not on a GPU.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "device.cpp"


@lru_cache
def ready():
    """Builds the device, half a minute at the first time, and makes it known; False where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        return False
    extension = _loaded(_built(compiler))
    extension.init()
    torch.utils.rename_privateuse1_backend("fake")
    torch._register_device_module("fake", _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    return True


def _built(compiler):
    """The compiled library, kept by what it was made from; a process that builds beside another does no harm."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    place = SOURCE.parents[2] / "build" / "fake_device" / f"fake_device_{key}.so"
    if not place.exists():
        from torch.utils.cpp_extension import include_paths, library_paths

        place.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{folder}" for folder in (*include_paths(), sysconfig.get_paths()["include"])]
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / place.name
            flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w", "-DTORCH_EXTENSION_NAME=fake_device_native",
                     f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]  # fmt: skip
            libraries = [*(f"-L{folder}" for folder in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch_python"]
            subprocess.run([compiler, *flags, *includes, str(SOURCE), "-o", str(made), *libraries], check=True)
            made.replace(place)
    return place


def _loaded(place):
    specification = importlib.util.spec_from_file_location("fake_device_native", place)
    extension = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(extension)
    return extension


def _module():
    """What torch asks of `torch.fake`."""
    module = types.ModuleType("torch.fake")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._lazy_init = module.synchronize = lambda *arguments: None
    return module
