"""DAPO-Math-17k -> AIME 2025, one of the paper's settings, with the mathematical reward.

    python espl.py --task dapo                      # the first 256 problems after the seeded shuffle
    python espl.py --task dapo --train-size 100     # DAPO100
"""


def problems(config) -> tuple[list[dict], list[dict]]:
    """The training problems, without what stands before and after each; on the hub each is there a hundred times."""
    import pyarrow.compute
    from datasets import load_dataset
    rows = load_dataset("BytedTsinghua-SIA/DAPO-Math-17k", split="train")
    turns = pyarrow.compute.list_element(rows.data.column("prompt"), 0)
    firsts = pyarrow.compute.struct_field(turns, "content").to_pandas().drop_duplicates().index  # not row by row
    train = [{"problem": "\n\n".join(row["prompt"][0]["content"].split("\n\n")[1:-1]),
              "answer": row["reward_model"]["ground_truth"]} for row in rows.select(firsts)]
    return train, [dict(row) for row in load_dataset("yentinglin/aime_2025", split="train")]
