"""The OpenAI client: turns after `.stream()` and `.parse()`, tools and their results, and the Responses API."""

import json

from common import BASE_URL, KEY, MODEL, QUESTION, TOOL
from openai import OpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    answer: int


client = OpenAI(base_url=BASE_URL, api_key=KEY)
ask = [{"role": "user", "content": QUESTION}]

reply = client.chat.completions.create(model=MODEL, messages=ask)
assert r"\boxed{" in reply.choices[0].message.content
again = client.chat.completions.create(model=MODEL, messages=[*ask, reply.choices[0].message, *ask])
assert again.choices[0].finish_reason == "stop"

with client.chat.completions.stream(model=MODEL, messages=ask) as stream:
    for _ in stream:
        pass
    whole = stream.get_final_completion()
assert whole.choices[0].message.content == reply.choices[0].message.content
client.chat.completions.create(model=MODEL, messages=[*ask, whole.choices[0].message, *ask])

parsed = client.chat.completions.parse(model=MODEL, messages=ask, response_format=Answer)
assert isinstance(parsed.choices[0].message.parsed, Answer)
client.chat.completions.create(model=MODEL, messages=[*ask, parsed.choices[0].message.model_dump(), *ask])

called = client.chat.completions.create(model=MODEL, messages=ask, tools=[TOOL], tool_choice="required", max_tokens=200)
call = called.choices[0].message.tool_calls[0]
assert called.choices[0].finish_reason == "tool_calls"
assert set(json.loads(call.function.arguments)) == {"a", "b"}
result = {"role": "tool", "tool_call_id": call.id, "content": "12"}
last = client.chat.completions.create(model=MODEL, messages=[*ask, called.choices[0].message, result], tools=[TOOL])
assert last.choices[0].finish_reason in ("stop", "tool_calls", "length")
with client.chat.completions.stream(model=MODEL, messages=ask, tools=[TOOL], tool_choice="required") as stream:
    names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
    streamed = stream.get_final_completion().choices[0].message
assert set(names) == {"add"}
results = [{"role": "tool", "tool_call_id": call.id, "content": "12"} for call in streamed.tool_calls]
client.chat.completions.create(model=MODEL, messages=[*ask, streamed, *results], tools=[TOOL])

answered = client.responses.create(model=MODEL, input=QUESTION)
assert answered.output_text == reply.choices[0].message.content
again = client.responses.create(model=MODEL, input=[*ask, *answered.output, *ask])
assert again.status == "completed"
with client.responses.stream(model=MODEL, input=QUESTION) as stream:
    assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == answered.output_text
formed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Answer)
assert isinstance(formed.output_parsed, Answer)
flat = {"type": "function", **TOOL["function"], "strict": True}
less = {"model": MODEL, "tools": [flat], "max_output_tokens": 200}
called = client.responses.create(input=QUESTION, tool_choice="required", **less)
call = called.output[0]
assert set(json.loads(call.arguments)) == {"a", "b"}
result = {"type": "function_call_output", "call_id": call.call_id, "output": "19"}
assert client.responses.create(input=[*ask, *called.output, result], **less).output
