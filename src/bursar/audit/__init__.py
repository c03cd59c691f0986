"""Who did what to which object, why and from where.

Promises:
- An event is written in the transaction of the deed: neither is there without the other.
- Events are never changed, deleted or truncated (triggers and missing grants), and an organization sees its own only.
- No personal data and no secrets: events name ids and the changed fields; addresses are keyed hashes.

Table: audit.events. Refused requests are recorded by the application's problem handler, in a transaction of its own.
"""
