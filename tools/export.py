"""A run's model for other programs: a PEFT adapter or a full Hugging Face directory, its system prompt, a model card.

    python tools/export.py runs/aime-espl-20260214-120000 OUT          # the LoRA adapter, for PEFT or vLLM
    python tools/export.py RUN OUT --merge                             # a full model, the adapter merged into its base
    python tools/export.py RUN OUT --best                              # the iteration that validation picked, not the last

OUT also gets system_prompt.txt, the tested prompt as the model reads it, population.json, and README.md, the card. A full
model has its base's files, tensor names and dtypes; W + (alpha / R) A B is rounded from float32, and the card says what
part of the learning that costs. The adapter is exact; a run with --lora-rank 0 has none and is always written in full.

The base model, the files of the task and its prompts, and what its tools read must be where the run found them; problems
are not read. No accelerator is touched, nor a run that is still going. Memory: one tensor of the checkpoint.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"  # a run may hold all the memory of this machine's accelerators
import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16}  # by their names in a safetensors header
CARD = """---
library_name: {library}
---
# {name}, iteration {iteration}

{what}
Made by E-SPL (arXiv 2602.14697), which learns weights and a system prompt together: use it with system_prompt.txt, which
is prompt {prompt} of population.json.

- run `{name}`: `--mode {c.mode}`, `--seed {c.seed}`, after iteration {iteration}
- base model `{c.model}`, whose licence applies
- data: task `{c.task}`, training file `{c.train_file}`, test file `{c.test_file}` (empty: the task's own)

{scores}

Mean rewards; val: validation problems, which pick the iteration; test: the test problems, which decide nothing.

To serve it from this directory, DIR, to any client of the chat completions API:

    vllm serve {serve}

{turn}. The run sampled with temperature
{c.temperature:g}, top_p {c.top_p:g} and at most {c.max_new_tokens} tokens; the template got enable_thinking={c.thinking}.
"""
TURNS = {"system": "The system prompt is the system turn, or begins the user's where the template has none",
         "user": "One user turn has the problem, a blank line and the system prompt"}


class Checkpoint:
    """The latest checkpoint in a folder of a run, whatever devices wrote it; theta is read weight by weight."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns that it will not write
        if not folder.is_dir():
            raise espl.UserError(f"there is no {folder}; leave out --best if there were no validation problems")
        with espl.explained(f"cannot read the checkpoints in {folder}", "if the run is still going, try again"):
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)  # else it tidies up behind the run
            manager = ocp.CheckpointManager(folder.absolute(), options=options)
            self.iteration = max(manager.all_steps())
            loop = manager.restore(self.iteration, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]
            self.population = [espl.SystemPrompt(**s) for s in loop["prompts"]]
            self.reader, self.weights = ocp.PyTreeCheckpointer(), manager.directory / str(self.iteration) / "weights"
            leaves = jax.tree_util.tree_leaves_with_path(self.reader.metadata(self.weights).item_metadata.tree["theta"])
        self.theta = {espl.path_name(path).removesuffix("/value"): leaf for path, leaf in leaves}
        self.adapted = sorted(path.removesuffix("/lora_a") for path in self.theta if path.endswith("/lora_a"))

    def read(self, path: str) -> np.ndarray:
        """The weight at `path`, of layers/ the stack [L, …], in float32."""
        nest = lambda leaf: reduce(lambda x, key: {key: x}, reversed(f"theta/{path}/value".split("/")), leaf)
        how = ocp.args.PyTreeRestore(nest(self.theta[path]), nest(ocp.RestoreArgs(np.ndarray)), partial_restore=True)
        return np.asarray(jax.tree.leaves(self.reader.restore(self.weights, how))[0], np.float32)


def write_adapter(out: Path, c: espl.Config, checkpoint: Checkpoint, base: Path, cfg: espl.ModelConfig) -> None:
    """PEFT's adapter_config.json and adapter_model.safetensors: lora_A [R, in], lora_B [R, out] transposed, float32."""
    from safetensors.numpy import save_file
    from transformers import AutoConfig
    whole, tensors = AutoConfig.from_pretrained(base), {}
    inner = "" if whole.get_text_config() is whole else "language_model."  # of a model that also sees
    for path in checkpoint.adapted:
        for x in "ab":
            for name, w in zip(espl.tensor_names(f"{path}/kernel", cfg), checkpoint.read(f"{path}/lora_{x}")):
                name = f"base_model.model.model.{inner}{name.removesuffix('weight')}lora_{x.upper()}.weight"
                tensors[name] = np.ascontiguousarray(w.T)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    modules = [path.split("/")[1] for path in checkpoint.adapted]
    settings = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=c.model, r=c.lora_rank,
        lora_alpha=int(c.lora_alpha) if c.lora_alpha == int(c.lora_alpha) else c.lora_alpha, lora_dropout=0.0,
        # a list matches the ends of names, and so the vision tower's, too
        target_modules=rf".*\.language_model\..*\.({'|'.join(modules)})" if inner else modules,
        bias="none", fan_in_fan_out=False, inference_mode=True)
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def map_tensors(directory: Path) -> dict[str, np.memmap]:
    """The text model's tensors in a directory, to be written where they lie; names as in espl.open_checkpoint."""
    wanted, tensors = espl.open_checkpoint(str(directory)).keys(), {}
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb") as f:  # the format: the header's length, the header, the tensors' bytes
            start = 8 + (length := int.from_bytes(f.read(8), "little"))
            header = json.loads(f.read(length))
        for name, x in header.items():
            if (short := re.sub(r"^(model\.|language_model\.)+", "", name)) in wanted:
                offset, shape = start + x["data_offsets"][0], tuple(x["shape"])
                tensors[short] = np.memmap(file, DTYPES[x["dtype"]], "r+", offset, shape)
    return tensors


