"""Every model that the official client names for embeddings, images, speech and sound can be priced as it is billed."""

import datetime
from typing import get_args

import openai.types
import openai.types.audio.speech_model
import pytest

from bursar.clock import uuid7
from bursar.pricing import genai_list
from bursar.pricing.importing import load_shipped
from bursar.pricing.lists import PriceList
from bursar.pricing.models import NameIndex
from bursar.pricing.prices import PriceVersion
from bursar.pricing.usage import Usage

TEXT = Usage(input_tokens=1)
# What a call of each kind may use, in any of the forms in which it is billed.
FORMS = {
    "embeddings": (TEXT,),
    "images": (Usage(images=1), Usage(input_tokens=1, image_input_tokens=1, image_output_tokens=1)),
    "speech": (Usage(characters=1), Usage(input_tokens=1, audio_output_tokens=1)),
    "sound": (Usage(audio_milliseconds=1), Usage(input_tokens=1, audio_input_tokens=1, output_tokens=1)),
}
NAMES = {
    "embeddings": get_args(openai.types.EmbeddingModel),
    "images": get_args(openai.types.ImageModel),
    "speech": get_args(openai.types.audio.speech_model.SpeechModel),
    "sound": get_args(openai.types.AudioModel),
}
SQUARE = {"size": "1024x1024", "quality": "standard"}


@pytest.fixture(scope="module")
def lists() -> list[PriceList]:
    """The shipped lists; the first that has a model counts."""
    return [load_shipped("bursar"), genai_list.load(datetime.datetime.now(datetime.UTC).date())]


@pytest.mark.parametrize("kind", FORMS)
def test_every_model_of_the_client_has_a_price_in_a_form_in_which_it_is_billed(
    lists: list[PriceList], kind: str
) -> None:
    assert NAMES[kind]
    for name in NAMES[kind]:
        version = price_of(lists, name)
        assert version is not None, name
        assert any(not version.unpriced_kinds(form, context=SQUARE) for form in FORMS[kind]), name


def price_of(lists: list[PriceList], name: str) -> PriceVersion | None:
    for each in lists:
        found = NameIndex(each.providers, each.model_names()).find("openai", name)
        if found is None:
            continue
        [model] = [listed for listed in each.models if listed.key == (found.provider, found.model)]
        prices = model.segments[-1].prices
        if prices is not None:
            segment = model.segments[-1]
            return PriceVersion(uuid7(), each.name, *model.key, segment.effective_from, prices.rates, prices.variants)
    return None
