"""Control questions: the same question without the audio, or with the audio of another clip."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from models.data.manifest import Example


def control_id(example_id: str, control: str) -> str:
    """The id of a prediction under a control; of the plain question ("") it is the example's own."""
    return f"{example_id}#{control}" if control else example_id


def with_controls(
    examples: Sequence[Example], controls: Iterable[str], *, plain: bool = True
) -> list[tuple[str, Example, Example]]:
    """The triples (control, example that is asked about, example with the audio that is heard), control by control.

    Args:
        plain: whether the questions without a control ("") come first, or are left out.
    """
    asked = []
    for control in ("", *controls) if plain else controls:
        heard = swapped(examples) if control == "swapped_audio" else examples
        asked += [(control, e, h) for e, h in zip(examples, heard, strict=True)]
    return asked


def swapped(examples: Sequence[Example]) -> list[Example]:
    """For each example the next one of its task that has another answer. Its audio takes the place of the example's own.

    An example without such a partner stands for itself: it keeps its own audio and is not a control then.
    """
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    place = {e.id: i for group in by_task.values() for i, e in enumerate(group)}
    result = []
    for example in examples:
        group, at = by_task[example.task], place[example.id]
        others = (group[(at + step) % len(group)] for step in range(1, len(group)))
        result.append(next((o for o in others if o.answer != example.answer and o.audio is not None), example))
    return result
