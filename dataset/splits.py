"""Tells the role of a split from its name, in the forms that public datasets use."""

import re
from collections.abc import Iterable, Sequence

TRAIN, VAL, TEST = "train", "val", "test"
# The words that name a split, by role, most common first.
WORDS = {
    TRAIN: ("train", "training", "trainval", "trn"),
    VAL: ("val", "validation", "valid", "dev", "validate", "eval", "evaluation"),
    TEST: ("test", "testing", "tst", "pred", "prediction"),
}
SPLIT_NAMES = ("train", "training", "val", "validation", "valid", "test", "testing")
ROLE_OF_WORD = {word: role for role, words in WORDS.items() for word in words}
# Words that add no meaning, as in train_images, Training Set, ILSVRC2012_img_val or seg_test.
FILLERS = set(
    "set sets split part data dataset folder fold image images img imgs picture pictures photo photos file files jpg jpeg png "
    "seg ilsvrc imagenet simple full small mini clean new original final cropped resized labeled labelled unlabeled "
    "unlabelled public private hidden input inputs gt ground truth".split()
)
TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")  # train2017, TrainImages, TEST_SIMPLE
JOINED = re.compile(rf"({'|'.join(ROLE_OF_WORD)})(sets?|split|data|images?|imgs?)")  # trainset
# train.X1, val.X, train_part2 and train-03 are parts of a split; train2017, with a year, is not.
PART = re.compile(r"(.+?)(?:[._ -]?(?:X|part|chunk)[._ -]?\d{0,4}|[._ -]?\d{1,3})", re.IGNORECASE)


def split_role(name: str) -> str | None:
    """The role of a split of this name: train, val or test; None if the name is not a split's."""
    found = _parse(name)
    return found[0] if found and all(token is None or _says_nothing(token) for token in found[1]) else None


def split_roles(names: Iterable[str]) -> dict[str, str]:
    """The roles of the names that are splits, among all names in one folder or table.

    Names that differ only in the word for the split also count, such as asl_train and asl_test; bullet_train alone does not.
    """
    names = list(names)
    roles = {name: role for name in names if (role := split_role(name))}
    by_frame: dict[tuple[str | None, ...], dict[str, str]] = {}
    for name in names:
        if found := _parse(name):
            by_frame.setdefault(found[1], {})[name] = found[0]
    for same in by_frame.values():
        if len(set(same.values())) > 1:
            roles |= same
    return roles


def whole_split(name: str) -> str:
    """The name of the split that `name` is a part of, such as train for train.X1; the name itself if it is not a part."""
    match = PART.fullmatch(name)
    return match[1] if match and split_role(name) and match[1].lower() in ROLE_OF_WORD else name


def training_split(names: Sequence[str]) -> str | None:
    """The training split by name; None if no name, or more than one, is a training split's."""
    return _one(names, TRAIN)


def statistics_split(names: Sequence[str]) -> str:
    """The split that the statistics were of before `build` decided what to train on: train, training, or else the first."""
    return next((name for name in ("train", "training") if name in names), names[0])


def evaluation_split(names: Sequence[str]) -> str | None:
    """The split to evaluate on by name: validation, or else test."""
    return _one(names, VAL, first=True) or _one(names, TEST, first=True)


def _one(names: Sequence[str], role: str, first: bool = False) -> str | None:
    plain = [name for word in WORDS[role] for name in names if name.lower() == word]
    usual = plain or [name for name, of in split_roles(names).items() if of == role]
    return usual[0] if len(usual) == 1 or (usual and (first or plain)) else None


def _parse(name: str) -> tuple[str, tuple[str | None, ...]] | None:
    """The role of a name, and its words in lower case, with None in place of the word that gives the role."""
    tokens: list[str | None] = []
    roles: list[str] = []
    for token in TOKEN.findall(name):
        token = token.lower()
        joined = JOINED.fullmatch(token)
        role = ROLE_OF_WORD.get(joined[1] if joined else token)
        roles += [role] if role else []
        tokens.append(None if role else token)
    if set(roles) == {TEST, VAL} and "dev" in name.lower():  # test-dev2017
        return TEST, tuple(tokens)
    if roles == [TRAIN, VAL] and "trainval" in re.sub("[^a-z]", "", name.lower()):  # train_val_list, for a test_list beside it
        return TRAIN, tuple(token for at, token in enumerate(tokens) if token is not None or tokens.index(None) == at)
    return (roles[0], tuple(tokens)) if len(set(roles)) == 1 else None


def _says_nothing(token: str) -> bool:
    return token in FILLERS or token.isdigit() or len(token) == 1
