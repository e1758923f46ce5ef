"""Ollama's client: what it asks before it chats, whole and line by line, a second turn, a form, tools."""

import json

from common import BASE_URL, KEY, MODEL, QUESTION, TOOL
from ollama import Client, ResponseError

client = Client(host=BASE_URL.removesuffix("/v1"), headers={"Authorization": f"Bearer {KEY}"})
ask = {"role": "user", "content": QUESTION}
options = {"num_predict": 200}

[listed] = client.list().models
assert (listed.model, len(listed.digest)) == (MODEL, 64)
assert listed.size > 0
shown = client.show(MODEL)
assert shown.details == listed.details
assert shown.modelinfo["trm.context_length"] > 0
assert shown.capabilities == ["completion", "tools"]
refused = None
try:
    client.show("other")
except ResponseError as error:
    refused = error.status_code
assert refused == 404

reply = client.chat(MODEL, [ask])
assert r"\boxed{" in reply.message.content
assert "".join(part.message.content for part in client.chat(MODEL, [ask], stream=True)) == reply.message.content
assert client.chat(MODEL, [ask, reply.message, ask]).done_reason == "stop"
formed = client.chat(MODEL, [ask], format=TOOL["function"]["parameters"], options=options)
assert set(json.loads(formed.message.content)) == {"a", "b"}
assert client.chat(MODEL, [ask], tools=[TOOL], options=options).done
made = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 12, "b": 7}}}]}
result = {"role": "tool", "tool_name": "add", "content": "19"}
assert client.chat(MODEL, [ask, made, result], tools=[TOOL], options=options).done
