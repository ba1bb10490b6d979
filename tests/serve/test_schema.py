"""The messages made of our `.proto` files beside those of the client's generated modules."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from grpc_health.v1 import health_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from twofour.serve.protocol import schema

THEIRS = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
# A ModelConfig has fields of other things than this server does; they stay unset.
PARTIAL = {
    "inference.ModelConfig",
    "inference.ModelInput",
    "inference.ModelOutput",
    "inference.ModelInstanceGroup",
}


def types(descriptor: Descriptor) -> list[Descriptor]:
    return [descriptor, *(t for nested in descriptor.nested_types for t in types(nested))]


def all_types(files: tuple[object, ...]) -> dict[str, Descriptor]:
    tops = [top for file in files for top in file.message_types_by_name.values()]  # type: ignore[attr-defined]
    return {each.full_name: each for top in tops for each in types(top)}


OURS = all_types(tuple(schema.POOL.FindFileByName(n) for n in ("inference.proto", "health.proto")))
KNOWN = all_types(THEIRS)


def facts(field: FieldDescriptor) -> tuple[object, ...]:
    held = field.message_type or field.enum_type
    return (
        field.number,
        field.type,
        field.is_repeated,
        held.full_name if held else "",
        field.containing_oneof.name if field.containing_oneof else "",
        field.is_packed,
        bool(field.message_type and field.message_type.GetOptions().map_entry),
    )


def values(enum: EnumDescriptor) -> dict[str, int]:
    return {value.name: value.number for value in enum.values}


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_field_is_the_clients(name: str) -> None:
    ours = {field.name: facts(field) for field in OURS[name].fields}
    theirs = {field.name: facts(field) for field in KNOWN[name].fields}
    if name in PARTIAL:
        assert ours.items() < theirs.items()
    else:
        assert ours == theirs
    for enum in OURS[name].enum_types:
        assert values(enum) == values(KNOWN[name].enum_types_by_name[enum.name])


def test_no_message_of_the_service_is_missing() -> None:
    wanted = {
        m.full_name for m in all_types((service_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)).values()
    }
    assert wanted <= OURS.keys()
    (ours,) = schema.POOL.FindFileByName("inference.proto").enum_types_by_name.values()
    assert values(ours) == values(model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"])


@pytest.mark.parametrize(
    ("methods", "service"),
    [
        (schema.INFERENCE, service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]),
        (schema.HEALTH, health_pb2.DESCRIPTOR.services_by_name["Health"]),
    ],
)
def test_each_method_is_the_clients(methods: dict[str, schema.Method], service: object) -> None:
    theirs = {
        each.name: (
            f"/{service.full_name}/{each.name}",  # type: ignore[attr-defined]
            each.input_type.full_name,
            each.output_type.full_name,
            (each.client_streaming, each.server_streaming),
        )
        for each in service.methods  # type: ignore[attr-defined]
    }
    ours = {
        name: (m.path, m.request.DESCRIPTOR.full_name, m.response.DESCRIPTOR.full_name, m.streams)
        for name, m in methods.items()
    }
    assert ours == theirs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("message A { int32 a = 1; ", "ends within"),
        ("message A { int32 a : 1; }", "cannot read ': 1; }'"),
        ("message A { int32 a 1; }", "expected =, got 1"),
        ("option x = 1;", "expected a definition, got option"),
        ("service A { option x; }", "expected rpc, got option"),
        ('syntax = "proto2";', 'expected "proto3", got "proto2"'),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"x\.proto") as refused:
        schema.parse(text, "x.proto")
    assert said in str(refused.value)
