"""Networks that stay loaded between calls of `generate`, so that a second picture does not wait for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from bolid.generate.adapters import LoadedAdapter
from bolid.models.families import Family
from bolid.person import PersonReader

_Model = TypeVar("_Model")

Pipe = tuple[Any, dict[str, LoadedAdapter]]
"""A base ready to sample, and the adapters in it."""


class Models:
    """The `most` pipelines that were used last, their ControlNets, and the smaller models beside them.

    One call at a time: the networks' state is that of the picture that is being sampled.
    """

    def __init__(self, most: int = 1) -> None:
        self.most = most
        self._pipes: OrderedDict[Hashable, Pipe] = OrderedDict()
        self._controlnets: dict[Hashable, dict[str, Any]] = {}
        self._others: dict[Hashable, Any] = {}

    def pipe(self, networks: Hashable, load: Callable[[], Pipe]) -> Pipe:
        """The pipeline of these `networks`, by `load` where it is not here yet."""
        if networks not in self._pipes:
            while len(self._pipes) >= self.most:  # before the next one is loaded
                oldest, _ = self._pipes.popitem(last=False)
                self._controlnets.pop(oldest, None)
            self._pipes[networks] = load()
        self._pipes.move_to_end(networks)
        return self._pipes[networks]

    @property
    def current(self) -> Any:
        """The base that was used last, or None."""
        return next(reversed(self._pipes.values()))[0] if self._pipes else None

    def controlnet(self, networks: Hashable, part: str, load: Callable[[], Any]) -> Any:
        """The ControlNet of the pipeline of these `networks`; `part`: "controlnet" or "depth_controlnet"."""
        loaded = self._controlnets.setdefault(networks, {})
        if part not in loaded:
            loaded[part] = load()
        return loaded[part]

    def reader(self, family: Family, device: str, force: bool = False) -> PersonReader:
        """What reads photos of people with the family's models; with `force` photographs by `tiny`, too."""
        return self.keep(
            ("reader", family.name, family.root, device, force), lambda: PersonReader(family, device, force=force)
        )

    def keep(self, name: Hashable, load: Callable[[], _Model]) -> _Model:
        """The model of this `name`, by `load` where it is not here yet."""
        if name not in self._others:
            self._others[name] = load()
        return self._others[name]
