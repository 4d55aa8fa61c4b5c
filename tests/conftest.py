"""For every test: folders of its own for caches and settings, one torch thread, Hypothesis without a clock.

ZAMBA2_TEST_PROFILE=thorough draws ten times as many examples.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

# Before any import that reads them: nothing of the user's is read or written, nothing is downloaded.
HOME = Path(tempfile.mkdtemp(prefix="zamba2-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for variable, folder in {
    "HF_HOME": "huggingface",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "XDG_STATE_HOME": "state",
}.items():
    (HOME / folder).mkdir()
    os.environ[variable] = str(HOME / folder)
for variable in ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_CACHE"):
    os.environ.pop(variable, None)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU, slowly
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
WITHOUT_SHRINKING = [Phase.explicit, Phase.generate]  # a failure is reported at once; the thorough profile makes it small
settings.register_profile(
    "default", max_examples=12, deadline=None, derandomize=True, database=None, phases=WITHOUT_SHRINKING, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile("thorough", max_examples=120, deadline=None, print_blob=True, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("ZAMBA2_TEST_PROFILE", "default"))


def pytest_configure() -> None:
    # A shell may start its background jobs with Ctrl-C ignored; programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        import torch
    except ImportError:  # the tests of what needs no torch still run
        return
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # A full collection looks at what all test modules imported, which takes up to a second, in the middle of whatever test is running.
    gc.collect()
    gc.freeze()
