"""LangChain's ChatOpenAI."""

from common import BASE_URL, KEY, MODEL, QUESTION
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    """The answer."""

    answer: int


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


model = ChatOpenAI(base_url=BASE_URL, api_key=KEY, model=MODEL, max_tokens=200)
reply = model.invoke(QUESTION)
assert r"\boxed{" in reply.content
assert "".join(chunk.content for chunk in model.stream(QUESTION)) == reply.content
assert model.invoke([HumanMessage(QUESTION), reply, HumanMessage(QUESTION)]).content
for method in ("function_calling", "json_schema"):
    assert isinstance(model.with_structured_output(Answer, method=method).invoke(QUESTION), Answer)
called = model.bind_tools([add], tool_choice="add").invoke(QUESTION)
call = called.tool_calls[0]
assert call["name"] == "add"
assert set(call["args"]) == {"a", "b"}
history = [HumanMessage(QUESTION), called, ToolMessage("12", tool_call_id=call["id"])]
assert model.bind_tools([add]).invoke(history).response_metadata["finish_reason"]
