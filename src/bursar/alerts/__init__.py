"""Alerts: what is told when credits run low, to whom, once.

Promises:
- Each level of a rule is told once for a balance and period, whatever process dies and however many workers look; again
  only in a new period, or when the limit was raised above it and it is reached again.
- A level that is reached is told within seconds. Looking costs the path of a request nothing: the attribution is read
  from behind, by its index.
- Every alert says what happens at 100 %, how much is left in its unit, when it resets, and the next step.

Tables: alerts.rules, reached, notices, looks. Events go out through `bursar.outbox`.
"""
