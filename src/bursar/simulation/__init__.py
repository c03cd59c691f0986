"""Simulation: a told history through the real money functions, of which nothing stays.

Promises:
- What is played is decided by the functions that move real credits; nothing is worked out a second time here.
- Everything happens in one transaction of the role bursar_simulator, in an organization made for it, and is rolled back
  at the end: no real figure changes, and no gate, balance or hold of a real organization is ever locked.
- Amounts are exact: whole micros in, whole micros out.

Tables: none.
"""
