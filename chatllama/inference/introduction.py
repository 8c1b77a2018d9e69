"""What a run says of itself before the first question: what it knows, and prompts to try.

`chat` prints it and the page of `serve` shows it; no model is opened.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from chatllama.runs.folder import RunFolder
from chatllama.runtime.command_line import tell
from chatllama.runtime.json_files import MORE_KEYS, read_json

if TYPE_CHECKING:  # importing it takes a second
    from chatllama.config.schema import Config

MOST_PROMPTS, MOST_CHARACTERS = 4, 300


class _Sample(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    prompt: str


class _Evaluation(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    samples: list[_Sample]


def example_prompts(run: RunFolder) -> list[str]:
    """Up to four short prompts, spread over the held-out set; none before the run's evaluation.

    A damaged evaluation.json is named on stderr: it is no reason not to talk.
    """
    if not run.evaluation.is_file():
        return []
    try:
        samples = read_json(run.evaluation, _Evaluation)["samples"]
    except ValueError as error:
        tell(f"no example prompts: {error}")
        return []
    distinct = dict.fromkeys(sample["prompt"].strip() for sample in samples)
    prompts = [text for text in distinct if 0 < len(text) <= MOST_CHARACTERS]
    return prompts[:: -(-len(prompts) // MOST_PROMPTS) or 1]


def what_it_knows(cfg: "Config") -> str | None:
    """A sentence on the bounds of a model whose backbone the run made; None for other models."""
    made = cfg.backbone.from_scratch
    if made is None:
        return None
    files = ", ".join(Path(source.path).name for source in made.data)
    return (
        f"A tiny model, made from nothing but {files}: it knows the world of that text and no "
        "other, and a message at a time best: ask what its prompts ask."
    )
