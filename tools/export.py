"""A run's model for other programs, with its system prompt: a PEFT adapter, or a full model.

    python tools/export.py RUN OUT               # the LoRA adapter, for PEFT or vLLM
    python tools/export.py RUN OUT --merge       # a full model: the adapter merged into its base
    python tools/export.py RUN OUT --step 60     # another checkpoint than validation's pick

OUT also gets system_prompt.txt, the tested prompt as the model reads it, and a README.md. A full
model has its base's files, names and dtypes, so the merged weights are rounded to these; an adapter
is exact. A run with --lora-rank 0 has no adapter and is always written in full. The base model must
be where the run found it. No accelerator is used.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"  # a run may hold all memory of the accelerators
import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import checkpoints_of, pick_step  # noqa: E402
from report import new_parser, run_tool  # noqa: E402

import espl  # noqa: E402

CARD = """# {run}, iteration {iteration}

{what}

Its system prompt is system_prompt.txt, prompt {prompt} of the run. Both were learned together by
E-SPL (arXiv 2602.14697). The base model's licence applies. To serve it, DIR being this directory:

    vllm serve {serve}

The run had the prompt in the {c.prompt_role} turn, and sampled with temperature {c.temperature:g},
top_p {c.top_p:g}, at most {c.max_new_tokens} tokens, and enable_thinking {c.thinking}.
"""


def export(run, out, step, merge):
    """Writes OUT, which appears when it is complete."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise espl.UserError(f"{out} exists and is not an empty directory")
    iteration = pick_step(run, step)
    c = espl.parse_args(["--resume", str(run)])
    weights, population = read_checkpoint(run, iteration)
    s = espl.tested_prompt(SimpleNamespace(config=c, population=population))
    base = Path(espl.find_model(c.model))
    part = out.with_name(out.name + ".part")
    with espl.explained(f"cannot make {part}; remove it if an export was killed"):
        part.mkdir(parents=True)
    try:
        with espl.explained(f"cannot export {run}"):
            if merge or not c.lora_rank:
                write_model(part, base, weights)
                what, serve = f"`{c.model}` with trained weights.", "DIR"
            else:
                write_adapter(part, base, weights, c)
                what = f"A LoRA adapter (PEFT) for `{c.model}`."
                serve = (
                    f"{c.model} --enable-lora --max-lora-rank {c.lora_rank} --lora-modules espl=DIR"
                )
            about = {"run": run.resolve().name, "iteration": iteration, "prompt": s.id}
            card = CARD.format(**about, what=what, serve=serve, c=c)
            (part / "README.md").write_text(card, encoding="utf-8")
            (part / "system_prompt.txt").write_text(prompt_text(c, s), encoding="utf-8")
            part.replace(out)  # an empty directory gives way
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{what}\niteration {iteration} of {run} with prompt {s.id}, written to {out}")


def prompt_text(c, s):
    """A prompt as the model reads it. The task's problems are not needed."""
    own = getattr(espl.task_module(c.task), "PROMPTS", "")
    task = SimpleNamespace(texts=espl.read_texts(own, c.prompts_file))
    return espl.system_text(task, s.principles)


def read_checkpoint(run, iteration):
    """The trained weights as torch has them, {name: float32 [out, in]}, and the population."""
    with checkpoints_of(run) as manager, espl.explained(f"cannot read checkpoint {iteration}"):
        args = ocp.args.Composite(population=ocp.args.JsonRestore())
        entries = manager.restore(iteration, args=args)["population"]
        directory = manager.directory / str(iteration) / "weights"
        reader = ocp.PyTreeCheckpointer()
        tree = {"theta": reader.metadata(directory).item_metadata.tree["theta"]}
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
        theta = reader.restore(directory, args=args)["theta"]
    weights = {}
    for (*path, _), w in jax.tree.leaves_with_path(theta):
        matrix = re.search("kernel|lora", espl.path_name(path))
        weights[espl.tensor_name(path)] = np.ascontiguousarray(w.T if matrix else w)
    return weights, [espl.SystemPrompt(**entry) for entry in entries]


def write_adapter(out, base, weights, c):
    """PEFT's files: adapter_config.json, and lora_A [R, in] and lora_B [out, R] of each module."""
    whole = json.loads((base / "config.json").read_text(encoding="utf-8"))
    inner = "language_model." if "text_config" in whole else ""  # beside a vision tower
    tensors, modules = {}, set()
    for name, w in weights.items():
        module, kind = re.fullmatch(r"(.*)\.lora_([ab])\.weight", name).groups()
        tensors[f"base_model.model.model.{inner}{module}.lora_{kind.upper()}.weight"] = w
        modules.add(module.rpartition(".")[2])
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": c.model,
        "r": c.lora_rank,
        "lora_alpha": espl.LORA_ALPHA,
        "target_modules": sorted(modules),
    }
    if inner:  # a list would match the vision tower's modules, too
        config["target_modules"] = rf".*\.language_model\..*\.({'|'.join(sorted(modules))})"
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_model(out, base, weights):
    """The base's directory with the trained weights in its dtypes; one file is held at a time."""
    unused = set(weights)
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(file, out / file.name)
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="np") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, old in tensors.items():
            used, new = trained(name, old, weights)
            unused.difference_update(used)
            tensors[name] = new
        save_file(tensors, out / file.name, metadata)
    if unused:
        raise ValueError(f"the base model has no {min(unused)}; restore it")


def trained(name, old, weights):
    """The names of the weights that change a tensor of the base model, and its new value."""
    name = re.sub(r"^(model\.|language_model\.)+", "", name)
    if name == "lm_head.weight" and name not in weights:
        name = "embed_tokens.weight"  # tied, and here twice
    a, b = (name.replace(".weight", f".lora_{kind}.weight") for kind in "ab")
    if name in weights:
        used, value = {name}, weights[name]
    elif a in weights:
        used, value = {a, b}, espl.LORA_ALPHA / len(weights[a]) * weights[b] @ weights[a]
    else:
        return set(), old
    if value.shape != old.shape:
        raise ValueError(f"{name} is {old.shape} in the base model, not {value.shape}; restore it")
    new = value if name in weights else old.astype(np.float32) + value
    return used, new.astype(old.dtype)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory, new or empty")
    parser.add_argument("--step", default="best", help="best, latest, or an iteration")
    parser.add_argument("--merge", action="store_true", help="a full model instead of an adapter")
    return run_tool(parser, export, argv)


if __name__ == "__main__":
    sys.exit(main())
