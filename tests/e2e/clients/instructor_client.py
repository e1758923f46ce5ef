"""instructor, in its default mode, which is tools, and in the one with a JSON schema."""

import instructor
from common import BASE_URL, KEY, MODEL, QUESTION
from openai import OpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    answer: int


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key=KEY), mode=mode)
    ask = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "response_model": Answer}
    assert isinstance(client.create(**ask), Answer)
    *_, last = client.create_partial(**ask)
    assert isinstance(last.answer, int)
