"""A data format of one's own: columns are named in the config, any other layout is converted.

Columns with other names need no code; `messages.0.content` looks inside:

    sft.data=[{path: faq.csv, format: {prompt: frage, completion: antwort}}]

Any other layout becomes JSON lines in one of the formats of data/samples/README.md. Here, logs of
`Name: text` lines in which the second speaker of each block is the assistant:

    python examples/data_format.py support.log support.jsonl
    chatllama data check mine.yaml 'sft.data=[{path: support.jsonl, format: messages}]'
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def conversations(log: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """One record for each block of lines; blank lines separate blocks."""
    for block in log.strip().split("\n\n"):
        turns = [line.split(": ", maxsplit=1) for line in block.splitlines()]
        roles = {name: "user" if name == turns[0][0] else "assistant" for name, _ in turns}
        yield {"messages": [{"role": roles[name], "content": text} for name, text in turns]}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    rows = conversations(source.read_text(encoding="utf-8"))
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
