"""What every test needs before JAX starts: eight simulated devices, and programs compiled fast.

Set JAX_COMPILATION_CACHE_DIR to a folder that stays, and the next time only what changed is
compiled.
"""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# The suite spends its time compiling. XLA ends a process that gives it a flag it does not know, and
# its versions know different ones, so a child process tries each.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)


def is_known(flag):
    """Whether XLA starts with this flag."""
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:  # the processes of pytest-xdist inherit it from the first one
    known = filter(is_known, FAST_COMPILATION)
    os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *known])
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="espl-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs now and then: Linux limits the memory maps of a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def torch():
    """The torch that transformers' models need: the reference for ours."""
    torch = pytest.importorskip("torch", reason="the reference models need: pip install torch")
    torch.set_num_threads(1)
    return torch
