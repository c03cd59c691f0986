"""The request path: an OpenAI- and Anthropic-compatible endpoint that holds, calls the provider and settles.

What it promises: the caller's bytes reach the provider unchanged except for the fields named in `wire.WireRequest`, and
the provider's bytes reach the caller unchanged except for a usage chunk that the caller did not ask for. Nothing of the
caller's credentials goes to a provider, nothing of the provider's account goes to the caller.

`endpoints`, `…_wire`                                      the paths; read their requests and answers as far as needed
`wire`, `tokens`, `sse`, `multipart`, `sound`              what wires share: texts, streams, forms, files of sound
`upstream`, `providers`, `routes`                          call a provider; which provider serves which model
`sealing`, `provider_keys`                                 provider keys, encrypted at rest
`batches`, `batch_keeper`                                  batches: made and held; looked after until they are settled
`demo_provider`                                            an offline provider that answers deterministically

Tables: gateway.providers, gateway.model_routes, gateway.platform_provider_keys (all global);
gateway.provider_keys (tenant).
gateway.batches, gateway.batch_requests, gateway.batch_files (tenant): what is held and settled for batches.
"""
