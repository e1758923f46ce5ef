"""The tools that a request offers: functions, with JSON schemas of their arguments."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError, PydanticUndefined

from server.schemas.common import Body
from server.schemas.messages import FunctionName
from trm.errors import BadRequest
from trm.tools import Function, Tools


class FunctionDefinition(Body):
    """parameters: by default there are none. Arguments fit their schema whether or not `strict` is set."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Something that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    """This function must be called, once."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools. mode: whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(Body):
    """Only these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Mode = Literal["none", "auto", "required"]


def choice_of(function: type[Body], allowed: type[Body], described: Any = PydanticUndefined) -> BeforeValidator:
    """Reads the choice that a word or `type` names, so that an error's path needs no union in it.

    described: its type in the OpenAPI document, which cannot say that what is named must be among the tools.
    """
    kinds = {"function": function, "allowed_tools": allowed}

    def read(value: Any) -> Any:
        if value is None or value in get_args(Mode):
            return value
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise PydanticCustomError(
                "tool_choice", 'Input should be "none", "auto", "required", or of type function or allowed_tools'
            )
        return kinds[kind].model_validate(value)

    return BeforeValidator(read, json_schema_input_type=described)


ToolChoice = Annotated[
    Mode | NamedTool | AllowedToolChoice | None,
    choice_of(NamedTool, AllowedToolChoice, Literal["none", "auto"] | None),
    Field(description="where there are tools also required, one of them, or some of them (allowed_tools)"),
]


def chosen_tools(tools: list[Tool] | None, choice: ToolChoice, parallel: bool | None) -> Tools | None:
    """What a reply may call, None where that is nothing. Raises BadRequest for a choice that `tools` does not hold."""
    functions = {
        tool.function.name: Function(tool.function.name, tool.function.description, tool.function.parameters)
        for tool in tools or ()
    }
    if len(functions) < len(tools or ()):
        raise BadRequest("two of the tools have the same name", param="tools")
    wanted = list(functions)
    if isinstance(choice, NamedTool):
        wanted = [choice.function.name]
    elif isinstance(choice, AllowedToolChoice):
        wanted = [tool.function.name for tool in choice.allowed_tools.tools]
    if unknown := [name for name in wanted if name not in functions]:
        raise BadRequest(f"tool_choice names {unknown[0]}, which is not among the tools", param="tool_choice")
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedToolChoice) else choice
    required = mode == "required" or isinstance(choice, NamedTool)
    if required and not functions:
        raise BadRequest("tool_choice is required, and there are no tools; give some", param="tool_choice")
    if not functions or choice == "none":
        return None
    several = parallel is not False and not isinstance(choice, NamedTool)
    return Tools(tuple(functions.values()), tuple(functions[name] for name in wanted), required, several)
