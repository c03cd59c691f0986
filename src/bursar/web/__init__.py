"""The pages: what a browser gets. No rule lives here; every figure comes from the handler that serves the API too.

Promises:
- Every number can be read without script, without colour and on paper; a chart has its table beside it.
- Nothing is asked of any other host; style and script come from our own files under a strict policy (no inline ones).
- Light and dark are of equal rank; a page never flashes the other one first.
- What a person may not see is not on the page; foreign and unknown organizations look alike.

Tables: none.
"""
