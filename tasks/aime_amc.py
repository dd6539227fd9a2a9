"""AIME 2022-2024 and AMC -> BeyondAIME, a setting of the paper."""

from mathematics import hub, prepare, reward  # noqa: F401  (espl.py takes them from here)


def problems(config):
    """173 training problems and 100 test problems, from the hub."""
    train = ["AI-MO/aimo-validation-aime:train", "AI-MO/aimo-validation-amc:train"]
    return hub(config, train, ["ByteDance-Seed/BeyondAIME:test"])
