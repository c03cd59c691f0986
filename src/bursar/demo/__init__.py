"""Sample companies: invented people and addresses, true prices, thirteen months of use.

Promises:
- Everything is written by the functions that write real data, at past instants; its books verify like any others.
- Numbers that a story names are exact to the micro; the same day and seed give the same numbers.
- A demo lives in a data folder that carries its mark; no other folder is ever seeded, reset or removed.

Tables: none of its own. Money is dated through the role bursar_simulator.
"""
