"""Loads a run and answers one question as the base model, after SFT and after PPO.

    python examples/load_and_answer.py runs/quickstart "Write a note to Rosa about the tulips."

Beside each answer: the reward model's score, and the KL to the SFT model in nats per token.
"""

import sys
from pathlib import Path

import torch

from chatllama.generation.sampling import Sampling
from chatllama.inference.chat_model import ChatModel
from chatllama.inference.load import load_run
from chatllama.runs.folder import RunFolder

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, question = sys.argv[1:]
    loaded = load_run(RunFolder(Path(folder)))
    sampling = Sampling(max_new_tokens=48, temperature=0.7)
    model = ChatModel(loaded, sampling, torch.Generator().manual_seed(0))
    for answer in model.compare([{"role": "user", "content": question}]):
        print(f"{answer.role} (score {answer.score}, KL {answer.kl}): {answer.text}")
