"""The ladder of the embedded world: what prompts alone, weights alone, and both together reach on the test set.

    python tools/ladder.py --seeds 100 101 102            # every mode with every seed; about 20 seconds a run
    python tools/ladder.py --seeds 0 --rows espl --model embedded:1

Prints a Markdown table: mean and standard deviation over the seeds of the final score, sampled at T = 1 and greedy.
"perfect prompt" is a prompt that states what every glyph means; its row is evaluated before training (frozen weights),
and "rl, perfect prompt" after it.
"""

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

ROWS = ("perfect", "rl", "evolution", "reflection", "espl")


def perfect_prompts(seed: int, directory: Path) -> Path:
    """A prompts file whose root prompt says what every glyph means in the world of this seed."""
    meaning = espl.draw_meaning(random.Random(f"glyphs/{seed}"))
    text = Path(espl.DEFAULT_PROMPTS).read_text(encoding="utf-8")
    known = "\n".join(f"{glyph} {name}" for glyph, name in meaning.items())
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"perfect-{seed}.txt"
    path.write_text(text.replace("[glyphs.principles]\n", f"[glyphs.principles]\n{known}\n"), encoding="utf-8")
    return path


def evaluations(row: str, seed: int, model: str, extra: list[str], directory: Path) -> list[dict]:
    """The evaluations of one run, first to last."""
    argv = ["--task", "glyphs", "--model", model, "--seed", str(seed), "--run-dir", str(directory / f"{row}-{seed}")]
    argv += ["--mode", row] if row != "perfect" else [
        "--mode", "rl", "--prompts-file", str(perfect_prompts(seed, directory))]
    config = espl.parse_args(argv + extra)
    jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).expanduser()))
    run = espl.start_run(config)
    espl.train(run)
    return run.evaluations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--out", default="", help="where the runs are kept (default: a temporary directory)")
    args, extra = parser.parse_known_args()  # what is left goes to espl.py
    espl.print_line = lambda *_: None
    table = defaultdict(dict)  # row: {seed: evaluation}
    with tempfile.TemporaryDirectory() as scratch:
        for row, seed in ((row, seed) for row in args.rows for seed in args.seeds):
            try:
                first, *_, last = evaluations(row, seed, args.model, extra, Path(args.out or scratch))
            except espl.UserError as e:
                print(f"ladder: error: {e}", file=sys.stderr)
                return 2
            table["perfect prompt, frozen weights" if row == "perfect" else "base"][seed] = first
            table["rl, perfect prompt" if row == "perfect" else row][seed] = last
            print(f"{row} {seed}: {first['test']:.3f} -> {last['test']:.3f}, greedy {first['test_greedy']:.3f} -> "
                  f"{last['test_greedy']:.3f}", file=sys.stderr, flush=True)
    print(f"| {len(args.seeds)} seeds | T = 1 | greedy |\n| --- | --- | --- |")
    for row, found in sorted(table.items(), key=lambda item: np.mean([e["test"] for e in item[1].values()])):
        cells = [[e[name] for e in found.values()] for name in ("test", "test_greedy")]
        print(f"| {row} | " + " | ".join(f"{np.mean(c):.2f} +- {np.std(c, ddof=min(1, len(c) - 1)):.2f}" for c in cells)
              + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
