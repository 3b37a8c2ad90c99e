"""One key of a recipe: its type, bounds, choices, stages and defaults, and if it may change."""

from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cache
from typing import Any, get_origin

from hfsft.errors import quoted
from hfsft.recipe.upstream import Field

STAGES = ("base", "mid", "sft")

# the value that lets a stage's plan choose
AUTO = "auto"

# the default of a key without one: it is required, or upstream's default holds
UNSET = object()

# may a key differ between the run that was interrupted and the one that resumes it?
FIXED = "no"
FREE = "yes"
SAME = "yes, if it is the same model"  # its files are compared, wherever they lie
ROUNDED = "yes, to rounding"  # a step's sum is grouped differently: its last digits may change

# the documentation lists no more choices than this; there are 41 optimizers
MOST_CHOICES = 12


@dataclass(frozen=True)
class Key(Field):
    """One key: everything that checking, defaults, resuming and the documentation need to know.

    A key of transformers, trl or peft whose annotation is empty keeps upstream's type and choices.
    """

    annotation: str = ""
    _: KW_ONLY
    help: str  # one line of docs/recipes.md
    stages: tuple[str, ...] = STAGES  # whose sections take it
    # What a stage's section starts from. It is written into the run's copy of the recipe, and so
    # is compared on resume.
    defaults: dict[str, Any] = field(default_factory=dict)
    # What holds where neither recipe nor `defaults` set the key. In a stage it stays out of the
    # run's copy: a new key with a default then stops no older run from resuming.
    default: Any = UNSET
    low: float | None = None
    above: float | None = None  # an exclusive lower bound
    high: float | None = None
    share: bool = False  # below 1 a share, from 1 on a whole number
    auto: bool = False  # `auto` lets the stage's plan choose the value
    added: tuple[str, ...] = ()  # choices beside upstream's
    null: bool = True  # False: null in `annotation` stands for "not this stage's", and is refused
    on_resume: str = FIXED

    def check(self, value: Any, raw: str | None = None) -> Any:
        """Return `value` as this key takes it.

        Args:
            value: as parsed from YAML.
            raw: the scalar as written in the file.

        Raises:
            ValueError: with the part of an error message that follows the key's name.
        """
        if self.auto and raw == AUTO:
            return AUTO
        checked = super().check(value, raw)
        if checked == "":
            raise ValueError("must not be empty")
        if isinstance(checked, (int, float)) and not isinstance(checked, bool):
            self._check_bounds(checked, quoted(raw or str(checked)).strip("'"))
        return checked

    def _check_bounds(self, value: float, shown: str) -> None:
        if self.high is not None and value > self.high:
            raise ValueError(f"{shown} is not possible: it must be at most {self.high:,}")
        if self.low is not None and value < self.low:
            raise ValueError(f"{shown} is not possible: it must be at least {self.low:,}")
        if self.above is not None and value <= self.above:
            raise ValueError(f"{shown} is not possible: it must be above {self.above:,}")
        if self.share and value > 1 and value != int(value):
            raise ValueError(
                f"{shown} is not possible: below 1 it is a share, from 1 on a whole number"
            )

    def typed_by(self, upstream: Field) -> "Key":
        """This key with upstream's type and choices, unless it declares its own."""
        if self.annotation:
            return self
        choices = upstream.choices + self.added
        return replace(self, annotation=upstream.annotation, choices=choices)

    def default_in(self, stage: str) -> Any:
        """The value in a stage whose recipe does not set the key; `UNSET` if there is none."""
        return self.defaults.get(stage, self.default)

    def takes(self) -> str:
        """What the key takes, for the documentation: "a whole number, 1 to 1,024"."""
        if len(self.choices) > MOST_CHOICES:
            text = " or ".join(
                ["one of transformers' choices", *(f"`{one}`" for one in self.added)]
            )
        elif self.choices:
            words = [f"`{choice}`" for choice in self.choices]
            text = ", ".join(words + ["null"] * ("None" in self.kinds))
        else:
            text = self.expected()
        return (
            text + self._range() + "; below 1 a share" * self.share + f"; or `{AUTO}`" * self.auto
        )

    def _range(self) -> str:
        """The bounds for the documentation: ", 1 to 1,024"; empty without any."""
        low = "" if self.low is None else _short(self.low)
        low = low if self.above is None else f"above {_short(self.above)}"
        high = "" if self.high is None else f"to {_short(self.high)}"
        return f", {low} {high}".rstrip() if low or high else ""


def _short(bound: float) -> str:
    """A bound as a reader takes it in: 2^31 instead of 2,147,483,648."""
    power = int(bound).bit_length() - 1
    return f"2^{power}" if power >= 16 and bound == 2**power else f"{bound:,}"


def key(help: str, *, default: Any = UNSET, choices: tuple[str, ...] = (), **rest: Any) -> Any:
    """A dataclass field that is a key of a recipe; its type is the key's, unless `rest` has one.

    Args:
        help: one line of documentation.
        default: the field's default.
        choices: the values it may have, where it is text.
        rest: as `Key` takes them.
    """
    metadata = {"key": Key(choices=choices, help=help, default=default, **rest)}
    if default is UNSET:
        return field(metadata=metadata)
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def declared_keys(declared: type) -> dict[str, Key]:
    """The keys that the fields of a dataclass declare with `key`, by name and in order."""
    found = {}
    for item in fields(declared):
        if (one := item.metadata.get("key")) is not None:
            annotation = one.annotation or _annotation(item.type, one.null)
            found[item.name] = replace(one, annotation=annotation)
    return found


def _annotation(declared: Any, null: bool) -> str:
    """A field's type as upstream's source would have it: `int | None`, `list`."""
    if isinstance(declared, type):
        return (get_origin(declared) or declared).__name__
    return str(declared) if null else str(declared).replace(" | None", "")


def overlaid(upstream: dict[str, Field], declared: dict[str, Key]) -> dict[str, Field]:
    """Upstream's fields, those that hfsft declares as well with its bounds and defaults."""
    return {
        name: declared[name].typed_by(known) if name in declared else known
        for name, known in upstream.items()
    }
