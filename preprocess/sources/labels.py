"""Turns labels as files spell them, such as 3, 3.0, cat, -1 or nothing, into classes."""

import re
from collections.abc import Iterable

from imagefeed.dataset.errors import UserError

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,2})?")
FLOAT = re.compile(r"[+-]?[0-9]+\.0*")  # as pandas writes whole numbers of a column in which one is missing


def name_labels(values: Iterable[str], where: object) -> dict[str, str]:
    """Maps each value of a label column to a class name, or to "" if the class is unknown.

    An empty value, nan, or a negative number means unknown; a column may have only one negative number, such as -1. Whole numbers
    written as floats become integers. For other numbers, raises UserError, which names `where`.
    """
    names: dict[str, str] = {}
    for value in set(values):
        text = value.strip()
        names[value] = "" if text.lower() == "nan" else text
    known = {name for name in names.values() if name}
    only_numbers = all(NUMBER.fullmatch(name.lower()) for name in known)
    negative = set()
    for value, name in names.items():
        if FLOAT.fullmatch(name) or (only_numbers and name and not name.isdecimal()):
            if not float(name).is_integer():
                raise UserError(f"{where}: the label {name} is neither a whole number nor a name; give labels of classes")
            name = names[value] = str(int(float(name)))
        if re.fullmatch(r"-[0-9]+", name) and int(name) < 0:
            negative.add(name)
            names[value] = ""
    classes = set(names.values()) - {""}
    if len(negative) > 1 or (negative == {"-1"} and classes == {"1"}):
        found = ", ".join(sorted(negative | classes, key=lambda name: (len(name), name))[:4])
        raise UserError(f"{where}: labels are {found}, but a negative label means unknown; number the classes from 0")
    return names
