"""What a setting is: a default, a doc line and its bounds, all three in its field.

    steps: int = key(500, "Iterations: rollouts, then updates.", low=0, basic=True)

A section is a frozen dataclass of such fields that checks them as soon as it is made. What relates
several settings stands in the section's `relations`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
# Of a value and the key that it was given for; raises a ConfigError.
Check = Callable[[Any, str], None]


class ConfigError(ValueError):
    """One line: where it was said (file:line or override), which key, what is wrong."""

    for_user = True

    def __init__(self, problem: str, key: str = "", where: str = ""):
        self.problem, self.key, self.where = problem, key, where
        said = ": ".join(part for part in (where, key, problem) if part)
        super().__init__(" ".join(said.split()))


def require(holds: bool, key: str, got: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"is {shortened(got)!r}; want {wanted}", shortened(key))


def shortened(value: Any, longest: int = 100) -> Any:
    """A text or a number that fits into a message; anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return shortened(f"a whole number of about {int(value.bit_length() * 0.30103)} digits")
    if isinstance(value, str) and len(value) > longest:
        return f"{value[: longest - 1]}…"
    return value


def key(
    default: T,
    doc: str,
    *checks: Check,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    want: str = "",
    basic: bool = False,
    result: bool = True,
) -> T:
    """A setting of a section.

    low, high: the least and the greatest value; above, below: the same without the end itself. In
    a mapping they bound every value. want: how a message calls them, where the numbers alone say
    too little. basic: most people who train something look at it. result: a change of it changes
    what comes out of a run, and not only its speed, its place, or what is kept.
    """
    bounds = ""
    if any(bound is not None for bound in (low, above, high, below)):
        checks = (*checks, _bounds(low, above, high, below, want))
        bounds = want or _in_words(low, above, high, below)
    metadata = {"doc": doc, "checks": checks, "bounds": bounds, "basic": basic, "result": result}
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that belong together; `at` is the section's key in a configuration."""

    at: ClassVar[str] = ""

    def __init_subclass__(cls, at: str = "") -> None:
        cls.at = at or cls.at  # what is under a section stands at its key

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            for check in each.metadata["checks"]:
                check(getattr(self, each.name), self._key(each.name))
        self.relations()

    @classmethod
    def kind_of(cls, data: Mapping[str, Any]) -> type[Section]:
        """The class that these data make: this one, or one of those under it."""
        return cls

    def relations(self) -> None:
        """Raises a ConfigError where settings that are fine alone do not go together."""

    def require(self, holds: bool, name: str, wanted: str) -> None:
        require(holds, self._key(name), _got(attrgetter(name)(self)), wanted)

    def _key(self, name: str) -> str:
        return f"{self.at}.{name}" if self.at else name


# Checks beside the bounds, for `key`.


def among(allowed: Sequence[str]) -> Check:
    """Each name of a list, or of a mapping, is one of these."""

    def check(value: Any, key: str) -> None:
        for at, name in _names(value, key):
            require(name in allowed, at, name, choices(name, allowed))

    return check


def spelled(pattern: str, wanted: str) -> Check:
    """The text, or each name of a mapping, matches this from end to end."""

    def check(value: Any, key: str) -> None:
        for at, name in _names(value, key):
            require(re.fullmatch(pattern, name) is not None, at, name, wanted)

    return check


def filled(wanted: str) -> Check:
    """A text, list or mapping that is not empty."""
    return such_that(bool, wanted)


def such_that(holds: Callable[[Any], bool], wanted: str) -> Check:
    def check(value: Any, key: str) -> None:
        require(holds(value), key, _got(value), wanted)

    return check


def _bounds(
    low: float | None, above: float | None, high: float | None, below: float | None, want: str
) -> Check:
    def check(value: Any, key: str) -> None:
        for at, number in _values(value, key):
            inside = (
                (low is None or number >= low)
                and (above is None or number > above)
                and (high is None or number <= high)
                and (below is None or number < below)
            )
            require(inside, at, number, want or _in_words(low, above, high, below))

    return check


def _in_words(
    low: float | None, above: float | None, high: float | None, below: float | None
) -> str:
    if high is None and below is None:
        return f"{low} or more" if low is not None else f"more than {above}"
    if low is not None:
        return f"{low} to {high}" if high is not None else f"[{low}, {below})"
    return f"({above}, {high}]" if high is not None else f"more than {above} and less than {below}"


def _got(value: Any) -> Any:
    """As a YAML file spells it: a list, not a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _values(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of a number, of each value of a mapping."""
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", each) for name, each in value.items())
    else:
        yield key, value


def _names(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, name) of a text, of each in a list, of each name of a mapping."""
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", name) for name in value)
    else:
        yield from ((key, each) for each in (value if isinstance(value, tuple) else (value,)))


def choices(value: Any, allowed: Sequence[str]) -> str:
    return f"one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
