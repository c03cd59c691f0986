-- What programs report that call models themselves is marked, so that nobody can settle a call of the gateway by hand.
set local lock_timeout = '5s';

comment on column ledger.attribution.flags is 'Bits: 2 customer''s own key, 4 estimated, 8 streamed, 64 booked by expiry, 128 late, 256 unpriced by policy, 512 the request named no limit of output, 4096 reported by a program, 8192 in a batch of the provider''s';
