"""Several processes for one run, by JAX's own runtime: espl.py joins them before it touches a device (docs/hosts.md).

A collective may never end if one process has gone, and what JAX does about that takes it minutes and forty lines. So
the processes meet in a barrier of JAX's coordinator every few seconds, in a thread; when one stays away, the others end
with one line that names it.
"""

import argparse
import atexit
import contextlib
import os
import pickle
import re
import sys
import threading
import time
import traceback
import warnings
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402  (the very module of the program that loads this)

LOST_SECONDS = 30  # without an answer, until a process counts as gone


def prepare(argv: list[str]):
    """(the flags that are not about processes, a function that joins these, or does nothing for only one). Raises
    UserError."""
    def stop(message):
        raise espl.UserError(f"{message}; see docs/hosts.md")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, kind, default in (("coordinator", str, ""), ("num-processes", int, 0), ("process-id", int, -1),
                                ("join-timeout", int, 300)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.error = stop
    args, rest = parser.parse_known_args(argv)
    if args.coordinator or args.num_processes or args.process_id >= 0:
        if not re.search(r".:\d+$", args.coordinator) or not 0 <= args.process_id < args.num_processes:
            stop("--coordinator HOST:PORT, --num-processes P and --process-id I, from 0 to P - 1, go together")
        how = dict(coordinator_address=args.coordinator, num_processes=args.num_processes, process_id=args.process_id,
                   cluster_detection_method="deactivate")
        return rest, partial(join, args.join_timeout, how)
    return rest, partial(join, args.join_timeout, {}) if detected_processes() > 1 else lambda: None


def detected_processes() -> int:
    """How many processes jax.distributed.initialize() would find of a TPU slice, a Slurm or an MPI job. It is not to
    find a single one: of a Slurm task it would hide all GPUs but the first."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImportError, AttributeError):
        from jax._src.clusters import ClusterEnv  # has no public name
        kinds = [e for e in ClusterEnv._cluster_types if not e.opt_in_only_method and e.is_env_present()]
        return kinds[0].get_process_count() if kinds else 1
    return 1


def join(seconds: int, how: dict) -> None:
    """Makes one run of all processes, or ends the program if one does not come in time."""
    timer = threading.Timer(seconds, end, [2, f"not all processes of this run have started within {seconds} s; see "
                                              "what the others say, or raise --join-timeout"])
    timer.start()  # when its own time is over, JAX aborts the process
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(**how, initialization_timeout=seconds + 60)
        jax.devices()  # the processes wait for each other here, too
    except Exception as e:
        end(2, f"the processes of this run do not find each other ({espl.first_line(e)})")
    timer.cancel()
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")
    sys.excepthook = broken
    over = threading.Event()
    threading.Thread(target=watch, args=[over], daemon=True).start()
    atexit.register(leave, over)


def broken(kind, error, trace) -> None:
    """What no one has caught. In a collective it may be that another process has gone, which `watch` says better."""
    if issubclass(kind, jax.errors.JaxRuntimeError):
        time.sleep(3 * LOST_SECONDS)
    traceback.print_exception(kind, error, trace)
    end(1, "this ends all processes of the run")


def watch(over: threading.Event) -> None:
    """Meets the same thread of all other processes, again and again, until it is over."""
    meet = ocp.multihost.get_barrier_sync_fn()
    while not over.wait(5):
        try:
            meet(key="alive", timeout_ms=1000 * LOST_SECONDS)
        except Exception as e:
            if over.is_set():
                return
            names = re.search(r"timed out task names:\s*([\d\s]+)", str(e))
            lost = ", ".join(names[1].split()) if names else "0, the coordinator,"
            end(1, f"process {lost} of {jax.process_count()} has gone or hangs: see what it said last, and start all "
                "again with --resume")


def leave(over: threading.Event) -> None:
    """At the end of a run that went well: waits for the others, of which one may be busy with a tracker."""
    ocp.multihost.get_barrier_sync_fn()(key="over", timeout_ms=600_000)
    over.set()


def on_host_0(function, *args):
    """What function(*args) returns or raises on process 0, which alone calls it, on all processes."""
    result = error = None
    if jax.process_index() == 0:
        try:
            result = function(*args)
        except Exception as e:
            known = isinstance(e, (espl.UserError, espl.NoChild))
            error = e if known else RuntimeError(espl.first_line(e))
    data = np.frombuffer(pickle.dumps((result, error)), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    length = espl.bucket(size, 4096)  # few lengths, so few programs
    result, error = pickle.loads(multihost_utils.broadcast_one_to_all(np.resize(data, length)).tobytes())
    if error:
        raise error
    return result


def highest(number: int) -> int:
    """The highest of all processes' numbers."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def open_directory(run: espl.Run) -> str:
    """espl.open_directory on process 0, if all processes run the same there, and see its files. Raises UserError."""
    problems = [(x.id, x.question, x.answers) for x in (*run.task.train, *run.task.val, *run.task.test)]
    same = repr((run.config, problems, run.task.texts, run.policy.eos_ids, Path(espl.__file__).read_text()))
    if zlib.crc32(same.encode()) != on_host_0(lambda: zlib.crc32(same.encode())):
        raise espl.UserError("flags, problems, texts or code are not those of process 0; start the same on every host")
    directory = on_host_0(espl.open_directory, run)
    if not Path(directory, "config.json").is_file():
        raise espl.UserError(f"--run-dir {directory} is not that of process 0; all hosts must share its file system")
    return directory


def end(code: int, message: str) -> None:
    """Ends the process at once: a normal end would wait for the others."""
    print(f"espl: error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
