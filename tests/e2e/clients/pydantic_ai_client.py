"""pydantic-ai: an agent with an output type, and one with a tool that it must call."""

from common import BASE_URL, KEY, MODEL, QUESTION
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Answer(BaseModel):
    """The answer."""

    answer: int


model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))
agent = Agent(model)
first = agent.run_sync(QUESTION)
assert r"\boxed{" in first.output
assert agent.run_sync(QUESTION, message_history=first.all_messages()).output
assert isinstance(Agent(model, output_type=Answer).run_sync(QUESTION).output, Answer)
assert isinstance(Agent(model, output_type=NativeOutput(Answer)).run_sync(QUESTION).output, Answer)
with_tool = Agent(model)


@with_tool.tool_plain
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


assert isinstance(with_tool.run_sync(QUESTION).output, str)
with agent.run_stream_sync(QUESTION) as streamed:
    assert list(streamed.stream_text(delta=True))
