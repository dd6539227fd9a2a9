# ======================================================================================================================
# tools/export.py: the truth is what transformers and peft make of the files
# ======================================================================================================================


@pytest.fixture(scope="module")
def exporting():
    return load_tool("export")


def write_trained(directory, base, rank):
    """A run directory as after iteration 1, with weights that moved; returns policy and weights."""
    policy = load(base, lora_rank=rank, lora_alpha=7.0)
    theta = perturbed(policy.theta) if rank else jax.tree.map(lambda w: 0.9 * w + 0.01, policy.theta)
    run = SimpleNamespace(directory=directory, policy=dataclasses.replace(policy, theta=theta), evaluations=[],
                          trainer=SimpleNamespace(opt_state={"mu": theta}), population=[])
    run.population.append(espl.SystemPrompt(0, ["Check it."]))
    with espl.checkpoint_manager(run, "checkpoints", keep=1) as manager:
        espl.save_checkpoint(run, manager, 1)
    argv = dict(train_file="x", test_file="y", model=base, lora_rank=rank, lora_alpha=7.0)
    write_run(directory, run.population, **{
        "config.json": json.dumps(vars(espl.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in argv.items()]))),
        "metrics.jsonl": json.dumps(dict(iteration=0, prompt=0, val=0.5, test=0.25)) + "\n"})
    return policy, theta


def export(exporting, *argv):
    assert exporting.main([str(a) for a in argv]) == 0
    return argv[1]


def loaded(model, directory):
    return type(model).from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ["llama2", "llama3.2", "gemma3", "gemma3-vision", "qwen3"])
def test_exported_adapters_and_merged_models_are_ours(name, exporting, hf_model, torch, tmp_path):
    directory, model, base = hf_model(name)
    policy, theta = write_trained(tmp_path, directory, 3)
    expected = logits(policy, theta)
    assert np.abs(expected - base).max() > 0.1 * np.abs(base).max()
    merged = export(exporting, tmp_path, tmp_path / "merged", "--merge")
    assert_close(reference(torch, loaded(model, merged)), expected, 1e-4)
    adapter = export(exporting, tmp_path, tmp_path / "adapter")
    peft = pytest.importorskip("peft", reason="pip install peft")
    adapted = peft.PeftModel.from_pretrained(loaded(model, directory), adapter)
    assert_close(reference(torch, adapted), expected, 1e-4)


@pytest.mark.parametrize("name", ["llama2", "gemma3-vision"])
def test_exported_weights_are_ours_where_all_were_trained(name, exporting, hf_model, torch, tmp_path):
    directory, model, _ = hf_model(name)
    policy, theta = write_trained(tmp_path, directory, 0)
    out = export(exporting, tmp_path, tmp_path / "out")
    assert_close(reference(torch, loaded(model, out)), logits(policy, theta), 1e-4)
    assert_same_weights(load(out), dataclasses.replace(policy, theta=theta))


