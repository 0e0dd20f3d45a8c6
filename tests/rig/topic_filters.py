"""MQTT topic filters, and who subscribed to which."""


class FilterIndex:
    """Who subscribed to what; iterates in the order of subscribing."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[str, None]] = {}
        self._wild: dict[str, dict[str, None]] = {}

    def add(self, name: str, client_id: str) -> None:
        """Somebody subscribes."""
        index = self._wild if is_wild(name) else self._exact
        index.setdefault(name, {})[client_id] = None

    def drop(self, name: str, client_id: str) -> None:
        """Somebody does so no more."""
        for index in (self._exact, self._wild):
            if name in index:
                index[name].pop(client_id, None)
                if not index[name]:
                    del index[name]

    def subscribers(self, topic: str) -> list[str]:
        """Who gets a message on this topic, each once."""
        found = dict(self._exact.get(topic, {}))
        for name, clients in self._wild.items():
            if matches(name, topic):
                found |= clients
        return list(found)


def is_wild(name: str) -> bool:
    """Whether a filter takes more than one topic."""
    return "+" in name or "#" in name


def matches(name: str, topic: str) -> bool:
    """Whether a topic filter takes a topic (MQTT 5 section 4.7)."""
    if name == topic:
        return True
    wanted, found = name.split("/"), topic.split("/")
    if found[0].startswith("$") and wanted[0] in {"+", "#"}:
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(found) or level not in {"+", found[index]}:
            return False
    return len(wanted) == len(found)
