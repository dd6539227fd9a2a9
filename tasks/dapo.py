"""DAPO-Math-17k -> AIME 2025, a setting of the paper.

    python espl.py --task dapo                      # 256 of its problems, chosen by the seed
    python espl.py --task dapo --train-size 100     # DAPO100

In the paper (DeepSeek-V3.1, DAPO100): base model 48.6, RL 56.3, evolution 57.3, E-SPL 60.6 %.
"""

from mathematics import hub, prepare, reward  # noqa: F401  (espl.py takes them from here)


def problems(config):
    """On the hub each training problem is there a hundred times, between two fixed paragraphs."""
    train, test = hub(config, [], ["yentinglin/aime_2025:train"])
    if not config.train_file:
        import pyarrow.compute
        from datasets import load_dataset

        rows = load_dataset("BytedTsinghua-SIA/DAPO-Math-17k", split="train")
        turns = pyarrow.compute.list_element(rows.data.column("prompt"), 0)
        texts = pyarrow.compute.struct_field(turns, "content").to_pandas()
        for row in rows.select(texts.drop_duplicates().index):
            paragraphs = row["prompt"][0]["content"].split("\n\n")
            answer = row["reward_model"]["ground_truth"]
            train.append({"problem": "\n\n".join(paragraphs[1:-1]), "answer": answer})
    return train, test
