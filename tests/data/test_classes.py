"""The rule by which classes of models, data, classifiers and references are the same."""

from pathlib import Path

import pytest

from afm_pipe.data.classes import IMAGENET, imagenet_names, require_same_classes
from afm_pipe.runtime.errors import UserError

PETS = ("cat", "dog", "owl")


def synsets() -> list[str]:
    """Return 1,000 sorted WordNet ids that agree with ImageNet's where those are known."""
    known, ids = sorted(IMAGENET.items()), []
    for (start, first), (end, _) in zip(known, [*known[1:], (1000, "")], strict=True):
        ids += [f"n{int(first[1:]) + step:08d}" for step in range(end - start)]
    return ids


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("airplane", "automobile"), "Found 'airplane' as class 0 of 2 in model, expected 'cat' of 3 as in data: use "),
        (("cat", "owl", "dog"), "'owl' as class 1 of 3 in model, the same names in another order, expected 'dog'"),
        (("cat", "dog"), "Found nothing as class 2 of 2 in model, expected 'owl' of 3"),
        (("cat", "dog", "owl", "yak"), "Found 'yak' as class 3 of 4 in model, expected nothing of 3"),
        (("0", "1", "2"), "imported.NAME.classes names those of imported weights"),
        (("Cat", "dog", "owl"), "Found 'Cat'"),
        ([["cat"], {}, None], "as class 0 of 3"),
        ("cat", "Found nothing as class 0 of 0"),
    ],
)
def test_other_names_or_another_order_are_refused(found: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        require_same_classes(found, "model", PETS, Path("data"))
    assert message in str(caught.value)


def test_names_that_look_equal_are_shown_by_what_differs() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # as Linux and as macOS name the same folder
    with pytest.raises(UserError) as caught:
        require_same_classes([decomposed, "tea"], "model", [composed, "tea"], "data")
    said = "Found 'cafe\\u0301' as class 0 of 2 in model, the same names in another Unicode form, expected 'caf\\xe9'"
    assert said in str(caught.value)


def test_folders_sorted_as_text_are_not_a_models_numbers() -> None:
    folders = sorted(map(str, range(12)))  # "0", "1", "10", "11", "2", ...
    with pytest.raises(UserError, match="'2' as class 2 of 12 in model, the same names .* expected '10'"):
        require_same_classes(list(map(str, range(12))), "model", folders, "data")


def test_equal_names_pass_without_a_word_and_missing_ones_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    require_same_classes(list(PETS), "model", PETS, "data")
    assert capsys.readouterr().out == ""
    require_same_classes(None, "model", PETS, "data", count=3)
    line = "Not checked: whether the classes of model, which holds no names, are those of data.\n"
    assert capsys.readouterr().out == line
    with pytest.raises(UserError, match="Found 10 classes in model, expected 3 as in data"):
        require_same_classes(None, "model", PETS, "data", count=10)


def test_names_of_imagenet_stand_for_its_sorted_folders_and_no_others() -> None:
    names, folders = imagenet_names(), synsets()
    require_same_classes(names, "model", folders, "data")
    require_same_classes(folders, "model", names, "data")
    swapped = [*folders[:388], folders[387], *folders[389:]]
    other = sorted({*folders[1:], "n00000001"})
    numbers = list(map(str, range(1000)))
    for found, expected in ((names, swapped), (names, other), (numbers, folders), (names[::-1], folders)):
        with pytest.raises(UserError, match="imported.NAME.classes"):
            require_same_classes(found, "model", expected, "data")
