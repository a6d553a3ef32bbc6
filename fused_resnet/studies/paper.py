"""The paper's published numbers, each with its table or section.

Source: He et al., *Deep Residual Learning for Image Recognition*, arXiv 1512.03385.
"""

from __future__ import annotations

# Table 6: test error on CIFAR-10 in per cent, by depth; the 110-layer network's is the best of five runs.
CIFAR10_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43, 1202: 7.93}
# Table 1: multiply-adds in 10^9 at 224x224, by depth. 18 and 34 layers are counted without projections (option A).
IMAGENET_MULTIPLY_ADDS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}
# Table 3: top-1 and top-5 error on ImageNet's validation images in per cent, 10 crops.
IMAGENET_SHORTCUTS = {
    "plain-34": (28.54, 10.02),
    "ResNet-34 A": (25.03, 7.76),
    "ResNet-34 B": (24.52, 7.46),
    "ResNet-34 C": (24.19, 7.40),
    "ResNet-50": (22.85, 6.71),
    "ResNet-101": (21.75, 6.05),
    "ResNet-152": (21.43, 5.71),
}
