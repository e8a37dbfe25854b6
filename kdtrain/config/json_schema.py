"""The config as JSON Schema, so that editors complete and check it (`kdtrain schema`)."""

from __future__ import annotations

from typing import Any

from kdtrain.config.options import TrainingOptions
from kdtrain.config.schema import RunConfig
from kdtrain.config.suggest import known_keys
from kdtrain.config.training_fields import KINDS, TrainingField, training_fields
from kdtrain.config.training_rules import REFUSED
from kdtrain.losses.kinds import VISUAL_TARGETS


def json_schema() -> dict[str, Any]:
    """Draft 2020-12 of everything a file may say, with the descriptions of `schema` and of GKDConfig."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataSource"}]}
    sources = [*source["anyOf"], {"type": "array", "items": source, "minItems": 1}]
    data = definitions["DataConfig"]["properties"]
    data["train"] = {**_kept(data["train"]), "anyOf": sources}
    data["eval"] = {**_kept(data["eval"]), "anyOf": [*sources, {"type": "null"}]}
    visual = definitions["VisualKdConfig"]["properties"]
    target = {"anyOf": [{"$ref": "#/$defs/VisualTarget"}, {"type": "null"}]}
    targets = [
        {"type": "array", "items": {"enum": list(VISUAL_TARGETS)}},
        {"type": "object", "properties": dict.fromkeys(VISUAL_TARGETS, target), "additionalProperties": False},
    ]
    visual["targets"] = {**_kept(visual["targets"]), "anyOf": targets}
    definitions["TeacherConfig"]["properties"]["backend"]["enum"].append("local-toggle")
    own, fields = TrainingOptions.model_json_schema()["properties"], training_fields()
    names = [name for name in known_keys()["training"] if name not in REFUSED and name not in own]
    schema["properties"]["training"] = {
        **_kept(schema["properties"]["training"]),
        "type": "object",
        "properties": {**{name: _field(fields[name]) for name in names}, **own},
        "additionalProperties": False,
        "required": ["output_dir"],
    }
    schema["properties"]["extends"] = {
        "description": "Files this one is laid over, relative to it.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    # A file that extends another may leave the rest to it.
    required = schema.pop("required")
    schema["anyOf"] = [{"required": ["extends"]}, {"required": [*required, "training"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_one_line(schema)}


def _kept(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("title", "description", "default") if key in schema}


def _field(field: TrainingField) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": field.help}
    if field.kinds:
        schema["type"] = [KINDS[kind][2] for kind in field.kinds]
    if field.choices and set(field.kinds) <= {"str", "None"}:
        schema["enum"] = [*field.choices, *([None] if "None" in field.kinds else [])]
    return schema


def _one_line(value: Any) -> Any:
    """Texts, of which only descriptions have any, without the line breaks of the source."""
    if isinstance(value, dict):
        return {key: _one_line(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_one_line(item) for item in value]
    return " ".join(value.split()) if isinstance(value, str) else value