def write_merged(out: Path, checkpoint: Checkpoint, base: Path, cfg: espl.ModelConfig) -> float:
    """The base's directory with pi_theta's weights. Returns |rounding| / |what was learned|, norms over all weights."""
    for pattern in ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"):  # what espl.find_model gets
        for file in base.glob(pattern):
            shutil.copyfile(file, out / file.name)
    tensors, squares = map_tensors(out), np.zeros(2)

    def write(name, w, add):  # w: float32 [out, in], added to the base's or in its place
        old = tensors[name].astype(np.float32)
        if w.shape != old.shape:
            raise espl.UserError(f"{name} is {old.shape} in {base}, {w.shape} in the run; restore the base model")
        new = old + w if add else w
        tensors[name][...] = new.astype(tensors[name].dtype)
        squares[:] += [np.sum((x - new) ** 2, dtype=np.float64) for x in (tensors[name].astype(np.float32), old)]

    for path in checkpoint.adapted:
        a_LIR, b_LRO = (checkpoint.read(f"{path}/lora_{x}") for x in "ab")
        for name, a, b in zip(espl.tensor_names(f"{path}/kernel", cfg), a_LIR, b_LRO):
            write(name, cfg.lora_alpha / cfg.lora_rank * (a @ b).T, add=True)
    for path in () if cfg.lora_rank else checkpoint.theta:
        x, names = checkpoint.read(path), espl.tensor_names(path, cfg)
        names += [n for n in ("lm_head.weight",) if path == "embed" and cfg.tied and n in tensors]  # held twice
        for name, w in zip(names, x if path.startswith("layers/") else [x] * len(names)):
            write(name, w.T if path.endswith("kernel") else w, add=False)
    return float(np.sqrt(squares[0] / max(squares[1], 1e-99)))


def score_table(run: Path) -> str:
    """The evaluations of metrics.jsonl: before training, the last one, the one that validation picked."""
    *lines, _ = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")  # the last: incomplete
    evaluations = [m for m in map(json.loads, lines) if "test" in m]
    columns = ["iteration", "prompt", *(x for x in ("val", "test", "test_greedy") if x in evaluations[0])]
    shown = {name: row for name, row in espl.summary(evaluations).items() if "iteration" in row}  # no means of several
    cells = lambda row: [f"{row[x]:.3f}" if isinstance(row[x], float) else str(row[x]) for x in columns]
    table = [["", *columns], ["---"] * (len(columns) + 1), *([name, *cells(row)] for name, row in shown.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def export(run: Path, out: Path, merge: bool, best: bool) -> str:
    """All of OUT, which appears when it is complete. Returns what to say."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise espl.UserError(f"{out} exists and is not an empty directory; choose another OUT")
    if not (run / "config.json").is_file():
        raise espl.UserError(f"there is no {run / 'config.json'}; give the directory of a run of espl.py")
    c = espl.parse_args(["--resume", str(run)])
    checkpoint, own = Checkpoint(run / ("best" if best else "checkpoints")), espl.task_file(c.task)
    with espl.explained(f"task {c.task}: its texts or tools fail"):
        texts = espl.read_prompts(c.prompts_file or espl.DEFAULT_PROMPTS, Path(c.task).stem, own.get("PROMPTS", ""))
        task = espl.Task(c.task, [], [], [], texts, tools=own["tools"](c) if "tools" in own else {})
    s = espl.tested_prompt(SimpleNamespace(config=c, population=checkpoint.population))
    base, name, full = Path(espl.find_model(c.model)), run.resolve().name, merge or not c.lora_rank
    cfg = espl.read_model_config(str(base), lora_rank=c.lora_rank, lora_alpha=c.lora_alpha)
    part = out.resolve().with_name(out.resolve().name + ".part")
    with espl.explained(f"cannot make {part}", "remove it if an export was killed, or choose another OUT"):
        part.mkdir(parents=True)
    try:
        with espl.explained(f"cannot export {run}"):
            if full:
                lost, serve = write_merged(part, checkpoint, base, cfg), f"DIR --served-model-name {name}"
                what = f"`{c.model}` with {'a LoRA adapter merged into it' if c.lora_rank else 'all weights trained'}.\n" \
                       f"Rounding to its dtype changed the weights by {lost:.2g} of what training did (norms)."
            else:
                write_adapter(part, c, checkpoint, base, cfg)
                serve = f"{c.model} --enable-lora --max-lora-rank {c.lora_rank} --lora-modules {name}=DIR"
                what = f"A LoRA adapter (PEFT) for `{c.model}`."
            card = CARD.format(library="transformers" if full else "peft", iteration=checkpoint.iteration, prompt=s.id, c=c,
                               name=name, what=what, scores=score_table(run), serve=serve, turn=TURNS[c.prompt_role])
            for file, text in ("README.md", card), ("system_prompt.txt", espl.system_text(task, s.principles)):
                (part / file).write_text(text, encoding="utf-8")
            shutil.copyfile(run / "population.json", part / "population.json")
            part.replace(out)  # an empty directory gives way
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{what}\niteration {checkpoint.iteration} of {run} with prompt {s.id}, written to {out}"


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 2 for bad input."""
    def stop(message):
        raise espl.UserError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("out", type=Path, help="directory to write; it must not exist, or be empty")
    parser.add_argument("--merge", action="store_true", help="a full model instead of an adapter")
    parser.add_argument("--best", action="store_true", help="the iteration that validation picked instead of the last")
    parser.error = stop  # instead of the usage on many lines
    try:
        print(export(**vars(parser.parse_args(argv))))
    except espl.UserError as e:
        print(f"export: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
