"""Anthropic's client, on its own routes: whole and streamed, a second turn, a form, tools, and the count of tokens."""

import json

from anthropic import Anthropic, BadRequestError
from common import BASE_URL, KEY, MODEL, QUESTION

ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
client = Anthropic(base_url=BASE_URL.removesuffix("/v1"), api_key=KEY)
ask = {"role": "user", "content": QUESTION}
server = {"model": MODEL, "max_tokens": 200}

reply = client.messages.create(messages=[ask], **server)
assert r"\boxed{" in reply.content[0].text
assert reply.stop_reason == "end_turn"
assert reply._request_id
refused = None
try:
    client.messages.create(messages=[ask], model=MODEL, max_tokens=0)
except BadRequestError as error:
    refused = error.request_id
assert refused
with client.messages.stream(messages=[ask], **server) as stream:
    assert "".join(stream.text_stream) == reply.content[0].text
    assert stream.get_final_message().stop_reason == "end_turn"
turns = [ask, {"role": "assistant", "content": reply.content}, ask]
assert client.messages.create(messages=turns, **server).content
counted = client.messages.count_tokens(model=MODEL, messages=[ask]).input_tokens
used = reply.usage
assert counted == used.input_tokens + (used.cache_read_input_tokens or 0)

schema = ADD["input_schema"] | {"additionalProperties": False}
formed = client.messages.create(
    messages=[ask], output_config={"format": {"type": "json_schema", "schema": schema}}, **server
)
assert set(json.loads(formed.content[0].text)) == {"a", "b"}

called = client.messages.create(messages=[ask], tools=[ADD], tool_choice={"type": "tool", "name": "add"}, **server)
call = called.content[-1]
assert (called.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "add")
assert set(call.input) == {"a", "b"}
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "19"}]}
history = [ask, {"role": "assistant", "content": called.content}, result]
assert client.messages.create(messages=history, tools=[ADD], **server).stop_reason
with client.messages.stream(messages=[ask], tools=[ADD], tool_choice={"type": "any"}, **server) as stream:
    assert "input_json" in {event.type for event in stream}
