"""Engines of a group: rank 0 orders every step, and all ranks carry the orders out alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from neounify.distributed.group import Group
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import Command, Reply
from neounify.engine.understanding import UnderstandingEngine
from neounify.model.parts import StreamName
from neounify.runtime.plan import ExecutionPlan

Engine = UnderstandingEngine | GenerationEngine


@dataclass(frozen=True, kw_only=True)
class Order:
    """One step of an engine, which takes commands first; `options` are those of its `step`.

    `owner` numbers the caller that the engine belongs to, where there are several.
    """

    role: StreamName
    commands: tuple[Command, ...]
    options: Mapping[str, Any]
    owner: int = 0

    def carry_out(self, engine: Engine) -> None:
        for command in self.commands:
            engine.submit(command)  # type: ignore[arg-type]
        engine.step(**self.options)


class LedEngine:
    """An engine of a group, as rank 0 drives it: like the engine alone, on all ranks at once.

    Commands wait for the next step, so that each order is one exchange. `carry_out` sends an order
    to the others and carries it out here.
    """

    def __init__(
        self,
        engine: Engine,
        role: StreamName,
        carry_out: Callable[[Order, Engine], None],
        owner: int = 0,
    ) -> None:
        self._engine, self._role, self.owner = engine, role, owner
        self._carry_out = carry_out
        self._commands: list[Command] = []
        self.counters = engine.counters

    @property
    def replies(self) -> list[Reply]:
        return self._engine.replies

    @replies.setter
    def replies(self, replies: list[Reply]) -> None:
        self._engine.replies = replies

    @property
    def busy(self) -> bool:
        return bool(self._commands) or self._engine.busy

    @property
    def urgent(self) -> bool:
        return isinstance(self._engine, UnderstandingEngine) and self._engine.urgent

    @property
    def decoding(self) -> bool:
        return isinstance(self._engine, UnderstandingEngine) and self._engine.decoding

    def gauges(self) -> Mapping[str, float]:
        return self._engine.gauges()

    def submit(self, command: Command) -> None:
        self._commands.append(command)

    def step(self, **options: Any) -> None:
        commands, self._commands = tuple(self._commands), []
        order = Order(role=self._role, commands=commands, options=options, owner=self.owner)
        self._carry_out(order, self._engine)


def lead(group: Group, order: Order, engine: Engine) -> None:
    """Carry an order out on all ranks, called by rank 0."""
    group.announce(order)
    order.carry_out(engine)


def follow(
    group: Group, engine_of: Callable[[Order], Engine], take: Callable[[Any], None] | None = None
) -> None:
    """Carry out the orders of rank 0 until it ends, called by the others; only it answers.

    `take` gets what it announces besides orders.
    """
    while (said := group.hear()) is not None:
        if isinstance(said, Order):
            engine = engine_of(said)
            said.carry_out(engine)
            engine.replies = []
        elif take is not None:
            take(said)


def agreed(plan: ExecutionPlan, group: Group) -> ExecutionPlan:
    """The plan of rank 0 with the least of all ranks' limits; collective."""
    if group.size == 1:
        return plan
    plans = group.gather(plan)
    limits = [field.name for field in fields(plan) if field.type == "int"]
    least = {name: min(getattr(other, name) for other in plans) for name in limits}
    return replace(plans[0], **least)
