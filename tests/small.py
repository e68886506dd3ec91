"""A ResNet of four blocks in place of ResNet-50, for tests in which the network is not the point.

It has ResNet-50's stem, its blocks and its 2048 features, but 3 M parameters instead of 25 M: two
epochs of the tests' data take 2 s instead of 11. conftest.py puts it in place for runs in the
tests' own process; as a command, this file does so for a script that the tests start as a user does:

    python tests/small.py train.py --epochs 1
"""

import runpy
import sys
from pathlib import Path

import torchvision
from torchvision.models.resnet import Bottleneck, ResNet


def small_resnet(num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes, width_per_group=4)


def use_small_resnet():
    """Call it before the scripts are imported: they take resnet50 from torchvision.models."""
    torchvision.models.resnet50 = small_resnet


if __name__ == "__main__":
    use_small_resnet()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent.parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
