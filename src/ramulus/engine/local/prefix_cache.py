"""The prefix cache: which texts have their KV in a slot, so that a fork goes on where its parent ended, or copies from a neighbour."""

from __future__ import annotations

from bisect import bisect_left, insort

from ramulus.engine.local.kv import Slots
from ramulus.engine.local.radix_tree import RadixTree, common

Prefix = tuple[int, ...]


class PrefixCache:
    """The texts whose KV lies at the start of a slot; the tree is given one only when its slot is wanted for something else.

    A slot keeps its texts until it is overwritten, also when its sequence has ended. `slot_of` has those of running sequences' prefixes and of
    ended sequences; nothing is lost when a text is not in it.
    """

    def __init__(self, slots: Slots, tree: RadixTree) -> None:
        self.slots, self.tree = slots, tree
        self.clear()

    def clear(self) -> None:
        """Forget which slot holds which text."""
        self.slot_of: dict[Prefix, int] = {}  # the slot of each text
        self.texts: dict[int, list[Prefix]] = {}  # those of each slot
        self.unsaved: dict[int, Prefix] = {}  # of each slot, the longest text that the tree may not hold
        self._order: list[Prefix] = []  # all of them, sorted when somebody looks for the beginning of one
        self._added: list[Prefix] = []  # since then
        self._stale = 0  # about how many in the order have no slot any more

    @property
    def end(self) -> int:
        """One past the last slot that holds a text."""
        return max(self.texts, default=-1) + 1

    def hold(self, slot: int, text: Prefix) -> None:
        """The slot begins with this text."""
        before = self.slot_of.get(text)
        if before == slot:
            return
        if before is None:
            self._added.append(text)
        self.slot_of[text] = slot
        self.texts.setdefault(slot, []).append(text)

    def keep(self, slot: int, text: Prefix) -> None:
        """The whole text stays in the slot for those that go on from it."""
        self.hold(slot, text)
        self.unsaved[slot] = text

    def find(self, text: Prefix) -> tuple[int, int]:
        """A slot that begins as `text` does, and the length of what they share, the most that there is; (-1, 0) where nothing is."""
        slot = self.slot_of.get(text)
        if slot is not None:
            return slot, len(text)
        if not self.slot_of:
            return -1, 0
        if 2 * self._stale > len(self._order):
            self._order = sorted(set(self._order) & self.slot_of.keys())
            self._stale = 0
        for new in self._added:
            insort(self._order, new)
        self._added = []
        at = bisect_left(self._order, text)  # the longest common beginning is a neighbour's
        near = (self._alive(range(at - 1, -1, -1)), self._alive(range(at, len(self._order))))
        n, best = max([(common(one, text), one) for one in near if one is not None], default=(0, text))
        return (self.slot_of[best], n) if n else (-1, 0)

    def _alive(self, places: range) -> Prefix | None:
        """The first of the order that has a slot."""
        return next((self._order[i] for i in places if self._order[i] in self.slot_of), None)

    def evict(self, slot: int, stays: Prefix | None = None) -> None:
        """The slot will be overwritten, but for the text that `stays`: give the tree what it may not hold."""
        if stays is None or self.unsaved.get(slot) != stays:
            self._save(slot)
        for text in self.texts.pop(slot, ()):
            if text != stays and self.slot_of.get(text) == slot:
                del self.slot_of[text]
                self._stale += 1
        if stays is not None:
            self.texts[slot] = [stays]

    def move(self, source: int, target: int, n: int) -> None:
        """Put the sequence of `source`, of n tokens, into a slot whose texts end here."""
        self.evict(target)
        self.slots.move([(source, target, n)])
        if source in self.unsaved:
            self.unsaved[target] = self.unsaved.pop(source)
        texts = self.texts.pop(source, [])
        for text in texts:
            if self.slot_of.get(text) == source:
                self.slot_of[text] = target
        self.texts[target] = texts

    def rename(self, slots: dict[int, int]) -> None:
        """The slots have other numbers now: those of the keys their values; no other holds a text."""
        self.slot_of = {text: slots[slot] for text, slot in self.slot_of.items()}
        self.texts = {slots[slot]: texts for slot, texts in self.texts.items()}
        self.unsaved = {slots[slot]: text for slot, text in self.unsaved.items()}

    def _save(self, slot: int) -> None:
        text = self.unsaved.pop(slot, None)
        if text is not None:
            self.tree.insert(text, lambda start, stop: self.slots.get(slot, start, stop))
