"""Faults that an operator can mend: what happened, why, and what to do next.

A refusal of a request is a `bursar.problems.Problem`; this is for everything around it: settings, the database server,
migrations. The command line prints the three parts; nothing here travels over HTTP.
"""


class BursarError(Exception):
    """Base of every fault that we foresee and can explain.

    what: one sentence, without a full stop; why: what was found; next_step: a command or an action.
    """

    def __init__(self, what: str, *, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        return ". ".join(part.rstrip(".") for part in (self.what, self.why, self.next_step) if part)
