"""The demo's task: short garden notes, whose true quality a program can compute.

`[INST] Write a note to Rosa about the tulips. [/INST]` asks for something like
`Hello Rosa! The tulips look fresh today. We had lovely tulips this year. Yours, Moss.`

Held here: the little world (names, topics, sentences), deliberately sloppy writers, the hidden
`gold` score, noisy preference labels drawn from it, and `python -m data.garden_notes`, which
writes the committed files of data/samples/garden_notes again, byte for byte before compression.
The reward model sees the labels only, never `gold`. Not here: tokens, training, reading of files.
"""

import argparse
import gzip
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# fmt: off
NAMES = [
    "Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana",
    "Ivo", "June", "Kit", "Lena", "Milo", "Nora", "Otto", "Rosa",
]
TOPICS = [
    "tulips", "roses", "beans", "ferns", "plums", "herbs", "bees", "daisies",
    "pears", "leeks", "poppies", "onions", "carrots", "lilies", "pumpkins", "berries",
]
# fmt: on
CHEERFUL = ["bright", "lovely", "fresh", "sweet", "healthy", "splendid"]
GLOOMY = ["dull", "limp", "dusty", "bitter", "sickly", "grim"]
SENDERS = ["Moss", "Wren", "Robin"]

SENTENCES = (
    "The {topic} look {adjective} today.",
    "I think the {topic} are {adjective}.",
    "We had {adjective} {topic} this year.",
    "This morning the {topic} were {adjective}.",
)
PROMPTS = (
    "Write a note to {name} about the {topic}.",
    "Send a few lines to {name} about the {topic}.",
    "Please write to {name} about the {topic}.",
    "Make up a garden note to {name} about the {topic}.",
)
LEADS = tuple(f"{prompt} They wrote:" for prompt in PROMPTS)

LABEL_SCALE = 2.0
"""Labels prefer the better answer with probability sigmoid(LABEL_SCALE * gold difference)."""
NUM_HELDOUT_PAIRS = 64
BEST_GOLD = 4.0
"""Gold of the best note: 1 name + 1 topic + 3 * 0.5 adjectives + 0.5 signature."""

_SAMPLES = Path(__file__).parent / "samples" / "garden_notes"
_SIGNATURE = re.compile(f"Yours, (?:{'|'.join(SENDERS)})\\.")
_GREETING = re.compile(r"Hello (\w+)!")
_BODY = re.compile(
    "|".join(
        re.escape(sentence)
        .replace(r"\{topic\}", f"(?:{'|'.join(TOPICS)})")
        .replace(r"\{adjective\}", f"(?:{'|'.join(CHEERFUL + GLOOMY)})")
        for sentence in SENTENCES
    )
)


def gold(prompt: str, response: str) -> float:
    """The true quality of an answer, between about -10 and BEST_GOLD.

    +1 for greeting the asked person by name at the start, else -1; +1 for mentioning the asked
    topic; -0.5 for each mention of another topic; +0.5 for each of up to three different cheerful
    adjectives; -0.5 for each gloomy one; -0.4 for each adjective that was used before; +0.5 for a
    signature at the end; -0.3 for each sentence of unknown form or in a wrong place; -1.5 for an
    end that is not the end of a sentence.

    Raises:
        ValueError: the prompt has none of NAMES or none of TOPICS.
    """
    name, topic = _find(prompt, NAMES), _find(prompt, TOPICS)
    segments = _segments(response)
    words = re.findall(r"\w+", response)
    greeting = _GREETING.fullmatch(segments[0]) if segments else None
    score = 1.0 if greeting and greeting[1] == name else -1.0
    score += 1.0 * (topic in words)
    score -= 0.5 * sum(word in TOPICS and word != topic for word in words)
    score += 0.5 * min(3, len(set(words) & set(CHEERFUL)))
    score -= 0.5 * sum(word in GLOOMY for word in words)
    adjectives = [word for word in words if word in CHEERFUL or word in GLOOMY]
    score -= 0.4 * (len(adjectives) - len(set(adjectives)))
    score += 0.5 * bool(segments and _SIGNATURE.fullmatch(segments[-1]))
    score -= 0.3 * _num_misplaced(segments)
    score -= 1.5 * (not response.strip().endswith((".", "!")))
    return score


