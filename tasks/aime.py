"""AIME 2022-2024 -> BeyondAIME, the paper's main setting, with espl.py's defaults.

In the paper (DeepSeek-V3.1): base model 36.5, RL 38.8, evolution of prompts 40.0, E-SPL 45.1 %.
"""

from mathematics import hub, prepare, reward  # noqa: F401  (espl.py takes them from here)


def problems(config):
    """90 training problems and 100 test problems, from the hub."""
    return hub(config, ["AI-MO/aimo-validation-aime:train"], ["ByteDance-Seed/BeyondAIME:test"])
