"""The protobuf messages of the protocol, made from the `.proto` files of this folder at import.

They live in a pool of descriptors of their own, so that a client's generated modules, which have
the same names, can be imported into the same process. What is read is the part of the proto3
language that these files are written in:

    file     package NAME; { message | enum | service }
    message  message NAME { field | oneof NAME { field } | message | enum }
    field    [repeated] TYPE NAME = NUMBER;    TYPE: a scalar, map<KEY, VALUE>, or a name in scope
    enum     enum NAME { NAME = NUMBER; }
    service  service NAME { rpc NAME([stream] NAME) returns ([stream] NAME); }

Source: https://protobuf.dev/reference/protobuf/proto3-spec/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

_TOKEN = re.compile(r'//[^\n]*|\s+|([A-Za-z_][\w.]*|\d+|"[^"]*"|[{}()<>=;,])')
_Field: TypeAlias = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: _Field.Type.Value(f"TYPE_{name.upper()}")
    for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
}


@dataclass(frozen=True)
class Method:
    """A method of a service.

    Attributes:
        path: as requests name it, /package.Service/Method.
        request: message that a client sends.
        response: message that it gets.
        streams: whether (the client, the server) sends any number of them.
    """

    path: str
    request: type[Message]
    response: type[Message]
    streams: tuple[bool, bool]


class _Parser:
    """Reads one `.proto` text into a FileDescriptorProto."""

    def __init__(self, text: str, name: str) -> None:
        self._tokens = _tokens(text, name)
        self._name = name
        self.file = descriptor_pb2.FileDescriptorProto(name=name, syntax="proto3")

    def read(self) -> descriptor_pb2.FileDescriptorProto:
        for token in self._tokens:
            if token == "syntax":
                self._expect("=", '"proto3"', ";")
            elif token == "package":
                self.file.package = next(self._tokens)
                self._expect(";")
            elif token == "message":
                self._message(self.file.message_type.add())
            elif token == "enum":
                self._enum(self.file.enum_type.add())
            elif token == "service":
                self._service(self.file.service.add())
            else:
                raise self._refusal("a definition", token)
        return self.file

    def _message(self, into: descriptor_pb2.DescriptorProto) -> None:
        into.name = next(self._tokens)
        self._expect("{")
        while (token := next(self._tokens)) != "}":
            if token == "message":
                self._message(into.nested_type.add())
            elif token == "enum":
                self._enum(into.enum_type.add())
            elif token == "oneof":
                into.oneof_decl.add(name=next(self._tokens))
                self._expect("{")
                while (kind := next(self._tokens)) != "}":
                    self._field(into, kind).oneof_index = len(into.oneof_decl) - 1
            else:
                self._field(into, token)

    def _field(self, into: descriptor_pb2.DescriptorProto, kind: str) -> _Field:
        field = into.field.add(label=_Field.LABEL_OPTIONAL)
        if kind == "repeated":
            field.label = _Field.LABEL_REPEATED
            kind = next(self._tokens)
        if kind == "map":
            self._expect("<")
            key = next(self._tokens)
            self._expect(",")
            value = next(self._tokens)
            self._expect(">")
            field.label = _Field.LABEL_REPEATED
        field.name = next(self._tokens)
        self._expect("=")
        field.number = int(next(self._tokens))
        self._expect(";")
        if kind == "map":
            kind = "".join(part.capitalize() for part in field.name.split("_")) + "Entry"
            entry = into.nested_type.add(name=kind)
            entry.options.map_entry = True
            for number, (name, held) in enumerate((("key", key), ("value", value)), 1):
                _be(entry.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL), held)
        _be(field, kind)
        return field

    def _enum(self, into: descriptor_pb2.EnumDescriptorProto) -> None:
        into.name = next(self._tokens)
        self._expect("{")
        while (name := next(self._tokens)) != "}":
            self._expect("=")
            into.value.add(name=name, number=int(next(self._tokens)))
            self._expect(";")

    def _service(self, into: descriptor_pb2.ServiceDescriptorProto) -> None:
        into.name = next(self._tokens)
        self._expect("{")
        while (token := next(self._tokens)) != "}":
            if token != "rpc":
                raise self._refusal("rpc", token)
            method = into.method.add(name=next(self._tokens))
            method.input_type, method.client_streaming = self._side()
            self._expect("returns")
            method.output_type, method.server_streaming = self._side()
            self._expect(";")

    def _side(self) -> tuple[str, bool]:
        """What a method takes or gives: ([stream] NAME)."""
        self._expect("(")
        name = next(self._tokens)
        streams = name == "stream"
        if streams:
            name = next(self._tokens)
        self._expect(")")
        return name, streams

    def _expect(self, *wanted: str) -> None:
        for each in wanted:
            token = next(self._tokens)
            if token != each:
                raise self._refusal(each, token)

    def _refusal(self, wanted: str, token: str) -> ValueError:
        return ValueError(f"{self._name}: expected {wanted}, got {token}")


def _tokens(text: str, name: str) -> Iterator[str]:
    """The words and signs of a text, without its spaces and comments."""
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{name}: cannot read {text[at : at + 20]!r}")
        at = found.end()
        if found[1]:
            yield found[1]


def _be(field: _Field, kind: str) -> None:
    """Gives a field its type; the pool finds what a name in scope stands for."""
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind


def parse(text: str, name: str) -> descriptor_pb2.FileDescriptorProto:
    """Reads a `.proto` text.

    Args:
        text: in the part of proto3 that this module's head shows.
        name: of the file, for messages and for the pool.

    Raises:
        ValueError: the text is written otherwise, or ends early.
    """
    try:
        return _Parser(text, name).read()
    except StopIteration as e:
        raise ValueError(f"{name}: the text ends within a definition") from e


POOL = descriptor_pool.DescriptorPool()
for _name in ("inference.proto", "health.proto"):
    _text = resources.files(__package__).joinpath(_name).read_text(encoding="utf-8")
    POOL.AddSerializedFile(parse(_text, _name).SerializeToString())


def message(name: str) -> type[Message]:
    """The class of a message.

    Args:
        name: in full: inference.ModelInferRequest.
    """
    found: type[Message] = message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))
    return found


def methods(service: str) -> dict[str, Method]:
    """The methods of a service, by their names.

    Args:
        service: in full: inference.GRPCInferenceService.
    """
    return {
        each.name: Method(
            f"/{service}/{each.name}",
            message_factory.GetMessageClass(each.input_type),
            message_factory.GetMessageClass(each.output_type),
            (each.client_streaming, each.server_streaming),
        )
        for each in POOL.FindServiceByName(service).methods
    }


INFERENCE = methods("inference.GRPCInferenceService")
HEALTH = methods("grpc.health.v1.Health")