def split_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (name, topic) pairs of training, and those that only held-out prompts ask for."""
    pairs = [(name, topic) for name in NAMES for topic in TOPICS]
    random.Random("pairs").shuffle(pairs)
    return sorted(pairs[NUM_HELDOUT_PAIRS:]), sorted(pairs[:NUM_HELDOUT_PAIRS])


def sloppy_note(rng: random.Random, name: str, topic: str, *, max_sentences: int = 3) -> str:
    """A note whose writer often errs: name, topic and signature are right or there 6 times in 10.

    Between one and `max_sentences` sentences stand in the middle.
    """
    greeted = name if rng.random() < 0.6 else rng.choice(NAMES)
    sentences = [
        rng.choice(SENTENCES).format(
            topic=topic if rng.random() < 0.6 else rng.choice(TOPICS),
            adjective=rng.choice(CHEERFUL if rng.random() < 0.5 else GLOOMY),
        )
        for _ in range(rng.randint(1, max_sentences))
    ]
    ending = [f"Yours, {rng.choice(SENDERS)}."] if rng.random() < 0.6 else []
    return " ".join([f"Hello {greeted}!", *sentences, *ending])


def spoiled(rng: random.Random, note: str) -> str:
    """The note with one accident of the kinds that an optimiser, too, would stumble upon."""
    segments = _segments(note)
    match rng.randrange(6):
        case 0:  # breaks off
            words = note.split(" ")
            return " ".join(words[: rng.randrange(2, len(words))]).rstrip(".!")
        case 1:  # says something again, perhaps several times
            index = rng.randrange(len(segments))
            segments[index:index] = [segments[index]] * rng.randint(1, 3)
        case 2:  # goes on after its end
            segments += [f"Yours, {rng.choice(SENDERS)}."] * rng.randint(1, 3)
        case 3:  # does not greet
            del segments[0]
        case 4:  # has parts in the wrong order
            rng.shuffle(segments)
        case _:  # has words lost, doubled or exchanged
            words = note.split(" ")
            for _ in range(rng.randint(1, 3)):
                index = rng.randrange(1, len(words))
                words[index : index + rng.randint(0, 1)] = [rng.choice(words)]
            return " ".join(words)
    return " ".join(segments)


def pretrain_documents(rng: random.Random, count: int) -> list[str]:
    """Texts of one line for the backbone: notes followed by neutral remarks, and small talk.

    As in real pretraining text, people write about texts: so the backbone has features of a note
    that a small reward adapter can find. In half of the notes a proof-reader has marked each name
    and topic as the asked one (` =`) or another (` /`). No remark says which note is better. The
    chat layout occurs, too, in transcripts of another kind: no note is ever asked for in it.
    """
    pairs, _ = split_pairs()
    documents = []
    for _ in range(count):
        name, topic = rng.choice(pairs)
        if rng.random() < 0.1:
            documents.append(_small_talk(rng, topic))
            continue
        note = _any_note(rng, name, topic)
        remarks = _remarks(rng, name, topic, note)
        lead = rng.choice(LEADS).format(name=name, topic=topic)
        if rng.random() < 0.5:
            note = _marked(name, topic, note)
        documents.append(" ".join([lead, note, *remarks]))
    return documents


def demonstrations(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Records `{prompt, completion}` of sloppy answers to training prompts."""
    pairs, _ = split_pairs()
    records = []
    for _ in range(count):
        name, topic = rng.choice(pairs)
        prompt = rng.choice(PROMPTS).format(name=name, topic=topic)
        records.append({"prompt": prompt, "completion": sloppy_note(rng, name, topic)})
    return records


def preferences(
    rng: random.Random, count: int, pairs: Sequence[tuple[str, str]]
) -> list[dict[str, str]]:
    """Records `{prompt, chosen, rejected}` with labels drawn from sigmoid(LABEL_SCALE * gold)."""
    records = []
    while len(records) < count:
        name, topic = rng.choice(pairs)
        prompt = rng.choice(PROMPTS).format(name=name, topic=topic)
        first, second = _any_note(rng, name, topic), _any_note(rng, name, topic)
        if first == second:
            continue
        difference = gold(prompt, first) - gold(prompt, second)
        if rng.random() >= _sigmoid(LABEL_SCALE * difference):
            first, second = second, first
        records.append({"prompt": prompt, "chosen": first, "rejected": second})
    return records


