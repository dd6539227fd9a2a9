"""Sends the numbers in a run's metrics.jsonl to a dashboard, while it runs or afterwards.

    python tools/track.py RUN wandb:PROJECT        # or trackio:PROJECT

A line of metrics.jsonl is a step. The program ends with the run's last line, or by Ctrl-C.
"""

import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from report import new_parser, read_run, run_tool  # noqa: E402

import espl  # noqa: E402

SECONDS = 10  # between polls


def track(run, to):
    """Logs the lines of metrics.jsonl, and waits for more until the run has ended."""
    saved = read_run(run)
    package, _, project = to.partition(":")
    if package not in ("wandb", "trackio") or not project:
        raise espl.UserError(f"{to}: must be wandb:PROJECT or trackio:PROJECT")
    name = run.resolve().name
    more = {"id": name} if package == "wandb" else {}  # by which a run is continued
    with espl.explained(f"{package} does not start; pip install {package}, and log in"):
        package = importlib.import_module(package)
        tracker = package.init(
            project=project, name=name, config=saved.config, resume="allow", **more
        )
    done, line = -1, {}
    while True:
        for line in saved.log("metrics"):
            if line["iteration"] > done:
                done = line["iteration"]
                tracker.log(numbers(line), step=done)
        if "table" in line:
            return
        time.sleep(SECONDS)


def numbers(line):
    """The numbers of a line; those in its parts as part/name."""
    found = {}
    for name, value in line.items():
        parts = value if isinstance(value, dict) else {"": value}
        for part, x in parts.items():
            if isinstance(x, (int, float)):
                found[f"{name}/{part}".rstrip("/")] = x
    return found


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("to", metavar="PACKAGE:PROJECT", help="wandb:PROJECT or trackio:PROJECT")
    return run_tool(parser, track, argv)


if __name__ == "__main__":
    sys.exit(main())
