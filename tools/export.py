"""A run's model for other programs: a PEFT adapter or a full Hugging Face directory, its system prompt, a model card.

    python tools/export.py runs/aime-espl-20260214-120000 OUT       # the LoRA adapter, for PEFT or vLLM
    python tools/export.py RUN OUT --merge                          # a full model, the adapter merged into its base
    python tools/export.py RUN OUT --best                           # the iteration that validation picked, not the last

OUT also gets system_prompt.txt, the tested prompt as the model reads it, population.json, and README.md, the card. A
full model has its base's files, tensor names and dtypes: W + (alpha / R) A B is rounded from float32, and the card says
how large that error is. The adapter is exact; a run with --lora-rank 0 has none and is always written in full.
The base model, the files of the task and its prompts, and what its tools read must be where the run found them; its
problems are not read. No accelerator is touched, nor a run that still goes on. Memory: one weight of the checkpoint.
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

os.environ["JAX_PLATFORMS"] = "cpu"  # a run may hold all the memory of this machine's accelerators
import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

evaluate = espl.from_tools("evaluate")
logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns that it will not write
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16}  # by their names in a safetensors header
CARD = """# {name}, iteration {iteration}

{what}
Made by E-SPL (arXiv 2602.14697), which learns weights and system_prompt.txt together. The base's licence applies.

- run `{name}`: `--mode {c.mode}`, `--seed {c.seed}`; iteration {iteration}, prompt {prompt} of population.json
- data: task `{c.task}`, training file `{c.train_file}`, test file `{c.test_file}` (empty: the task's own)

{scores}

Validation problems (val) pick an iteration, test problems decide nothing. To serve it, DIR being this directory:

    vllm serve {serve}

Any client of the chat completions API will do; in a request the system prompt is the {turn}.
Sampled at temperature {c.temperature:g}, top_p {c.top_p:g}, {c.max_new_tokens} tokens, enable_thinking {c.thinking}.
"""
TURNS = {"system": "system turn (if there is none, it begins the user's)", "user": "end of the user's turn"}


class Checkpoint:
    """The latest checkpoint in a folder of a run, whatever devices wrote it; theta is read weight by weight."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise espl.UserError(f"there is no {folder}; leave out --best if there were no validation problems")
        with espl.explained(f"cannot read the checkpoints in {folder}", "if the run is still going, try again"):
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)  # else it tidies up behind the run
            manager = ocp.CheckpointManager(folder.absolute(), options=options)
            self.iteration = max(manager.all_steps())
            loop = manager.restore(self.iteration, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]
            self.population = [espl.SystemPrompt(**s) for s in loop["prompts"]]
            self.reader, self.weights = ocp.PyTreeCheckpointer(), manager.directory / str(self.iteration) / "weights"
            tree = self.reader.metadata(self.weights).item_metadata.tree["theta"]
        self.theta = {espl.path_name(path).removesuffix("/value"): x for path, x in jax.tree.leaves_with_path(tree)}
        self.adapted = sorted(path.removesuffix("/lora_a") for path in self.theta if path.endswith("/lora_a"))

    def read(self, path: str) -> np.ndarray:
        """The weight at `path`, of layers/ the stack [L, …], in float32."""
        nest = lambda leaf: reduce(lambda x, key: {key: x}, reversed(f"theta/{path}/value".split("/")), leaf)
        how = ocp.args.PyTreeRestore(nest(self.theta[path]), nest(ocp.RestoreArgs(np.ndarray)), partial_restore=True)
        return np.asarray(jax.tree.leaves(self.reader.restore(self.weights, how))[0], np.float32)


def write_adapter(out: Path, c: espl.Config, checkpoint: Checkpoint, base: Path, cfg: espl.ModelConfig) -> None:
    """PEFT's adapter_config.json and adapter_model.safetensors: lora_A [R, in] and lora_B [out, R] in float32."""
    from safetensors.numpy import save_file
    sees = "text_config" in json.loads((base / "config.json").read_text(encoding="utf-8"))
    inner, modules, tensors = "language_model." * sees, [path.split("/")[1] for path in checkpoint.adapted], {}
    for path, x in [(path, x) for path in checkpoint.adapted for x in "ab"]:
        for name, w in zip(espl.tensor_names(f"{path}/kernel", cfg), checkpoint.read(f"{path}/lora_{x}")):
            name = f"base_model.model.model.{inner}{name.removesuffix('weight')}lora_{x.upper()}.weight"
            tensors[name] = np.ascontiguousarray(w.T)  # torch keeps [out, in]
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(indent=1, obj=dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=c.model, r=c.lora_rank,
        lora_alpha=c.lora_alpha,  # next: a list matches the ends of names, and so the vision tower's, too
        target_modules=rf".*\.language_model\..*\.({'|'.join(modules)})" if sees else modules,
        lora_dropout=0.0, bias="none", fan_in_fan_out=False, inference_mode=True)), encoding="utf-8")


