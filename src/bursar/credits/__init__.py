"""The treasury: pools, grants, allocations, limits, and the holds and charges that move credits.

Promises:
- Nothing is authorized beyond what is available, in any interleaving; what a call really used is always charged.
- Balances are caches of an append-only ledger; `verify` recomputes every one.
- A command with an idempotency key has one effect, however often it is sent.
- A refusal names the limit that refused, who set it, when it resets and what to do next: one `Why` everywhere.

Tables: schema `credits`; settle and deduct also write `ledger.attribution`, and grants `ledger.entries` (the named
composers, see the folder functions). Credits move in SQL functions only; Python never updates a balance.
"""
