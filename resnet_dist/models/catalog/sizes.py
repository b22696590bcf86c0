"""How large and how costly an architecture is, without building it. Imports no torch.

Estimates before a job is queued read it; a test compares it with the networks themselves.
"""

# name -> millions of parameters, giga multiply-adds of one image's forward pass, both at the
# published input size, with 1,000 classes (of 32 pixels: 10).
SIZES: dict[str, tuple[float, float]] = {
    "plain18": (11.5, 1.79), "resnet18": (11.7, 1.81), "plain34": (21.6, 3.64),
    "resnet34": (21.8, 3.66), "resnet50": (25.6, 4.09), "resnet50_v1": (25.6, 3.86),
    "resnet50d": (25.6, 4.33), "resnet101": (44.5, 7.8), "resnet101_v1": (44.5, 7.57),
    "resnet101d": (44.6, 8.04), "resnet152": (60.2, 11.5), "resnet152_v1": (60.2, 11.3),
    "resnet152d": (60.2, 11.8), "resnet200": (64.7, 15), "resnet200_v1": (64.7, 14.8),
    "resnet200d": (64.7, 15.2), "seresnet50": (28.1, 4.09), "resnet50_blur": (25.6, 4.11),
    "seresnet101": (49.3, 7.81), "resnet101_blur": (44.5, 7.82), "resnext50_32x4d": (25, 4.23),
    "resnext101_32x4d": (44.2, 7.97), "resnext101_32x8d": (88.8, 16.4),
    "resnext101_64x4d": (83.5, 15.5), "wide_resnet50_2": (68.9, 11.4),
    "wide_resnet101_2": (127, 22.8), "plain20": (0.27, 0.0406), "resnet20": (0.27, 0.0406),
    "plain32": (0.464, 0.0689), "resnet32": (0.464, 0.0689), "plain44": (0.659, 0.0972),
    "resnet44": (0.659, 0.0972), "plain56": (0.853, 0.125), "resnet56": (0.853, 0.125),
    "plain110": (1.73, 0.253), "resnet110": (1.73, 0.253), "plain1202": (19.4, 2.83),
    "resnet1202": (19.4, 2.83), "resnet164": (1.7, 0.245), "resnet1001": (10.3, 1.49),
    "preresnet110": (1.73, 0.253), "preresnet164": (1.7, 0.245), "preresnet1001": (10.3, 1.49),
    "preresnet152": (60.2, 11.3), "preresnet200": (64.7, 14.8), "vgg16": (138, 15.5),
    "vgg16_bn": (138, 15.5), "vgg19": (144, 19.6), "vgg19_bn": (144, 19.6),
    "inception_v4": (42.7, 12.3), "inception_resnet_v2": (55.8, 13.2),
}
