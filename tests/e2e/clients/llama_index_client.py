"""LlamaIndex's client of OpenAI-like servers."""

from common import BASE_URL, KEY, MODEL, QUESTION
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Answer(BaseModel):
    """The answer."""

    answer: int


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


model = OpenAILike(
    api_base=BASE_URL, api_key=KEY, model=MODEL, is_chat_model=True, is_function_calling_model=True, max_tokens=200
)
ask = ChatMessage(role="user", content=QUESTION)
reply = model.chat([ask])
assert r"\boxed{" in reply.message.content
*_, last = model.stream_chat([ask])
assert last.message.content == reply.message.content
assert model.chat([ask, reply.message, ask]).message.content
assert isinstance(model.as_structured_llm(Answer).chat([ask]).raw, Answer)
tool = FunctionTool.from_defaults(add)
called = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
call = model.get_tool_calls_from_response(called)[0]
assert call.tool_name == "add"
result = ChatMessage(role="tool", content="12", additional_kwargs={"tool_call_id": call.tool_id})
assert model.chat_with_tools([tool], chat_history=[ask, called.message, result]).message
