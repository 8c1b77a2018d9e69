from typing import Any

from chatllama.reporting.answers import read_answers


def kept(number: int, sft: float, ppo: float) -> dict[str, Any]:
    values = {"gold": {"sft": sft, "ppo": ppo}}
    return {"prompt": f"p{number}", "sft": "s", "ppo": "t"} | values


FOUR = [kept(0, 1.0, 2.0), kept(1, 3.0, 0.5), kept(2, 0.0, 4.0), kept(3, 0.0, 1.0)]


def heads(content: dict[str, Any]) -> dict[str, list[str]]:
    return {sample.prompt: sample.heads for sample in read_answers(content, "sft").first}


def test_best_median_worst_and_lost() -> None:
    found = read_answers({"samples": FOUR}, "sft")
    assert found.judge == "gold score" and found.words == ""
    # By PPO's value: p1 0.5, p3 1, p0 2, p2 4; p1 lost 2.5.
    assert heads({"samples": FOUR}) == {
        "p2": ["Best of 4"],
        "p3": ["Median of 4"],
        "p1": ["Worst of 4", "Lost most against SFT: -2.50"],
    }
    assert [sample.prompt for sample in found.first] == ["p2", "p3", "p1"]
    assert [sample.prompt for sample in found.others] == ["p0"]
    assert found.first[0].answers == [("SFT", "s", 0.0), ("PPO", "t", 4.0)]


def test_all_judged_values_give_the_place() -> None:
    values = {"sft": [1.0, 3.0, 0.0, 0.0, 5.0], "ppo": [2.0, 0.5, 4.0, 1.0, 5.0]}
    content = {"samples": FOUR, "judged": {"by": "gold x", "prompts": "h", "values": values}}
    assert heads(content)["p2"] == ["Best of 4 kept, above 60 % of all 5"]
    words = read_answers(content, "sft").words.strip()
    assert words == (
        "Of all 5 prompts, PPO's answer is better than that of SFT on 3, equal on 1 and worse on 1."
    )


def test_nothing_lost_is_said_and_nothing_is_made_up() -> None:
    found = read_answers({"samples": FOUR[2:]}, "sft")
    assert found.words == "None of the 2 answers kept is worse than that of SFT."
    unjudged = [{"prompt": "p", "ppo": "t"}]
    found = read_answers({"samples": unjudged}, "sft")
    assert found.first == [] and found.words == "" and len(found.others) == 1
    scored = [{"prompt": "p", "base": "b", "ppo": "t", "score": {"base": 1.0, "ppo": 0.0}}]
    found = read_answers({"samples": scored}, "base")
    assert found.judge == "reward score (raw)"
    assert found.first[0].heads[-1] == "Lost most against base: -1.00"
