"""What becomes of the utility as more is to be forgotten: at once, and one request after another.

The fifth and sixth criterion of Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language
Models", ICLR 2025: scalability and sustainability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from germane.core.evidence import Plot, Score, Series

AT_ONCE, IN_TURN = "at once", "one after another"
_NAMES = {AT_ONCE: "scalability", IN_TURN: "sustainability"}


class Courses:
    """Utilities by the number of requests, for both ways of unlearning them.

    Args:
        count: Requests in all.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._scores: dict[tuple[str, int], list[Score]] = {}

    def add(self, course: str, requests: int, scores: Sequence[Score]) -> None:
        """Utilities after so many requests, in the same order each time, the suites' last."""
        self._scores[course, requests] = list(scores)

    def of(self, course: str, requests: int) -> list[Score]:
        """What `add` was given."""
        return self._scores[course, requests]

    def plots(self) -> list[Plot]:
        """One plot for each measure of utility, with both courses."""
        found = []
        for index, score in enumerate(self.of(AT_ONCE, 1)):
            series = [
                Series(
                    name=course,
                    steps=[float(number) for number in range(1, self.count + 1)],
                    values=[self.of(course, n)[index].value for n in range(1, self.count + 1)],
                )
                for course in _NAMES
            ]
            title = f"{score.metric} as more is to be forgotten"
            found.append(Plot(title=title, x="requests", y=score.metric, series=series))
        return found

    def scores(self) -> Iterator[Score]:
        """The least utility of each course, by the last measure: a suite's, where there is one."""
        for course, name in _NAMES.items():
            last = [self.of(course, number)[-1] for number in range(1, self.count + 1)]
            least = min(last, key=lambda score: score.value)
            yield least.model_copy(update={"metric": f"{name} (least {least.metric})"})
