"""OpenAI's translations of sound into English text: as transcriptions, at another path, and never streamed.

Source: the OpenAI API reference, "Create translation".
"""

from __future__ import annotations

from typing import Final

from bursar.gateway import transcriptions_wire

PATH: Final = "/audio/translations"

UsageMeter = transcriptions_wire.UsageMeter
read_request = transcriptions_wire.read_request
upstream_body = transcriptions_wire.upstream_body
refusal = transcriptions_wire.refusal
stream_refusal = transcriptions_wire.stream_refusal
