"""Which texts have their KV in a slot, so that a fork goes on where its parent ended, or copies from a neighbour."""

from __future__ import annotations

from ramify.engine.kv import Slots
from ramify.engine.radix import Trie

Text = tuple[int, ...]


class Residents:
    """The texts whose KV lies at the start of a slot; the trie is given one only when its slot is wanted for something else.

    A slot keeps its texts until it is overwritten, also when its row has finished. `where` has those of active rows' prefixes and of
    finished rows; nothing is lost when a text is not in it, as long as `keep` precedes the search in the trie.
    """

    def __init__(self, slots: Slots, trie: Trie) -> None:
        self.slots, self.trie = slots, trie
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.where: dict[Text, int] = {}  # the slot of each text
        self.texts: dict[int, list[Text]] = {}  # those of each slot
        self.unkept: dict[int, Text] = {}  # of each slot, the longest text that the trie may not hold

    @property
    def end(self) -> int:
        """One past the last slot that holds a text."""
        return max(self.texts, default=-1) + 1

    def hold(self, slot: int, text: Text) -> None:
        """The slot begins with this text."""
        if self.where.get(text) != slot:
            self.where[text] = slot
            self.texts.setdefault(slot, []).append(text)

    def finish(self, slot: int, text: Text) -> None:
        """A row has ended: its text stays in the slot for those that go on from it."""
        self.hold(slot, text)
        self.unkept[slot] = text

    def vacate(self, slot: int, stays: Text | None = None) -> None:
        """The slot will be overwritten, but for the text that `stays`: give the trie what it may not hold."""
        if stays is None or self.unkept.get(slot) != stays:
            self._keep(slot)
        for text in self.texts.pop(slot, ()):
            if text != stays and self.where.get(text) == slot:
                del self.where[text]
        if stays is not None:
            self.texts[slot] = [stays]

    def move(self, source: int, target: int, n: int) -> None:
        """Put the row of `source`, of n tokens, into a slot whose texts end here."""
        self.vacate(target)
        self.slots.move(source, target, n)
        if source in self.unkept:
            self.unkept[target] = self.unkept.pop(source)
        texts = self.texts.pop(source, [])
        for text in texts:
            if self.where.get(text) == source:
                self.where[text] = target
        self.texts[target] = texts

    def keep(self) -> bool:
        """Give the trie all that it may not hold; whether there was anything."""
        slots = list(self.unkept)
        for slot in slots:
            self._keep(slot)
        return bool(slots)

    def _keep(self, slot: int) -> None:
        text = self.unkept.pop(slot, None)
        if text is not None:
            self.trie.insert(text, lambda start, stop: self.slots.get(slot, start, stop))
