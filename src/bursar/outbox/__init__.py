"""What happened and is to be told: events, and their way to people (e-mail) and programs (signed webhooks).

Promises:
- An event is written in the transaction of the deed: neither is there without the other.
- The events of one object are numbered 1, 2, 3 … without gaps, and each endpoint gets them in that order.
- Each event comes at least once to each endpoint that asked for its kind, under the same webhook-id, until it has been
  tried for three days; whatever process dies at whatever moment.
- Nothing is sent to an address inside a private network: see `bursar.outbox.outside`.
- What is still to be sent stays; what was told ends after BURSAR_EVENTS_DAYS, the last event of each object aside.

Tables: outbox.events (never changed), endpoints, endpoint_secrets, deliveries, mails, mail_events.
Written by others through the SQL function outbox.post_event alone.
"""