@pytest.mark.parametrize("rank", [0, 3])
def test_a_merged_model_has_its_bases_files_and_dtype(rank, exporting, hf_model, torch, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    model = copy.deepcopy(hf_model("llama3.2")[1]).bfloat16()
    model.save_pretrained(base := tmp_path / "base", max_shard_size="20KB")
    save_file({"lm_head.weight": model.lm_head.weight.clone()}, base / "x.safetensors")  # some have it twice
    (tmp_path / "run").mkdir()
    policy, theta = write_trained(tmp_path / "run", base, rank)
    out = export(exporting, tmp_path / "run", tmp_path / "out", "--merge")
    names = {p.name for p in base.iterdir()}
    assert {p.name for p in out.iterdir()} == names | {"README.md", "population.json", "system_prompt.txt"}
    read = lambda d: {n: t for file in d.glob("*.safetensors") for n, t in load_file(file).items()}
    before, after = read(base), read(out)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == ({n for n in before if "_proj.weight" in n} if rank else before.keys())
    weights = nnx.to_pure_dict(theta)["layers"]["up_proj"]
    kernel = before[n := "model.layers.1.mlp.up_proj.weight"].float().numpy()
    kernel = kernel + 7 / 3 * (weights["lora_a"][1] @ weights["lora_b"][1]).T if rank else weights["kernel"][1].T
    assert torch.allclose(torch.tensor(np.array(kernel)), after[n].float(), rtol=2**-8)
    assert "Check it." in (out / "system_prompt.txt").read_text()
    said = float(re.search(r"changed the weights by (\S+) of what training did", capsys.readouterr().out)[1])
    assert 1e-4 < said < 1e-1


def test_an_exported_run_goes_on(run_of, world, exporting, tmp_path):
    """A run on eight devices, exported by a process with one; what it wrote is a base model for another run."""
    run, out = run_of("espl"), tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, ROOT / "tools" / "export.py", run.directory, out, "--merge"], text=True,
                          capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0 and not done.stderr and "iteration 3" in done.stdout, done.stderr
    tokens = TOKENS % 64
    assert_close(logits(load(out, run.policy.mesh), None, tokens), logits(run.policy, None, tokens), 1e-4)
    tested = espl.tested_prompt(run)
    assert (out / "system_prompt.txt").read_text() == espl.system_text(run.task, tested.principles)
    assert (out / "population.json").read_bytes() == (run.directory / "population.json").read_bytes()
    card, lines = (out / "README.md").read_text(), read_lines(run, "metrics.jsonl")
    picked = max(lines[::3], key=lambda m: m["val"])
    for name, m in ("base model", lines[0]), ("final", lines[3]), ("picked by validation", picked):
        assert f"| {name} | {m['iteration']} | {m['prompt']} | {m['val']:.3f} | {m['test']:.3f} |" in card
    assert f", prompt {tested.id} of" in card and str(world / "train.jsonl") in card and "--seed 0" in card
    again = play(flags(world, tmp_path / "again", model=out, mode="rl", iterations=1, num_rollouts=2, test_samples=1))
    assert [m["iteration"] for m in read_lines(again, "metrics.jsonl")] == [0, 1]


def test_the_best_checkpoint_is_the_one_that_validation_picked(run_of, exporting, tmp_path):
    run = run_of("espl")
    files = lambda: {p: p.stat().st_mtime_ns for p in run.directory.rglob("*")}
    before = files()
    export(exporting, run.directory, tmp_path / "out", "--best")
    assert files() == before  # a run that is still going is not disturbed
    picked = espl.summary(run.evaluations)["picked by validation"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# espl, iteration {picked['iteration']}\n" in card and f", prompt {picked['prompt']} of" in card
    principles = run.population[picked["prompt"]].principles
    assert (tmp_path / "out" / "system_prompt.txt").read_text() == espl.system_text(run.task, principles)
    b = [t for n, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_B" in n]
    assert all(t.any() == (picked["iteration"] > 0) for t in b)


BAD_EXPORTS = {  # name: (what is done to the copy of a run, argv, message)
    "no run": (lambda d: (d / "config.json").unlink(), [], "there is no .*config.json; give the directory of a run"),
    "no best": (lambda d: shutil.rmtree(d / "best"), ["--best"], "there is no .*best; .*leave out --best"),
    "full": (lambda d: write_jsonl(d.parent / "out", ["x"]), [], "exists and is not an empty directory; choose"),
    "part": (lambda d: (d.parent / "out.part").mkdir(), [], "cannot make .*out.part .*remove it if"),
    "damaged": (lambda d: shutil.rmtree(d / "checkpoints" / "3" / "weights"), [], "cannot read the checkpoints"),
    "no base": (lambda d: model_of(d, model="/nowhere"), ["--merge"], "--model /nowhere: no such directory"),
    "no logs": (lambda d: (d / "population.json").unlink(), ["--merge"], "cannot export"),
    "another base": (lambda d: model_of(d, model=str(SHIPPED)), ["--merge"], "in the run; restore the base"),
    "flag": (lambda d: None, ["--beste"], "unrecognized arguments"),
}


def model_of(d, **changes):
    (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | changes))


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_exports_are_one_line_and_leave_nothing(name, run_of, exporting, tmp_path, capsys):
    damage, argv, message = BAD_EXPORTS[name]
    shutil.copytree(run_of("espl").directory, tmp_path / "run")
    damage(tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert exporting.main([str(tmp_path / "run"), str(tmp_path / "out"), *argv]) == 2
    assert re.fullmatch(f"export: error: .*{message}.*\n", capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before
