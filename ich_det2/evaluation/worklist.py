"""A simulated reading worklist: how much sooner bleeding exams are read if a model orders it.

Arbabshirani et al. 2018 (npj Digital Medicine 1:9) put routine head CTs that their network called
positive before the others, and report the time to diagnosis. What their text leaves open is how
exams arrive and how long they are read: here they arrive as a Poisson process, and reading times
are exponential.

Shape glossary: P patients of the predictions, N exams of a simulated worklist, D worklists.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def reading_ends(
    arrivals: ArrayLike, durations: ArrayLike, priorities: ArrayLike, readers: int = 1
) -> np.ndarray:
    """When each exam has been read.

    A reader who is free takes the waiting exam of the highest priority, of equal ones that which
    came first, and is not interrupted.

    Args:
        arrivals: (N,), minutes.
        durations: (N,), minutes a reader takes, >= 0.
        priorities: (N,).
        readers: how many read at a time, >= 1.

    Returns:
        float64 (N,), minutes.

    Raises:
        ValueError: if there is no reader, or a number is not finite or a duration below 0.
    """
    arrivals, durations, priorities = (
        np.asarray(x, dtype=float) for x in (arrivals, durations, priorities)
    )
    if readers < 1:
        raise ValueError(f"readers is {readers}, expected at least 1.")
    if not all(np.isfinite(x).all() for x in (arrivals, durations, priorities)):
        raise ValueError(
            "arrivals, durations and priorities: expected finite numbers; a patient without a score"
            " has no place in the order."
        )
    if (durations < 0).any():
        raise ValueError(f"a reading takes {durations.min():g} minutes, expected 0 or more.")
    order = np.argsort(arrivals, kind="stable").tolist()
    ends, free, waiting, following = np.zeros(len(order)), [-np.inf] * readers, [], 0
    for _ in order:
        reader = heapq.heappop(free)
        # With nobody waiting the reader waits for the next exam.
        now = reader if waiting else max(reader, arrivals[order[following]])
        while following < len(order) and arrivals[order[following]] <= now:
            exam = order[following]
            heapq.heappush(waiting, (-priorities[exam], following, exam))
            following += 1
        *_, exam = heapq.heappop(waiting)
        ends[exam] = now + durations[exam]
        heapq.heappush(free, ends[exam])
    return ends


@dataclass(frozen=True)
class Worklist:
    """How exams come and are read.

    Attributes:
        exams: N, of one worklist.
        per_hour: how many come in an hour, on average.
        minutes: that reading one takes, on average.
        readers: how many read at a time.

    Raises:
        ValueError: if a number is out of its range, or exams come faster than they can be read.
    """

    exams: int = 200
    per_hour: float = 10.0
    minutes: float = 5.0
    readers: int = 1

    def __post_init__(self):
        if self.exams < 1 or self.readers < 1 or not (self.per_hour > 0 and self.minutes > 0):
            raise ValueError(
                f"a worklist of {self.exams} exams, {self.per_hour:g} an hour, {self.minutes:g}"
                f" minutes each, by {self.readers} reader(s): expected numbers above 0."
            )
        if self.load >= 1:
            raise ValueError(
                f"{self.per_hour:g} exams an hour of {self.minutes:g} minutes are {self.load:.2f}"
                f" of what {self.readers} reader(s) can read, expected less than 1: the worklist"
                " would grow for ever."
            )

    @property
    def load(self) -> float:
        """The share of their time that the readers read."""
        return self.per_hour * self.minutes / 60 / self.readers


def simulate(
    labels: ArrayLike,
    priorities: ArrayLike,
    worklist: Worklist,
    *,
    n_worklists: int = 1000,
    prevalence: float | None = None,
    average: Callable[[np.ndarray], float] = np.mean,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Times from arrival to diagnosis, in order of arrival and in that of priorities.

    Each worklist has patients of its own, drawn with replacement from the bleeding and the others,
    and draws its exams from them, so that the spread is that over patients too. Both orders see the
    same exams, arrivals and reading times.

    Args:
        labels: 1 hemorrhage, 0 none, sized (P,).
        priorities: sized (P,), such as scores, or 1 of those called positive.
        worklist: how exams come and are read.
        n_worklists: D.
        prevalence: share of bleeding exams, in (0, 1); None: that of the labels.
        average: of the exams of a worklist; ``np.median`` as that publication.
        seed: of everything.

    Returns:
        "bleeding, arrival", "bleeding, model", "others, arrival", "others, model": float64 (D,),
        the average minutes to diagnosis of such exams in each worklist; NaN without any.

    Raises:
        ValueError: if the labels are of one class, or a number is out of its range.
    """
    positive, priorities = np.asarray(labels).astype(bool), np.asarray(priorities, dtype=float)
    if positive.all() or not positive.any():
        raise ValueError(
            f"{positive.sum()} of {len(positive)} patients bleed, expected some that do and some"
            " that do not."
        )
    if n_worklists < 1:
        raise ValueError(f"{n_worklists} worklists, expected at least one.")
    share = float(positive.mean()) if prevalence is None else prevalence
    if not 0 < share < 1:
        raise ValueError(f"prevalence is {share}, expected between 0 and 1.")
    rng = np.random.default_rng(seed)
    kinds = [np.flatnonzero(~positive), np.flatnonzero(positive)]
    groups = {"bleeding": True, "others": False}
    times: dict[str, list] = {f"{g}, {o}": [] for g in groups for o in ("arrival", "model")}
    for _ in range(n_worklists):
        # Patients of either kind, of which each exam is one.
        own = [rng.choice(kind, len(kind)) for kind in kinds]
        bleeds = rng.random(worklist.exams) < share
        drawn = np.where(bleeds, *(rng.choice(kind, worklist.exams) for kind in own[::-1]))
        arrivals = np.cumsum(rng.exponential(60 / worklist.per_hour, worklist.exams))
        durations = rng.exponential(worklist.minutes, worklist.exams)
        for order, of_order in (("arrival", np.zeros(len(drawn))), ("model", priorities[drawn])):
            ends = reading_ends(arrivals, durations, of_order, worklist.readers)
            for group, kind in groups.items():
                chosen = (ends - arrivals)[bleeds == kind]
                times[f"{group}, {order}"].append(average(chosen) if len(chosen) else np.nan)
    return {name: np.array(values) for name, values in times.items()}
