"""Rules: other options for some layers, by their names.

``PATTERN: bits=4 rank=1 group=32 branch=qera:32 method=rtn``, or ``PATTERN: skip``. The first rule that matches a layer
holds; what it does not name is as for all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rankbook.calibration.model.patterns import check_patterns, matches
from rankbook.calibration.option import near

if TYPE_CHECKING:
    from rankbook.calibration.driver.options import QuantizeOptions

SKIP = "skip"
KEYS = ("bits", "rank", "group", "branch", "method")
"""What a rule may set; a branch is ``KIND`` or ``KIND:RANK``."""
_OF_A_METHOD: Mapping[str, Any] = {
    "rank": None,
    "weight_format": None,
    "clip_search": None,
    "level_dtype": None,
    "method_options": {},
}
"""Options that mean something to one method: another one starts without them."""


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: As it was given.
        pattern: Whole names, with * and ?.
        settings: Values by key; empty for one that skips.
    """

    text: str
    pattern: str
    settings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule.

        Raises:
            ValueError: It has no pattern, or sets something unknown, nothing, or one thing twice.
        """
        pattern, colon, rest = text.partition(":")
        words = rest.split()
        if not colon or not pattern.strip() or not words:
            raise ValueError(f"rule {text!r} is not 'PATTERN: bits=4 ...'; it sets {', '.join(KEYS)}, or says {SKIP}")
        if SKIP in words:
            if len(words) > 1:
                raise ValueError(f"rule {text!r} skips layers and sets something for them; it can only do one")
            return cls(text, pattern.strip(), {})
        settings: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not value or key not in KEYS or key in settings:
                why = "is set twice" if key in settings else f"is not one of {', '.join(KEYS)}, as KEY=VALUE, or {SKIP}"
                raise ValueError(f"rule {text!r}: {word!r} {why}{near(key, [*KEYS, SKIP])}")
            settings[key] = value
        return cls(text, pattern.strip(), settings)

    def applied(self, options: QuantizeOptions) -> QuantizeOptions:
        """Return the options of the layers that it matches.

        Raises:
            ValueError: They do not allow a value, or a method that trains blocks would have to train some layers alone.
        """
        try:
            changes = self._changes(options)
            found = replace(options, rules=(), **changes)
        except ValueError as error:
            raise ValueError(f"rule {self.text!r}: {error}") from error
        if found.method != options.method and found.trains():
            raise ValueError(
                f"rule {self.text!r}: method {found.method!r} trains whole blocks, not some of their layers; give it as"
                " --method, and rules for the others"
            )
        return found

    def _changes(self, options: QuantizeOptions) -> dict[str, Any]:
        from rankbook.calibration.driver.options import group_size

        changes: dict[str, Any] = {}
        if self.settings.get("method", options.method) != options.method:
            changes |= {**_OF_A_METHOD, "method": self.settings["method"]}
        for key in ("bits", "rank"):
            if key in self.settings:
                changes[key] = _number(key, self.settings[key])
        if "group" in self.settings:
            changes["group_size"] = group_size(self.settings["group"])
        if "branch" in self.settings:
            kind, colon, rank = self.settings["branch"].partition(":")
            changes["error_branch"] = kind
            changes |= {"error_rank": _number("branch", rank)} if colon else {}
        return changes


@dataclass(frozen=True)
class Rules:
    """The rules of a run, the first that matches holds.

    Attributes:
        rules: In their order.
        options: Of layers that none matches, and of each rule those of its layers; a rule that skips has none.
    """

    rules: tuple[Rule, ...]
    options: Mapping[str, QuantizeOptions]

    @classmethod
    def of(cls, options: QuantizeOptions) -> Rules:
        """Read the rules of options.

        Raises:
            ValueError: One of them cannot be read, or sets what the other options do not allow.
        """
        rules = tuple(map(Rule.parse, options.rules))
        texts = [rule.text for rule in rules]
        if double := {text for text in texts if texts.count(text) > 1}:
            raise ValueError(f"rule {min(double)!r} is given twice")
        if options.target_bits is not None and any(rule.settings for rule in rules):
            raise ValueError("target_bits chooses what each layer gets, and so do rules; give one, or rules that skip")
        return cls(rules, {rule.text: rule.applied(options) for rule in rules if rule.settings})

    def match(self, name: str) -> Rule | None:
        """Return the rule that holds for a layer, or None."""
        return next((rule for rule in self.rules if matches(name, [rule.pattern])), None)

    def skips(self, name: str) -> bool:
        """Return whether a layer is left alone."""
        rule = self.match(name)
        return rule is not None and not rule.settings

    def for_layer(self, name: str, options: QuantizeOptions) -> QuantizeOptions:
        """Return the options of a layer, ``options`` where no rule matches."""
        rule = self.match(name)
        return options if rule is None else self.options.get(rule.text, options)

    def counted(self, names: list[str]) -> dict[str, int]:
        """Return for how many layers each rule holds.

        Raises:
            ValueError: A pattern matches none, or only layers that rules before it match.
        """
        check_patterns("rule", [rule.pattern for rule in self.rules], names)
        held = Counter(rule.text for name in names if (rule := self.match(name)) is not None)
        for rule in self.rules:
            if not held[rule.text]:
                raise ValueError(f"rule {rule.text!r} holds for no layer: those that it matches have a rule before it")
        return dict(held)


def _number(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{key} is {text!r}; give a number")
    return int(text)
