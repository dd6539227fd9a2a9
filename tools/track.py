"""`--track wandb:PROJECT` or `trackio:PROJECT`: a run's numbers on a dashboard, too. Loaded by espl.py; no program."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402  (the very module of the program that loads this)


def start(c: espl.Config):
    """The run of the named package, opened or, by its directory's name, gone on with."""
    name, _, project = c.track.partition(":")
    if name not in ("wandb", "trackio") or not project:
        raise espl.UserError(f"--track {c.track}: must be wandb:PROJECT or trackio:PROJECT")
    with espl.explained(f"--track {c.track} does not start", f"pip install {name}, log in, or set WANDB_MODE=offline"):
        package = __import__(name)
        more = {"id": Path(c.run_dir).name} if name == "wandb" else {}  # by which a resumed run is found
        return package.init(project=project, name=Path(c.run_dir).name, config=dataclasses.asdict(c), resume="allow",
                            **more)


def log(tracker, m: dict) -> None:
    """The numbers of a line of metrics.jsonl; those in its parts as part/name."""
    groups = ("", m), *((f"{k}/", v) for k, v in m.items() if isinstance(v, dict))
    numbers = {f"{group}{k}": v for group, d in groups for k, v in d.items() if isinstance(v, (int, float))}
    tracker.log(numbers, step=m["iteration"])
