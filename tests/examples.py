"""tf.train.Example declared from TensorFlow's .proto files and parsed by Google's protobuf library, independently of our code."""

import functools


@functools.cache
def _example_class():
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, (label, kind, field_name, type_name) in enumerate(fields, 1):
            made.field.add(name=field_name, number=number, label=label, type=kind, type_name=type_name)
        return made

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", (many, field.TYPE_BYTES, "value", None))
    message("FloatList", (many, field.TYPE_FLOAT, "value", None))
    message("Int64List", (many, field.TYPE_INT64, "value", None))
    message(
        "Feature", *((one, field.TYPE_MESSAGE, f"{kind}_list", f".t.{kind.title()}List") for kind in ("bytes", "float", "int64"))
    )
    features = message("Features", (many, field.TYPE_MESSAGE, "feature", ".t.Features.Entry"))
    entry = features.nested_type.add(name="Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=field.TYPE_MESSAGE, type_name=".t.Feature")
    message("Example", (one, field.TYPE_MESSAGE, "features", ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def parse_example(data: bytes) -> dict[str, list]:
    """The values of each feature."""
    example = _example_class()()
    example.ParseFromString(data)
    return {
        key: list(getattr(feature, kind).value)
        for key, feature in example.features.feature.items()
        for kind in ("bytes_list", "float_list", "int64_list")
        if feature.HasField(kind)
    }
