"""A recipe and its net, so small that a test can train it in no time.

It is no part of conftest.py, which the grader loads for hand-ins that may have no net yet.
"""

import torch

from petseg_utils import Recipe, UNet

TINY = Recipe(EPOCHS=3, BATCH_SIZE=3, BASE_CHANNELS=2, DEPTH=2, IMAGE_SIZE=16, PRECISION="float32")


def new_net(recipe: Recipe = TINY, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(recipe.BASE_CHANNELS, recipe.DEPTH, norms=recipe.NORMS, skips=recipe.SKIPS)