def map_tensors(directory: Path) -> dict[str, np.memmap]:
    """The text model's tensors in a directory, to be written where they lie; names as in espl.open_checkpoint."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = np.memmap(file, mode="r+")  # bytes: the header's length, the header, the tensors
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, x in json.loads(data[8:start].tobytes()).items():
            if not re.search(r"^__metadata__|vision_tower|multi_modal_projector|rotary_emb", name):
                short = re.sub(r"^(model\.|language_model\.)+", "", name)
                tensors[short] = data[start:][slice(*x["data_offsets"])].view(DTYPES[x["dtype"]]).reshape(x["shape"])
    return tensors


def write_merged(out: Path, checkpoint: Checkpoint, base: Path, cfg: espl.ModelConfig) -> float:
    """The base's directory with pi_theta's weights. Returns |rounding| / |what was learned|, norms over all weights."""
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors"):  # what espl.find_model gets
            shutil.copyfile(file, out / file.name)
    tensors, squares = map_tensors(out), np.zeros(2)

    def write(name, w, add):  # w: float32 [out, in], added to the base's or in its place
        old = tensors[name].astype(np.float32)
        if w.shape != old.shape:
            raise espl.UserError(f"{name} is {old.shape} in {base}, {w.shape} in the run; restore the base model")
        tensors[name][...] = (new := old + w if add else w).astype(tensors[name].dtype)
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
    rows = evaluate.summary([m for m in map(json.loads, lines) if "test" in m])
    scores = [x for x in ("val", "test", "test_greedy") if x in rows["final"]]
    table = [["mean reward", "iteration", "prompt", *scores], ["---"] * (len(scores) + 3), *(
        [name, str(m["iteration"]), str(m["prompt"]), *(f"{m[x]:.3f}" for x in scores)]
        for name, m in rows.items() if "iteration" in m)]  # no mean of several
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
    s = espl.tested_prompt(argparse.Namespace(config=c, population=checkpoint.population))
    base, name, full = Path(espl.find_model(c.model)), run.resolve().name, merge or not c.lora_rank
    cfg = espl.read_model_config(str(base), lora_rank=c.lora_rank, lora_alpha=c.lora_alpha)
    with espl.explained(f"cannot make {out}.part", "remove it if an export was killed, or choose another OUT"):
        (part := out.with_name(out.name + ".part")).mkdir(parents=True)
    try:
        with espl.explained(f"cannot export {run}"):
            if full:
                lost, serve = write_merged(part, checkpoint, base, cfg), f"DIR --served-model-name {name}"
                what = f"Base model `{c.model}`, {'adapter merged in' if c.lora_rank else 'all weights trained'}.\n" \
                       f"Rounding to its dtype changed the weights by {lost:.2g} of what training did (norms)."
            else:
                write_adapter(part, c, checkpoint, base, cfg)
                rank = max(8, 1 << (c.lora_rank - 1).bit_length())  # vLLM takes powers of two
                serve = f"{c.model} --enable-lora --max-lora-rank {rank} --lora-modules {name}=DIR"
                what = f"A LoRA adapter (PEFT) for the base model `{c.model}`."
            (part / "README.md").write_text(encoding="utf-8", data=CARD.format(
                name=name, iteration=checkpoint.iteration, prompt=s.id, c=c, what=what, scores=score_table(run),
                serve=serve, turn=TURNS[c.prompt_role]))
            (part / "system_prompt.txt").write_text(espl.system_text(task, s.principles), encoding="utf-8")
            shutil.copyfile(run / "population.json", part / "population.json")
            part.replace(out)  # an empty directory gives way
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{what}\niteration {checkpoint.iteration} of {run} with prompt {s.id}, written to {out}"


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 2 for bad input."""
    def stop(message):  # instead of the usage on many lines
        raise espl.UserError(message)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("out", type=lambda x: Path(x).resolve(), help="directory to write, not there yet or empty")
    parser.add_argument("--merge", action="store_true", help="a full model instead of an adapter")
    parser.add_argument("--best", action="store_true", help="the iteration that validation picked instead of the last")
    parser.error = stop
    try:
        print(export(**vars(parser.parse_args(argv))))
        return 0
    except espl.UserError as e:
        print(f"export: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
