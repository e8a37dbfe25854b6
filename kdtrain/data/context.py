"""What stands in columns beside a conversation and is written by its chat template: system prompt, tools, arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdtrain.data.errors import RowError, type_name
from kdtrain.data.turns import blank, from_json, is_list, read_content, valid_unicode


def read_system(row: Mapping[str, Any]) -> tuple[str, str]:
    """The column of the system prompt and its text."""
    given = {column: row[column] for column in ("system", "system_prompt") if not blank(row.get(column))}
    texts = {column: read_content(value, column) for column, value in given.items()}
    if any(not isinstance(text, str) for text in texts.values()):
        raise RowError("the system column has an image: only text can stand there")
    if len({str(text) for text in texts.values()}) > 1:
        raise RowError(
            "system and system_prompt have different texts: keep one of the two columns (columns: "
            "{system_prompt: null} leaves the other out)"
        )
    return next(((column, str(text)) for column, text in texts.items()), ("", ""))


def read_tools(row: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The column of the tools and their schemas; `functions` is the older name."""
    tools, functions = (_schemas(row.get(column), column) for column in ("tools", "functions"))
    if tools and functions and tools != functions:
        raise RowError("tools and functions are different: keep one of the two columns (columns: {functions: null})")
    return ("tools", tools) if tools else ("functions", functions)


def read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    value = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if blank(value):
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"chat_template_kwargs must be a mapping, not {type_name(value)}")
    return dict(value)


def _schemas(value: Any, column: str) -> list[dict[str, Any]]:
    """Schemas of tools: a list, its JSON text (Arrow wants one type), or a list of JSON texts."""
    tools = from_json(value, column)
    if not tools:
        return []
    if not is_list(tools):
        raise RowError(f"{column} must be a list of JSON schemas, not {type_name(tools)}")
    read = [from_json(tool, f"{column}[{i}]") for i, tool in enumerate(tools)]
    for i, tool in enumerate(read):
        if not isinstance(tool, Mapping):
            raise RowError(f"{column}[{i}] must be a JSON schema, not {type_name(tool)}")
    valid_unicode(json.dumps(read, ensure_ascii=False, default=str), column)
    return [_wrapped(tool, column) for tool in read]


def _wrapped(tool: Mapping[str, Any], column: str) -> dict[str, Any]:
    """The bare function of older sets and of ShareGPT, as servers hand it to a chat template at inference."""
    bare = "name" in tool and (column == "functions" or "parameters" in tool or "description" in tool)
    if "function" in tool or not bare:
        return dict(tool)
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
