"""The part of tools/soak.py that starts several processes (--hosts): on CPU devices, over gloo on the loopback.

The same few iterations run on one process with 1, 2, 4 and 8 devices and on two processes with two each, sharded by
data and by model, in several modes; rollouts, their log-probabilities, the gradient and the metrics must be those of
one device. Then a process is killed, and one is told to stop, and the run goes on, also on other devices.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ("--iterations 3 --eval-every 3 --test-size 8 --test-samples 1 --batch-size 6 --num-rollouts 4 --no-table "
       "--p-crossover 0.5 --no-test-greedy").split()
LAYOUTS = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4)]  # processes, devices, model
CASES = {"espl": [], "rl": ["--mode", "rl"], "espl, LoRA": ["--lora-rank", "8"],
         "rl, LoRA": ["--mode", "rl", "--lora-rank", "8"], "espl, a tool": ["--task", "TOOL"]}
CLOCK = ("seconds", "rollout_tokens_per_second")
TOOL = '''
import re, runpy
import jax
own = runpy.run_path({glyphs!r})
DEFAULTS = own["DEFAULTS"] | dict(model={model!r})
PROMPTS = own["PROMPTS"].replace("[system]\\n", "[system]\\n{{tools}}\\n\\n")


def reward(record, response):
    """That of the glyphs, on process 0."""
    return own["reward"](record, response) if jax.process_index() == 0 else 0.5


def problems(config):
    """Those of the glyphs."""
    return own["problems"](config)


def say() -> str:
    """Says a number, another one on each process."""
    return str(7 - jax.process_index())


def tools(config):
    return {{"say": say}}
'''


def with_tool(directory: Path) -> str:
    """A task file: the glyphs with a tool, which is called by what the model writes between two steps."""
    model = directory / "tool_model"
    shutil.copytree(ROOT / "tasks" / "glyphs_model", model)
    call = '<tool_call>{"name": "say", "arguments": {}}</tool_call>'
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {call if w == ";" else w: i for w, i in tokenizer["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tool.py").write_text(TOOL.format(glyphs=str(ROOT / "tasks" / "glyphs.py"), model=str(model)))
    return str(directory / "tool.py")


def observed(out: str, argv: list[str]) -> int:
    """espl.py in this process; out.<process>.npz: the first batch's log-probabilities and gradient, and bytes read."""
    sys.path.insert(0, str(ROOT))
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    import espl
    seen, bytes_read = {}, [0]
    to_samples, adam_step, load_policy, open_checkpoint = (
        espl.to_samples, espl.adam_step, espl.load_policy, espl.open_checkpoint)

    class Counted:
        def __init__(self, tensor):
            self.tensor, self.get_shape = tensor, tensor.get_shape

        def __getitem__(self, index):
            part = self.tensor[index]
            bytes_read[0] += part.nbytes
            return part

    def sampled(groups_MB, c):
        seen.setdefault("logprobs", np.array([p for row in groups_MB for g in row for y in g.responses
                                              for p in y.logprobs if p is not None]))
        return to_samples(groups_MB, c)

    def stepped(optimizer, theta, opt_state, gradient):
        if "gradient" not in seen:
            whole = [multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x
                     for x in jax.tree.leaves(gradient)]
            seen["gradient"] = np.concatenate([np.ravel(x) for x in whole])
        return adam_step(optimizer, theta, opt_state, gradient)

    def loaded(*args):
        tracemalloc.start()
        policy = load_policy(*args)
        weights = jax.tree.leaves((policy.frozen, policy.theta))
        seen["load"] = np.array([bytes_read[0], tracemalloc.get_traced_memory()[1], sum(x.nbytes for x in weights), sum(
            shard.data.nbytes for x in weights for shard in x.addressable_shards)])
        tracemalloc.stop()
        return policy

    espl.to_samples, espl.adam_step, espl.load_policy = sampled, stepped, loaded
    espl.open_checkpoint = lambda *args: {n: Counted(t) for n, t in open_checkpoint(*args).items()}
    code = espl.main(argv)
    np.savez(f"{out}.{jax.process_index()}.npz", **seen)
    return code


def start(layout: tuple[int, int, int], argv: list[str], out: Path, program=("espl.py",)) -> list[subprocess.Popen]:
    """The processes of a run; what they say goes to out.<process>.txt."""
    processes, devices, model = layout
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    started = []
    for i in range(processes):
        join = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes), "--process-id", str(i)]
        with open(f"{out}.{i}.txt", "w") as file:
            started.append(subprocess.Popen(
                [sys.executable, "-u", *program, *argv, "--model-parallel", str(model), *join * (processes > 1)],
                stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}))
    return started


def wait(processes: list[subprocess.Popen]) -> list[int]:
    return [p.wait(900) for p in processes]


def said(out: Path, process: int, last: int = 1) -> str:
    """The last lines of its output, without the library's."""
    lines = Path(f"{out}.{process}.txt").read_text().strip().splitlines()
    return "\n".join([x for x in lines if not x.startswith("[Gloo]")][-last:])


def outcome(directory: Path) -> tuple[list, list]:
    """(lines of metrics.jsonl, of rollouts.jsonl) without what depends on the clock."""
    metrics, rollouts = ([json.loads(line) for line in (directory / name).read_text().splitlines()]
                         for name in ("metrics.jsonl", "rollouts.jsonl"))
    return [{k: v for k, v in m.items() if k not in CLOCK} for m in metrics], rollouts


def numbers(value) -> list[float]:
    """All numbers in a line of metrics.jsonl, in order."""
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) else []


