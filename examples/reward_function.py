"""A reward function of one's own: an answer should be one sentence of at most twenty words.

Added to the reward model's score, with half its weight:

    deepspeed train_ppo.py configs/quickstart.yaml \
        'ppo.rewards=[{adapter: run}, {function: examples.reward_function:brevity, weight: 0.5}]'

More forms, such as batches, columns of the data and time limits: docs/rewards.md.

The module is looked for in the current folder too, which RUN/config.yaml then names. PPO normalises
the sum of all terms, so only differences between answers count, not their level.
"""

import re


def brevity(prompt: str, response: str) -> float:
    """0 for one sentence of 1 to 20 words; -1 for each further sentence, -0.1 for each word more.

    Called once for every answer, with the texts of prompt and answer; must return a finite number.
    """
    sentences = [part for part in re.split(r"[.!?]+", response) if part.strip()]
    if not sentences:
        return -2.0
    return -1.0 * (len(sentences) - 1) - 0.1 * max(0, len(response.split()) - 20)
