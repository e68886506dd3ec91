"""A ResNet of six blocks in place of ResNet-50, for tests in which the network is not the point.

    python -m small train.py --epochs 1     # a script with the small network (torchrun starts this)

It has ResNet-50's stem, its blocks, its 2048 features and its last block, layer4.2, but 3 M
parameters instead of 25 M: two epochs of the tests' data take 2 s instead of 11. Importing this
module puts it where the scripts find it, in torchvision.models; they have to be imported later.
"""

import runpy
import sys

import torchvision.models
from torchvision.models.resnet import Bottleneck, ResNet

RESNET50 = torchvision.models.resnet50


def small_resnet(num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, [1, 1, 1, 3], num_classes, width_per_group=4)


torchvision.models.resnet50 = small_resnet

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
