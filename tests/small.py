"""A ResNet of four blocks in place of ResNet-50, for tests in which the network is not the point.

It has ResNet-50's stem, its blocks and its 2048 features, but 3 M parameters instead of 25 M: two
epochs of the tests' data take 2 s instead of 11.
"""

from types import SimpleNamespace

from torchvision.models.resnet import Bottleneck, ResNet, ResNet50_Weights

import train


def small_resnet(num_classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes, width_per_group=4)


REAL_NETWORK = train.NETWORK
SMALL_NETWORK = SimpleNamespace(
    build=small_resnet,
    weights=ResNet50_Weights.IMAGENET1K_V2,
    head="fc",
    gradcam_layer="layer4.0",
)


def use_small_network():
    """Let both scripts build the small network: train.NETWORK alone names it."""
    train.NETWORK = SMALL_NETWORK
