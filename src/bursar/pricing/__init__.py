"""What a model costs, since when, and what that comes to for one request.

Promises:
- Amounts are exact integers until the end and rounded once, half-up (a hold: up); what is charged and what the provider
  costs are each taken from the exact amount, never one from the other.
- A price is never changed: a new one takes effect at an instant, and what was said about the past stays.
- Nothing costs zero by accident: a model or a kind without a price is refused, unless a named policy of the
  organization lets it pass (recorded as unpriced) or names a fallback; a price of zero is marked free.
- A request is priced from memory: no list, library or network is asked while it waits.
- Importing a list brings all of it or nothing, and the same list again changes nothing.

Tables, schema `pricing`: book (revision), kinds, lists, imports, providers, models, versions, rates for everybody;
overrides, override_rates, markups, policies for one organization, set by the platform's operator alone.

Files: usage (the canonical kinds), prices (pricing, pure), models (which model a name means, pure), lists (a list and
what importing it changes, pure), genai_list and files (where lists come from), importing, versions, terms, book.
"""
