"""The search for numbers in modules' attributes that have to follow a cut, such as a number of heads.

All scale with the share of neurons that stays; which of them a forward uses is found by trial: a set of them is right
if the cut model then equals the one with silenced neurons. From a set that is right, those are dropped without which it
still is (delta debugging, Zeller and Hildebrandt 2002).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from torch import Tensor, nn

from lightning_neurons.dependency.groups import Attribute, Group, Part
from lightning_neurons.dependency.sizes import numbers_of
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import handler_of
from lightning_neurons.pruning.structure.preflight import Preflight
from lightning_neurons.pruning.surgery.surgery import cuts_of

_OF_KNOWN_TYPES = ("torch.nn.", "lightning_neurons.")
FORWARDS = 64
"""The most sets that are tried for one group."""

Units = Mapping[str, Sequence[int]]


def mended(preflight: Preflight, groups: Sequence[Group], units: Units, widths: Mapping[str, int]) -> dict[str, Group]:
    """Find the attributes that let groups be cut whose cut is wrong without.

    Args:
        preflight: Tries the cuts.
        groups: Groups whose cut is wrong.
        units: By root, the units to remove in the trial.
        widths: Neurons by layer.

    Returns:
        By root, the groups that can be cut, with their attributes. Of groups of the same form, as those of the blocks
        of a transformer, only the first is searched if the others need the same.
    """
    found: dict[str, Group] = {}
    first: dict[object, Group | None] = {}
    copies: list[tuple[Group, Group]] = []
    for group in groups:
        form = _form(group)
        if form not in first:
            answer = attributes_of(preflight, [group], units, widths)
            first[form] = None if answer is None else answer[0]
            found |= {} if answer is None else {group.root: answer[0]}
        elif (pattern := first[form]) is not None:
            copies.append((group, replace(group, attributes=_translated(pattern, group))))
    wrong = preflight.failing([copy for _, copy in copies], units)
    for group, copy in copies:
        answer = [copy] if copy.root not in wrong else attributes_of(preflight, [group], units, widths)
        found |= {} if answer is None else {group.root: answer[0]}
    return found


def tried(
    preflight: Preflight, groups: Sequence[Group], units: Units, widths: Mapping[str, int], fixed: Collection[str] = ()
) -> tuple[dict[str, Group], dict[str, str]]:
    """Try groups together, or where that fails, of those of the same kind one first, to know what others need.

    Args:
        preflight: Tries the cuts.
        groups: The groups.
        units: By root, the units to remove in the trial.
        widths: Neurons by layer.
        fixed: Roots of groups for which no attributes are searched.

    Returns:
        By root, the groups that can be cut, but only with attributes, with these; and by root, the reasons why others
        cannot be cut.
    """
    reason = preflight.difference(cuts_of(groups, units)) if groups else None
    if reason is None:
        return {}, {}
    kinds: dict[object, list[Group]] = {}
    for group in groups:
        kinds.setdefault(_kind(group), []).append(group)
    firsts = [first for first, *_ in kinds.values()]
    with preflight.on_one_sample():  # to tell what is wrong; what is right is tried on all of them
        wrong = preflight.failing(firsts, units, reason if len(firsts) == len(groups) else None)
        suspects = [group for same in kinds.values() if same[0].root in wrong for group in same]
        able = mended(preflight, [group for group in suspects if group.root not in fixed], units, widths)
        refused = {root: why for root, why in wrong.items() if root not in able}
        for group in suspects:  # very probably wrong as well, so that halving would not help
            if group.root not in wrong and group.root not in able:
                refused |= preflight.failing([group], units)
    fails = preflight.failing([able.get(g.root, g) for g in groups if g.root not in refused], units)
    able = {root: group for root, group in able.items() if root not in fails}
    able |= mended(preflight, [g for g in groups if g.root in fails and g.root not in fixed], units, widths)
    return able, refused | {root: why for root, why in fails.items() if root not in able}


def attributes_of(
    preflight: Preflight, groups: Sequence[Group], units: Units, widths: Mapping[str, int]
) -> list[Group] | None:
    """Find the attributes with which groups can be cut together.

    Args:
        preflight: Tries the cut.
        groups: Groups whose cut is wrong without.
        units: By root, the units to remove.
        widths: Neurons by layer.

    Returns:
        The same groups with attributes, none of which can be left out; None if no set of them makes the cut right.
    """
    candidates = _candidates(groups, units, widths, modules_by_name(preflight.twin))
    names = preflight.names
    candidates = [one for one in candidates if names is None or one.attribute.name.rpartition(".")[2] in names]
    if not candidates:
        return None
    try:
        trial = _Trial(preflight, groups, units, preflight.expected(cuts_of(groups, units)))
    except Exception:  # noqa: BLE001 (a norm that does not run on fewer neurons: no attribute mends that)
        return None
    right = next((chosen for chosen in _sets(candidates) if trial.is_right(chosen)), None)
    if right is None:
        return None
    needed = trial.reduced(right)
    return trial.with_attributes(needed) if needed else None


@dataclass(frozen=True)
class _Candidate:
    """A number that may have to follow.

    Attributes:
        root: The group to which it would belong.
        attribute: The number, and what it follows.
        rank: How plausible it is, the lower the more: 0 for the number of units, 1 for a width, 2 for a multiple of
            either, 3 for a divisor; 4 more in an object of settings, which few modules read in their forward.
    """

    root: str
    attribute: Attribute
    rank: int

    @property
    def slot(self) -> tuple[str, str, int | None]:
        """The place of the number."""
        return self.attribute.path, self.attribute.name, self.attribute.place


@dataclass
class _Trial:
    preflight: Preflight
    groups: Sequence[Group]
    units: Units
    expected: Sequence[Tensor]
    left: int = FORWARDS
    verdicts: dict[frozenset[_Candidate], bool] = field(default_factory=dict)

    def with_attributes(self, chosen: Iterable[_Candidate]) -> list[Group]:
        """Return the groups with some candidates as their attributes."""
        by_root: dict[str, tuple[Attribute, ...]] = {}
        for one in chosen:
            by_root[one.root] = (*by_root.get(one.root, ()), one.attribute)
        own = {group.root: group.attributes for group in self.groups}
        return [replace(g, attributes=(*own[g.root], *by_root.get(g.root, ()))) for g in self.groups]

    def is_right(self, chosen: Sequence[_Candidate]) -> bool:
        """Return whether the cut is right if just these follow; False once too many sets have been tried."""
        key = frozenset(chosen)
        if key not in self.verdicts:
            if self.left <= 0:
                return False
            self.left -= 1
            cuts = cuts_of(self.with_attributes(chosen), self.units)
            self.verdicts[key] = self.preflight.difference(cuts, self.expected) is None
        return self.verdicts[key]

    def reduced(self, right: Sequence[_Candidate]) -> list[_Candidate]:
        """Return what is left of a set that is right when everything is dropped that need not follow."""
        kept = list(right)
        settings = [one for one in kept if one.rank > 3]
        for dropped in (settings, *([one] for one in sorted(kept, key=lambda one: -one.rank))):
            rest = [one for one in kept if one not in dropped]
            if len(rest) < len(kept) and self.is_right(rest):
                kept = rest
        return kept


def _sets(candidates: Sequence[_Candidate]) -> Iterator[list[_Candidate]]:
    """Yield sets of candidates to try, the most plausible first; none has two that share a place."""
    best: dict[object, _Candidate] = {}
    for one in sorted(candidates, key=lambda one: one.rank):
        best.setdefault(one.slot, one)
    main = list(best.values())
    yield main
    for rank in range(7):
        yield [one for one in main if one.rank <= rank]
        yield [one for one in main if one.rank == rank]
    for dropped in reversed(main):
        yield [one for one in main if one is not dropped]
    for count in (1, 2):
        for chosen in combinations(sorted(candidates, key=lambda one: one.rank), count):
            if len({one.slot for one in chosen}) == count:
                yield list(chosen)
    for pair in combinations(reversed(main), 2):
        yield [one for one in main if one not in pair]


def _candidates(
    groups: Sequence[Group], units: Units, widths: Mapping[str, int], modules: Mapping[str, nn.Module]
) -> list[_Candidate]:
    """Return the numbers that are a width, a number of units, or a multiple or divisor of one, and would stay whole."""
    gone: dict[str, set[int]] = {}
    for group in groups:
        for layer, removed in group.neurons(units[group.root]).items():
            gone.setdefault(layer, set()).update(removed)
    found: dict[tuple[object, object], _Candidate] = {}
    for group in groups:
        measures = _measures(group, widths)
        for path in _near(group, modules):
            for name, place, value in _free_numbers(modules[path]):
                for rank, layer, neurons in _follows(value, measures, group.size):
                    left = len(set(neurons) - gone.get(layer, set()))
                    if value * left % len(neurons) == 0 and 0 < left < len(neurons):
                        one = _Candidate(
                            group.root, Attribute(path, name, place, layer, neurons), rank + 4 * ("." in name)
                        )
                        share = left / len(neurons)
                        found.setdefault((one.slot, share), one)
    return list(found.values())


def _measures(group: Group, widths: Mapping[str, int]) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return what a number may follow: its size, and the layer and its neurons; the number of units last."""
    found: list[tuple[int, str, tuple[int, ...]]] = []
    for layer, units in group.layers.items():
        own = tuple(sorted(neuron for unit in units for neuron in unit))
        found += [(widths[layer], layer, tuple(range(widths[layer]))), (len(own), layer, own)]
    root = group.layers[group.root]
    for part in group.parts:  # some may have only a share of the units, as behind a split
        own = tuple(sorted(neuron for unit, there in zip(root, part.indices, strict=True) if there for neuron in unit))
        found += [(len(own), group.root, own)] if own else []
    first = tuple(unit[0] for unit in root)
    return [*dict.fromkeys(found), (group.size, group.root, first)]


