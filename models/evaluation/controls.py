"""Control questions: the same question without the audio, or with the audio of another clip."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from models.data.answers import normalize
from models.data.manifest import Example


def control_id(example_id: str, control: str) -> str:
    """The id of a prediction under a control; of the plain question ("") it is the example's own."""
    return f"{example_id}#{control}" if control else example_id


def with_controls(
    examples: Sequence[Example], controls: Iterable[str], *, plain: bool = True
) -> list[tuple[str, Example, Example]]:
    """The triples (control, example that is asked about, example with the audio that is heard), control by control.

    "swapped_audio" leaves out the examples that `swapped` finds no partner for.

    Args:
        plain: whether the questions without a control ("") come first, or are left out.
    """
    asked: list[tuple[str, Example, Example]] = []
    for control in ("", *controls) if plain else controls:
        heard = swapped(examples) if control == "swapped_audio" else examples
        asked += [(control, e, h) for e, h in zip(examples, heard, strict=True) if h is not None]
    return asked


def swapped(examples: Sequence[Example]) -> list[Example | None]:
    """For each example the next one of its task that has the same question, another clip and another answer; None without one.

    The audio of this partner takes the place of the example's own. With choices, the example's answer is one of the partner's
    choices too: if the partner was not offered it, that answer may be right for its clip as well.
    """
    groups: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        if example.audio is not None:
            groups[example.task, example.question].append(example)
    partners: dict[str, Example] = {}
    for group in groups.values():
        said = [e.answer if e.choices else normalize(e.answer or "") for e in group]
        if len(set(said)) < 2:
            continue
        for at, example in enumerate(group):
            for other in (*range(at + 1, len(group)), *range(at)):
                partner = group[other]
                offered = not example.choices or example.answer in partner.choices
                if offered and said[other] != said[at] and partner.clips != example.clips:
                    partners[example.id] = partner
                    break
    return [partners.get(example.id) for example in examples]
