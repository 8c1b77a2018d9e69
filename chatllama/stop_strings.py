"""Where a stop string ends an answer, wherever the borders between tokens fall. No tensors."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def cut_at_stop(ids: Sequence[int], stops: Sequence[str], decode: Decode) -> tuple[int, str] | None:
    """Tokens sampled until a stop string was complete, and the text before it; None without one.

    The answer ends at the first token after which the text so far holds any of the strings, at
    the place where the earliest of these begins; so it does not matter whether the string is a
    token, a part of one, or spread over several.

    Args:
        ids: of the answer, without the token that ends it.
        stops: none of them empty.
        decode: text of ids.
    """
    if not stops:
        return None
    text = decode(ids)
    # The text of the first tokens begins the whole text, unless bytes in it make no character.
    if REPLACEMENT not in text and not any(stop in text for stop in stops):
        return None
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count])
        places = [place for place in map(text.find, stops) if place >= 0]
        if places:
            return count, text[: min(places)]
    return None
