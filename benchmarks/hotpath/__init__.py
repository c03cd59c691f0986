"""How fast credits move: our batches against a transaction in the application and against one call per request.

    python -m benchmarks.hotpath [--quick] [--seconds 6] [--callers 128]

Everything runs on a PostgreSQL server of its own with durable commits, in one process per side, in interleaved rounds.
A figure is the median of its rounds, with their least and greatest; only ratios within one run mean anything.
Each request is checked against four balances: the pool, its open part, the user's cap and the key's cap.
"""
