"""How fast sampling and updates are, in tokens a second, also beside transformers and torch.

    python tools/bench.py m                             # random weights in a named shape
    python tools/bench.py m --vs hf                     # transformers.generate, a torch update
    python tools/bench.py DIR --lora-rank 0 --vs hf     # a model's directory; all weights trained
    python tools/bench.py qwen3-4b --dtype bfloat16 --prompts 30 --prompt-tokens 1024 \\
        --new-tokens 4096 --microbatch-tokens 32768 --vs hf

The workload: --samples responses to each of --prompts random prompts of --prompt-tokens tokens,
plus or minus half. One token in 128 ends a response, so lengths are geometric, up to --new-tokens.
Then comes an update on as many rollouts of --prompt-tokens and half of --new-tokens tokens. After
one turn that compiles, the sides alternate for --runs turns; the table shows medians, and the
median of the turns' ratios. An update counts a prompt's tokens once for each response; sampling
does not count them.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pretrain_glyphs import save_weights  # noqa: E402
from report import new_parser, run_tool  # noqa: E402

import espl  # noqa: E402

SHAPES = {  # config.json of models with random weights
    "m": {
        "model_type": "llama",
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_model(directory, shape):
    """A model's directory with random weights, and a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    more = {"tie_word_embeddings": True, "max_position_embeddings": 32768}
    (directory / "config.json").write_text(json.dumps(shape | more))
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    tokenizer.save_pretrained(directory)
    cfg = espl.read_model_config(directory)
    save_weights(directory, nnx.split(espl.Transformer(cfg, nnx.Rngs(0)), nnx.Param)[1])


class Work:
    """What both sides do."""

    def __init__(self, vocabulary, prompts, samples, prompt_tokens, new_tokens):
        rng = np.random.default_rng(0)
        count = 1 + vocabulary // 128
        self.ends = rng.choice(np.arange(4, vocabulary), count, replace=False).tolist()
        self.new_tokens = new_tokens
        self.prompts, self.rollouts = [], []  # to sample from, and to train on
        for _ in range(prompts):
            n = rng.integers(prompt_tokens // 2, prompt_tokens * 3 // 2, endpoint=True)
            self.prompts += [rng.integers(4, vocabulary, n).tolist()] * samples
            prompt = rng.integers(4, vocabulary, prompt_tokens).tolist()
            for _ in range(samples):
                tokens = rng.integers(4, vocabulary, new_tokens // 2).tolist()
                y = espl.Rollout(prompt, tokens, [-10.0] * len(tokens), advantage=rng.normal())
                self.rollouts.append(y)
        self.trained = len(self.rollouts) * (prompt_tokens + new_tokens // 2)


class Ours:
    """espl.py on the workload. Both methods return how many tokens they sampled, or trained on."""

    def __init__(self, policy, work, microbatch_tokens):
        self.policy, self.work = policy, work
        policy.stop_ids = tuple(work.ends)
        optimizer = optax.adam(4e-5, b1=0.9, b2=0.95, eps=1e-8)
        state = optax.apply_if_finite(optimizer, 2**30)
        self.trainer = espl.Trainer(
            policy, state, state.init(policy.theta), max_tokens=microbatch_tokens
        )
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.live_arrays())
        policy.cache_tokens = espl.cache_tokens(policy.cfg, policy.mesh, held)

    def rollouts(self, turn):
        rollouts = [espl.Rollout(prompt) for prompt in self.work.prompts]
        sampling = espl.Sampling(1.0, 1.0, self.work.new_tokens, (0, turn))
        espl.generate(self.policy, self.policy.theta, rollouts, sampling)
        return espl.count_sampled(rollouts)

    def update(self, turn):
        espl.rl_update(self.trainer, self.work.rollouts, len(self.work.rollouts))
        return self.work.trained


class Theirs:
    """transformers and torch (with peft, if there is an adapter) on the same workload."""

    def __init__(self, directory, dtype, lora_rank, work, microbatch_tokens):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.work, self.max_tokens = torch, work, microbatch_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(self.device)
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(r=lora_rank, lora_alpha=espl.LORA_ALPHA, target_modules=MODULES)
            self.model = get_peft_model(self.model, adapter)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=4e-5, betas=(0.9, 0.95))

    def rollouts(self, turn):
        self.torch.manual_seed(turn)
        T = max(map(len, self.work.prompts))
        padded = [[0] * (T - len(p)) + p for p in self.work.prompts]
        ids = self.torch.tensor(padded, device=self.device)
        with self.torch.inference_mode():
            out = self.model.eval().generate(
                input_ids=ids,
                attention_mask=(ids > 0).long(),
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=self.work.new_tokens,
                eos_token_id=self.work.ends,
                pad_token_id=0,
            )
        return int((out[:, T:] > 0).sum())

    def update(self, turn):
        self.model.train()
        waiting = self.work.rollouts
        while waiting:
            n = len(waiting[0].prompt)
            size = max(1, self.max_tokens // (n + len(waiting[0].tokens)))
            some, waiting = waiting[:size], waiting[size:]
            x = self.torch.tensor([y.prompt + y.tokens for y in some], device=self.device)
            advantage = self.torch.tensor([[y.advantage] for y in some], device=self.device)
            logits = self.model(x).logits[:, n - 1 : -1].float()
            logp = self.torch.log_softmax(logits, -1).gather(-1, x[:, n:, None])[..., 0]
            objective = self.torch.exp(logp - logp.detach()) * advantage
            (-objective.sum() / len(self.work.rollouts)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        logp.detach()[0, 0].item()  # waits for the device
        return self.work.trained


def speed(work, turn):
    """Tokens a second of a turn."""
    start = time.perf_counter()
    return work(turn) / (time.perf_counter() - start)


def bench(model, lora_rank, dtype, max_rows, microbatch_tokens, runs, vs, **workload):
    """Prints the table."""
    with tempfile.TemporaryDirectory() as scratch:
        if model in SHAPES:
            write_model(Path(scratch), SHAPES[model])
        directory = scratch if model in SHAPES else espl.find_model(model)
        flags = {"dtype": dtype, "lora_rank": lora_rank, "max_rows": max_rows}
        policy, _ = espl.load_policy(espl.Config(model=directory, **flags))
        work = Work(policy.cfg.vocab_size, **workload)
        sides = [Ours(policy, work, microbatch_tokens)]
        if vs:
            with espl.explained("--vs hf needs torch and peft"):
                sides.append(Theirs(directory, dtype, lora_rank, work, microbatch_tokens))
    print(f"{model}, {dtype}, LoRA rank {lora_rank}, on {jax.default_backend()}\n")
    print("| tokens/s | espl | transformers, torch | ratio |\n| --- | --- | --- | --- |")
    for name in ("rollouts", "update"):
        turns = []
        for turn in range(runs + 1):
            turns.append([speed(getattr(side, name), turn) for side in sides])
        speeds = np.array(turns[1:])
        cells = [f"{x:.3g}" for x in np.median(speeds, 0)]
        if vs:
            cells.append(f"{np.median(speeds[:, 0] / speeds[:, 1]):.3g}")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("model", help=f"{', '.join(SHAPES)}, a directory, or a hub's name")
    parser.add_argument("--lora-rank", type=int, default=32, help="0: all weights")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--max-rows", type=int, default=0)
    parser.add_argument("--microbatch-tokens", type=int, default=4500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vs", choices=("hf",), help="beside transformers and torch")
    return run_tool(parser, bench, argv)


if __name__ == "__main__":
    sys.exit(main())
