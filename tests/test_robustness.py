"""The native engine against damage from outside: any bytes, files that shrink, memory and threads that run out. Each in a child process."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from zamba2.errors import Zamba2Error
from zamba2.runtime import processors
from zamba2.runtime.native import chosen_threads
from zamba2.runtime.processors import cores, default_threads, free_memory, processors_for, quota
from zamba2.weights.formats import FORMATS
from zamba2.weights.hub import RANDOM
from zamba2.weights.packed import quantize

ROOT = Path(__file__).resolve().parent.parent
FUZZ = ROOT / "tests" / "fuzz_native.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are pinned and /proc is read on Linux only")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in bf16, so that its matrices span many pages."""
    target = tmp_path_factory.mktemp("packed") / "bf16"
    quantize(RANDOM, target, FORMATS["bf16"])
    return target


def child(code: str, *arguments: object, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output and lines of standard error, notices left out, of a Python program that begins with some imports."""
    program = f"import numpy as np, os, resource, sys, zamba2\nfrom zamba2.runtime.backend import Row\n{code}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"ZAMBA2_THREADS": "2"} | environment)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if "random weights" not in line]


# ---- any bytes --------------------------------------------------------------------------------------------------------------


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """What the fuzzing program counted."""
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"weights refused", "weights read", "state read"}, found
    return found


def test_any_bytes(tmp_path: Path) -> None:
    """Damaged checkpoints and states, drawn at random, are refused in one sentence or give finite numbers."""
    command = [sys.executable, FUZZ, tmp_path, "--rounds", "60"]
    assert sum(counts(subprocess.run(command, capture_output=True, text=True, timeout=200)).values()) == 60


def build_with_sanitizers() -> tuple[Path, dict[str, str]]:
    """The engine built with sanitizers, and the environment in which Python can load it."""
    build, nanobind = ROOT / "build" / "sanitize", Path(str(find_spec("nanobind").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    settings = [
        "-DZAMBA2_SANITIZE=ON",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dnanobind_DIR={nanobind / 'cmake'}",
    ]
    cmake = [sys.executable, "-m", "cmake"] if find_spec("cmake") else ["cmake"]
    subprocess.run([*cmake, "-S", ROOT, "-B", build, *settings], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*cmake, "--build", build, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return next(build.glob("_engine*.so")), options


@pytest.mark.slow
@pytest.mark.timeout(1800)
@linux
def test_any_bytes_under_sanitizers(tmp_path: Path) -> None:
    """The same, many times, with every read and every sum in the engine checked by the address and undefined-behaviour sanitizers."""
    pytest.importorskip("nanobind", reason="building the engine here needs nanobind and cmake: pip install nanobind cmake")
    engine, options = build_with_sanitizers()
    command = [sys.executable, FUZZ, tmp_path, "--rounds", "1500", "--seed", "2", "--engine", engine]
    found = counts(subprocess.run(command, capture_output=True, text=True, timeout=1500, env=os.environ | options))
    assert found["weights read"] >= 100 and found["weights refused"] >= 300 and found["state read"] == 300, found


def test_infinite_and_nan_scales_show(packed: Path, tmp_path: Path) -> None:
    """A scale that is infinite or NaN, in any matrix of the model, ends in an error: nothing on the way hides it."""
    code = """
from pathlib import Path
import shutil
from zamba2.config import Config
from zamba2.errors import Zamba2Error
from zamba2.weights.files import TensorFile
from zamba2.weights.formats import FORMATS
from zamba2.weights.packed import parts
folder = Path(sys.argv[1])
for format in ("q4", "q8"):
    target = folder / format
    zamba2.weights = __import__("zamba2.weights.packed", fromlist=["quantize"])
    zamba2.weights.quantize(Path(sys.argv[2]), target, FORMATS[format])
    config = Config.from_file(target / "config.json")
    whole = (target / "model.safetensors").read_bytes()
    entries = TensorFile(target / "model.safetensors").entries
    for part in parts(config):
        if not part.is_matrix or part.name == "embed_tokens.weight":
            continue
        for bits in (b"\\x00\\x7e", b"\\x00\\x7c"):
            data, block = bytearray(whole), FORMATS[format].block_bytes(part.shape[1])
            codes = -(-part.shape[1] // 32) * FORMATS[format].code_bytes
            for start in range(0, entries[part.name].nbytes, block):
                at = entries[part.name].start + start + codes
                data[at : at + 32] = bits * 16
            (target / "model.safetensors").write_bytes(data)
            model = zamba2.load(target, threads=1)
            try:
                model.backend.forward([Row(np.arange(20, dtype=np.int32), model.backend.new_state())])
            except Zamba2Error as error:
                assert "not finite" in str(error), error
                continue
            print(format, part.name, bits)
"""
    assert child(code, tmp_path, RANDOM) == (0, "", [])


# ---- files that shrink ------------------------------------------------------------------------------------------------------

SHRINKS = "model = zamba2.load(sys.argv[1])\nfile = sys.argv[1] + '/model.safetensors'\ntokens = np.arange(30, dtype=np.int32)\n"


def copied(packed: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(packed, tmp_path / "model"))


LAST = "max(entry.start for entry in model.backend.file.entries.values() if entry.dtype == 'U8')"


@pytest.mark.parametrize(
    ("before", "left"),
    [("", "4096"), ("import faulthandler; faulthandler.enable()\n", "4096"), ("", LAST)],
    ids=["plain", "another handler", "last matrix"],
)
def test_file_cut_while_it_is_read(before: str, left: str, packed: Path, tmp_path: Path) -> None:
    """Cut in the middle of a call, by whichever thread reads it: one sentence and exit code 2, other handlers or not, be it that the last
    matrix alone is missing."""
    code = f"""{before}{SHRINKS}
def cut(name, data):
    os.truncate(file, {left})
model.backend.engine.observe(cut)
model.backend.forward([Row(tokens, model.backend.new_state())])
print("went on")
"""
    code_, out, err = child(code, copied(packed, tmp_path))
    assert (code_, out) == (2, "") and len(err) == 1, err
    assert err[0].startswith("zamba2: the weight file became shorter while it was in use")


@pytest.mark.parametrize("left", ["4096", "-1"])
def test_file_cut_between_calls(left: str, packed: Path, tmp_path: Path) -> None:
    """Cut between two calls, by much or by a byte: Zamba2Error, and the state is what it was."""
    code = f"""{SHRINKS}
state = model.backend.new_state()
model.backend.forward([Row(tokens, state)])
os.truncate(file, {left} if {left} > 0 else os.stat(file).st_size - 1)
try:
    model.backend.forward([Row(tokens, state)])
except zamba2.Zamba2Error as error:
    print(state.position, error)
"""
    code_, out, err = child(code, copied(packed, tmp_path))
    assert (code_, err) == (0, []) and out.startswith("30 ") and "shrank from" in out


OTHERS = """
import mmap
def others():
    open(sys.argv[1] + '/other', 'wb').truncate(1 << 30)  # so large that it lies below the weights
    with open(sys.argv[1] + '/other', 'r+b') as own:
        view = mmap.mmap(own.fileno(), 1 << 30)
        os.truncate(own.name, 0)
        print(view[5000])
"""


def test_other_bus_errors_are_not_ours(packed: Path, tmp_path: Path) -> None:
    """A SIGBUS elsewhere, before, during or after a call, does what it did without the engine: ends the process, or runs its handler."""
    folder = copied(packed, tmp_path)
    during = "model.backend.engine.observe(lambda name, data: others())\nmodel.backend.forward([Row(tokens, model.backend.new_state())])\n"
    after = "model.backend.forward([Row(tokens, model.backend.new_state())])\nothers()\n"
    for run in (during, after):
        code, out, err = child(f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{OTHERS}{SHRINKS}{run}", folder)
        assert (code, out, err) == (-signal.SIGBUS, "", [])
        code, out, err = child(
            f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{OTHERS}import faulthandler; faulthandler.enable()\n{SHRINKS}{run}", folder
        )
        assert code == -signal.SIGBUS and err[0] == "Fatal Python error: Bus error", err


# ---- threads of Python's ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_added_beside_a_call(packed: Path) -> None:
    """What waits for a running call leaves Python to that call's observer, and a state made meanwhile is used behind it."""
    code = """
import signal, threading, time
from zamba2.runtime import native
from zamba2.weights.lora import LoraPart
signal.alarm(60)
backend, tokens, began, found = zamba2.load(sys.argv[1]).backend, np.arange(30, dtype=np.int32), threading.Event(), []
size = backend.config.hidden_size, backend.config.d_inner
part = LoraPart("layers.0.mamba.out_proj", np.ones((1, size[1]), np.float32), np.ones((size[0], 1), np.float32), 0.5)
native.read_lora = lambda folder, config: [part]
read = lambda **adapter: found.append(backend.forward([Row(tokens, backend.new_state(**adapter))])[0].numpy())
backend.engine.observe(lambda name, data: (began.set(), time.sleep(0.01)))
call = threading.Thread(target=read)
call.start()
began.wait()
backend.load_adapter(None, "a")
read(adapter="a")
call.join()
read()
print(np.array_equal(found[0], found[2]), np.array_equal(found[0], found[1]))
"""
    assert child(code, packed) == (0, "True False\n", [])


# ---- memory and threads that run out ----------------------------------------------------------------------------------------


def limit(room: str) -> str:
    """A line after which the process gets this many more bytes of address space."""
    return f"used = 4096 * int(open('/proc/self/statm').read().split()[0]); resource.setrlimit(resource.RLIMIT_AS, (used + ({room}), -1))"


@linux
def test_out_of_memory_says_how_much(packed: Path, tmp_path: Path) -> None:
    """A call and logits that do not fit into memory raise Zamba2Error with the bytes needed; the state stays and goes on."""
    code = f"""{SHRINKS}
state = model.backend.new_state()
model.backend.forward([Row(tokens, state)])
many = np.zeros(100_000, np.int32)
{limit("8 << 20")}
for wanted in (1, 100_000):
    try:
        model.backend.forward([Row(many, state, wanted)])
    except zamba2.Zamba2Error as error:
        print(state.position, error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
model.backend.forward([Row(tokens, state)])
print(state.position)
"""
    code_, out, err = child(code, packed, tmp_path)
    lines = out.splitlines()
    assert (code_, err, len(lines)) == (0, [], 3), (out, err)
    assert all(line.startswith("30 there is not enough memory") and "bytes" in line for line in lines[:2]) and lines[2] == "60"


@linux
def test_mapping_that_does_not_fit(packed: Path, tmp_path: Path) -> None:
    """A weight file that address space has no room for gives one sentence with its size, and exit code 2."""
    folder = copied(packed, tmp_path)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.truncate(1 << 36)  # sparse: it needs no disk
    run = "sys.exit(zamba2.cli.run(['generate', 'hi', '--model', sys.argv[1]]))"
    code = f"import zamba2.cli, zamba2.runtime.native\n{limit('1 << 30')}\n{run}"
    code_, out, err = child(code, folder)
    assert (code_, out, len(err)) == (2, "", 1) and str(1 << 36) in err[0] and "mapped" in err[0], err
    assert size < 1 << 36


@linux
def test_threads_that_the_system_refuses(packed: Path) -> None:
    """Where no more threads can be started the engine says how many there were, and nothing else happens."""
    run = "try: zamba2.load(sys.argv[1], threads=1000)\nexcept zamba2.Zamba2Error as error: print(error)"
    code = f"import zamba2.runtime.native\n{limit('600 << 20')}\n{run}"
    code_, out, err = child(code, packed)
    assert (code_, err) == (0, []) and "of 1000 threads" in out, (out, err)


# ---- how many threads, and where --------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of files: two hyper-threads on each of four cores, of which processors 0 to 6 may be used."""
    monkeypatch.delenv("ZAMBA2_THREADS", raising=False)
    monkeypatch.setattr(processors, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    for i in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{i}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{i % 4},{i % 4 + 4}\n")
    return tmp_path


def group(machine: Path, path: str, **files: str) -> None:
    folder = machine / "sys" / "fs" / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def test_one_thread_for_each_core(machine: Path) -> None:
    """Hyper-threads of a core count once; pinned threads take cores first, then the rest, and never more than there are."""
    assert cores() == [[0, 4], [1, 5], [2, 6], [3]]
    assert (quota(), default_threads()) == (None, 4) and ", 4 cores, " in processors.machine()
    assert processors_for(3) == [0, 1, 2]
    assert processors_for(7) == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(Zamba2Error, match="8 threads cannot be pinned to the 7 processors"):
        processors_for(8)


def test_machines_of_one_name_are_told_apart(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of one processor are not taken for those of another whose name is the same."""
    monkeypatch.setattr(processors, "CPUS", machine / "cpuinfo")
    for kind in ("cpu family\t: 25\nmodel\t\t: 17", "cpu family\t: 26\nmodel\t\t: 2"):
        block = f"processor\t: 0\nvendor_id\t: AuthenticAMD\n{kind}\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
        (machine / "cpuinfo").write_text(f"{block}\n{block.replace('EPYC', 'other')}")
        family, model = (line.split(": ")[1] for line in kind.splitlines())
        assert processors.machine().startswith(f"AMD EPYC (family {family}, model {model}), 4 cores, ")
    (machine / "cpuinfo").unlink()
    assert ", 4 cores, " in processors.machine()


def test_cores_that_the_system_does_not_tell(machine: Path) -> None:
    """Where a container hides which processors are one core, each is taken for one."""
    shutil.rmtree(machine / "sys" / "devices")
    assert cores() == [[i] for i in range(7)] and default_threads() == 7


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("max", 4), ("100000", 1), ("150000", 2), ("140000", 1), ("10000", 1), ("260000", 3), ("900000", 4), ("x", 4)],
)
def test_quota_of_cgroup_2(machine: Path, limit: str, threads: int) -> None:
    """cpu.max of this process's own group, rounded to the nearest whole number, bounds the threads; also where the container shows "/"."""
    (machine / "cgroup").write_text("0::/user.slice/mine\n")
    group(machine, "user.slice/mine", cpu_max=f"{limit} 100000")
    assert default_threads() == threads
    (machine / "cgroup").write_text("0::/\n")
    assert default_threads() == 4
    group(machine, "", cpu_max=f"{limit} 100000")
    assert default_threads() == threads


def test_quota_of_the_groups_around(machine: Path) -> None:
    """The tightest of nested groups counts."""
    (machine / "cgroup").write_text("0::/a/b/c\n")
    group(machine, "a/b/c", cpu_max="max 100000")
    group(machine, "a/b", cpu_max="300000 100000")
    assert default_threads() == 3
    group(machine, "a", cpu_max="100000 50000")
    assert (default_threads(), quota()) == (2, 2.0)


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_quota_of_cgroup_1(machine: Path, folder: str) -> None:
    """cpu.cfs_quota_us over cpu.cfs_period_us, in the group itself or, where its path is the host's, at the root; -1 is no limit."""
    (machine / "cgroup").write_text("9:name=systemd:/\n4:memory:/docker/1f\n1:cpu,cpuacct:/docker/1f\n0::/\n")
    group(machine, f"{folder}/docker/1f", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    assert default_threads() == 2
    (machine / "cgroup").write_text("1:cpu,cpuacct:/docker/unseen\n")
    assert default_threads() == 4
    group(machine, folder, cpu_cfs_quota_us="50000", cpu_cfs_period_us="100000")
    assert default_threads() == 1
    group(machine, folder, cpu_cfs_quota_us="-1")
    assert default_threads() == 4


def test_free_memory_within_the_groups(machine: Path) -> None:
    """What the system has to give, less where a control group of either version allows less; pages of files count as free."""
    assert free_memory() == math.inf
    (machine / "meminfo").write_text("MemTotal:       99 kB\nMemAvailable:   90 kB\n")
    (machine / "cgroup").write_text("4:memory:/docker/1f\n0::/a/b\n")
    group(machine, "a/b", memory_max="max", memory_current="5")
    assert free_memory() == 90 * 1024
    group(machine, "a", memory_max="70000", memory_current="50000", memory_stat="anon 1\nactive_file 1000\ninactive_file 200")
    assert free_memory() == 21_200
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 30\ntotal_inactive_file 4"
    group(machine, "memory", memory_limit_in_bytes="9000", memory_usage_in_bytes="8000", memory_stat=stat)
    assert free_memory() == 1034


def test_thread_and_pin_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments go before ZAMBA2_THREADS and ZAMBA2_PIN; what is no count or no switch is refused."""
    monkeypatch.setenv("ZAMBA2_THREADS", "3")
    assert chosen_threads(None, None) == (3, []) and chosen_threads(1, False) == (1, [])
    for bad in ("yes", "2", "-1"):
        monkeypatch.setenv("ZAMBA2_PIN", bad)
        with pytest.raises(Zamba2Error, match=f"ZAMBA2_PIN is '{bad}'"):
            chosen_threads(1, None)
    for count in (0, -1, 1025):
        with pytest.raises(Zamba2Error, match=f"threads is {count}"):
            chosen_threads(count, False)
    monkeypatch.setenv("ZAMBA2_PIN", "1")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with pytest.raises(Zamba2Error, match="Linux only"):
        chosen_threads(1, None)


@linux
@pytest.mark.parametrize("how", ["pin=True", "threads=2, pin=False", "environment"])
def test_pinned_threads(how: str, packed: Path) -> None:
    """Pinned, each thread stays on a processor of its own during a call, and the caller's own setting is back after it."""
    available = [group[0] for group in cores()]
    if len(available) < 2:
        pytest.skip("one core: two threads cannot be told apart")
    free = tuple(sorted(os.sched_getaffinity(0)))
    expected = [free, free] if "False" in how else [(available[0],), (available[1],)]
    code = f"""
import time
def places():
    return sorted(tuple(sorted(os.sched_getaffinity(int(task)))) for task in os.listdir('/proc/self/task'))
before = os.sched_getaffinity(0)
model = zamba2.load(sys.argv[1]{"" if how == "environment" else ", " + how})
seen, end = [], time.monotonic() + 20  # a thread that has had no processor yet has not chosen one, and the caller does its work
model.backend.engine.observe(lambda name, data: seen.append(places()))
while not seen or (seen[-1] != {expected} and time.monotonic() < end):
    model.backend.forward([Row(np.arange(30, dtype=np.int32), model.backend.new_state())])
assert os.sched_getaffinity(0) == before
print(seen[-1])
"""
    code_, out, err = child(code, packed, **({"ZAMBA2_PIN": "1"} if how == "environment" else {}))
    assert (code_, err) == (0, [])
    assert eval(out) == expected