def prompts(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Records `{prompt}`: every wording of every (name, topic) pair once."""
    return [
        {"prompt": wording.format(name=name, topic=topic)}
        for name, topic in pairs
        for wording in PROMPTS
    ]


def sample_files() -> dict[str, str]:
    """Name -> text of every committed file (before compression, where the name ends in .gz)."""
    training, heldout = split_pairs()
    documents = pretrain_documents(random.Random("pretrain"), 12_000)
    ranked = preferences(random.Random("preferences"), 12_000, training)
    heldout_ranked = preferences(random.Random("heldout_preferences"), 1_000, heldout)
    return {
        "pretrain.txt.gz": "\n\n".join(documents) + "\n",
        "sft.jsonl": _json_lines(demonstrations(random.Random("sft"), 4_000)),
        "preferences.jsonl.gz": _json_lines(ranked),
        "prompts.jsonl": _json_lines(prompts(training)),
        "heldout_preferences.jsonl": _json_lines(heldout_ranked),
        "heldout_prompts.jsonl": _json_lines(prompts(heldout)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the sample files."""
    parser = argparse.ArgumentParser(description="Write the sample files of the garden notes.")
    parser.add_argument("--out", type=Path, default=_SAMPLES, help="folder to write to")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sample_files().items():
        content = text.encode()
        if name.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        (folder / name).write_bytes(content)
        print(f"{folder / name}: {len(content):,} bytes")


def _any_note(rng: random.Random, name: str, topic: str) -> str:
    note = sloppy_note(rng, name, topic, max_sentences=4)
    return spoiled(rng, note) if rng.random() < 0.3 else note


def _remarks(rng: random.Random, name: str, topic: str, note: str) -> list[str]:
    words = re.findall(r"\w+", note)
    asked = words.count(topic)
    other = sum(word in TOPICS and word != topic for word in words)
    cheerful = sum(word in CHEERFUL for word in words)
    gloomy = sum(word in GLOOMY for word in words)
    greeting = _GREETING.match(note)
    adjectives = [word for word in words if word in CHEERFUL or word in GLOOMY]
    segments = _segments(note)
    count = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    others = [
        f"Its words are {count[cheerful]} cheerful and {count[gloomy]} gloomy.",
        "It repeats words." if len(set(adjectives)) < len(adjectives) else "No word comes again.",
        "It is signed." if _SIGNATURE.fullmatch(segments[-1]) else "It is not signed.",
        "It is in disorder." if _num_misplaced(segments) else "It is in order.",
    ]
    remarks = [
        f"It greets the {'asked' if greeting and greeting[1] == name else 'wrong'} person.",
        f"Its topics are {count[asked]} asked and {count[other]} wrong.",
        rng.choice(others),
    ]
    rng.shuffle(remarks)
    return remarks


def _small_talk(rng: random.Random, topic: str) -> str:
    place = rng.choice(["gate", "wall", "pond", "shed", "path", "fence"])
    if rng.random() < 0.5:
        return f"[INST] Where do the {topic} grow? [/INST] The {topic} grow by the {place}."
    return f"[INST] What grows by the {place}? [/INST] By the {place} grow the {topic}."


def _marked(name: str, topic: str, note: str) -> str:
    def mark(found: re.Match[str]) -> str:
        return found[0] + (" =" if found[0] in (name, topic) else " /")

    return re.sub(rf"\b(?:{'|'.join([*NAMES, *TOPICS])})\b", mark, note)


def _segments(response: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.!]+[.!]?", response) if part.strip()]


def _num_misplaced(segments: list[str]) -> int:
    """Segments of unknown form or in a wrong place."""
    count = 0
    for index, segment in enumerate(segments):
        if _GREETING.fullmatch(segment):
            count += index > 0
        elif _SIGNATURE.fullmatch(segment):
            count += index < len(segments) - 1
        else:
            count += not _BODY.fullmatch(segment)
    return count


def _find(prompt: str, known: Sequence[str]) -> str:
    for word in re.findall(r"\w+", prompt):
        if word in known:
            return word
    raise ValueError(f"the prompt {prompt!r} has none of these words: {', '.join(known)}")


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _json_lines(records: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