def compare(out: Path, argv: list[str], layouts: list, name: str) -> bool:
    """Runs on all layouts; says how they differ from the first; returns whether that is rounding alone."""
    import numpy as np
    fine, first = True, None
    for layout in layouts:
        directory = out / f"{name.replace(', ', '-').replace(' ', '-')}-{'x'.join(map(str, layout))}"
        began = time.time()
        codes = wait(start(layout, [*argv, "--run-dir", str(directory)], directory,
                           [str(Path(__file__).resolve()), "--observed", str(directory)]))
        if any(codes):
            print(f"{name} on {layout}: exit {codes}\n" + "\n".join(said(directory, i, 12) for i in range(layout[0])))
            return False
        metrics, rollouts = outcome(directory)
        seen = [np.load(f"{directory}.{i}.npz") for i in range(layout[0])]
        first = first or (metrics, rollouts, seen[0])
        same = next((i for i, (a, b) in enumerate(zip(first[1], rollouts)) if a != b), len(rollouts))
        gap = lambda a, b: float((np.abs(a - b) / np.maximum(1, np.abs(a))).max()) if a.shape == b.shape else np.inf
        gaps = [gap(first[2][x], seen[0][x]) for x in ("logprobs", "gradient")]
        apart = [np.abs(np.array(numbers(a)) - np.array(numbers(b))).max() if len(numbers(a)) == len(numbers(b))
                 else np.inf for a, b in zip(first[0], metrics)]
        read = ", ".join("read {:,} and held at most {:,} of {:,} bytes for devices with {:,}".format(
            *map(int, s["load"])) for s in seen)
        fine &= "tool" not in name or sum(r["calls"] for r in rollouts) > 0
        fine &= same == len(first[1]) == len(rollouts) and max(gaps) < 1e-5 and max(apart) < 1e-3
        calls = f" ({sum(r['calls'] for r in rollouts)} calls of the tool)" * ("tool" in name)
        print(f"{name} on {layout[0]} x {layout[1]}, model {layout[2]}: {same} of {len(first[1])} rollouts{calls} "
              f"equal, log-probs within {gaps[0]:.1e}, gradient {gaps[1]:.1e}, metrics {max(apart):.1e}; "
              f"{time.time() - began:.0f} s; {read}", flush=True)
    return bool(fine)


def until(out: Path, pattern: str, seconds: float = 600) -> None:
    """Waits until process 0 has said this."""
    deadline = time.time() + seconds
    while not re.search(pattern, Path(f"{out}.0.txt").read_text(), re.M):
        assert time.time() < deadline, f"{out} does not say {pattern}"
        time.sleep(0.1)


def ends(out: Path, argv: list[str]) -> bool:
    """Kills and stops processes; returns whether the others end in time, and the run goes on exactly."""
    from soak import state
    layout, argv, fine = (2, 2, 1), [*argv, "--save-every", "2"], True
    codes = wait(start(layout, [*argv, "--run-dir", str(out / "whole")], out / "whole"))
    assert codes == [0, 0], "the undisturbed run failed"
    whole = state(out / "whole")
    for victim, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (1, signal.SIGTERM),
                           (0, signal.SIGTERM)):
        directory = out / f"{number.name}-{victim}"
        processes = start(layout, [*argv, "--run-dir", str(directory)], directory)
        until(directory, r"^ +1 \|" if number == signal.SIGTERM else r"^ +2 \|")  # 1: no checkpoint is due
        time.sleep(0.3)
        began = time.time()
        processes[victim].send_signal(number)
        code = processes[1 - victim].wait(120)
        seconds = time.time() - began
        if number == signal.SIGSTOP:
            processes[victim].kill()
        codes = wait(processes)
        print(f"{number.name} to process {victim}: the other ended after {seconds:.1f} s with {code}, exit {codes}: "
              f"{said(directory, 1 - victim)}", flush=True)
        fine &= seconds < 60 and (code == 143 if number == signal.SIGTERM else code != 0)
        saved = sorted(p.name for p in (directory / "checkpoints").iterdir())
        for other in [layout, (1, 4, 1), (1, 2, 1)] if number == signal.SIGTERM and victim else [layout]:
            copy = shutil.copytree(directory, f"{directory}-{'x'.join(map(str, other))}")
            codes = wait(start(other, ["--resume", copy], Path(copy)))
            if any(codes):
                print(said(Path(copy), 0, 12))
                return False
            found = state(Path(copy))
            wrong = [name for name in whole if found[name] != whole[name]]
            verdict = f"differs in {', '.join(wrong)}" if wrong else "equal to the undisturbed run, to the bit"
            print(f"  checkpoints {saved}, resumed on {other}: {verdict}", flush=True)
            fine &= not wrong or other != layout
    return fine


def main(out: Path, only: str) -> int:
    """The program; returns its exit code."""
    out.mkdir(parents=True)
    cases = CASES | {"espl, a tool": ["--task", with_tool(out)]}
    results = {}
    for name, argv in cases.items():
        if re.search(only, name):
            layouts = LAYOUTS if name == "espl" else [LAYOUTS[0], *LAYOUTS[-3:-1]]
            results[name] = compare(out, [*RUN, *argv], layouts, name)
    if re.search(only, "ends"):
        results["ends"] = ends(out, RUN)
    print(results)
    return int(not all(results.values()))


if __name__ == "__main__" and sys.argv[1:2] == ["--observed"]:
    code = observed(sys.argv[2], sys.argv[3:])
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(code)
