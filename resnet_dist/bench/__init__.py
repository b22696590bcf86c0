"""Measurements of the step, the kernels and the scaling, side by side with the usual choice.

Run by `resnet-dist bench`, each in processes of its own: the command itself imports no torch.
"""
