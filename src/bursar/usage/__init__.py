"""What was used: figures and their breakdowns, each the one answer behind page, JSON and CSV.

Promises:
- One figure, one handler: the page, the API and the CSV render the same result.
- The rows of a breakdown sum to its total and the days to their range, to the micro; what nobody owns is a named row.
- Available, used, held and overage are four figures; those of shared and of personal pools are never added up.
- Days and months are those of the organization's zone, also where they have 23 or 25 hours.
- Amounts are integers; a ratio is taken from exact values and rounded once, at the end.

Tables: none of its own yet. It reads ledger.attribution, credits.pools and credits.balances, and names from identity.
"""
