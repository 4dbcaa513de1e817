"""The scores section: the confusion matrix and what is derived from it, against scikit-learn."""

import json

import pytest
import torch
from sklearn import metrics
from torch import Tensor

from petseg_utils import CLASSES, IGNORE, confusion_matrix, scores


@pytest.fixture(params=[False, True], ids=["all count", "some are ignored"])
def ignored(request) -> bool:
    return request.param


@pytest.fixture(params=[[0, 1, 2], [0, 2], [1]], ids="classes {}".format)
def labels(request, ignored) -> tuple[Tensor, Tensor]:
    """Return predicted and true labels (4, 9, 11) uint8 of these classes, half of them alike."""
    random = torch.Generator().manual_seed(0)
    choice = torch.tensor(request.param, dtype=torch.uint8)
    truth, other = choice[torch.randint(len(choice), (2, 4, 9, 11), generator=random)]
    predicted = torch.where(torch.rand(truth.shape, generator=random) < 0.5, truth, other)
    if ignored:
        truth = truth.masked_fill(torch.rand(truth.shape, generator=random) < 0.3, IGNORE)
    return predicted, truth


def known(labels: tuple[Tensor, Tensor]) -> tuple[list[int], list[int]]:
    """Return the (true, predicted) labels of the pixels that count, in scikit-learn's order."""
    predicted, truth = labels
    return truth[truth != IGNORE].tolist(), predicted[truth != IGNORE].tolist()


def test_confusion_matrix_is_scikit_learns(labels):
    matrix = confusion_matrix(*labels)
    assert (matrix.dtype, matrix.shape) == (torch.int64, (3, 3))
    expected = metrics.confusion_matrix(*known(labels), labels=range(3)).tolist()
    found = matrix.tolist()
    assert found == expected, f"expected the counts {expected}, rows the truth, found {found}"


def expect(what: str, expected: float | list[float], found: float | list[float]) -> None:
    assert found == pytest.approx(expected), f"expected {what} {expected}, found {found}"


def test_scores_are_scikit_learns(labels):
    truth, predicted = known(labels)
    ours = scores(confusion_matrix(*labels))
    expect("the pixel accuracy", metrics.accuracy_score(truth, predicted), ours["pixel_accuracy"])
    there = sorted({*truth, *predicted})
    iou = metrics.jaccard_score(truth, predicted, labels=there, average=None)
    dice = metrics.f1_score(truth, predicted, labels=there, average=None)
    for name, theirs in (("iou", iou), ("dice", dice)):
        assert list(ours[name]) == list(CLASSES)
        expect(f"the {name}", theirs.tolist(), [ours[name][CLASSES[label]] for label in there])
        absent = {ours[name][CLASSES[label]] for label in {0, 1, 2}.difference(there)}
        message = f"expected no {name} (None) for a class that is not there, found {absent}"
        assert absent <= {None}, message
    expect("the mean IoU", iou.mean(), ours["mean_iou"])


def test_class_that_is_only_predicted_scores_zero():
    zero, two = torch.zeros(4, 4, dtype=torch.uint8), torch.full((4, 4), 2, dtype=torch.uint8)
    result = scores(confusion_matrix(torch.cat((zero, two)), torch.cat((zero, zero))))
    assert result["iou"] == result["iou"] | {"pet": 0.5, "background": None, "border": 0.0}
    assert result["mean_iou"] == 0.25


def test_matrices_of_batches_add_up_to_that_of_the_whole(labels):
    predicted, truth = labels
    whole = confusion_matrix(predicted, truth)
    parts = zip(predicted.split(3), truth.split(3), strict=True)
    assert torch.equal(sum(confusion_matrix(*part) for part in parts), whole)


def test_scores_go_through_json_without_nan(labels):
    result = scores(confusion_matrix(*labels))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
