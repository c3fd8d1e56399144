"""Labels in files stand for classes, whatever they are written as."""

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.labels import name_labels


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["0", "1", "-1", ""], ["0", "1", "", ""]),
        (["0.0", "1.0", "11.0", "nan", "NaN"], ["0", "1", "11", "", ""]),
        (["0.000000", "1.000e+00", "1e1"], ["0", "1", "10"]),
        (["2", "2.0", " 2 "], ["2", "2", "2"]),
        (["003", "3"], ["003", "3"]),
        (["-1.0", "0", "1"], ["", "0", "1"]),
        (["-100", "1", "2"], ["", "1", "2"]),
        (["-1", "-1.0"], ["", ""]),
        (["cat", "2.0", "-1"], ["cat", "2", ""]),
        (["1e5", "1f5"], ["1e5", "1f5"]),  # parts of hashes
        (["2.5", "cat"], ["2.5", "cat"]),
        (["Cat", "cat", "None"], ["Cat", "cat", "None"]),
    ],
)
def test_the_class_of_a_label(values, classes):
    found = name_labels(values, "x.csv")
    assert [found[value] for value in values] == classes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0", "0.5"], "x.csv: the label 0.5 is neither a whole number nor a name"),
        (["-1", "1"], "x.csv: labels are 1, -1, but a negative label means unknown; number the classes from 0"),
        (["-2", "-1", "0", "1", "2"], "labels are 0, 1, 2, -1, but a negative label means unknown"),
    ],
)
def test_numbers_that_are_no_labels_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        name_labels(values, "x.csv")
