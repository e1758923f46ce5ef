"""LiteLLM, which maps everybody's dialects onto OpenAI's."""

import json

import litellm
from common import BASE_URL, KEY, MODEL, QUESTION, TOOL
from pydantic import BaseModel


class Answer(BaseModel):
    answer: int


ask = [{"role": "user", "content": QUESTION}]
server = {"model": f"openai/{MODEL}", "base_url": BASE_URL, "api_key": KEY, "max_tokens": 200}
reply = litellm.completion(messages=ask, **server)
said = reply.choices[0].message
assert r"\boxed{" in said.content
chunks = litellm.completion(messages=ask, stream=True, **server)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said.content
assert litellm.completion(messages=[*ask, said, *ask], **server).choices[0].message.content
formed = litellm.completion(messages=ask, response_format=Answer, **server)
assert Answer.model_validate_json(formed.choices[0].message.content)
called = litellm.completion(messages=ask, tools=[TOOL], tool_choice="required", **server).choices[0].message
call = called.tool_calls[0]
assert set(json.loads(call.function.arguments)) == {"a", "b"}
result = {"role": "tool", "tool_call_id": call.id, "content": "12"}
assert litellm.completion(messages=[*ask, called, result], tools=[TOOL], **server).choices
