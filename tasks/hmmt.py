"""HMMT February 2023-2025 -> HMMT November 2025, a setting of the paper.

In the paper (DeepSeek-V3.1): base model 39.3, RL 50.0, evolution of prompts 48.6, E-SPL 52.7 %.
"""

from mathematics import hub, prepare, reward  # noqa: F401  (espl.py takes them from here)


def problems(config):
    """90 training problems and 30 test problems, from the hub."""
    train = [f"MathArena/hmmt_feb_{year}:train" for year in (2023, 2024, 2025)]
    return hub(config, train, ["MathArena/hmmt_nov_2025:train"])