def _follows(
    value: int, measures: Sequence[tuple[int, str, tuple[int, ...]]], size: int
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Yield what a number may follow, with its rank; the most plausible first."""
    by_rank = (
        (m for m in reversed(measures) if m[0] == value == size),
        (m for m in measures if m[0] == value),
        (m for m in measures if value % m[0] == 0),
        (m for m in reversed(measures) if m[0] % value == 0),
    )
    for rank, fitting in enumerate(by_rank):
        for _, layer, neurons in fitting:
            yield rank, layer, neurons


def _near(group: Group, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules whose attributes may follow: those with parts of a group, around them, or without weights."""
    owners = [_owner(part) for part in group.parts]
    split = [owner.split(".") if owner else [] for owner in owners]
    shared = 0
    while all(len(names) > shared for names in split) and len({names[shared] for names in split}) == 1:
        shared += 1
    if len(set(owners)) == 1:
        shared = max(shared - 1, 0)
    around = {".".join(names[:count]) for names in split for count in range(shared, len(names) + 1)}
    top = ".".join(split[0][:shared])
    inside = [path for path in modules if not top or path.startswith(f"{top}.")]
    bare = {path for path in inside if not any(True for _ in modules[path].parameters())}
    return [path for path in modules if path in around | bare]


def _owner(part: Part) -> str:
    return part.path.rpartition(".")[0] if part.role == "holds" else part.path


def _free_numbers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield numbers of a module of at least 2, but for those that its record says, and those of torch's own layers."""
    handler = handler_of(module)
    if handler is not None and handler.sizes and type(module).__module__.startswith(_OF_KNOWN_TYPES):
        return  # the others are no widths, but sizes of windows
    for name, place, value in numbers_of(module):
        if value > 1 and (handler is None or name not in handler.sizes):
            yield name, place, value


def _kind(group: Group) -> tuple[object, ...]:
    """Return what groups of blocks of the same class have in common."""
    parts = ((_masked(part.path), part.role, part.axis) for part in _in_order(group))
    return (*parts, *map(_masked, group.layers))


def _form(group: Group) -> object:
    """Return what groups of blocks of the same class and size have in common."""
    return _kind(group), group.size, tuple(part.indices for part in _in_order(group))


def _masked(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _in_order(group: Group) -> list[Part]:
    return sorted(group.parts, key=lambda part: (_masked(part.path), part.role, part.axis or 0))


def _translated(pattern: Group, group: Group) -> tuple[Attribute, ...]:
    """Return the attributes of a group for another one of the same form."""
    there: dict[str, str] = {"": ""}
    pairs = [(_owner(a), _owner(b)) for a, b in zip(_in_order(pattern), _in_order(group), strict=True)]
    for here, other in (*pairs, *zip(pattern.layers, group.layers, strict=True)):
        names, others = here.split("."), other.split(".")
        there |= {".".join(names[:n]): ".".join(others[:n]) for n in range(1, len(names) + 1)}

    def path(of: str) -> str:
        inner: list[str] = []
        while of not in there:
            of, _, last = of.rpartition(".")
            inner.insert(0, last)
        return ".".join(filter(None, (there[of], *inner)))

    return tuple(replace(a, path=path(a.path), layer=path(a.layer)) for a in pattern.attributes)
