"""One pool as other credit systems describe it, in plain integers: what scenarios without holds must come to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NEVER = 10**9


@dataclass
class Grant:
    """A grant; instants are whole hours. every: hours between two recurrences, counted from its beginning."""

    name: str
    amount: int
    priority: int
    begins: int
    ends: int = NEVER
    voided: int = NEVER
    every: int = 0
    least: int = 0
    most: int = 0
    balance: int = 0
    since: int = NEVER  # its beginning, or when it last came again

    def is_active(self, at: int) -> bool:
        """It can pay."""
        return self.begins <= at < min(self.ends, self.voided)

    def comes(self, at: int) -> bool:
        """It begins, or comes again."""
        again = self.every and at > self.begins and (at - self.begins) % self.every == 0
        return at == self.begins or bool(again)


@dataclass
class Pool:
    """Grants, and what nothing covered."""

    grants: list[Grant]
    overage: int = 0

    def use(self, amount: int, at: int) -> None:
        """By priority; what is left over is overage."""
        for grant in sorted(self.grants, key=lambda each: each.priority):
            if grant.is_active(at):
                paid = min(amount, grant.balance)
                grant.balance -= paid
                amount -= paid
        self.overage += amount

    def pay(self, at: int) -> None:
        """Overage is paid by whatever has come."""
        overage, self.overage = self.overage, 0
        self.use(overage, at)

    def pass_to(self, at: int) -> None:
        """Grants end, then come."""
        for grant in self.grants:
            if at >= min(grant.ends, NEVER):
                grant.balance = 0
        for grant in self.grants:
            if grant.is_active(at) and grant.comes(at):
                grant.balance, grant.since = grant.amount, at
        self.pay(at)

    def reset(self, at: int, keeps: bool) -> None:
        """Each grant that did not come just now rolls over within its bounds."""
        self.overage = self.overage if keeps else 0
        for grant in self.grants:
            if grant.is_active(at) and grant.since < at:
                grant.balance = min(grant.most, max(grant.least, grant.balance))
        self.pay(at)


def told(scenario: dict[str, Any]) -> Iterator[tuple[int, dict[str, int], int]]:
    """(hour, balances, overage) of every hour; scenario: grants, usage as (hour, amount), resets as (hour, keeps)."""
    pool = Pool(scenario["grants"])
    for at in range(scenario["hours"]):
        pool.pass_to(at)
        for _, keeps in (each for each in scenario["resets"] if each[0] == at):
            pool.reset(at, keeps)
        for grant in pool.grants:
            if grant.voided == at:
                grant.balance = 0
        for _, amount in (each for each in scenario["usage"] if each[0] == at):
            pool.use(amount, at)
        yield at, {grant.name: grant.balance for grant in pool.grants}, pool.overage
