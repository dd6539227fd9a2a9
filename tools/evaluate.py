"""Test scores of a run's checkpoint, or of a model: mean reward with its interval, and pass@k.

    python tools/evaluate.py RUN                         # the checkpoint that validation picked
    python tools/evaluate.py RUN --step 60 --table       # another one, and the 2 x 2 table
    python tools/evaluate.py RUN --test-file F --test-samples 64
    python tools/evaluate.py --model DIR --task aime --population P.json

The evaluated prompt is the checkpoint's tested prompt; without a run it is the best of P.json, a
list like [{"principles": ["..."]}], or the task's root prompt. A run's own flags hold unless they
are given here. RUN is not modified, except for RUN/eval-<time>/ (or --run-dir), which gets the
responses in rollouts.jsonl and a metrics.jsonl of one line.
"""

import argparse
import dataclasses
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import report  # noqa: E402

import espl  # noqa: E402

FLAGS = (  # of espl.py, that may be given
    "task train_file test_file prompts_file population model dtype model_parallel attention"
    " max_rows prompt_role temperature top_p max_new_tokens test_samples test_prompt seed run_dir"
)


def evaluate(run, step, table, **given):
    """Evaluates on the test problems and prints the scores."""
    c = config_of(run, given)
    history, iteration = [], 0
    if run:
        history = report.read_run(run).metrics
        iteration = pick_step(run, step)
    with mock.patch.object(espl, "load_task", task_to_evaluate):
        evaluated = espl.start_run(c)
    if run:
        with espl.explained(f"cannot load a checkpoint of {run}"), checkpoints_of(run) as manager:
            espl.load_checkpoint(evaluated, manager, iteration)
    evaluated.task.val.clear()
    metrics = {"iteration": iteration} | espl.evaluate(evaluated, iteration, last=table)
    espl.write_logs(evaluated, metrics)
    print_scores(report.read_run(c.run_dir), history)


def task_to_evaluate(c, load_task=espl.load_task):
    """The task. It may lack training problems, which are not used."""
    task = load_task(c)
    task.train = task.train or task.test
    return task


def config_of(run, given):
    """Config of the evaluation: that of the run, if there is one, with the given flags."""
    name = time.strftime("eval-%Y%m%d-%H%M%S")
    if not run:
        flags = {"run_dir": f"runs/{name}", "reflector": "reference"} | given
        return espl.parse_args([f"{espl.flag_name(flag)}={x}" for flag, x in flags.items()])
    fixed = given.keys() & {"model", "population", "seed"}
    if fixed:
        raise espl.UserError(f"{espl.flag_name(min(fixed))} is fixed by RUN; leave it out")
    own = {"resume": "", "run_dir": str(run / name), "reflector": "reference", "population": ""}
    c = espl.parse_args(["--resume", str(run)])
    flags = [f"{espl.flag_name(flag)}={x}" for flag, x in given.items()]
    espl.parse_args([f"--task={c.task}", *flags])  # a UserError if one of them is wrong
    return dataclasses.replace(c, **own | given)


def checkpoints_of(run):
    """The manager of a run's checkpoints, which are only read."""
    if not (run / "checkpoints").is_dir():
        raise espl.UserError(f"there are no checkpoints in {run}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns that it will not write
    return espl.checkpoints(SimpleNamespace(directory=run.resolve()), read_only=True)


def pick_step(run, step):
    """The iteration of a checkpoint. "best": validation's pick; the latest without validation."""
    with checkpoints_of(run) as manager:
        steps = sorted(manager.all_steps())
    wanted = int(step) if step.isdecimal() else None
    if step in ("best", "latest") and steps:
        wanted = steps[-1]
    picked = report.readings(report.read_run(run).metrics).get("picked by validation")
    if picked and step == "best":
        wanted = picked["iteration"]
    if wanted not in steps:
        raise espl.UserError(f"{run} has no checkpoint {step}; it has {steps}")
    return wanted


def print_scores(run, history):
    """Prints what an evaluation found. history: the metrics of the run that was evaluated."""
    [m] = run.metrics
    rollouts = list(run.log("rollouts", split="test"))
    rewards = report.rewards_by("problem", rollouts).values()
    means = [sum(of_one) / len(of_one) for of_one in rewards]
    print(f"iteration {m['iteration']}, prompt {m['tested_prompt']}, {len(means)} test problems")
    print(f"mean reward {report.interval_text(means)}")
    print(report.rates_text(report.pass_rates(rollouts)))
    cells = report.table_of([*history, m])
    if cells:
        print(report.table_text(cells, m["tested_prompt"]))
    print(f"files: {run.directory}")


def main(argv=None):
    parser = report.new_parser(__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--step", default="best", help="best, latest, or an iteration")
    parser.add_argument("--table", action="store_true", help="also make the 2 x 2 table")
    for f in dataclasses.fields(espl.Config):
        if f.name in FLAGS.split():
            how = {"type": type(f.default), "default": argparse.SUPPRESS}
            text = f.metadata["text"].replace("%", "%%")
            parser.add_argument(espl.flag_name(f.name), help=text, **how)
    return report.run_tool(parser, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
