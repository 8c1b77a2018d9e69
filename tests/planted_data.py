"""Clean records, and records with one defect each that the data check must find."""

from typing import Any

TOPICS = [
    "the river in spring", "an old garden wall", "bread from rye flour", "a lamp that flickers",
    "the night train north", "seven wooden chairs", "snow on a red roof", "a letter without stamp",
    "the market at noon", "two quiet children", "a map of the harbour", "the bell of a school",
]  # fmt: skip
SFT = [
    {"messages": [{"role": "user", "content": f"Tell me about {topic}."},
                  {"role": "assistant", "content": f"Gladly: {topic[::-1]} is {len(topic)}."}]}
    for topic in TOPICS
]  # fmt: skip
PAIRS = [
    {"prompt": f"What is {topic}?", "chosen": f"It is {topic[::-1]}.", "rejected": topic[:7]}
    for topic in TOPICS
]
PROMPTS = [{"prompt": f"Describe {topic} to a friend."} for topic in TOPICS]


def ask(question: str, answer: str = "Yes, of course.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


LONG = "the garden wall is old and the river runs slowly past it towards the market " * 40
PLANTED_SFT: list[tuple[str, str, Any]] = [
    ("malformed", "error", '{"messages": [}'),
    ("malformed", "error", '{"messages": []} extra'),
    ("malformed", "error", {"messages": "text"}),
    ("malformed", "error", {"massages": []}),
    ("malformed", "error", {"messages": [{"role": "user", "content": 7}]}),
    ("empty_side", "error", ask("What now?", "  ")),
    ("empty_side", "error", ask(" ", "An answer to nothing.")),
    ("empty_side", "error", {"messages": []}),
    ("role_order", "error", {"messages": [SFT[0]["messages"][0]] * 2}),
    ("role_order", "error", {"messages": SFT[0]["messages"][::-1]}),
    ("role_order", "error", {"messages": [{"role": "narrator", "content": "Once."}]}),
    ("duplicate", "warning", SFT[3]),
    ("near_duplicate", "warning",
     ask("Tell me about seven wooden chairs", "Gladly, sriahc nedoow neves is 19!")),
    ("truncated", "warning", ask("Write at length.", LONG)),
    ("broken_text", "warning", ask("What is caf\ufffd?", "A place for coffee.")),
    ("control_characters", "warning", ask("What is \x07?", "It rings a bell.")),
    ("template_marks", "warning", ask("[INST] Who are you? [/INST]", "A model.")),
    ("template_marks", "warning", ask("Who wrote this?", "Nobody.</s>")),
    ("leak", "error", ask("Tell me: WHO found the harbour?!", "Somebody.")),
    ("contamination", "warning",
     ask("Say, why does the moon look so large near the horizon at night?", "It does not.")),
]  # fmt: skip
PLANTED_PAIRS: list[tuple[str, str, Any]] = [
    ("chosen_equals_rejected", "error", {"prompt": "q", "chosen": "a", "rejected": "a "}),
    ("chosen_equals_rejected", "error", {"prompt": "q", "chosen": [{"role": "assistant",
     "content": "a"}], "rejected": "a"}),
    ("empty_side", "error", {"prompt": "q", "chosen": "a", "rejected": ""}),
    ("different_prompts", "error", {"prompt": "q", "rejected": "b",
     "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}),
    ("contradiction", "warning", {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["rejected"],
     "rejected": PAIRS[0]["chosen"]}),
    ("truncated", "warning", {"prompt": "Write.", "chosen": LONG, "rejected": "No."}),
]  # fmt: skip
