"""The model section, beside what the rubric's tests of the model ask of every hand-in."""

import torch
from course_unet import UNet as CourseUNet

from petseg_utils import UNet, load_weights, save_weights


def test_weights_are_loaded_into_a_net_with_other_names_which_gives_the_same(tmp_path):
    ours, theirs = UNet(2, 3).eval(), CourseUNet(2, 3).eval()
    save_weights(tmp_path / "weights.pt", ours)
    for net in (ours, theirs):
        load_weights(tmp_path / "weights.pt", net)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(ours(images), theirs(images))


def test_weights_have_the_names_of_the_kept_run():
    names = list(UNet(1, 2).state_dict())
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    blocks = ("downs.0", "downs.1", "bottleneck", "ups.0", "ups.1")
    assert parts == [f"{block}.{layer}" for block in blocks for layer in (0, 1, 3, 4)] + ["out"]
